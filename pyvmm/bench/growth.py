# growth.py: what a VM costs that has 1 to 16 GiB of RAM, of which its guest uses next to nothing: all that grows with
# the size alone (of measure P18 the second half). Units: seconds, MiB; "x": the largest one's over the smallest one's.
"""Guests `echo`, or, where there is to be something, with random data in one block of 2 MiB in a hundred.

"GiB more": what a GiB costs beyond the first size. What differs between the sizes is the size: the host's memory is
touched as little as the cost is about, so that 16 GiB need not be there.
"""

from __future__ import annotations

import ctypes
import os
import random
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from pyvmm._native import ffi, lib
from pyvmm.bench import Collected
from pyvmm.bench.checkpoints import folder
from pyvmm.bench.running import memory_of, timed
from pyvmm.errors import HostError, check
from pyvmm.host import has
from pyvmm.layout import BLOCK_SIZE, GIB, MIB, PAGE_SIZE, format_size
from pyvmm.machine import VM
from pyvmm.memory.reclaim.live import LiveView
from pyvmm.memory.trace import TRACKERS
from pyvmm.record import Record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    Cost: TypeAlias = tuple[str, Literal["s", "MiB"], float]

GUEST = "echo"
_BYTE = "x"
_BOOT = 20.0
_TOUCHED = 100
"""Of the blocks of a guest that has been touched, one in so many is."""
_PART = 16 * MIB
"""That is populated, at the end of RAM."""
_MOVED = 60.0
_RINGS = 4096


class Size(Record):
    """memories: RAM of the guests, the smallest first; rounds, after one that warms up; idle: seconds in which a guest
    at its limit does nothing."""

    __slots__ = ("idle", "memories", "rounds")

    def __init__(self, memories: tuple[int, ...], rounds: int, idle: float) -> None:
        self.memories = memories
        self.rounds = rounds
        self.idle = idle


FULL = Size((GIB, 2 * GIB, 4 * GIB, 8 * GIB, 16 * GIB), 5, 0.5)
QUICK = Size((32 * MIB, 64 * MIB), 1, 0.05)


@contextmanager
def _guest(memory: int, touched: bool = False, dirty_ring: int = 0) -> Iterator[VM]:
    """A guest that sleeps, when it has sent its first byte back."""
    with VM(memory, dirty_ring=dirty_ring) as vm:
        begin(vm, touched)
        yield vm


