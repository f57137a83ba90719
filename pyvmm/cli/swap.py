# swap.py: `pyvmm swap PATH`: has a guest that runs in another process live in less memory, and shows how that goes.
"""The command. Sizes in bytes, pages of 4 KiB."""

from __future__ import annotations

import json
import time

from rich.live import Live
from rich.table import Table

from pyvmm.cli.output import Output
from pyvmm.control.client import Client
from pyvmm.errors import BadInput, ControlError
from pyvmm.layout import PAGE_SIZE, format_size, parse_size
from pyvmm.memory.reclaim.policy import absolute

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.cli.parse import Arguments

_INTERVAL = 1.0
"""Seconds between two looks."""


def run(args: Arguments) -> int:
    """The command: 0; 1 where the limit is not kept; 2 for bad input, and where nobody listens."""
    if args.live and args.json:
        raise BadInput("--live is for people, --json for programs: give one of them")
    asked = _asked(args)
    with Client(args.path) as client:
        found = client.ask("swap", **asked)
        if args.json:
            print(json.dumps(found))
        else:
            try:
                _show(client, found, args.live)
            except (KeyError, TypeError, AttributeError, ValueError):
                raise ControlError(f"{args.path} is of another version: use --json") from None
    kept = args.target is None or found.get("limit") is None or found.get("resident", 0) <= found["limit"]
    return 0 if kept else 1


def _asked(args: Arguments) -> dict[str, object]:
    if args.target == "none":
        return {"off": True, "policy": args.policy}
    policy = None if args.policy is None else absolute(args.policy)
    return {"target": None if args.target is None else parse_size(args.target), "policy": policy}


def _show(client: Client, found: dict[str, Any], live: bool) -> None:
    console = Output()
    if not live:
        console.print(_table(found, {}, 0.0))
        return
    at = time.monotonic()
    try:
        with Live(_table(found, {}, 0.0), console=console, auto_refresh=False) as shown:
            while True:
                time.sleep(_INTERVAL)
                before, found, then, at = found, client.ask("swap"), at, time.monotonic()
                shown.update(_table(found, before, at - then), refresh=True)
    except KeyboardInterrupt:
        pass


def _table(found: dict[str, Any], before: dict[str, Any], seconds: float) -> Table:
    """What is so now; with what was so before, rates too."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(justify="right", style="green")
    limit = found["limit"]
    table.add_row("limit", "none" if limit is None else format_size(limit), f"of {format_size(found['memory'])}")
    swap = found["swap"]
    if swap is None:
        return table
    table.add_row("resident", f"{found['resident'] / (1 << 20):,.1f} MiB", f"policy {found['policy']}")
    table.add_row("of that, aside", f"{found['aside'] / (1 << 20):,.1f} MiB", "")

    def row(name: str, field: str, of: dict[str, Any], earlier: dict[str, Any]) -> None:
        rate = f"{(of[field] - earlier[field]) / seconds:,.0f}/s" if earlier and seconds else ""
        table.add_row(name, f"{of[field]:,} pages", rate)

    old = before.get("swap") or {}
    row("taken out", "taken", found, before if old else {})
    row("  back before written", "spared", found, before if old else {})
    row("out to swap", "out", swap, old)
    row("  zeros, stored nowhere", "zeros", swap, old)
    row("  writes saved", "saved", swap, old)
    row("back from swap", "came", swap, old)
    row("  read ahead", "ahead", swap, old)
    row("  refaults", "refaults", swap, old)
    full = f"{100 * (1 - swap['free'] / swap['slots']):.0f}% of the file"
    table.add_row("in the file", f"{swap['live'] * PAGE_SIZE / (1 << 20):,.1f} MiB", full)
    if found["waits"]:
        table.add_row("faults that waited", f"{found['waits']:,}", f"longest {found['longest'] * 1e3:,.1f} ms")
    if found["trouble"]:
        table.caption = found["trouble"]
        table.caption_style = "red"
    return table
