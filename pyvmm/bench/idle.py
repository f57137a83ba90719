# idle.py: what the memory engine costs while it has nothing to do, and what changing a block costs. Units: M writes/s,
# % of guest memory, seconds.
"""A guest's speed with an idle engine and without one, the page map's memory, and split, merge, break of a block."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from pyvmm._native import ffi, lib
from pyvmm.bench import Collected, Result
from pyvmm.bench.running import Watch, alone, run_on, timed, touching
from pyvmm.errors import KernelError, check
from pyvmm.layout import BLOCK_SIZE, MIB, Gpa
from pyvmm.memory.engine import BLOCK_PAGES
from pyvmm.record import Record

if TYPE_CHECKING:
    from pyvmm.machine import VM

_FIRST = 2
"""The first block that is used: below it are the guest's program and page tables."""
_SIDES = ("no engine", "idle engine")


class Size(Record):
    """memory: bytes of a guest's RAM; seconds: its speed is watched; vms: pairs of VMs; blocks: changed a round."""

    __slots__ = ("blocks", "memory", "rounds", "seconds", "vms")

    def __init__(self, memory: int, vms: int, rounds: int, seconds: float, blocks: int) -> None:
        self.memory = memory
        self.vms = vms
        self.rounds = rounds
        self.seconds = seconds
        self.blocks = blocks


FULL = Size(256 * MIB, 6, 3, 0.3, 20)
QUICK = Size(16 * MIB, 1, 1, 0.02, 2)


def measure(quick: bool = False) -> list[Result]:
    """Speed: in pairs, of several pairs of VMs, since where a VM's memory happens to lie shows too. An idle engine has
    taken a block away and brought it back: it has its thread and userfaultfd, and nothing is away. The map's memory is
    what the process grew by, page tables with it, when all blocks had been away once."""
    size = QUICK if quick else FULL
    found = Collected()
    for pair in range(size.vms):
        _speed(found, size, pair)
    _map(found, size)
    _blocks(found, size)
    return found.results()


def _use(vm: VM) -> None:
    vm.memory.engine.remove(_FIRST * BLOCK_PAGES, BLOCK_PAGES)
    vm.memory.engine.install(_FIRST * BLOCK_PAGES, BLOCK_PAGES)


def _speed(found: Collected, size: Size, pair: int) -> None:
    with ExitStack() as stack:
        vms = [stack.enter_context(touching(size.memory, "")) for _ in _SIDES]
        for vm in vms:
            vm.pause()
        sides = dict(zip(_SIDES, reversed(vms) if pair % 2 else vms, strict=True))
        _use(sides["idle engine"])
        for turn in range(size.rounds + 1):
            for name, vm in sides.items():
                with alone(vm):
                    run_on(vm, size.seconds / 10)
                    watch = Watch(vm)
                    run_on(vm, size.seconds)
                    rates = watch.rate(), watch.rate_of_threads()
                if turn:
                    found.add("a guest writes to all its memory: writes a second", name, "M/s", rates[0] / 1e6)
                    found.add("... a second of its vCPU's CPU time", name, "M/s", rates[1] / 1e6)


def _process_bytes() -> int:
    with open("/proc/self/status") as status:
        sizes = dict(line.split(":", 1) for line in status)
    return sum(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "VmPTE"))


def _map(found: Collected, size: Size) -> None:
    group = "memory of the page map, of the guest's"
    with touching(size.memory, "") as vm:
        vm.pause()
        before = _process_bytes()
        for block in range(_FIRST, size.memory // BLOCK_SIZE):
            vm.memory.engine.remove(block * BLOCK_PAGES, BLOCK_PAGES)
            vm.memory.engine.install(block * BLOCK_PAGES, BLOCK_PAGES)
        grown = _process_bytes() - before
        engine = vm.memory.engine
        words = engine.page_words.nbytes + engine.block_words.nbytes
        found.add(group, "words of pages and blocks", "%", 100 * words / size.memory)
        found.add(group, "process grown by", "%", 100 * grown / size.memory)


# ---- blocks ----


def _blocks(found: Collected, size: Size) -> None:
    """The engine's operations, and the bare system calls on the RAM of a VM that has no engine; the guests run."""
    last = min(_FIRST + size.blocks, size.memory // BLOCK_SIZE)
    with ExitStack() as stack:
        ours, bare = (stack.enter_context(touching(size.memory, "")) for _ in range(2))
        ours.pause()
        bare.pause()
        for turn in range(size.rounds + 1):
            for block in range(_FIRST, last):
                with alone(ours):
                    operations = _change(ours, block)
                with alone(bare):
                    advice = _advise(bare, block)
                for name, seconds in (operations | advice).items() if turn else ():
                    found.add("a block, while the guest writes to all memory", name, "s", seconds)


def _change(vm: VM, block: int) -> dict[str, float]:
    engine = vm.memory.engine
    steps = {
        "split": engine.split,
        "merge of a split block": engine.merge,
        "break": engine.break_,
        "merge of a broken block": engine.merge,
    }
    seconds = {}
    for name, step in steps.items():
        run_on(vm, 0.002)  # the guest has touched it as it is
        seconds[name] = timed(lambda step=step: step(block))  # type: ignore[misc]
    return seconds


def _advise(vm: VM, block: int) -> dict[str, float]:
    """MADV_COLLAPSE alone, of a large page in small mappings, and of small pages; left out where it fails."""
    start = vm.memory.hva(Gpa(block * BLOCK_SIZE)).value
    seconds = {}

    def advise(advice: int, offset: int = 0) -> None:
        at = ffi.cast("uint8_t *", start + offset)
        check(lib.pv_madvise(at, BLOCK_SIZE - offset, advice), "madvise", advice=advice)

    def small(fresh: bool) -> None:
        advise(lib.MADV_NOHUGEPAGE, BLOCK_SIZE // 2)  # the attribute differs within it: the mapping is split
        advise(lib.MADV_NOHUGEPAGE)
        if fresh:
            advise(lib.MADV_DONTNEED)
            advise(lib.MADV_POPULATE_WRITE)

    for name, fresh in (("MADV_COLLAPSE alone, split", False), ("MADV_COLLAPSE alone, small pages", True)):
        small(fresh)
        run_on(vm, 0.002)
        advise(lib.MADV_HUGEPAGE)
        try:
            seconds[name] = timed(lambda: advise(lib.MADV_COLLAPSE))
        except KernelError:
            continue
    return seconds
