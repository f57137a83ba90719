# bench_compare.py: `pyvmm bench compare A B`: what is in both files, in 80 columns; with --json a line a result.
"""`show()`."""

from __future__ import annotations

import json
from collections import Counter
from itertools import groupby

from rich.table import Table
from rich.text import Text

from pyvmm.bench.compare import BETTER_NOW, FEW, LEAST, MOVED, SAME, WORSE_NOW, Row, compare
from pyvmm.bench.results import Run, joined, read
from pyvmm.bench.targets import figure
from pyvmm.cli.output import Output
from pyvmm.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_STYLES = {BETTER_NOW: "green", WORSE_NOW: "red", MOVED: "yellow", FEW: "dim", SAME: ""}


def show(first: str, second: str, as_json: bool) -> None:
    """Raises BadInput for files that hold no results, or none that can be compared."""
    both = {name: read(path) for name, path in (("A", first), ("B", second))}
    sizes = {run.quick for runs in both.values() for run in runs}
    if len(sizes) != 1:
        raise BadInput("compare: some of these runs are --quick and others are not: they do not measure the same")
    rows, alone = compare(joined(both["A"]), joined(both["B"]))
    if not rows:
        raise BadInput(f"compare: {first} and {second} have no result in common")
    if as_json:
        for row in rows:
            print(json.dumps(row.as_json()))
        return
    output = Output()
    for name, runs in both.items():
        for run in runs:
            output.print(Text(f"{name}: {_of(run)}"))
    for benchmark, members in groupby(rows, key=lambda row: row.benchmark):
        output.print(_table(benchmark, members))
    output.print(Text(_sum(rows, alone)))


def _of(run: Run) -> str:
    facts = run.head["host"]
    commit = run.head.get("commit") or "no commit"
    return (
        f"{run.head['date']}, pyvmm {run.head['version']}, {commit}, kernel {facts.get('kernel', '?')}, "
        f"{facts.get('cores', '?')} cores, load {run.head['load']}"
    )


def _table(benchmark: str, rows: Iterable[Row]) -> Table:
    table = Table("", "A", "B", "B / A", "", title=Text(benchmark), title_justify="left", title_style="bold")
    for column in table.columns[1:4]:
        column.justify = "right"
    for group, members in groupby(rows, key=lambda row: row.group):
        if group:
            table.add_row(Text(group, "italic"))
        for row in members:
            ratio = "" if row.ratio != row.ratio else f"{row.ratio:.2f}"
            said = Text(row.said, _STYLES[row.said])
            name = Text(f"{'  ' if group else ''}{row.name}")
            table.add_row(name, Text(figure(row.a, row.unit)), Text(figure(row.b, row.unit)), ratio, said)
    return table


def _sum(rows: Iterable[Row], alone: int) -> str:
    counts = Counter(row.said for row in rows)
    texts = [f"{counts[word]} {word}" for word in (BETTER_NOW, WORSE_NOW, MOVED)]
    texts.append(f"{counts[SAME]} within the noise")
    texts += [f"{counts[FEW]} with fewer than {LEAST} values, which say nothing"] if counts[FEW] else []
    texts += [f"{alone} in one of the two alone"] if alone else []
    return ", ".join(texts) + "."
