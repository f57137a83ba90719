# dirty.py: `pyvmm dirty`: what a guest writes over time, and what tracing it costs, by each tracker. 80 columns.
"""Measures by pyvmm.bench.dirty, shows curves and a table, or with --json the data."""

from __future__ import annotations

import json
from itertools import pairwise

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyvmm.bench.dirty import Measured, Plan, measure
from pyvmm.cli.output import Output
from pyvmm.cli.parse import Arguments
from pyvmm.errors import BadInput, HostError
from pyvmm.layout import PAGE_SIZE, format_size, parse_size
from pyvmm.machine.tracing import why_not
from pyvmm.memory.trace import TRACKERS, Tracker, tracker

ALL = "all"
_TOUCH = "pattern=zipf"
"""What `touch` does where the command line does not say: few pages often, many seldom."""
_GAPS = "gaps=1"
_ROWS = 5
_LABEL = 9
_STEPS = " ▁▂▃▄▅▆▇█"
_ASCII_STEPS = " .:#"


def run(args: Arguments) -> int:
    """The command: returns 0. Raises BadInput for bad options, HostError where no tracker asked for is there."""
    plan = _plan(args)
    rows, missing = _trackers(args.tracker)
    errors = Console(stderr=True)
    found = []
    for row in rows:
        with errors.status(f"{row.name}: {plan.guest} runs untraced, traced, untraced"):
            found.append(measure(row, plan))
        if not args.json:
            if len(found) == 1:
                console = Output()
                console.print(Text(_title(plan), "bold"))
            _show(console, row, found[-1])
    if args.json:
        print(json.dumps(_as_json(plan, found, missing), indent=2))
        return 0
    if len(found) > 1:
        console.print()
        console.print(_comparison(found))
    for name, reason in missing.items():
        console.print(Text(f"{name} is not here: {reason}", "yellow"))
    return 0


def _plan(args: Arguments) -> Plan:
    if not 0.1 <= args.seconds <= 3600:
        raise BadInput(f"--seconds {args.seconds:g}: give 0.1 to 3600")
    if not 1 <= args.interval <= args.seconds * 1000:
        raise BadInput(f"--interval {args.interval}: give 1 to {args.seconds * 1000:g} ms, no more than --seconds")
    append = args.append
    if args.guest == "touch":
        append = _TOUCH if append is None else append
        if not any(word.startswith("gaps=") for word in append.split()):
            append = f"{append} {_GAPS}".lstrip()
    memory = parse_size(args.mem)
    return Plan(args.guest, append or "", memory, args.cpus, args.pages, args.seconds, args.interval / 1e3, args.pause)


def _trackers(name: str) -> tuple[list[Tracker], dict[str, str]]:
    """Those that can be measured, and why others cannot."""
    if name != ALL:
        row = tracker(name)
        reason = why_not(name)
        if reason:
            raise HostError(f"no tracker {name} here: {reason}")
        return [row], {}
    missing = {name: reason for name in TRACKERS if (reason := why_not(name))}
    rows = [row for name, row in TRACKERS.items() if name not in missing]
    if not rows:
        raise HostError(f"no tracker works here: {next(iter(missing.values()))}")
    return rows, missing


def _as_json(plan: Plan, found: list[Measured], missing: dict[str, str]) -> dict[str, object]:
    return {
        "guest": plan.guest,
        "append": plan.append,
        "memory_bytes": plan.memory,
        "cpus": plan.cpus,
        "pages": plan.pages,
        "seconds": plan.seconds,
        "interval_seconds": plan.interval_seconds,
        "paused": plan.paused,
        "trackers": [each.as_json() for each in found],
        "missing": missing,
    }


# ---- for people ----


def _number(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f}{unit}"
    return f"{value:.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _title(plan: Plan) -> str:
    cpus = f"{plan.cpus} vCPU{'s' if plan.cpus > 1 else ''}"
    guest = f"{plan.guest} {plan.append}".rstrip()
    looks = f"a look each {plan.interval_seconds * 1e3:g} ms for {plan.seconds:g} s"
    return f"{guest}; {format_size(plan.memory)}, {cpus}; {looks}"


