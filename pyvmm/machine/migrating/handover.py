# handover.py: the guest stands, and one of two processes will run it: docs/migration-protocol.md, "Who owns the guest".
# Seconds.
"""`Handover`: of the source."""

from __future__ import annotations

import threading
import time

from pyvmm.migration.frames import MAX_PIECE, Commit, Complete, Done, Prepare, Ready, States, Taken
from pyvmm.snapshot.format import checksum
from pyvmm.snapshot.states import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.machine import VM
    from pyvmm.machine.migrating.precopy import Precopy
    from pyvmm.migration.control import Control
    from pyvmm.migration.decision import Decision
    from pyvmm.migration.events import Report

_BARRED = "the guest is being handed over to another process, or runs there"


class Handover:
    """From the pause to DONE, and back where that is still possible."""

    def __init__(
        self, vm: VM, control: Control, decision: Decision, committing: threading.Lock, report: Report
    ) -> None:
        self._vm = vm
        self._control = control
        self._decision = decision
        self._committing = committing
        self._report = report
        self._paused = False
        self._at = 0.0

    def switch(self, precopy: Precopy, postcopy: bool) -> None:
        """All of it. Raises what went wrong: before GIVEN undo() is to be called."""
        control, vm = self._control, self._vm
        self._at = time.perf_counter()
        vm.life.pause_for_good(_BARRED)
        self._paused = True
        self._part("pause")
        self._decision.set("offered")
        precopy.last(control)
        raw = encode(vm.save_state())
        precopy.finish(control)
        self._part("last round")
        for at in range(0, len(raw), MAX_PIECE):
            control.send(States(len(raw), at, raw[at : at + MAX_PIECE]))
        control.send(Prepare(precopy.round, 0, len(raw), checksum(raw)))
        self._part("state")
        control.expect(Ready)
        self._part("prepare")
        with self._committing:
            control.check()
            self._decision.set("given")
        control.send(Commit())
        control.expect(Taken)
        self._part("commit")
        vm.life.leave()
        self._report.state_bytes = len(raw)
        control.expect(Complete)
        control.send(Done())
        precopy.close()
        precopy.fill_in(self._report)
        self._decision.release()

    def undo(self, reason: str) -> None:
        """The guest runs on here."""
        if self._decision.value == "given":
            return
        if self._decision.value == "offered":
            self._decision.set("held")
        self._control.cancel(reason)
        if self._paused:
            self._vm.life.bar("")
            if self._vm.paused:
                self._vm.resume()
        self._control.linger()
        self._decision.release()

    def _part(self, name: str) -> None:
        now = time.perf_counter()
        self._report.downtime[name] = now - self._at
        self._at = now
