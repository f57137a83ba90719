# host_table.py: a fleet as a table, now or again and again. Bytes, shown as MiB.
"""`show()` and `live()` of what a fleet's daemon answers to `status`."""

from __future__ import annotations

import time

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pyvmm.cli.output import Output
from pyvmm.errors import ControlError
from pyvmm.fleet.demand import CLASSES
from pyvmm.layout import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_COLOURS = {"running": "green", "starting": "cyan", "silent": "yellow", "died": "red", "refused": "yellow"}
_STATES = {"high": "green", "clear": "green", "soft": "cyan", "hard": "yellow", "low": "red"}


def show(found: dict[str, Any]) -> None:
    """For people. Raises ControlError for a picture of another version."""
    Output().print(_drawn(found))


def live(look: Callable[[], dict[str, Any]]) -> None:
    """Until Ctrl-C, or the daemon has gone: then ControlError."""
    found = look()
    try:
        with Live(_drawn(found), console=Output(), auto_refresh=False) as shown:
            while True:
                time.sleep(max(0.1, float(found["interval"])))
                found = look()
                shown.update(_drawn(found), refresh=True)
    except KeyboardInterrupt:
        pass


def _drawn(found: dict[str, Any]) -> Group:
    try:
        return _group(found)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ControlError("the daemon is of another version: use --json") from None


def _group(found: dict[str, Any]) -> Group:
    state = found["state"]
    head = Text.assemble(
        (state, _STATES.get(state, "")),
        f": {found['resident'] / (1 << 20):,.1f} of {format_size(found['budget'])}, policy {found['policy']},"
        f" process {found['pid']}; MiB",
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("VM", "state"):
        table.add_column(column, no_wrap=True, min_width=8)
    for column in ("size", "has", "used", "due", "limit", "balloon", "to", "swapped", "shared", "faults/s"):
        table.add_column(column, justify="right", no_wrap=True)
    notes = []
    for vm in found["vms"]:
        table.add_row(vm["name"], Text(vm["state"], _COLOURS.get(vm["state"], "")), *_figures(vm))
        if vm["why"]:
            notes.append(Text(f"{vm['name']}: {vm['why']}", "yellow"))
    return Group(head, table, *_classes(found["vms"]), *notes)


def _figures(vm: dict[str, Any]) -> list[str]:
    names = (
        "memory",
        "resident",
        "working_set",
        "entitlement",
        "limit",
        "ballooned",
        "balloon_target",
        "swapped",
        "shared",
    )
    return [*(_mib(vm[name]) for name in names), f"{vm['refaults']:,.0f}"]


def _classes(vms: list[dict[str, Any]]) -> list[Table]:
    """A table of what guests tell, if any does."""
    table = Table("classes", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in CLASSES:
        table.add_column(name.replace("anonymous", "anon").replace("_", " "), justify="right")
    for vm in vms:
        if vm["classes"] is not None:
            table.add_row(vm["name"], *(_mib(vm["classes"][name]) for name in CLASSES))
    return [table] if table.row_count else []


def _mib(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / (1 << 20):,.{0 if size >= 100 << 20 else 1}f}"
