# trace.py: what all trackers share: order of calls, bits that are never lost, and the host's own writes.
"""`Trace`: start, collect again and again, stop. A tracker implements `_arm`, `_fetch` and `_disarm`."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager

from pyvmm._native import lib
from pyvmm.errors import LifecycleError
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory.trace.runs import Runs, new_bitmap, words_for
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from pyvmm._native import CData
    from pyvmm.kvm import VmFd
    from pyvmm.memory import GuestMemory
    from pyvmm.memory.trace.ring import Rings


class Target:
    """What a tracker may use of one VM; all traces of it share this.

    fd, memory: the VM's; vcpus: their `struct pv_vcpu *`; rings: its dirty rings, if it has them; require_open: raises
    LifecycleError after the VM's close(). active: the trace that runs; lock: guards that.
    """

    def __init__(
        self,
        fd: VmFd,
        memory: GuestMemory,
        vcpus: list[CData],
        rings: Rings | None,
        require_open: Callable[[], None],
    ) -> None:
        self.fd = fd
        self.memory = memory
        self.vcpus = vcpus
        self.rings = rings
        self.require_open = require_open
        self.lock = threading.Lock()
        self.active: Trace | None = None

    def close(self) -> None:
        """The VM is about to go: the trace that runs, if one does, ends without asking KVM."""
        if (trace := self.active) is not None:
            trace.abandon()


class TraceStats(Record):
    """collections: collect() calls that returned; pages: reported by them in all; host_pages: of the pages, those that
    the host's own writes reported, counted at each collection; seconds spent in start(), collect() and stop()."""

    __slots__ = ("collect_seconds", "collections", "host_pages", "pages", "start_seconds", "stop_seconds")

    def __init__(self) -> None:
        self.collections = 0
        self.pages = 0
        self.host_pages = 0
        self.start_seconds = 0.0
        self.collect_seconds = 0.0
        self.stop_seconds = 0.0

    __hash__ = None  # type: ignore[assignment]


class Trace(ABC):
    """A write trace over all RAM of one VM. One at a time runs; any thread but a vCPU's own may call.

    `collect()` gives all pages written since start() or the last collect() returned, and maybe more. Copying the pages
    *after* collect() returned catches every write before it; what is written meanwhile is in the next. So: start(),
    copy all RAM, then collect() and copy in rounds; pause the VM before the last round.

    The vCPUs may run during all of it. To install the trace while they stand instead, for comparison:
    `vm.pause(); trace.start(); vm.resume()`.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._pages = target.memory.size // PAGE_SIZE
        self._pending = new_bitmap(self._pages)  # fetched, or put back, and not yet given to anybody
        self._host = new_bitmap(self._pages)  # written by the host; set without a lock, also in a garbage collection
        self._lock = threading.RLock()  # one of start, collect, put_back, stop at a time
        self.stats = TraceStats()

    # ---- what a tracker does; each is called with the lock held ----

    @abstractmethod
    def _arm(self) -> None:
        """Starts logging; has undone what it did where it raises."""

    @abstractmethod
    def _fetch(self, bits: CData) -> None:
        """Adds the pages written since the last fetch to `bits`, and has logging go on.

        A bit that the kernel has given up must be in `bits` before anything can fail.
        """

    @abstractmethod
    def _disarm(self) -> None:
        """Ends logging, as far as it can; then raises what went wrong."""

    # ---- what people call ----

    @property
    def running(self) -> bool:
        """Between start() and stop()?"""
        return self._target.active is self

    def start(self, after: Trace | None = None) -> None:
        """Begins to trace: every write after this has returned is reported. Returns when all RAM is traced.

        after: a trace that runs, of another mechanism, which this one takes over from: it ends, and what it has not
        been asked for is in the first collect() of this one. No write in between is lost, and the vCPUs may run.
        Raises LifecycleError where another trace of this VM runs or the VM is closed, KernelError where KVM fails:
        then `after` runs on.
        """
        begin = time.perf_counter()
        target = self._target
        with self._lock:
            with target.lock:
                target.require_open()
                if target.active is not after:
                    which = "the trace was" if target.active is self else "another trace of this VM is"
                    raise LifecycleError(f"{which} started already: stop() it first")
                target.active = self
            words = words_for(self._pages)
            lib.pv_zero(self._pending, words * 8)
            lib.pv_zero(self._host, words * 8)
            try:
                target.memory.on_write = self.host_wrote
                self._arm()
            except BaseException:
                self._end()
                if after is not None:
                    with target.lock:
                        target.active, target.memory.on_write = after, after.host_wrote
                raise
            if after is not None:
                after._hand_over(self._pending)
            self.stats.start_seconds += time.perf_counter() - begin

    def _hand_over(self, bits: CData) -> None:
        """Ends, with what was not collected in `bits`; another trace runs already."""
        words = words_for(self._pages)
        with self._lock:
            self._fetch(self._pending)
            lib.pv_bits_take(self._pending, self._host, words)
            lib.pv_bits_or(bits, self._pending, words)
            self._disarm()

    def collect(self) -> Runs:
        """The pages written since start() or the last collect(); a superset.

        Raises LifecycleError unless the trace runs, KernelError where KVM fails: what it had told by then is in the
        next collect().
        """
        begin = time.perf_counter()
        with self._lock:
            self._require_running("collect() from it")
            self._fetch(self._pending)
            for first, count in self._target.memory.written_views():
                lib.pv_bits_set(self._host, first, count)
            words = words_for(self._pages)
            host_pages = lib.pv_bits_take(self._pending, self._host, words)
            runs = Runs.from_bits(self._pending, self._pages)
            self.stats.collections += 1
            self.stats.pages += runs.pages
            self.stats.host_pages += host_pages
            self.stats.collect_seconds += time.perf_counter() - begin
            lib.pv_zero(self._pending, words * 8)
            return runs

    @contextmanager
    def collecting(self) -> Iterator[Runs]:
        """collect(), and put_back() of what it gave where the block raises: `with trace.collecting() as runs: ...`."""
        runs = self.collect()
        try:
            yield runs
        except BaseException:
            self.put_back(runs)
            raise

    def put_back(self, runs: Runs) -> None:
        """Has the next collect() report these pages again. Raises BadInput where they are beyond the VM's RAM."""
        runs.require_within(self._pages)
        with self._lock:
            runs.mark(self._pending)

    def host_wrote(self, first_page: int, count: int) -> None:
        """Reports a write that KVM does not see: one of ours, through the mapping of RAM. After the write, in pages.

        GuestMemory calls it for all that goes through it; others who write to the mapping must. Takes no lock.
        """
        if first_page < 0 or count < 0 or first_page + count > self._pages:
            raise IndexError(f"pages {first_page}+{count} of {self._pages}")
        lib.pv_bits_set(self._host, first_page, count)

    def stop(self) -> None:
        """Ends the trace, and what was not collected is forgotten. A second call does nothing."""
        begin = time.perf_counter()
        with self._lock:
            if self.running:
                try:
                    self._disarm()
                finally:
                    self._end()
                    self.stats.stop_seconds += time.perf_counter() - begin

    def abandon(self) -> None:
        """Ends the trace where the VM ends: waits for a collect() that is under way, and leaves KVM as it is."""
        with self._lock:
            if self.running:
                self._end()

    def _end(self) -> None:
        with self._target.lock:
            self._target.memory.on_write = None
            self._target.active = None

    def _require_running(self, what: str) -> None:
        self._target.require_open()
        if not self.running:
            raise LifecycleError(f"the trace is not started: start() it before you {what}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
