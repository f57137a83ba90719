# migrate.py: `pyvmm migrate PATH --to ADDRESS`: has a running guest move, and shows how. Times in seconds.
"""The command. The migration is the VM's own: this only asks for it, and for its end where a signal comes."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import nullcontext

from pyvmm.cli.moving import SCHEMA, Journey, absolute, check_options, print_report
from pyvmm.control import wire
from pyvmm.control.client import Client
from pyvmm.errors import EXIT_FAILED, EXIT_SIGNAL, BadInput, ControlError
from pyvmm.layout import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import FrameType
    from typing import Any, Self

    from rich.live import Live

    from pyvmm.cli.parse import Arguments
    from pyvmm.control.client import Stream

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(args: Arguments) -> int:
    """The command: 0 when the guest has moved, 1 when it has not, 128+n after signal n, which cancels."""
    if args.abandon:
        return _abandon(args)
    arguments = _arguments(args)
    events: list[dict[str, Any]] = []
    error: ControlError | None = None
    with Client(args.path) as client, _Cancelling(client) as cancelling:
        stream = client.stream("migrate", **arguments)
        cancelling.watch()
        try:
            _follow(stream, events)
        except ControlError as failed:
            error = failed
    if args.json:
        print(json.dumps({"schema": SCHEMA, "report": stream.result or None, "events": events}))
    if error is not None:
        return _failed(error, events, cancelling.number)
    if cancelling.number:
        print("pyvmm: too late to cancel: the guest has moved", file=sys.stderr)
    if not args.json:
        from pyvmm.cli.output import Output

        print_report(Output(), stream.result)
    return 0


def _abandon(args: Arguments) -> int:
    if args.to is not None:
        raise BadInput("--abandon ends a migration, and --to begins one: give one of them")
    with Client(args.path) as client:
        client.ask("abandon")
    print("pyvmm: abandoned: the guest runs on", file=sys.stderr)
    return 0


def _arguments(args: Arguments) -> dict[str, object]:
    """What the VM is asked, checked here as far as it can be. Paths are absolute: it works in another folder."""
    address, _ = check_options(args, "--to", args.to, listening=False)
    if address.path:
        address.path = os.path.abspath(address.path)
    found = {
        "to": str(address),
        "mode": args.mode,
        "downtime": args.downtime / 1e3,
        "channels": args.channels,
        "bandwidth": None if args.bandwidth is None else parse_size(args.bandwidth),
        "throttle": not args.no_throttle,
        "tls_cert": absolute(args.tls_cert),
        "tls_key": absolute(args.tls_key),
        "tls_ca": absolute(args.tls_ca),
        "capture": absolute(args.capture),
    }
    if not 0.1 <= args.downtime <= 3600e3:
        raise BadInput(f"--downtime {args.downtime:g}: give milliseconds, 0.1 or more")
    try:
        wire.check("migrate", found)
    except BadInput as error:
        raise BadInput(f"--{error}") from None
    return found


def _follow(stream: Stream, events: list[dict[str, Any]]) -> None:
    """Until its end. Raises ControlError with why it came to nothing, BadInput."""
    journey = Journey()
    with _picture(journey) as live:
        for event in stream:
            events.append(event)
            journey.told(event)
            if live is not None:
                live.update(journey, refresh=True)


def _picture(journey: Journey) -> AbstractContextManager[Live | None]:
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    return Live(journey, console=console, auto_refresh=False, transient=True, redirect_stdout=False)


def _failed(error: ControlError, events: list[dict[str, Any]], number: int) -> int:
    """Says so in one line."""
    runs = any(event.get("event") == "failed" and event.get("runs") for event in events)
    where = ": the guest runs on" if runs else ""
    what = "cancelled" if number else str(error)
    print(f"pyvmm: {what}{where}", file=sys.stderr)
    return EXIT_SIGNAL + number if number else EXIT_FAILED


class _Cancelling:
    """Within its `with` the first signal asks for the end of the migration; a second one ends us. `number`: of the
    signal, 0 before one came.

    The handler raises nothing, which could be in the midst of an answer. It sends only when nothing is being sent.
    """

    def __init__(self, client: Client) -> None:
        self.number = 0
        self._client = client
        self._watching = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._arrived) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self) -> None:
        """The migration was asked for: a signal cancels it from now on, and one that came before does so at once."""
        self._watching = True
        if self.number:
            self._cancel()

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if self._watching:
            self._cancel()

    def _cancel(self) -> None:
        self._client.send("cancel", reason="whoever asked for it has cancelled it")
