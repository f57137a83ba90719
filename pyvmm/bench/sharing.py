# sharing.py: what sharing frees, beside what was estimated, and how many large pages that costs (measure P12).
# Units: MiB, GB/s, "x": one over another.
"""Memory of which one block in eight is mostly duplicates, as a page cache is, and the others have few; and the guest
dup, whose duplicates are everywhere alike.

Freed: what RAM takes less of the host's memory, by the kernel's figures (Pss), after KSM has merged what it can. KSM is
started for that, and its settings are put back.
"""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pyvmm.bench import Collected, Result
from pyvmm.layout import BLOCK_SIZE, MIB, PAGE_SIZE
from pyvmm.machine import VM
from pyvmm.memory import GuestMemory
from pyvmm.memory.sharing.estimate import Estimate
from pyvmm.memory.sharing.ksm import footprint, ksm_running, settled
from pyvmm.memory.sharing.sharer import share_blocks
from pyvmm.memory.sharing.table import scan
from pyvmm.record import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.memory.sharing.table import Table

_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
RICH = 8
"""One block in so many has many duplicates; as many are broken, but where KSM is given everything."""
_MANY, _FEW = 0.75, 0.05
_TIMES = 4
"""Each content that is planted occurs about so often."""
_WAIT = 20.0


class Size(Record):
    """blocks: of the memory; rounds: of each way."""

    __slots__ = ("blocks", "rounds")

    def __init__(self, blocks: int, rounds: int) -> None:
        self.blocks = blocks
        self.rounds = rounds


FULL, QUICK = Size(64, 3), Size(16, 1)


def filled(blocks: int, seed: int) -> GuestMemory:
    """So many large blocks. What is planted is the same for all seeds, where it lies is not."""
    rng, memory = random.Random(seed), GuestMemory(blocks * BLOCK_SIZE, "2m")
    contents = int(blocks * _BLOCK_PAGES * (_MANY / RICH + _FEW) / _TIMES)
    rest = random.Random(1).randbytes(PAGE_SIZE - 16)
    rich = set(rng.sample(range(blocks), blocks // RICH))
    for block in range(blocks):
        share, data = (_MANY if block in rich else _FEW), bytearray()
        for page in range(_BLOCK_PAGES):
            own = rng.random() >= share
            stamp = (seed, block * _BLOCK_PAGES + page) if own else (1 << 40, rng.randrange(contents))
            data += stamp[0].to_bytes(8, "little") + stamp[1].to_bytes(8, "little") + rest
        memory.write(memory.gpa_of(block * _BLOCK_PAGES), data)
    return memory


def _of(table: Table, chosen: Sequence[int]) -> int:
    """Bytes that sharing these blocks alone should free."""
    import numpy as np

    parts = [table[block * _BLOCK_PAGES : (block + 1) * _BLOCK_PAGES] for block in chosen]
    return Estimate(np.concatenate(parts)).freed * PAGE_SIZE


def _by_count(found: Estimate) -> list[int]:
    counts = found.counts()
    return sorted(range(len(counts)), key=lambda block: -counts[block])[: len(counts) // RICH]


WAYS: dict[str, Callable[[Estimate, random.Random], list[int]]] = {
    "at random": lambda found, rng: rng.sample(range(len(found.counts())), len(found.counts()) // RICH),
    "by count": lambda found, rng: _by_count(found),
    "KSM on everything": lambda found, rng: list(range(len(found.counts()))),
}
"""Which blocks are broken."""


def _one(found: Collected, name: str, size: Size, turn: int) -> None:
    memory = filled(size.blocks, turn + 1)
    try:
        begin = time.perf_counter()
        table = scan(memory)
        found.add("scan", "hashes of large pages", "GB/s", memory.size / 1e9 / (time.perf_counter() - begin))
        estimate = Estimate(table)
        chosen = WAYS[name](estimate, random.Random(turn))
        expected = _of(table, chosen)
        shared = share_blocks(memory, chosen, start_ksm=True)
        found.add("MiB freed a large page broken", name, "MiB", shared.bytes_freed / MIB / max(shared.broken, 1))
        found.add("MiB freed in all", name, "MiB", shared.bytes_freed / MIB)
        if shared.bytes_freed > 0:
            found.add("estimated / actual", name, "x", expected / shared.bytes_freed)
    finally:
        memory.close()


def _two(found: Collected, size: Size, turn: int) -> None:
    """Two VMs' memories, in one process here; the kernel sees no difference."""
    both = [filled(size.blocks // 2, 100 * (turn + 1) + number) for number in range(2)]
    try:
        mine, theirs = map(scan, both)
        expected = (Estimate(mine, [theirs]).freed + Estimate(theirs).freed) * PAGE_SIZE
        before = sum(map(footprint, both))
        with ksm_running(start=True):
            for memory in both:
                share_blocks(memory, range(size.blocks // 2))
            settled()
            freed = before - sum(map(footprint, both))
        found.add("estimated / actual", "all blocks of two VMs", "x", expected / freed)
    finally:
        for memory in both:
            memory.close()


def _guest(found: Collected, size: Size) -> None:
    """The guest goes on to check all of its memory meanwhile."""
    with ExitStack() as stack:
        vm = stack.enter_context(VM(size.blocks * BLOCK_SIZE, pages="2m"))
        vm.load("dup")
        vm.start()
        end = time.monotonic() + _WAIT
        while not vm.progress().passes and time.monotonic() < end:
            vm.wait(0.01)
        estimate = Estimate(scan(vm.memory))
        shared = share_blocks(vm.memory, range(size.blocks), start_ksm=True)
        found.add("estimated / actual", "a guest that runs on", "x", estimate.freed * PAGE_SIZE / shared.bytes_freed)


def measure(quick: bool = False) -> list[Result]:
    """Alternating rounds, each with fresh memory; the first warms up."""
    found, size = Collected(), QUICK if quick else FULL
    with ksm_running(start=True):  # now, so that a host that has none says so at once
        pass
    for turn in range(size.rounds + 1):
        into = found if turn else Collected()
        for name in WAYS:
            _one(into, name, size, turn)
        _two(into, size, turn)
        _guest(into, size)
    return found.results()
