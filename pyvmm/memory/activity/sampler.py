# sampler.py: watches a part of a guest's blocks at a time, and says how many of their pages were touched (technique T8,
# US9501422B2, US9330015B2). The work is in cffi_build/sample.c. Units: blocks of 2 MiB, pages of 4 KiB, seconds.
"""`Sampler`: decides which blocks are watched, when that ends, and how much of the guest's time it may cost."""

from __future__ import annotations

import errno
import random
import threading
import time
from contextlib import suppress

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, HostError, MemoryAccessError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Literal, Self, TypeAlias

    from pyvmm._native import CData
    from pyvmm.memory import GuestMemory

    Order: TypeAlias = Literal["random", "clock"]

BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
_TICKS = 20
"""Looks at what goes on, in a window; but one takes at least:"""
_LEAST_TICK = 0.002
_TRIES = 64
"""Blocks that are tried for one that can be sampled, in a tick."""
_FAULT_NS, _BLOCK_NS = 90_000, 50_000
"""What a touch costs its vCPU besides the answer (the exit, the way to the thread that answers and back, the mapping
made anew), and what a sample does, as measured with shadow paging: elsewhere it is less, and so the budget is kept."""
_LAST_TRIES = 5
_SAVED_UP = 0.25
"""Seconds of which the budget may be spent at once."""
_CANNOT = (-errno.EBUSY, -errno.ENXIO, -errno.EALREADY)


class SamplerCounts(Record):
    """Of one engine, since its beginning. begun, ended: samples; of the latter, active: ended by the threshold, and
    broken_off: by an operation that needed the block. touches: pages brought for that; waited: seconds in which vCPUs
    waited for these, as far as the engine sees; moved: seconds in which blocks were moved aside and back. refused:
    blocks that could not be sampled; failed: samples of which the large page did not come back; held: ticks in which
    the budget let nothing begin. The last three are the sampler's own."""

    __slots__ = ("active", "begun", "broken_off", "ended", "failed", "held", "moved", "refused", "touches", "waited")

    def __init__(self, native: CData, refused: int, failed: int, held: int) -> None:
        self.begun, self.ended = int(native.begun), int(native.ended)
        self.active, self.broken_off = int(native.active), int(native.broken_off)
        self.touches = int(native.touches)
        self.waited, self.moved = native.touch_ns / 1e9, native.moved_ns / 1e9
        self.refused, self.failed, self.held = refused, failed, held


