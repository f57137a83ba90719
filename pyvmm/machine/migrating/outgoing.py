# outgoing.py: the source's side of a migration: what is done in which order, and what becomes of the guest if it fails.
# Seconds, bytes, pages of 4 KiB.
"""`Outgoing`: made by VM.migrate()."""

from __future__ import annotations

import threading

from pyvmm.errors import BadInput, LifecycleError, MigrationError
from pyvmm.layout import parse_size
from pyvmm.machine.migrating.handover import Handover
from pyvmm.machine.migrating.precopy import Precopy
from pyvmm.machine.migrating.session import Session, as_ours
from pyvmm.migration.address import parse_address
from pyvmm.migration.control import Cancelled
from pyvmm.migration.convergence import POSTCOPY
from pyvmm.migration.decision import Decision
from pyvmm.migration.events import Connected, Report
from pyvmm.migration.frames import MAX_CHANNELS, MODES
from pyvmm.migration.link import Link
from pyvmm.migration.local import disallow, offer
from pyvmm.migration.opening import Ways
from pyvmm.migration.order import SOURCE
from pyvmm.migration.sending import Sender

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, TypedDict

    from pyvmm.machine.machine import VM
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
        vm.require_lasting()
        self._vm = vm
        self._mode = mode
        self._channels = channels
        self._rate = rate
        self._limits = (downtime, throttle, rounds)
        self._tracker = tracker
        self._tls = tls
        self._capture = capture
        self._ending = threading.Event()
        self._cancelled = ""
        self._handover: Handover | None = None
        if vm.leaving is not None and not vm.leaving.done:
            raise LifecycleError("the guest is moving already: cancel that first")
        vm.leaving = self
        self._thread.start()

    def cancel(self, reason: str = "it was cancelled") -> None:
        """Calls it off, unless the guest has been given away by now."""
        self._cancelled = reason
        if self._handover is not None:
            self._handover.cancel(reason)

    def abandon(self) -> None:
        """Somebody's word that the destination is dead and will never run the guest, where it was given away and is not
        heard of again: the guest runs on here. If that word is wrong it runs twice. Raises LifecycleError where the
        destination can be heard, or has taken it."""
        if self._handover is None:
            raise LifecycleError("nothing to abandon: no guest was given away")
        self._handover.abandon()

    def end(self, reason: str) -> None:
        """Cancels it, gives up what still waits for the destination, and waits until it has ended."""
        self.cancel(reason)
        self._ending.set()
        if self._handover is not None:
            self._handover.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def release(self) -> None:
        """end(), and its witness goes without a word: the other side is known to have ended."""
        self.end("it was released")
        if self._handover is not None:
            self._handover.release()

    def _runs_here(self) -> bool:
        return self._vm.started and not self._vm.paused and not self._vm.ended

    # ---- its course ----

    def _run(self) -> Report:
        transport = "tls" if self._tls is not None else self.address.kind
        report = Report("source", self._mode, transport, self._channels, self._vm.memory.size)
        decision = Decision(SOURCE)
        precopy = None
        try:
            link = self._open(report, decision)
            handover = self._handover = Handover(self._vm, link, decision, report, self._tell, self._now, self._ending)
            precopy = self._precopy(link)
            try:
                switch = self._before(link, precopy, report)
                handover.switch(precopy, switch == POSTCOPY)
            except Exception as met:  # whatever it is, the guest must run on
                why = link.control.why(as_ours(met))
                precopy.close()
                heard = handover.undo(str(why))
                if not heard:  # a destination that is ready for the guest must hear that it does not come
                    self._failed(why)
                    handover.say_held()
                raise why from met
            handover.complete(precopy.close)
        except BaseException:
            if self._handover is None:
                decision.close()
            raise
        finally:
            if precopy is not None:
                precopy.close()
        precopy.fill_in(report)
        decision.close()
        return report

    def _open(self, report: Report, decision: Decision) -> Link:
        recorder = None
        if self._capture is not None:
            from pyvmm.migration.capture import Recorder

            recorder = self._stack.enter_context(Recorder(self._capture))
        ways = Ways(self.address, self._tls, recorder)
        local = self.address.kind == "local"
        control, terms = ways.hello(self._vm.shape(), self._mode, self._channels, local, self._stack)
        link = Link(ways, terms, control, decision, self._vm.memory)
        self._stack.callback(link.close)
        if local and not link.local:
            raise MigrationError(f"{control.peer} does not read pages itself: use unix:{self.address.path}")
        if self._mode != "precopy" and "postcopy" not in terms.features:
            raise MigrationError(f"{control.peer} cannot run a guest before all its pages are there: use mode precopy")
        link.join()
        report.channels = terms.channels
        self._tell(Connected(self._now(), peer=control.peer, mode=self._mode, channels=terms.channels, local=local))
        return link

    def _precopy(self, link: Link) -> Precopy:
        memory, control = self._vm.memory, link.control
        if link.local:
            control.send(offer(control.connection, memory.base))
            self._stack.callback(disallow)
        sender = Sender(memory, link.pages, self._rate, link.local)
        self._stack.callback(sender.end)
        control.on_end = sender.end
        return Precopy(self._vm, sender, self._limits, self._mode, self._tracker, self._tell, self._now)

    def _before(self, link: Link, precopy: Precopy, report: Report) -> str:
        """All up to the switch; how that is to be done."""
        if self._cancelled:
            link.control.fail(Cancelled(self._cancelled))
        if "large" in link.terms.features:
            precopy.tell_large(link.control, report)
        if self._mode != "precopy":
            precopy.bring_here()
        return POSTCOPY if self._mode == "postcopy" else precopy.rounds(link.control, report)
