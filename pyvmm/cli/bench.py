# bench.py: `pyvmm bench NAME`: runs a benchmark and prints its table, or with --json its data.
"""The benchmarks by name."""

from __future__ import annotations

import json
import sys
from importlib import import_module

from rich.table import Table

from pyvmm.bench import Result
from pyvmm.cli.output import Output
from pyvmm.cli.parse import Arguments
from pyvmm.errors import BadInput

# name -> what it measures; the module of that name in pyvmm.bench has measure()
BENCHMARKS = {
    "start": "time to a guest's first byte: process, in-process, beside QEMU",
    "exits": "port writes a second: bare KVM_RUN loop, answered in C, by a Python device",
    "storage": "a snapshot file written and read with each codec: plain write() and read() of the same bytes",
}


def run(args: Arguments) -> int:
    """Runs one benchmark, or lists them."""
    name = args.name
    if name is None:
        for each, text in BENCHMARKS.items():
            print(f"{each:8} {text}")
        return 0
    if name not in BENCHMARKS:
        raise BadInput(f"no benchmark {name!r}: choose one of {', '.join(BENCHMARKS)}")
    results: list[Result] = import_module(f"pyvmm.bench.{name}").measure()
    if args.json:
        rows = [{"name": r.name, "unit": r.unit, "median": r.median, "values": list(r.values)} for r in results]
        json.dump({"benchmark": name, "results": rows}, sys.stdout)
        print()
        return 0
    table = Table("", "median", "min", "max", f"/ {results[0].name}", title=BENCHMARKS[name], title_justify="left")
    for r in results:
        figures = (f"{value:,.1f} {r.unit}" for value in (r.median, min(r.values), max(r.values)))
        table.add_row(r.name, *figures, f"{r.median / results[0].median:.2f}")
    Output().print(table)
    return 0