class Sampler:
    """Watches blocks of `memory`, at most `share` of them at a time, each for `window` seconds.

    A block of which `threshold` pages are touched is active, and no longer watched from that moment on: so a hot block
    costs as many faults and no more; full: watch it to the end, and count all its pages. order: "random", as estimates
    of the working set need it, or "clock", one after the other. budget: the share of vCPUs' time that faults of the
    sampling may take. cpus: vCPUs, and paused: does the guest stand (then no window goes on)? Both as the memory knows.
    seed: of the order.

    on_sample(block, touched, active): called for each sample with a bit a page; not for those that were broken off
    before they could say anything. decide(block, touched): may the block stay (True, also where nothing is given), or
    are its untouched pages to stay aside, to be reclaimed? Never asked of active ones.

    Small pages, and blocks that are partly away, are not sampled: of those each touch of what is away is a fault, which
    says the same. Use as a context manager, or start() and stop(); or call tick() yourself. Raises BadInput.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        window: float = 0.5,
        share: float = 1 / 16,
        threshold: int = 32,
        order: Order = "random",
        budget: float = 0.02,
        full: bool = False,
        cpus: int | None = None,
        seed: int | None = None,
        paused: Callable[[], bool] | None = None,
        on_sample: Callable[[int, int, bool], object] = lambda block, touched, active: None,
        decide: Callable[[int, int], bool] | None = None,
    ) -> None:
        cpus = max(memory.engine.cpus, 1) if cpus is None else cpus
        _check_options(window, share, threshold, order, budget, cpus)
        self._engine = memory.engine
        self._blocks = memory.size // BLOCK_SIZE
        self.window = window
        self.share = share
        self.threshold = threshold
        self.full = full
        self.on_sample = on_sample
        self.decide = decide
        self._most = max(int(self._blocks * share), 1)
        self._budget = budget * cpus * 1e9  # ns a second
        self._paused = memory.paused if paused is None else paused
        self._next = self._in_order(order, seed)
        self._running: dict[int, float] = {}  # blocks, and when their window is over
        self._small: set[int] = set()  # blocks that came back as small pages
        self._told = ffi.new("struct pv_sample *")
        self._native = ffi.new("struct pv_sample_counts *")
        self._before: float | None = None  # the last tick
        self._credit = 0.0  # blocks that may begin, as time goes by
        self._purse, self._paid = 0.0, 0.0  # ns that may be spent; ns that others, and we by the last tick, have spent
        self._refused = self._failed = self._held = 0
        self._ticking = threading.Lock()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._paid = self._spent()
        memory.before_end(self._abandon)

    # ---- life ----

    def start(self) -> None:
        """Has a thread do it."""
        if self._thread is not None:
            raise BadInput("this sampler runs already")
        self._ending.clear()
        self._thread = threading.Thread(target=self._run, name="pyvmm sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and all samples that go on, of which nobody is told: their blocks are large pages again.
        Raises what a callback of on_sample or decide raised. Twice is once."""
        self._abandon()
        with self._ticking:
            for block in list(self._running):
                self._finish(block, keep=True)
            with suppress(MemoryAccessError):
                for _ in range(_LAST_TRIES):
                    self._merge()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _abandon(self) -> None:
        self._ending.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._ending.wait(max(self.window / _TICKS, _LEAST_TICK)):
            try:
                self.tick()
            except MemoryAccessError:  # the VM is closed
                return
            except BaseException as error:
                self._error = error  # told by stop()
                return

    # ---- what is done, again and again ----

    def tick(self) -> None:
        """Ends those samples that are over, and begins others. To be called some twenty times a window, unless start()
        has a thread do that. Raises HostError where the kernel cannot tell a large page from small ones."""
        with self._ticking:
            now = time.monotonic()
            passed = 0.0 if self._before is None else now - self._before
            self._before = now
            if self._paused():
                self._running = {block: until + passed for block, until in self._running.items()}
                return
            self._earn(passed)
            for block, until in list(self._running.items()):
                if now >= until or self._state(block) != lib.PV_SAMPLE_RUNNING:
                    self._end(block)
            self._merge()
            self._begin(now)

    def _merge(self) -> None:
        """The kernel may have had a page in use, or no large page: once more, unless somebody wants it small now."""
        for block in list(self._small):
            if (
                self._engine.call(lambda native, block=block: _is_split(native, block))
                or self._engine.call(lib.pv_engine_merge, block) == 0
            ):
                self._small.discard(block)

    def _earn(self, passed: float) -> None:
        """What may begin now, and be spent for it."""
        self._credit = min(self._credit + passed * self._most / self.window, max(self._most / _TICKS, 1.0))
        paid = self._spent()
        allowed = self._budget * _SAVED_UP
        self._purse = min(self._purse + passed * self._budget, allowed) - (paid - self._paid)
        self._paid = paid

    def _spent(self) -> float:
        self._tell_counts()
        return float(self._native.touch_ns + self._native.touches * _FAULT_NS + self._native.begun * _BLOCK_NS)

    def _begin(self, now: float) -> None:
        if self._purse < 0:
            self._held += 1
            return
        limit = 0 if self.full else self.threshold
        for _ in range(_TRIES):
            if self._credit < 1 or len(self._running) >= self._most:
                return
            block = next(self._next)
            if block in self._running:
                continue
            result = self._engine.call(lib.pv_sample_begin, block, limit)
            if result == 0:
                self._running[block] = now + self.window
                self._credit -= 1
            elif result == -errno.EOPNOTSUPP:
                raise HostError("activity cannot be sampled: the kernel tells no large pages (PAGEMAP_SCAN, Linux 6.7)")
            else:
                self._refused += 1
                self._failed += result not in _CANNOT

    def _end(self, block: int) -> None:
        keep = True
        if self.decide is not None and self._engine.call(lib.pv_sample_look, block, self._told) == 0:
            active = self._told.touched >= self.threshold or self._told.state != lib.PV_SAMPLE_RUNNING
            keep = active or bool(self.decide(block, _bits(self._told)))
        if not self._finish(block, keep):
            return
        active = self._told.state == lib.PV_SAMPLE_ACTIVE or self._told.touched >= self.threshold
        if active or self._told.state != lib.PV_SAMPLE_BROKEN_OFF:
            self.on_sample(block, _bits(self._told), active)

    def _finish(self, block: int, keep: bool) -> bool:
        """Ends one. Was there one?"""
        del self._running[block]
        try:
            result = self._engine.call(lib.pv_sample_end, block, keep, self._told)
        except MemoryAccessError:  # the VM is closed
            return False
        self._failed += result not in (0, -errno.ENOENT)
        if result != -errno.ENOENT and self._told.small:
            self._small.add(block)
        return result != -errno.ENOENT

    def _state(self, block: int) -> int:
        return self._engine.call(lib.pv_sample_state, block)

    def _in_order(self, order: Order, seed: int | None) -> Iterator[int]:
        """All blocks, each once a round."""
        blocks = list(range(self._blocks))
        rng = random.Random(seed)
        while True:
            if order == "random":
                rng.shuffle(blocks)
            yield from blocks

    # ---- what is known ----

    def _tell_counts(self) -> None:
        self._engine.tell(lib.pv_sample_counts, self._native)

    def counts(self) -> SamplerCounts:
        """What it has done so far."""
        with self._ticking:
            self._tell_counts()
            return SamplerCounts(self._native, self._refused, self._failed, self._held)

    @property
    def missing(self) -> str:
        """Why the host cannot sample, as its thread found; or nothing."""
        return str(self._error) if isinstance(self._error, HostError) else ""

    @property
    def watched(self) -> list[int]:
        """Blocks that are sampled now."""
        return list(self._running)

    def population(self) -> int:
        """Blocks of which samples tell: large pages, and those that are watched now."""
        running = set(self._running)
        looks = self._engine.looks()
        return len(running) + sum(look == "large" and block not in running for block, look in enumerate(looks))


def _is_split(native: CData, block: int) -> bool:
    return bool(int(lib.pv_engine_blocks(native)[block]) & lib.PV_BLOCK_SMALL)


def _bits(told: CData) -> int:
    return int.from_bytes(bytes(ffi.buffer(told.bits)), "little")


def _check_options(window: float, share: float, threshold: int, order: str, budget: float, cpus: int) -> None:
    if not 0.001 <= window <= 3600:
        raise BadInput(f"a window of {window:g} s: give 0.001 to 3600")
    if not 0 < share <= 1:
        raise BadInput(f"a share of {share:g} of the blocks: give more than 0, and at most 1")
    if not 1 <= threshold <= BLOCK_PAGES:
        raise BadInput(f"a threshold of {threshold} pages: give 1 to {BLOCK_PAGES}")
    if order not in ("random", "clock"):
        raise BadInput(f"order={order!r}: choose random or clock")
    if not 0 < budget <= 1:
        raise BadInput(f"a budget of {budget:g} of the guest's time: give more than 0, and at most 1")
    if cpus < 1:
        raise BadInput(f"{cpus} vCPUs: give 1 or more")
