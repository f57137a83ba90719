# handover.py: the guest stands, and one of two processes will run it: docs/migration-protocol.md, "Who owns the guest".
# Seconds, pages of 4 KiB.
"""`Handover`: of the source, from the pause to DONE, and back where that is still possible."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from pyvmm.errors import LifecycleError, MigrationError
from pyvmm.layout import PAGE_SIZE
from pyvmm.machine.migrating.rest import Rest
from pyvmm.memory.pageset import PageSet
from pyvmm.migration.control import Abandoned, Cancelled
from pyvmm.migration.events import Broken, Resumed, Switched
from pyvmm.migration.frames import (
    MAX_BITS,
    MAX_PIECE,
    Away,
    Commit,
    Complete,
    Done,
    Have,
    Prepare,
    Ready,
    States,
    Taken,
)
from pyvmm.migration.link import PeerDied
from pyvmm.snapshot.format import checksum
from pyvmm.snapshot.states import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.machine.machine import VM
    from pyvmm.machine.migrating.precopy import Precopy
    from pyvmm.migration.decision import Decision
    from pyvmm.migration.events import Event, Report
    from pyvmm.migration.link import Link

_BARRED = "the guest is being handed over to another process, or runs there"
_WITNESS = 1.0
"""For the other side's witness to say that it was killed, before an error is told as a broken connection."""


