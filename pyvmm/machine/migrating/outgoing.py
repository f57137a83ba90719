# outgoing.py: the source's side of a migration: what is done in which order, and what becomes of the guest if it fails.
# Seconds, bytes, pages of 4 KiB.
"""`Outgoing`: made by VM.migrate()."""

from __future__ import annotations

import threading

from pyvmm.errors import BadInput, LifecycleError, MigrationError, PyvmmError
from pyvmm.layout import PAGE_SIZE, parse_size
from pyvmm.machine.migrating.handover import Handover
from pyvmm.machine.migrating.precopy import Precopy
from pyvmm.machine.migrating.session import Session
from pyvmm.migration.address import parse_address
from pyvmm.migration.control import Cancelled, Control
from pyvmm.migration.convergence import POSTCOPY
from pyvmm.migration.decision import Decision
from pyvmm.migration.events import Connected, Report
from pyvmm.migration.frames import MAX_CHANNELS, MODES
from pyvmm.migration.local import disallow, offer
from pyvmm.migration.opening import Ways
from pyvmm.migration.order import SOURCE
from pyvmm.migration.pages import PageChannel
from pyvmm.migration.sending import Sender

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, TypedDict

    from pyvmm.machine.machine import VM
    from pyvmm.migration.opening import Terms
    from pyvmm.migration.tls import Tls

    class MigrateOptions(TypedDict, total=False):
        """Of VM.migrate(); what they mean is said at Outgoing."""

        mode: Literal["precopy", "postcopy", "hybrid"]
        downtime: float
        channels: int
        bandwidth: int | str | None
        throttle: bool
        rounds: int
        tracker: str | None
        tls: Tls | None
        capture: str | None


ROUNDS = 30
"""Of pre-copy, at most."""


class Outgoing(Session):
    """A migration at its source.

    mode: "precopy" (all pages before the guest moves), "postcopy" (after it) or "hybrid" (before, and what does not get
    done then after it); downtime: seconds in which the guest may run nowhere; channels: 1 to 8 connections for pages;
    bandwidth: bytes a second that they may take together, such as "500M"; throttle: may vCPUs be held where the guest
    writes faster than the connection takes; rounds: of pre-copy, at most: then it ends in post-copy, or is given up;
    tracker: of write traces, None: the one that suits; tls; capture: a file in which what goes over the connections is
    recorded. Raises BadInput, LifecycleError.
    """

    def __init__(
        self,
        vm: VM,
        to: str,
        *,
        mode: Literal["precopy", "postcopy", "hybrid"] = "precopy",
        downtime: float = 0.020,
        channels: int = 1,
        bandwidth: int | str | None = None,
        throttle: bool = True,
        rounds: int = ROUNDS,
        tracker: str | None = None,
        tls: Tls | None = None,
        capture: str | None = None,
    ) -> None:
        super().__init__("migration out")
        self.address = parse_address(to)
        if mode not in MODES:
            raise BadInput(f"mode={mode!r}: choose precopy, postcopy or hybrid")
        if not 1 <= channels <= MAX_CHANNELS:
            raise BadInput(f"{channels} channels: give 1 to {MAX_CHANNELS}")
        if not 0 < downtime < 1e6:
            raise BadInput(f"downtime={downtime:g}: give seconds above 0")
        if rounds < 1:
            raise BadInput(f"{rounds} rounds: give 1 or more")
        rate = 0 if bandwidth is None else parse_size(bandwidth)
        if rate < 0 or (bandwidth is not None and not rate):
            raise BadInput(f"bandwidth={bandwidth}: give bytes a second above 0")
        if tls is not None and self.address.kind != "tcp":
            raise BadInput(f"{self.address}: TLS is for tcp")
        if not vm.started or vm.paused or vm.ended:
            raise LifecycleError("only a running guest moves: start() or resume() it, or save a snapshot")
        self._vm = vm
        self._mode = mode
        self._channels = channels
        self._rate = rate
        self._limits = (downtime, throttle, rounds)
        self._tracker = tracker
        self._tls = tls
        self._capture = capture
        self._control: Control | None = None
        self._handover: Handover | None = None
        self._cancelled = ""
        self._committing = threading.Lock()  # who holds it: a cancel comes before the commit point, or not at all
        self._decision: Decision | None = None
        if vm.leaving is not None and not vm.leaving.done:
            raise LifecycleError("the guest is moving already: cancel that first")
        vm.leaving = self
        self._thread.start()

    def cancel(self, reason: str = "it was cancelled") -> None:
        """Calls it off, unless the guest runs at the destination by now."""
        with self._committing:
            self._cancelled = reason
            if self._control is not None and (self._decision is None or self._decision.value != "given"):
                self._control.fail(Cancelled(reason))

    def end(self, reason: str) -> None:
        """Cancels it, and waits until it has ended."""
        self.cancel(reason)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _runs_here(self) -> bool:
        return self._vm.started and not self._vm.paused and not self._vm.ended

    # ---- its course ----

    def _run(self) -> Report:
        transport = "tls" if self._tls is not None else self.address.kind
        report = Report("source", self._mode, transport, self._channels, self._vm.memory.size)
        decision = self._decision = self._stack.enter_context(Decision(SOURCE))
        try:
            control, sender, terms = self._open(report)
        except PyvmmError:
            decision.release()
            raise
        precopy = Precopy(self._vm, sender, self._limits, self._mode, self._tracker, self._tell, self._now)
        self._stack.callback(precopy.close)
        handover = self._handover = Handover(self._vm, control, decision, self._committing, report)
        try:
            if "large" in terms.features:
                precopy.tell_large(control, report)
            switch = POSTCOPY
            if self._mode != "postcopy":
                switch = precopy.rounds(control, report)
            handover.switch(precopy, switch == POSTCOPY)
        except PyvmmError as error:
            handover.undo(str(error))
            raise
        return report

    def _open(self, report: Report) -> tuple[Control, Sender, Terms]:
        recorder = None
        if self._capture is not None:
            from pyvmm.migration.capture import Recorder

            recorder = self._stack.enter_context(Recorder(self._capture))
        ways = Ways(self.address, self._tls, recorder)
        local = self.address.kind == "local"
        control, terms = ways.hello(self._vm.shape(), self._mode, self._channels, local, self._stack)
        self._control = control
        if self._cancelled:
            control.fail(Cancelled(self._cancelled))
        ram, pages = self._vm.memory.base, self._vm.memory.size // PAGE_SIZE
        connections = [ways.join(terms, "pages", index, self._stack) for index in range(terms.channels)]
        channels = [PageChannel(connection, ram, pages) for connection in connections]
        if local and "local" not in terms.features:
            raise MigrationError(f"{control.peer} does not read pages itself: use unix:{self.address.path}")
        if local:
            control.send(offer(control.connection, ram, channels))
            self._stack.callback(disallow)
        sender = Sender(self._vm.memory, channels, self._rate, local)
        self._stack.callback(sender.end)
        control.on_end = sender.end
        report.channels = terms.channels
        self._tell(Connected(self._now(), peer=control.peer, mode=self._mode, channels=terms.channels, local=local))
        return control, sender, terms
