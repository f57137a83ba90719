# bench.py: `pyvmm bench NAME`: runs a benchmark and prints its tables, or with --json its data. 80 columns.
"""The benchmarks by name."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from statistics import median

from rich.table import Table
from rich.text import Text

from pyvmm.bench import MANY, Result, grouped, scaled
from pyvmm.cli.output import Output
from pyvmm.cli.parse import Arguments
from pyvmm.errors import BadInput

# name -> what it measures; the module of that name in pyvmm.bench has measure()
BENCHMARKS = {
    "start": "time to a guest's first byte: process, in-process, beside QEMU",
    "exits": "port writes a second: bare KVM_RUN loop, answered in C, by a Python device",
    "traces": "write traces: the guest's speed, stalls at the installation, bytes reported",
    "faults": "pages taken out of a guest and brought back, beside a bare userfaultfd loop",
    "idle": "the memory engine while it does nothing; blocks split, merged and broken",
    "restore": "a restored guest's first instruction, and how soon it touches its RAM",
    "blocks": "lazy restore from storage blocks of each size and codec",
    "save": "a VM saved: speed with each codec, beside write(); the guest's stall",
    "streams": "pages from one process to another: page runs, beside send() and recv()",
    "migrate": "a guest moves to another process: speed, downtime, its work, large pages",
    "populate": "a guest's first pass over memory that was populated before, or not",
    "storage": "a snapshot file written and read with each codec: plain write() and read() of the same bytes",
    "reclaim": "a guest in a half of its memory: speed and refaults, by policy",
    "activity": "active blocks found by sampling: precision, recall, what it costs the guest",
    "doublepaging": "a guest swaps what the host has swapped: bytes and reads, by mode of its disk",
    "overcommit": "three unlike guests in half of their memory: refaults, slowdown, by policy",
    "scale": "100 tiny guests at once: how soon, and memory a VMM process and a VM takes",
    "swap": "pages to the swap file and back, beside pwrite() and preadv() of the same bytes",
    "soak": "random operations on memory that its guest checks: what is wrong, and how fast",
    "sharing": "equal pages: estimated and freed, and how many large pages that costs",
}
# Those that have measure(quick=True): little memory and few rounds.
QUICK = (
    "traces",
    "faults",
    "idle",
    "restore",
    "blocks",
    "save",
    "streams",
    "migrate",
    "populate",
    "reclaim",
    "activity",
    "doublepaging",
    "overcommit",
    "scale",
    "soak",
    "swap",
    "sharing",
)


def run(args: Arguments) -> int:
    """Runs one benchmark, or lists them."""
    name = args.name
    if name is None:
        for each, text in BENCHMARKS.items():
            print(f"{each:8} {text}")
        return 0
    if name not in BENCHMARKS:
        raise BadInput(f"no benchmark {name!r}: choose one of {', '.join(BENCHMARKS)}")
    if args.quick and name not in QUICK:
        raise BadInput(f"benchmark {name} is quick anyway: --quick is for {', '.join(QUICK)}")
    measure = import_module(f"pyvmm.bench.{name}").measure
    results: list[Result] = measure(quick=True) if args.quick else measure()
    if args.json:
        json.dump({"benchmark": name, "results": [_as_json(result) for result in results]}, sys.stdout)
        print()
        return 0
    show(name, results)
    return 0


def show(name: str, results: list[Result]) -> None:
    """Prints a benchmark's tables."""
    output = Output()
    output.print(Text(BENCHMARKS[name], "bold"))
    for group, rows in grouped(results).items():
        output.print(_table(group, rows))


def _as_json(result: Result) -> dict[str, object]:
    named = {"group": result.group} if result.group else {}
    return named | {
        "name": result.name,
        "unit": result.unit,
        "median": result.median if result.values else None,
        "values": list(result.values),
    }


def _table(group: str, results: list[Result]) -> Table:
    many = any(len(result.values) >= MANY for result in results)
    results = sorted(results, key=lambda result: not result.values)  # what is not here is compared with nothing
    heads = ["median", "min", "p90" if many else "max", *(["max"] if many else []), f"/ {results[0].name}"]
    table = Table("", *heads, title=group or None, title_justify="left", title_style="italic")
    for column in table.columns[1:]:
        column.justify = "right"
    for result in results:
        if not result.values:
            table.add_row(result.name, "not here")
            continue
        shown = scaled(result)
        quantiles = [shown.median, shown.quantile(0), *([shown.quantile(0.9)] if many else []), shown.quantile(1)]
        figures = [f"{quantiles[0]:,.{_digits(quantiles[0])}f} {shown.unit}"]
        figures += [f"{value:,.{_digits(quantiles[0])}f}" for value in quantiles[1:]]
        table.add_row(result.name, *figures, _ratio(result, results[0]))
    return table


def _digits(value: float) -> int:
    return 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1


def _ratio(result: Result, base: Result) -> str:
    """Over the first of the group, the median of the rounds and their range; nothing where that is another unit."""
    ratios = sorted(result.ratios(base))
    if result.unit != base.unit or not ratios:
        return ""
    middle = f"{median(ratios):.2f}"
    return middle if len(ratios) == 1 or result is base else f"{middle} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
