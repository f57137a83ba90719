# sharing.py: `pyvmm pages PATH --sharing`: what sharing would free of guests that run, before anything is broken.
"""`run()` for control sockets, and how an estimate is shown."""

from __future__ import annotations

import json
import os
import stat

from rich.text import Text

from pyvmm.cli.output import Output
from pyvmm.cli.picture import new_table
from pyvmm.control.sharing import as_json, best, fetch
from pyvmm.errors import BadInput
from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.memory.sharing.estimate import Estimate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parse import Arguments

_SCHEMA = 1
_SHOWN = 10
_IN_JSON = 1 << 20
"""Blocks of an estimate: all of any VM's."""


def is_socket(path: str) -> bool:
    """Is that a guest that runs, by its control socket?"""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def run(args: Arguments) -> int:
    """The command, for a socket: 0."""
    if not args.sharing:
        raise BadInput(f"{args.guest} is the control socket of a guest that runs: add --sharing, or use pyvmm status")
    if args.do or args.png is not None:
        raise BadInput(f"{args.guest} is a control socket: --do and --png are for a guest that is started here")
    mine = fetch(args.guest)
    found = Estimate(mine, [fetch(path) for path in args.with_])
    if args.json:
        told = {"schema": _SCHEMA, "path": args.guest, "with": list(args.with_)}
        print(json.dumps(told | {"sharing": as_json(found, _IN_JSON)}))
    else:
        show(Output(), found, len(args.with_))
    return 0


def show(console: Output, found: Estimate, others: int) -> None:
    """For people. others: VMs that it was compared with."""
    console.print(Text("what sharing would free, by hashes", "bold"))
    table = new_table(console, "", "pages", "MiB", "share")
    rows = [("pages of zeros", found.zeros), ("copies within the VM", found.copies)]
    if others:
        rows.append((f"across {others + 1} VMs", found.across))
    for name, pages in [*rows, ("all", found.freed)]:
        table.add_row(name, f"{pages:,}", f"{pages * PAGE_SIZE / MIB:,.1f}", f"{pages / found.pages:.1%}")
    console.print(table)
    if unknown := found.pages - found.scanned:
        console.print(Text(f"{unknown:,} pages are away, and were not looked at", "yellow"))
    if blocks := best(found, _SHOWN):
        console.print(Text("blocks with the most pages that are elsewhere too", "bold"))
        table = new_table(console, "block", "pages", "share")
        for block, count in blocks:
            table.add_row(str(block), f"{count:,}", f"{count / 512:.0%}")
        console.print(table)
