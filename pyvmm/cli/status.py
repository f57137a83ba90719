# status.py: `pyvmm status PATH`: how a guest is that runs in another process.
"""The command."""

from __future__ import annotations

import json

from rich.text import Text

from pyvmm.cli.moving import words
from pyvmm.cli.output import Output
from pyvmm.cli.picture import PagesTable, Stage
from pyvmm.control.client import Client
from pyvmm.errors import ControlError
from pyvmm.layout import format_size
from pyvmm.memory.counts import PageCounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.cli.parse import Arguments

_COLOURS = {"running": "green", "paused": "yellow", "migrating": "cyan"}


def run(args: Arguments) -> int:
    """The command: 0; 2 where nobody listens."""
    with Client(args.path) as client:
        found = client.ask("status")
    if args.json:
        print(json.dumps(found))
        return 0
    try:
        show(found)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ControlError(
            f"{args.path}: the status is of another version ({found.get('version')}): use --json"
        ) from None
    return 0


def show(found: dict[str, Any]) -> None:
    """For people."""
    console = Output()
    state = found["state"]
    cpus = "1 vCPU" if found["cpus"] == 1 else f"{found['cpus']} vCPUs"
    rest = f", process {found['pid']}, {format_size(found['memory'])}, {cpus}, pyvmm {found['version']}"
    guest = (found["progress"] or {}).get("guest") or "guest"
    console.print(Text.assemble((guest, "bold"), ": ", (state, _COLOURS.get(state, "")), rest), soft_wrap=True)
    if found["progress"] is not None:
        console.print(Text(_work(found["progress"])))
    if found["migration"] is not None:
        console.print(Text(_migration(found["migration"])), soft_wrap=True)
    if found["pages"] is not None:
        pages = found["pages"]
        counts = PageCounts(pages["total"], pages["large"], pages["small"], pages["homes"], pages["armed"])
        console.print(PagesTable([Stage("pages", counts, found["mappings"], ())]))


def _work(progress: dict[str, Any]) -> str:
    gap = progress["longest_gap"]
    passes = "1 pass" if progress["passes"] == 1 else f"{progress['passes']:,} passes"
    text = f"work: {progress['count']:,} in {passes}, {progress['status']}"
    return text if gap is None else f"{text}; longest time without any: {gap * 1e3:,.1f} ms"


def _migration(migration: dict[str, Any]) -> str:
    going = "goes on" if migration["going"] else "ended"
    where = f" to {migration['to']}" if migration["to"] else " from elsewhere"
    last = migration["last"]
    if last is None:
        return f"migration{where}: has just begun"
    text = (
        words(last) or f"round {last['round']} is there: {last['pages']:,} pages, {last['dirty']:,} written meanwhile"
    )
    return f"migration{where}: {going}: {text}"
