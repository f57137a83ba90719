# moving.py: a migration as people see it, at both sides: options, what goes on, the report. Draws plain data, as it
# comes over a control socket. Times in seconds, sizes in bytes, pages of 4 KiB.
"""`check_options`, `Journey` and `print_report`."""

from __future__ import annotations

import os
import sys

from pyvmm.control.control import tls_of
from pyvmm.errors import BadInput
from pyvmm.layout import BLOCK_SIZE, rough_size
from pyvmm.migration.address import Address, parse_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from pyvmm.cli.parse import Arguments
    from pyvmm.migration.tls import Tls

    Fields = Mapping[str, Any]

SCHEMA = 1
_ROUNDS, _NOTES = 8, 4
"""So many of the last ones are shown while it goes on."""


def check_options(args: Arguments, option: str, text: str | None, listening: bool) -> tuple[Address, Tls | None]:
    """Where to, and TLS or none; warns on stderr of a network on which all would be read. Raises BadInput."""
    if text is None:
        raise BadInput(f"give {option} ADDRESS: tcp:HOST:PORT, unix:PATH or local:PATH")
    address = parse_address(text, listening)
    try:
        tls = tls_of(args.tls_cert, args.tls_key, args.tls_ca)
    except BadInput as error:
        raise BadInput(f"{error} (--tls-cert, --tls-key, --tls-ca)") from None
    if tls is not None and address.kind != "tcp":
        raise BadInput(f"{address}: TLS is for tcp: nobody but this user gets at a socket with a path")
    warning = address.warning(tls is not None)
    if warning:
        print(f"pyvmm: warning: {warning}", file=sys.stderr)
    return address, tls


def absolute(path: str | None) -> str | None:
    """A path that another process, in another folder, is to open."""
    return None if path is None else os.path.abspath(path)


class Journey:
    """What has been told of a migration so far, event by event; rich draws it."""

    def __init__(self) -> None:
        self.rounds: list[Fields] = []
        self._moving: Fields | None = None
        self._notes: list[str] = []

    def told(self, event: Fields) -> None:
        """An event, as as_json() of pyvmm.migration.events gives it."""
        kind = event.get("event")
        if kind == "moving":
            self._moving = event
            return
        if kind == "round":
            self.rounds = [*self.rounds, event][-_ROUNDS:]
            self._moving = None
        note = words(event)
        if note:
            self._notes = [*self._notes, note][-_NOTES:]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        for note in self._notes:
            yield Text(note)
        if self.rounds:
            yield rounds_table(console, self.rounds)
        if self._moving is not None:
            yield Text(words(self._moving), "bold")


def words(event: Fields) -> str:
    """One event in a line; nothing for the end of a round, which is a table's row."""
    say = _WORDS.get(str(event.get("event")))
    return "" if say is None else say(event)


def _connected(event: Fields) -> str:
    channels = "" if event["channels"] == 1 else f", {event['channels']} channels"
    return f"{event['mode']} with {event['peer']}{channels}{', read out of the source' if event['local'] else ''}"


def _moving(event: Fields) -> str:
    which = f"round {event['round']}" if event["round"] else "after the guest"
    share = event["sent"] / event["pages"] if event["pages"] else 1.0
    return (
        f"{which}: {event['sent']:,} of {event['pages']:,} pages ({share:.0%}), {rough_size(event['bandwidth'])}/s, "
        f"{rough_size(event['bytes'])} so far"
    )


def _helped(event: Fields) -> str:
    share = f", {event['share']:.0%} of the time" if event["share"] else ""
    return f"the guest writes faster than it goes: {event['help']}{share}"


def _switched(event: Fields) -> str:
    away = f", and {event['away']:,} pages are still to come" if event["away"] else ""
    return f"the guest runs there; it stood for {_time(event['downtime'])}{away}"


_WORDS: dict[str, Callable[[Fields], str]] = {
    "connected": _connected,
    "moving": _moving,
    "helped": _helped,
    "switched": _switched,
    "broken": lambda event: f"the connection is gone, and the guest stands: {event['reason']}",
    "resumed": lambda event: f"connected again; {event['missing']:,} pages are still to come",
    "failed": lambda event: f"it failed: {event['reason']}",
    "finished": lambda event: "all of it is there",
}


def _time(seconds: float) -> str:
    from pyvmm.cli.picture import nanoseconds

    return nanoseconds(seconds * 1e9)


def rounds_table(console: Console, rounds: list[Fields]) -> Table:
    """A row each: how much went, how fast, what was written meanwhile, and how long the guest would have stood."""
    from pyvmm.cli.picture import new_table

    table = new_table(console, "round", "pages", "time", "a second", "written", "pages/s", "would stand")
    for each in rounds:
        table.add_row(
            str(each["round"]), f"{each['pages']:,}", _time(each["seconds"]), rough_size(each["bandwidth"]),
            f"{each['dirty']:,}", f"{each['dirty_rate']:,.0f}", _time(each["expected"]),
        )  # fmt: skip
    return table


def print_report(console: Console, report: Fields) -> None:
    """All that a Report says, as tables."""
    from rich.text import Text

    from pyvmm.cli.picture import new_table

    channels = "1 channel" if report["channels"] == 1 else f"{report['channels']} channels"
    head = (
        f"{rough_size(report['memory'])} by {report['mode']} over {report['transport']}, {channels}, in "
        f"{_time(report['seconds'])}; the guest stood for {_time(report['total_downtime'])}"
    )
    console.print(Text(head, "bold"), soft_wrap=True)
    table = new_table(console, "guest stood", "time")
    for name, seconds in report["downtime"].items():
        table.add_row(name, _time(seconds))
    if table.row_count:
        console.print(table)
    table = new_table(console, "what went", "")
    for name, value in _figures(report):
        table.add_row(name, value)
    console.print(table)
    if report["rounds"]:
        console.print(rounds_table(console, report["rounds"]))


def _figures(report: Fields) -> list[tuple[str, str]]:
    blocks = -(-report["memory"] // BLOCK_SIZE)
    rows = [
        ("on the wire", rough_size(report["wire_bytes"])),
        ("pages in full", rough_size(report["page_bytes"])),
        ("pages of zeros", f"{report['zero_pages']:,}"),
        ("pages again", f"{report['resent_pages']:,}"),
        ("state", rough_size(report["state_bytes"])),
        ("large at the source", f"{report['large_before']:,} of {blocks:,}"),
        ("large at the destination", f"{report['large_after']:,} of {blocks:,}"),
        ("tables filled", f"{_time(report['populate_seconds'])}, {_time(report['populate_inside'])} while it stood"),
    ]
    if report["faults"]:
        mean = report["fault_seconds"] / report["faults"]
        rows.append(("asked for", f"{report['faults']:,} pages, {_time(mean)} each"))
    if report["throttled"]:
        rows.append(("slowed down", f"{report['throttled']:.0%} of the time at most"))
    if report["breaks"]:
        rows.append(("connected again", f"{report['breaks']:,} times"))
    return rows
