# balloon.py: `pyvmm balloon PATH 64M`: has a guest that runs in another process give up memory, and shows what it has.
"""The command. Sizes in bytes, times in seconds."""

from __future__ import annotations

import json
import time

from rich.table import Table

from pyvmm.cli.output import Output
from pyvmm.cli.run import check_seconds
from pyvmm.control.client import Client
from pyvmm.errors import ControlError
from pyvmm.layout import MIB, format_size, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.cli.parse import Arguments

_INTERVAL = 0.05


def run(args: Arguments) -> int:
    """The command: 0; 1 where the guest has not given up as much as it should; 2 for bad input, and where nobody
    listens."""
    check_seconds("--wait", args.wait)
    with Client(args.path) as client:
        found = client.ask("balloon") if args.size is None else _change(client, parse_size(args.size), args.wait)
    try:
        reached = args.size is None or found["actual"] == found["target"]
        if args.json:
            print(json.dumps(found))
        else:
            _show(found)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ControlError(f"{args.path} is of another version: use --json") from None
    if not reached and not args.json:
        Output().print(
            f"the guest has given up {format_size(found['actual'])} of {format_size(found['target'])} so far"
            if found["actual"] < found["target"]
            else f"the guest has taken back all but {format_size(found['actual'])} so far"
        )
    return 0 if reached else 1


def _change(client: Client, target: int, patience: float) -> dict[str, Any]:
    """Waits until it is reached, or until the guest has got no further for so many seconds."""
    found = client.ask("balloon", target=target)
    before, since = found.get("actual"), time.monotonic()
    while found.get("actual") != found.get("target") and time.monotonic() - since < patience:
        time.sleep(_INTERVAL)
        found = client.ask("balloon")
        if found.get("actual") != before:
            before, since = found.get("actual"), time.monotonic()
    return found


def _show(found: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("target", format_size(found["target"]))
    table.add_row("given up", f"{found['actual'] / MIB:,.1f} MiB")
    table.add_row("of that, not touched since", f"{found['away'] / MIB:,.1f} MiB")
    for name, size in found["stats"].items():
        table.add_row(name, "not known" if size is None else f"{size / MIB:,.1f} MiB")
    if found["refaults"] is not None:
        table.add_row("read again", f"{found['refaults']:,} pages")
    Output().print(table)
