# bench_tables.py: results as tables for people, in 80 columns: each side with its range, over the first; and targets.
"""`show()`."""

from __future__ import annotations

from statistics import median

from rich.table import Table
from rich.text import Text

from pyvmm.bench import MANY, Result, grouped, scaled
from pyvmm.bench.catalogue import BENCHMARKS
from pyvmm.bench.targets import MET, MISSED, Verdict, digits, verdicts
from pyvmm.cli.output import Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_STYLES = {MET: "green", MISSED: "yellow"}


def show(name: str, results: Sequence[Result], quick: bool = False) -> None:
    """Prints a benchmark's tables, and below each of them what its targets say."""
    output, row = Output(), BENCHMARKS[name]
    output.print(Text(f"{row.text}{f' ({row.numbers})' if row.numbers else ''}", "bold"))
    judged = verdicts(name, results, quick)
    for group, rows in grouped(results).items():
        output.print(table(group, rows))
        for verdict in judged:
            if verdict.group == group:
                output.print(_judged(verdict))


def _judged(verdict: Verdict) -> Text:
    line = Text(f"  {verdict.target.measure}: {verdict.what}, wanted {verdict.bound}: {verdict.figure()}, ")
    return line.append(verdict.said, _STYLES.get(verdict.said, "dim"))


def table(group: str, results: Sequence[Result]) -> Table:
    """One group's."""
    many = any(len(result.values) >= MANY for result in results)
    results = sorted(results, key=lambda result: not result.values)  # what is not here is compared with nothing
    heads = ["median", "min", "p90" if many else "max", *(["max"] if many else []), f"/ {results[0].name}"]
    shown = Table("", *heads, title=group or None, title_justify="left", title_style="italic")
    for column in shown.columns[1:]:
        column.justify = "right"
    for result in results:
        figures = cells(result, many)
        shown.add_row(result.name, *figures, ratio(result, results[0]) if result.values else "")
    return shown


def cells(result: Result, many: bool) -> list[str]:
    """Median with unit, least, with many values the 90th percentile, and greatest."""
    if not result.values:
        return ["not here", *[""] * (2 + many)]
    shown = scaled(result)
    quantiles = [shown.median, shown.quantile(0), *([shown.quantile(0.9)] if many else []), shown.quantile(1)]
    figures = [f"{quantiles[0]:,.{digits(quantiles[0])}f} {shown.unit}"]
    return figures + [f"{value:,.{digits(quantiles[0])}f}" for value in quantiles[1:]]


def ratio(result: Result, base: Result) -> str:
    """Over the first of the group, the median of the rounds and their range; nothing where that is another unit."""
    ratios = sorted(result.ratios(base))
    if result.unit != base.unit or not ratios:
        return ""
    middle = f"{median(ratios):.2f}"
    return middle if len(ratios) == 1 or result is base else f"{middle} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
