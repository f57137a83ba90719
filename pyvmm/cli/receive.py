# receive.py: `pyvmm receive --listen ADDRESS`: waits for a guest that moves here, and runs it on as `pyvmm run` would.
"""The command. The migration starts the vCPUs by itself; the console is there before the first instruction."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import contextmanager

from pyvmm.cli.moving import SCHEMA, check_options, print_report
from pyvmm.cli.run import Shown, devices_of
from pyvmm.control.moving import Moving
from pyvmm.errors import EXIT_FAILED, FetchError, MigrationError
from pyvmm.machine import VM
from pyvmm.migration.events import Finished, Switched

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from pyvmm.cli.parse import Arguments
    from pyvmm.control.moving import Incoming
    from pyvmm.migration.events import Report

_SETTLING = 2.0
"""Seconds for the last words of a migration whose guest has ended already."""


def run(args: Arguments) -> int:
    """The command: the guest's status, as for `run`; 1 where it never ran here, or was lost; 128+n after signal n."""
    received = _Received(args)
    try:
        return received.run()
    except (MigrationError, FetchError) as error:
        if received.status is not None:  # a signal's: what it led to is no news
            return received.status
        print(f"pyvmm: {error}", file=sys.stderr)
        return EXIT_FAILED


class _Received(Shown):
    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self._address, self._tls = check_options(args, "--listen", args.listen, listening=True)
        self.stdout = 2 if args.json else 1
        self.status: int | None = None  # that a signal asked for before the guest ran
        self._moving = self.moving = Moving()
        self._events: list[dict[str, object]] = []
        self._report: Report | None = None
        self._vm: VM | None = None
        self._news = threading.Event()  # the VM is built, or the migration has ended
        self._ready = threading.Event()  # its console is there, or nobody waits for it any more
        self._lock = threading.Lock()
        self._runs = self._given_up = False

    # ---- the migration's threads ----

    def _built(self, vm: VM) -> None:
        """The guest must not run before this returns."""
        self._vm = vm
        self._news.set()
        self._ready.wait()
        if self._given_up:
            raise MigrationError("the destination was ended before the guest ran there")

    def _follow(self) -> None:
        try:
            for event in self._moving.events():
                self._events.append(event.as_json())
                if isinstance(event, Finished):
                    self._report = event.report
        finally:
            self._news.set()

    # ---- the session's ----

    def make(self) -> VM:
        args = self.args
        self._incoming: Incoming = VM.receive(
            str(self._address),
            tls=self._tls,
            unit=args.unit,
            built=self._built,
            capture=args.capture,
            devices=devices_of(args),
        )
        self._moving.begin(lambda: self._incoming, side="destination")
        self._follower = threading.Thread(target=self._follow, name="migration events", daemon=True)
        self._follower.start()
        print(f"pyvmm: listening at {self._incoming.address}", file=sys.stderr, flush=True)
        self.signals.watch(self._interrupted)
        self._news.wait()
        if self._vm is None:
            self._end()
            self._incoming.result()
            raise MigrationError("the migration ended before there was a VM")
        return self._vm

    def around(self, vm: VM) -> AbstractContextManager[object]:
        return self._within(vm)

    @contextmanager
    def _within(self, vm: VM) -> Iterator[None]:
        try:
            with super().around(vm):
                yield
        finally:
            self._end()

    def begin(self, vm: VM) -> None:
        self._ready.set()
        self._incoming.vm()
        self.limit(vm)  # what came before the guest came as a whole
        with self._lock:
            self._runs = True
            if self.status is not None:
                vm.request_stop(self.status)

    def stop(self, vm: VM, status: int) -> None:
        with self._lock:
            if self._runs:
                vm.request_stop(status)
                return
            self.status = status  # begin() may be just about to look
        self._incoming.cancel("the destination was interrupted")

    def _interrupted(self, status: int) -> None:
        """A signal before there is a VM."""
        self.status = status
        self._incoming.cancel("the destination was interrupted")

    def finish(self, vm: VM, seconds: float) -> None:
        super().finish(vm, seconds)
        last = self._moving.last
        if not (isinstance(last, Switched) and last.away):  # who follows may not have come by the last event yet
            self._follower.join(_SETTLING)
        if self.args.json:
            report = None if self._report is None else self._report.as_json()
            print(json.dumps({"schema": SCHEMA, "report": report, "events": self._events}))
        elif self._report is not None and sys.stderr.isatty():
            from rich.console import Console

            print_report(Console(stderr=True, highlight=False), self._report.as_json())

    def _end(self) -> None:
        """Ends what is left of the migration, before the VM is closed."""
        self._given_up = not self._runs
        self._ready.set()
        self._incoming.close()
        self._follower.join()
