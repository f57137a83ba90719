# swap.py: how fast pages go out to the swap file and come back. Unit: GB/s of pages.
"""Beside plain pwrite() and preadv() of the same bytes, to and from the page cache, in pieces of 2 MiB on both sides.

Out: until all pages are written, for the first time; and once more, unchanged. In: all pages, as large ones; and read
into fresh memory.
"""

from __future__ import annotations

import os
import random
import tempfile
import time

from pyvmm.bench import Collected, Result
from pyvmm.layout import BLOCK_SIZE, MIB, PAGE_SIZE
from pyvmm.memory import GuestMemory
from pyvmm.memory.swap import Swap

_SIZE, _QUICK_SIZE = 256 * MIB, 16 * MIB
_ROUNDS = 5
_FIRST = BLOCK_SIZE // PAGE_SIZE
"""The block before that is of small pages."""


def _filled(size: int) -> GuestMemory:
    """Noise in all pages but the first block's."""
    memory, noise = GuestMemory(size + BLOCK_SIZE), random.Random(1).randbytes(BLOCK_SIZE - 8)
    for block in range(1, 1 + size // BLOCK_SIZE):
        memory.write(memory.gpa_of(block * _FIRST), block.to_bytes(8, "little") + noise)
    return memory


def _out(swap: Swap, size: int) -> float:
    begin = time.perf_counter()
    swap.out([(_FIRST, size // PAGE_SIZE)])
    swap.drain()
    return size / 1e9 / (time.perf_counter() - begin)


def _swapped(found: Collected, size: int) -> None:
    memory = _filled(size)
    try:
        swap = Swap(memory, None, 2 * size)
        found.add("out", "swap", "GB/s", _out(swap, size))
        begin = time.perf_counter()
        memory.engine.install(_FIRST, size // PAGE_SIZE)
        found.add("in", "swap", "GB/s", size / 1e9 / (time.perf_counter() - begin))
        found.add("out", "swap, unchanged", "GB/s", _out(swap, size))
    finally:
        memory.close()


def _plain(found: Collected, size: int) -> None:
    memory, fresh = _filled(size), GuestMemory(size)
    with tempfile.TemporaryFile(dir="/var/tmp", buffering=0) as file:
        fd = file.fileno()
        pieces = range(0, size, BLOCK_SIZE)
        with memory.view(memory.gpa_of(_FIRST), size) as view:
            begin = time.perf_counter()
            for at in pieces:
                os.pwrite(fd, view[at : at + BLOCK_SIZE], at)
            found.add("out", "pwrite", "GB/s", size / 1e9 / (time.perf_counter() - begin))
        with fresh.view(fresh.gpa_of(0), size) as view:
            begin = time.perf_counter()
            for at in pieces:
                os.preadv(fd, [view[at : at + BLOCK_SIZE]], at)
            found.add("in", "preadv", "GB/s", size / 1e9 / (time.perf_counter() - begin))
    memory.close()
    fresh.close()


def measure(quick: bool = False) -> list[Result]:
    """Alternating rounds, each with memory and a file of its own."""
    found, size = Collected(), _QUICK_SIZE if quick else _SIZE
    for turn in range(1 + (1 if quick else _ROUNDS)):
        for side in (_plain, _swapped):
            side(found if turn else Collected(), size)
    return found.results()