def _show(console: Console, row: Tracker, found: Measured) -> None:
    console.print()
    console.print(Text.assemble((row.name, "bold cyan"), f"  {row.about}"))
    for line in curve(found, console.width, console.encoding.startswith("utf")):
        console.print(line)
    lines: dict[str, Text | str] = {"work": _work(found), "install": _install(found), "written": _written(found)}
    if found.ring_full_exits:
        lines["ring"] = f"full {found.ring_full_exits:,} times: emptied by its vCPU"
    if found.mappings_before.get("pages_2m"):
        seen = [found.mappings_before, found.mappings_traced, found.mappings_after]
        lines["2 MiB"] = f"mappings before, during, after: {', '.join(str(each['pages_2m']) for each in seen if each)}"
    for name, text in lines.items():
        console.print(Text.assemble((f"{name:>{_LABEL}} ", "bold"), text))


def _work(found: Measured) -> Text:
    style = "green" if found.speed > 0.8 else "yellow" if found.speed > 0.4 else "red"
    after = "" if found.work_per_second_after is None else f", {_number(found.work_per_second_after)}/s after"
    return Text.assemble(
        (f"{found.speed:.0%} of untraced", style),
        f": {_number(found.work_per_second_before)}/s before, {_number(found.work_per_second_traced)}/s traced{after}",
    )


def _install(found: Measured) -> str:
    if found.longest_stall_seconds is None:
        return f"{_time(found.install_seconds)}; vCPU stalls are measured with the guest touch"
    stall, usual = _time(found.longest_stall_seconds), _time(found.longest_gap_untraced_seconds)
    return f"{_time(found.install_seconds)}; longest vCPU stall {stall} (untraced: {usual})"


def _written(found: Measured) -> str:
    size = found.different_pages * PAGE_SIZE / (1 << 20)
    return (
        f"{found.different_pages:,} pages ({size:.1f} MiB), reported {found.pages:,} times; "
        f"{len(found.samples)} looks of {_time(found.collect_seconds)}"
    )


def curve(found: Measured, width: int, blocks: bool = True) -> list[Text]:
    """The dirty page rate over time as lines of at most `width` columns; blocks: may they be other than ASCII?"""
    steps = _STEPS if blocks else _ASCII_STEPS
    bar, corner, floor = ("│", "└", "─") if blocks else ("|", "+", "-")
    rates = _columns([sample.pages_per_second for sample in found.samples], max(width - _LABEL - 3, 1))
    top = max(rates, default=0.0)
    lines = []
    for row in reversed(range(_ROWS)):
        label = f"{_number(top)}/s" if row == _ROWS - 1 else ""
        cells = "".join(_cell(rate / top * _ROWS - row if top else 0.0, steps) for rate in rates)
        style = ("red", "yellow", "green")[min((_ROWS - 1 - row) * 3 // _ROWS, 2)]
        lines.append(Text.assemble((f"{label:>{_LABEL}} {bar}", "dim"), (cells, style)))
    lines.append(Text(f"{'pages 0':>{_LABEL}} {corner}{floor * len(rates)}", "dim"))
    end = f"{found.samples[-1].at_seconds:.1f} s" if found.samples else "0 s"
    ruler = f"0 s{end:>{len(rates) - 3}}" if len(rates) > len(end) + 3 else end
    lines.append(Text(f"{'':{_LABEL}}  {ruler}", "dim"))
    return lines


def _cell(height: float, steps: str) -> str:
    """One column's character in a row; height: 0 empty to 1 full."""
    return steps[max(0, min(len(steps) - 1, round(height * (len(steps) - 1))))]


def _columns(values: list[float], width: int) -> list[float]:
    """The values in at most `width` columns, evenly: as many, or a mean of neighbours each; few are made broader."""
    if len(values) <= width:
        broad = width // len(values) if values else 1
        return [value for value in values for _ in range(broad)]
    edges = [i * len(values) // width for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _comparison(found: list[Measured]) -> Table:
    table = Table("tracker", "speed", "stall", "install", "look", "pages/s", "different", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in found:
        table.add_row(
            each.tracker,
            f"{each.speed:.0%}",
            _time(each.longest_stall_seconds),
            _time(each.install_seconds),
            _time(each.collect_seconds),
            _number(each.pages_per_second),
            f"{each.different_pages:,}",
        )
    return table
