# lifecycle.py: the vCPUs of one VM as one: started, paused, resumed and ended together. Thread-safe.
"""`Lifecycle`: and which of the things that can end a guest came first."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from pyvmm.errors import HostError, LifecycleError, PyvmmError
from pyvmm.machine.outcome import RunResult
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.explain import ExitFacts
    from pyvmm.machine.board import Board
    from pyvmm.vcpu import Vcpu


_PAUSE_LIMIT = 10.0
"""Seconds after which a vCPU that does not park is a fault of ours or of the host."""
_HOLD_LIMIT = 0.5
"""Seconds in which a vCPU parks or ends that a signal reaches."""


class Crash(Record):
    """A guest that cannot go on: which vCPU, and what KVM said of it."""

    __slots__ = ("facts", "vcpu")

    def __init__(self, vcpu: Vcpu, facts: ExitFacts) -> None:
        self.vcpu = vcpu
        self.facts = facts


class Lifecycle:
    """The threads of a VM's vCPUs. `paused`: parked, or about to be; `outcome`: what ended the guest, if anything has:
    a RunResult, a Crash, or the exception that ended a vCPU's thread; `trouble`: why hold() paused it, if it did."""

    def __init__(self, vcpus: list[Vcpu], board: Board) -> None:
        self._vcpus = vcpus
        self._board = board  # its devices run and rest with the vCPUs
        self._lock = threading.Lock()
        self._pausing = threading.Lock()  # held until all are parked, so that a resume() comes before or after
        self._closed = False
        self._alive = 0  # threads that have not ended
        self._ended = threading.Event()
        self._news = threading.Event()  # for wait(): ended, or in trouble
        self._barred = ""  # why nothing may run here
        self.paused = False
        self.trouble: PyvmmError | None = None
        self.outcome: RunResult | Crash | BaseException | None = None

    @property
    def started(self) -> bool:
        """Has it been started? Also true after its end."""
        return self._vcpus[0].started

    @property
    def ended(self) -> bool:
        """Have all threads come to their end?"""
        return self._ended.is_set()

    def start(self, on_exit: Callable[[Vcpu], None]) -> None:
        """Starts all vCPUs, each in its thread. Raises LifecycleError if they were started already, and what hold() was
        told before, once: the next call tries."""
        with self._lock:
            self.require_open()
            if self.started:
                raise LifecycleError("the VM was started already: a guest runs once")
            if self._barred:
                raise LifecycleError(self._barred)
            trouble, self.trouble = self.trouble, None
            if trouble is not None:
                self._news.clear()
                raise trouble
            self._board.go()
            self._alive = len(self._vcpus)
            for vcpu in self._vcpus:
                vcpu.start(on_exit, self._on_thread_end)

    def wait(self, timeout: float | None) -> bool:
        """Waits until all threads have ended or hold() was called, at most `timeout` seconds: is it so?"""
        return self._news.wait(timeout)

    def hold(self, trouble: PyvmmError) -> None:
        """Pauses the VM, whatever it does, because it must not go on like this; resume() lets it try. One that has not
        started does not start: start() raises the trouble.

        A vCPU that KVM has waiting for a page, where no signal reaches it, does not park: it stands still as it is.
        """
        with self._lock:
            self.trouble = trouble  # at once: pause() may be waiting for a vCPU that it has to do with
        with self._pausing:
            with self._lock:
                if (
                    self._closed or self.outcome is not None or self.trouble is None
                ):  # None: somebody was told, and tries
                    return
                self.paused = self.started
                for vcpu in self._vcpus if self.paused else ():
                    vcpu.request_pause()
            for vcpu in self._vcpus if self.paused else ():
                with suppress(HostError):
                    vcpu.wait_parked(_HOLD_LIMIT)
            self._board.ask()
            self._news.set()

    def pause(self) -> float:
        """Parks all vCPUs and returns the seconds that took; after the guest's end waits for that instead.

        Raises what hold() was told where that is why a vCPU does not park."""
        self.require_foreign("wait for itself to pause")
        return self._pause("")

    def pause_for_good(self, why: str) -> float:
        """The same, and bar(why) in one."""
        return self._pause(why)

    def _pause(self, bar: str) -> float:
        begin = time.perf_counter()
        with self._pausing:
            with self._lock:
                self.require_open()
                if not self.started:
                    raise LifecycleError("the VM is not started: there is nothing to pause")
                self._barred = self._barred or bar
                self.paused = self.outcome is None
                for vcpu in self._vcpus if self.paused else ():  # to park now would undo the request to stop
                    vcpu.request_pause()
            for vcpu in self._vcpus:
                self._await_parked(vcpu)
            if not self.paused:
                self._ended.wait()  # the threads are through, and only have to say so
            self._board.hold()
        return time.perf_counter() - begin

    def bar(self, why: str) -> None:
        """Nobody may start or resume the vCPUs any more: another process may run the guest. "": they may again."""
        with self._pausing, self._lock:
            self._barred = why

    def release(self) -> None:
        """After pause_for_good(): what the devices are kept in may be another process's, until resume(). Raises
        HostError."""
        self._board.release()

    def leave(self) -> None:
        """The guest runs elsewhere: here it has ended."""
        self.end(RunResult("migrated", 0))

    def ask_to_pause(self) -> None:
        """Has the vCPUs park as soon as they can, and does not wait: some may wait for a page. resume() as ever."""
        with self._pausing, self._lock:
            if self._closed or self.outcome is not None or not self.started:
                return
            self.paused = True
            self._board.ask()
            for vcpu in self._vcpus:
                vcpu.request_pause()

    def hold_back(self, seconds: float) -> None:
        """Parks the vCPUs for so long, unless they are parked or ending anyway, so that the guest gets less done."""
        with self._pausing:
            with self._lock:
                if self._closed or self.paused or self.outcome is not None or not self.started:
                    return
                for vcpu in self._vcpus:
                    vcpu.request_pause()
            time.sleep(seconds)
            with self._lock:
                for vcpu in self._vcpus if self.outcome is None else ():
                    vcpu.request_run()

    def _await_parked(self, vcpu: Vcpu) -> None:
        end = time.monotonic() + _PAUSE_LIMIT
        while True:
            try:
                return vcpu.wait_parked(_HOLD_LIMIT)
            except HostError:
                if self.trouble is not None:
                    raise self.trouble from None
                if time.monotonic() > end:
                    raise HostError(f"vCPU {vcpu.index} did not park within {_PAUSE_LIMIT:g} s") from None

    def resume(self) -> PyvmmError | None:
        """Lets paused vCPUs go on; returns what they were held for. Raises LifecycleError unless they are paused."""
        self.require_foreign("resume itself")  # whoever pauses may be waiting for this very thread
        with self._pausing, self._lock:
            self.require_open()
            if not self.paused:
                raise LifecycleError("the VM is not paused")
            if self._barred:
                raise LifecycleError(self._barred)
            if self.outcome is None:
                self._board.go()
            self.paused = False
            trouble, self.trouble = self.trouble, None
            if trouble is not None:
                self._news.clear()
            for vcpu in self._vcpus if self.outcome is None else ():
                vcpu.request_run()
        return trouble

    def end(self, outcome: RunResult | Crash | BaseException) -> None:
        """Ends the guest soon; returns at once. What comes first is the outcome."""
        with self._lock:
            if self.outcome is None:
                self.outcome = outcome
            self._board.ask()
            for vcpu in () if self._closed else self._vcpus:  # a closed vCPU has no shared area to write to any more
                vcpu.request_stop()

    def join(self, let_go: Callable[[], None]) -> None:
        """Waits until all threads have ended, after end().

        let_go: called if one does not, and hold() has said why: it waits in KVM for a page, and no signal reaches it.
        """
        self.require_foreign("wait for its own end: request_stop() it there")
        for vcpu in self._vcpus:
            while not vcpu.join(_HOLD_LIMIT):
                if self.trouble is not None:
                    let_go()

    def close(self, let_go: Callable[[], None]) -> None:
        """Ends the guest, if nothing has yet, and its devices. The vCPUs may be closed then."""
        self.end(RunResult("stopped", 0))
        self.join(let_go)
        self._board.close(let_go)
        with self._lock:
            self._closed = True

    def require_open(self) -> None:
        """Raises LifecycleError after close()."""
        if self._closed:
            raise LifecycleError("the VM is closed")

    def require_foreign(self, what: str) -> None:
        """Raises LifecycleError on a thread of one of the vCPUs."""
        if any(vcpu.is_current for vcpu in self._vcpus):
            raise LifecycleError(f"a VM's own vCPU thread cannot {what}")

    def require_still(self, what: str) -> None:
        """Raises LifecycleError while the vCPUs run."""
        self.require_open()
        if self.started and not self.paused and not self.ended:
            raise LifecycleError(f"the VM is running: pause() it before {what}")

    def _on_thread_end(self, vcpu: Vcpu, failure: BaseException | None) -> None:
        if failure is not None:
            self.end(failure)
        with self._lock:
            self._alive -= 1
            last = self._alive == 0
        if last:
            self._ended.set()
            self._news.set()