class Handover:
    """tell: takes events; now: seconds so far; stop: nobody waits for the end any more."""

    def __init__(
        self,
        vm: VM,
        link: Link,
        decision: Decision,
        report: Report,
        tell: Callable[[Event], None],
        now: Callable[[], float],
        stop: threading.Event,
    ) -> None:
        self._vm = vm
        self._link = link
        self._decision = decision
        self._report = report
        self._tell = tell
        self._now = now
        self._committing = threading.Lock()  # a cancel comes before the commit point, or not at all
        self._stop = stop
        self._paused = self._taken = False
        self._apart = False
        """The guest is given away, and nothing is connected."""
        self._abandoned = False
        self._rest: Rest | None = None
        self._at = 0.0
        self._gone: Callable[[], None] = lambda: None

    # ---- up to the commit point ----

    def switch(self, precopy: Precopy, postcopy: bool) -> None:
        """Until the guest is given away. Raises what went wrong: then undo() is to be called."""
        vm, control = self._vm, self._link.control
        self._at = time.perf_counter()
        vm.life.pause_for_good(_BARRED)
        self._paused = True
        if vm.ended:
            raise MigrationError("the guest has ended meanwhile")
        vm.life.release()
        self._part("pause")
        self._decision.set("offered")
        goes = not postcopy and precopy.last(control)
        raw = encode(vm.save_state())
        if goes:
            precopy.finish(control)
        if not postcopy:
            self._part("last round")
        away = self._send_states(raw, precopy, postcopy)
        control.send(Prepare(precopy.round, away, len(raw), checksum(raw)))
        self._part("state")
        if postcopy:
            left = precopy.left if control.order.mode == "hybrid" else None
            self._rest = Rest(vm.memory, self._link, left, precopy.pace)
        control.expect(Ready)
        self._part("prepare")
        with self._committing:
            control.check()
            self._decision.set("given")
        self._report.state_bytes = len(raw)

    def _send_states(self, raw: bytes, precopy: Precopy, postcopy: bool) -> int:
        """States, and AWAY in hybrid. Returns how many pages come after the switch."""
        control = self._link.control
        for at in range(0, len(raw), MAX_PIECE):
            control.send(States(len(raw), at, raw[at : at + MAX_PIECE]))
        pages = self._vm.memory.size // PAGE_SIZE
        if control.order.mode == "hybrid":
            left = precopy.stand() if postcopy else PageSet(pages)
            bits = left.bytes()
            for first in range(0, pages, MAX_BITS * 8):
                count = min(MAX_BITS * 8, pages - first)
                control.send(Away(first, count, bits[first // 8 : first // 8 + -(-count // 8)]))
            return left.count()
        return pages if postcopy else 0

    def cancel(self, reason: str) -> None:
        """Before the commit point: all that waits raises Cancelled."""
        with self._committing:
            if self._decision.value != "given":
                self._link.control.fail(Cancelled(reason))

    def undo(self, reason: str) -> bool:
        """After an error before the commit point: the guest runs on here. False where the destination may not have
        heard of it: say_held() is to be called then."""
        ready = self._link.control.order.phase in ("prepared", "ready", "committed")
        self._decision.set("held")
        self._link.control.cancel(reason)
        self._run_on()
        heard = self._link.control.linger() or not ready
        if heard:
            self._decision.close()
        return heard

    def _run_on(self) -> None:
        if self._paused:
            self._paused = False
            self._vm.life.bar("")
            if self._vm.paused:
                self._vm.resume()

    # ---- behind it ----

    def complete(self, gone: Callable[[], None]) -> None:
        """Until the destination has all. gone: called once the guest runs there: what takes time and is no part of the
        downtime. Raises PeerDied, or Cancelled: if `gave_back`, the guest runs on here."""
        self._gone = gone
        begin, broken = True, None
        while True:
            try:
                if broken is not None:
                    begin = self._again(broken)
                if begin:
                    self._link.control.send(Commit())
                self._serve()
                break
            except Cancelled as cancelled:
                self._back("none", cancelled)
                raise
            except Abandoned as nobody:
                if not self._abandoned:
                    raise
                self._back("none", nobody)
                raise Cancelled("the destination is dead, by somebody's word, and never had the guest") from nobody
            except PeerDied:
                raise
            except MigrationError as error:  # also while the connections are made anew: then once more
                broken = error
        self._decision.release()
        with suppress(MigrationError):  # it would be told once more, and the guest needs nothing from here
            self._link.control.send(Done())
            self._link.control.linger()

    @property
    def gave_back(self) -> bool:
        """The guest runs on here, after all."""
        return self._decision.value == "held"

    def abandon(self) -> None:
        """See Outgoing.abandon()."""
        with self._committing:
            if not self._apart or self._taken:
                raise LifecycleError("nothing to abandon: no guest was given away and not heard of again")
            self._abandoned = True
        self._stop.set()

    def stop(self) -> None:
        """Has what waits for the destination look whether anybody still wants that."""
        self._link.control.fail(Abandoned("nobody waits for the destination any more"))

    def release(self) -> None:
        """Nobody needs to hear what was decided here."""
        self._decision.close()

    def say_held(self) -> None:
        """Until the destination has heard that the guest runs on here, or has died."""
        try:
            self._link.again(self._stop)
        except PeerDied:
            pass
        except Abandoned:  # nobody waits: the witness will say so, when this process ends
            return
        else:
            self._link.say_held()
        self._decision.close()

    def _serve(self) -> None:
        control = self._link.control
        while True:
            frame = control.next()
            if isinstance(frame, Taken):
                self._left()
                if self._rest is not None:
                    self._rest.start()
                self._gone()
            elif isinstance(frame, Have):
                self._have(frame)
            elif isinstance(frame, Complete):
                self._report.large_after = frame.large
                if self._rest is not None:
                    self._rest.stop()
                    self._rest.fill_in(self._report)
                return

    def _left(self) -> None:
        if not self._taken:
            self._taken = True
            self._part("commit")
            self._vm.life.leave()
            away = self._rest.missing if self._rest is not None else 0
            self._tell(Switched(self._now(), downtime=self._report.total_downtime, away=away))

    def _have(self, frame: Have) -> None:
        """The destination says what it has, after a break; when it has said all, the rest goes."""
        if self._rest is None:
            return
        if self._rest.note(frame.first, frame.count, frame.bits):
            self._tell(Resumed(self._now(), epoch=self._link.breaks, missing=self._rest.missing))

    def _again(self, error: MigrationError) -> bool:
        """After a break. Is COMMIT to be sent anew? Raises PeerDied, Abandoned, and Cancelled where the guest runs on
        here."""
        if self._rest is not None:
            self._rest.stop()
        try:
            self._link.check_witness(_WITNESS)
            self._tell(Broken(self._now(), reason=str(error)))
            self._apart = True
            theirs = self._link.again(self._stop)
            with self._committing:
                self._apart = False
                if self._abandoned:  # the word was given while they answered: it was wrong, and they are asked
                    self._abandoned = False
                    self._stop.clear()
        except PeerDied as died:
            self._back(died.decision, died)
            raise
        self._report.breaks = self._link.breaks
        if theirs == "none":
            raise Cancelled("the destination did not take the guest")
        self._link.control.order.resumed("running" if theirs == "taken" else "ready")
        self._link.control.start()
        self._link.join(self._rest is not None)
        if theirs == "taken":
            self._left()
        return theirs == "ready"

    def _back(self, theirs: str, why: MigrationError) -> None:
        """The destination will never run it: the guest runs on here, if it never has. Else it was killed there, and
        whoever waits for it here hears that."""
        if self._taken or theirs == "taken":
            self._vm.life.end(why)
            self._decision.close()
            return
        self._decision.set("held", theirs)
        self._run_on()
        self._decision.close()

    def _part(self, name: str) -> None:
        now = time.perf_counter()
        self._report.downtime[name] = now - self._at
        self._at = now
