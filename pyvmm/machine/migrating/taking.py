# taking.py: the destination's side of the handover: ready, then the owner, and all that may break in between:
# docs/migration-protocol.md, "Who owns the guest". Seconds.
"""`Taking`."""

from __future__ import annotations

import time
from contextlib import suppress

from pyvmm.errors import MigrationError, PeerGone
from pyvmm.layout import PAGE_SIZE
from pyvmm.machine.migrating.arriving import Arriving
from pyvmm.memory.pageset import PageSet
from pyvmm.migration.control import Abandoned, Cancelled, Control
from pyvmm.migration.decision import Watch
from pyvmm.migration.events import Broken, Resumed, Switched
from pyvmm.migration.frames import DECISIONS, MAX_BITS, Commit, Complete, Done, Have, Ready, Refuse, Taken
from pyvmm.migration.frames import Resumed as ResumedFrame
from pyvmm.migration.order import SOURCE
from pyvmm.migration.transport import HANDSHAKE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from pyvmm.machine.machine import VM
    from pyvmm.migration.accepting import Acceptor
    from pyvmm.migration.connection import Connection
    from pyvmm.migration.decision import Decision
    from pyvmm.migration.events import Event, Report
    from pyvmm.migration.frames import Resume
    from pyvmm.migration.opening import Terms

_WITNESS = 1.0
_LOOK = 0.1
_NAMES = {number: name for name, number in DECISIONS.items()}
_THEIRS = {"ready": ("held", "given"), "taken": ("given",)}
"""What a source that connects anew may have decided."""
_BARRED = "pages of this guest were lost with the source of its migration"


class SourceDied(PeerGone):
    """decision: what the source had decided when it was killed."""

    def __init__(self, decision: str) -> None:
        self.decision = decision
        super().__init__(f"the source was killed (it had decided: {decision})")


class Lost(MigrationError):
    """The guest ran here, and cannot go on: pages of it were with a source that is gone."""