def begin(vm: VM, touched: bool = False) -> None:
    """Until the first byte of the guest, which then waits for more. Raises HostError."""
    vm.load(GUEST)
    if touched:
        noise, pages = random.Random(1).randbytes(BLOCK_SIZE), BLOCK_SIZE // PAGE_SIZE
        for block in range(1, vm.memory.size // BLOCK_SIZE, _TOUCHED):
            vm.memory.write(vm.memory.gpa_of(block * pages), noise)
    vm.start()
    vm.type(_BYTE)
    if not vm.expect(_BYTE, _BOOT):
        raise HostError(f"the guest {GUEST} has not begun: {vm.printed!r}")


# ---- the costs of one size ----


def _held() -> float:
    """MiB of this process, without what the C library keeps of other VMs: else small ones would seem to take less."""
    ctypes.CDLL(None).malloc_trim(0)
    return memory_of("self")["all"]


def _life(memory: int, path: str) -> Iterator[Cost]:
    before = _held()
    begun = time.perf_counter()
    vm = VM(memory)
    try:
        yield "VM()", "s", time.perf_counter() - begun
        yield "start() to the first byte", "s", timed(lambda: begin(vm))
        yield "memory of the process", "MiB", _held() - before
        yield f"{format_size(_PART)} populated", "s", _populate(vm)
        vm.memory.engine.equip()
        yield "pages counted", "s", timed(vm.memory.pages)
    finally:
        closing = timed(vm.close)
    yield "close()", "s", closing


def _populate(vm: VM) -> float:
    part = min(_PART, vm.memory.size // 4)
    at = ffi.cast("uint8_t *", vm.memory.hva(vm.memory.gpa_of((vm.memory.size - part) // PAGE_SIZE)).value)
    return timed(lambda: check(lib.pv_madvise(at, part, lib.MADV_POPULATE_WRITE), "madvise"))


def _engine(memory: int, path: str) -> Iterator[Cost]:
    """The first page that goes, and what keeps a limit."""
    with _guest(memory) as vm:
        before, last = _held(), memory // PAGE_SIZE - 1
        yield "the engine made, and its first page removed", "s", timed(lambda: vm.memory.engine.remove(last))
        yield "the next one", "s", timed(lambda: vm.memory.engine.remove(last - 1))
        yield "memory of an engine", "MiB", _held() - before


def _limit(memory: int, path: str, idle: float) -> Iterator[Cost]:
    with _guest(memory) as vm:
        before, half = _held(), memory // 2
        yield "limit, the first", "s", timed(lambda: setattr(vm.memory, "limit", half))
        yield "limit, changed", "s", timed(lambda: setattr(vm.memory, "limit", half - MIB))
        vm.wait(idle)
        yield "memory of what keeps a limit", "MiB", _held() - before
        begin = time.process_time()
        vm.wait(idle)
        yield "CPU time a second, at its limit and idle", "s", (time.process_time() - begin) / idle
        view = LiveView(vm.memory.engine, half // PAGE_SIZE, 0)
        view.look()
        yield "who reclaims looks at all pages", "s", timed(view.look)
        yield "limit, given up", "s", timed(lambda: setattr(vm.memory, "limit", None))


def _traces(memory: int, path: str) -> Iterator[Cost]:
    for name, row in TRACKERS.items():
        if not all(map(has, row.features)):
            continue
        with _guest(memory, dirty_ring=_RINGS if row.vm_options else 0) as vm:
            trace = vm.trace(name)
            yield f"trace {name}: start()", "s", timed(trace.start)
            yield f"trace {name}: a look", "s", timed(trace.collect)
            yield f"trace {name}: stop()", "s", timed(trace.stop)


def _files(memory: int, path: str) -> Iterator[Cost]:
    for touched, what in ((False, "untouched"), (True, "1 % touched")):
        file = os.path.join(path, "saved")
        with _guest(memory, touched) as vm:
            yield f"snapshot, {what}", "s", timed(lambda vm=vm, file=file: vm.snapshot(file))  # type: ignore[misc]
            live = f"{file}.live"
            if has("uffd_wp"):
                saved = vm.snapshot(live, mode="live")
                yield f"snapshot, {what}, live: the pause", "s", saved.pause_seconds
                os.unlink(live)
        yield f"snapshot, {what}: its file", "MiB", os.path.getsize(file) / MIB
        yield f"restore, {what}, lazy: to the first instruction", "s", _restored(file, lazy=True)
        yield f"restore, {what}, eager: to the first instruction", "s", _restored(file, lazy=False)
        os.unlink(file)


def _restored(file: str, lazy: bool) -> float:
    begin = time.perf_counter()
    with VM.restore(file, lazy=lazy, fill=not lazy) as vm:
        vm.start()
        while (entered := vm.vcpus[0].entered) is None:
            os.sched_yield()
        return entered - begin


def _moved(memory: int, path: str) -> Iterator[Cost]:
    """Both sides are in this process."""
    with _guest(memory) as vm, VM.receive(f"unix:{path}/in") as coming:
        report = vm.migrate(coming.address).result(_MOVED)
        with coming.vm(_MOVED):
            yield "migration, untouched", "s", report.seconds
            yield "migration, untouched: downtime", "s", report.total_downtime


# ---- all sizes ----


def measure_growth(found: Collected, size: Size) -> None:
    """Adds the costs of each size, in rounds; then of each cost the ratio of the largest to the smallest, and what a
    GiB more costs. Raises HostError, BadInput."""
    costs: dict[str, dict[int, list[float]]] = {}
    units: dict[str, str] = {}
    with folder(size.memories[-1] // 32) as path:
        for turn in range(size.rounds + 1):
            for memory in size.memories:
                for name, unit, value in _all(memory, path, size.idle):
                    units[name] = unit
                    if turn:  # the round before warms up
                        costs.setdefault(name, {}).setdefault(memory, []).append(value)
    first, last = size.memories[0], size.memories[-1]
    for name, by_size in costs.items():
        for memory, values in by_size.items():
            found.add(f"by RAM: {name}", format_size(memory), units[name], *values)
    for name, by_size in costs.items():
        pairs = list(zip(by_size[first], by_size[last], strict=True))
        if all(small > 0 for small, _ in pairs):
            ratios = [large / small for small, large in pairs]
            found.add(f"{format_size(last)} / {format_size(first)} of RAM", name, "x", *ratios)
        more = [(large - small) / ((last - first) / GIB) for small, large in pairs]
        found.add("a GiB of RAM more", name, units[name], *more)


def _all(memory: int, path: str, idle: float) -> Iterator[Cost]:
    yield from _life(memory, path)
    yield from _engine(memory, path)
    yield from _limit(memory, path, idle)
    yield from _traces(memory, path)
    yield from _files(memory, path)
    yield from _moved(memory, path)