class Taking:
    """From READY to DONE. running: set when the guest runs here; closing: nobody wants it any more; tell: takes events;
    now: seconds so far."""

    def __init__(
        self,
        vm: VM,
        acceptor: Acceptor,
        control: Control,
        decision: Decision,
        terms: Terms,
        report: Report,
        closing: threading.Event,
        running: threading.Event,
        tell: Callable[[Event], None],
        now: Callable[[], float],
    ) -> None:
        self._vm = vm
        self._acceptor = acceptor
        self.control = control
        self._decision = decision
        self._terms = terms
        self._report = report
        self._closing = closing
        self._running = running
        self._tell = tell
        self._now = now
        self._watch: Watch | None = None
        self._epoch = 0
        self._complete = False
        self.lost = False
        """Pages of the guest never come."""
        self.arriving: Arriving | None = None
        """In post-copy: what brings the pages that are with the source."""

    # ---- witnesses ----

    def witness(self) -> None:
        """Takes the witnesses' connections, as soon as the source has opened them."""
        if self._watch is not None:
            self._watch.close()
        check = self.control.check
        self._watch = Watch(self._acceptor.joined("source-witness", 0, check=check), SOURCE, self._terms.token)
        self._decision.start_witness(self._acceptor.joined("destination-witness", 0, check=check), self._terms.token)

    def close(self) -> None:
        """Ends all connections; twice is once."""
        if self.arriving is not None:
            self.arriving.close()
        self.control.close()
        if self._watch is not None:
            self._watch.close()

    def _check_witness(self, seconds: float) -> None:
        died = self._watch.died(seconds) if self._watch is not None else None
        if died is not None:
            raise SourceDied(died)

    # ---- ready ----

    def take(self, away: int) -> None:
        """Says READY, waits for COMMIT, and runs the guest. away: pages that come after that. Raises MigrationError
        where the guest is not ours, and will not be."""
        self._decision.set("ready")
        began = time.perf_counter()
        first = True
        while True:
            try:
                if first:
                    self.control.send(Ready(away))
                self.control.expect(Commit)
                break
            except (Abandoned, Cancelled):
                raise
            except MigrationError as error:
                first = False
                if self._to_decide(error, away):
                    break
        self._decision.set("taken")
        if self.arriving is not None:
            self.arriving.start()
        self._vm.start()
        self._report.downtime["handover"] = time.perf_counter() - began
        with suppress(MigrationError):  # a break is dealt with where the pages are waited for
            self.control.send(Taken())
        self._running.set()
        self._tell(Switched(self._now(), downtime=self._report.total_downtime, away=away))

    def _to_decide(self, error: MigrationError, away: int) -> bool:
        """After a break while READY. True: the guest is ours, since the source is dead and will never run it. False:
        connected anew, COMMIT may come."""
        try:
            self._check_witness(_WITNESS)
            theirs = self._again(error)
        except SourceDied as died:
            if died.decision == "held" or away:
                raise
            return True
        if theirs == "held":
            raise Cancelled("the source keeps the guest")
        return False

    # ---- taken ----

    def finish(self) -> None:
        """Until all pages are here, and the source knows. Raises Lost."""
        broken: MigrationError | None = None
        while True:
            try:
                if broken is not None and self._is_over(broken):
                    return
                if self.arriving is not None and not self._complete:
                    self.arriving.wait(self.control)
                if not self._complete:
                    self._report.large_after = self._vm.memory.large_blocks()
                self._complete = True
                self.control.send(Complete(self._report.large_after))
                return
            except Lost:
                raise
            except Abandoned as error:
                if not self._complete:
                    raise self._lose(error) from error
                return
            except MigrationError as error:  # also while the connections are made anew: then once more
                broken = error

    def farewell(self) -> None:
        """Until the source has heard that it is over, or is dead; the guest runs here whatever comes."""
        broken: MigrationError | None = None
        while not self._closing.is_set():
            try:
                if broken is not None:
                    if self._is_over(broken):
                        return
                    self.control.send(Complete(self._report.large_after))
                self.control.expect(Done)
                self._decision.release()
                return
            except Abandoned:
                return
            except MigrationError as error:
                broken = error

    def _is_over(self, error: MigrationError) -> bool:
        """After a break while the guest runs here: the source is dead, and nothing is missing. Else it is connected
        anew. Raises Lost; and MigrationError where that has broken too."""
        try:
            self._check_witness(_WITNESS)
            held = self._hold()
            self._again(error)
        except SourceDied as died:
            if self._complete:
                self._decision.release()
                return True
            raise self._lose(died) from died
        self._send_have()
        if self.arriving is not None and not self._complete:
            self.arriving.start()
        if held and self._vm.paused:
            self._vm.resume()
        return False

    def _hold(self) -> bool:
        """The guest stands until the connection is there again, unless it has all it needs."""
        if self._complete or self._vm.paused or self._vm.ended:
            return False
        self._vm.life.ask_to_pause()
        return True

    def _lose(self, why: MigrationError) -> Lost:
        self.lost = True
        lost = Lost(f"pages of the guest are lost: {why}")
        self._vm.life.bar(_BARRED)
        self._vm.hold(lost)
        if self.arriving is not None:
            self.arriving.lose(str(lost))  # who waits for one is told the same, as a FetchError
        return lost

    def _send_have(self) -> None:
        """What is here, over all of RAM; and the connections that bring the rest."""
        pages = self._vm.memory.size // PAGE_SIZE
        have = PageSet(pages, [(0, pages)])
        if not self._complete:
            have = self.arriving.have() if self.arriving is not None else have
            self._tell(Resumed(self._now(), epoch=self._epoch, missing=pages - have.count()))
        bits = have.bytes()
        for first in range(0, pages, MAX_BITS * 8):
            count = min(MAX_BITS * 8, pages - first)
            self.control.send(Have(first, count, bits[first // 8 : first // 8 + -(-count // 8)]))

    # ---- a new control connection ----

    def _again(self, error: MigrationError) -> str:
        """Waits until the source has connected anew; returns its decision. Raises SourceDied, Cancelled."""
        if self.arriving is not None:
            self.arriving.stop()
        self.control.close()
        if not self._complete:  # else the guest misses nothing, and runs
            self._tell(Broken(self._now(), reason=str(error)))
        while True:
            self._check_witness(0)
            if self._closing.is_set():
                raise Abandoned("nobody waits for the source any more")
            found = self._acceptor.resume(_LOOK)
            if found is None:
                continue
            with suppress(MigrationError):  # gone again: another one will come
                if self._answer(*found):
                    return _NAMES[found[1].decision]

    def _answer(self, connection: Connection, resume: Resume) -> bool:
        ours = self._decision.value
        if resume.epoch <= self._epoch or _NAMES[resume.decision] not in _THEIRS[ours]:
            with suppress(MigrationError):
                connection.send(Refuse("a newer connection is there, or this cannot be"), 1.0)
            connection.close()
            return False
        self._epoch = resume.epoch
        self._report.breaks += 1
        self._acceptor.expect(self._terms, places(self._terms, self.arriving is not None))
        try:
            connection.send(ResumedFrame(self._epoch, DECISIONS[ours]), HANDSHAKE)
        except BaseException:
            connection.close()
            raise
        self.control.close()
        order = self.control.order
        order.resumed("running" if ours == "taken" else "ready")
        self.control = Control(connection, order)
        self.control.start()
        if _NAMES[resume.decision] == "given":
            if self.arriving is not None:  # the source does not know yet whether all is here
                self.arriving.rejoin(self._acceptor, self.control)
            self.witness()
        return True


def places(terms: Terms, pages: bool) -> list[tuple[str, int]]:
    """The connections that a source opens: those of the witnesses, and with `pages` those for pages."""
    found = [("source-witness", 0), ("destination-witness", 0)]
    if pages:
        found += [("pages", index) for index in range(terms.channels)]
        found += [] if terms.mode == "precopy" else [("urgent", 0)]
    return found
