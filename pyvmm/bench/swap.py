# swap.py: how fast pages go out to the swap file and come back (measure P11). Unit: GB/s of pages.
"""Beside pwrite() and preadv() of the same bytes, in pieces of 2 MiB, memcpy(), and Linux's own swap; with each codec.

Data are random, or text-like. "out": until all pages are written, to the page cache, for the first time; "unchanged":
once more, as they were. "out to the disk": with fsync(). "in": all pages brought, from the page cache, into fresh or
emptied memory; "touched": by a thread that touches one after the other, answered fault by fault. "from the disk":
touched after the page cache was emptied.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from pyvmm._native import ffi, lib
from pyvmm.bench import Collected, Result
from pyvmm.bench.hostswap import HostSwap, Refused, host_swap
from pyvmm.bench.streams import copying
from pyvmm.layout import BLOCK_SIZE, MIB, PAGE_SIZE
from pyvmm.memory import GuestMemory
from pyvmm.memory.swap import CODECS, FOLDER, Swap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SIZE, _QUICK_SIZE = 64 * MIB, 8 * MIB
_ROUNDS = 5
_FIRST = BLOCK_SIZE // PAGE_SIZE
"""The block before that is of small pages."""
LINUX = "Linux, MADV_PAGEOUT"
_WORDS, _WORD = 2000, (2, 9)


def random_data() -> bytes:
    """2 MiB that do not compress."""
    return random.Random(1).randbytes(BLOCK_SIZE)


def text_data() -> bytes:
    """2 MiB of made-up words, of which some are much more frequent than others, as in any language."""
    rng = random.Random(2)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choices(letters, weights=range(26, 0, -1), k=rng.randint(*_WORD))) for _ in range(_WORDS)]
    often = list(accumulate(1 / (rank + 1) ** 1.25 for rank in range(_WORDS)))
    return " ".join(rng.choices(words, cum_weights=often, k=BLOCK_SIZE // 3)).encode()[:BLOCK_SIZE]


def _filled(size: int, data: bytes) -> GuestMemory:
    """All blocks but the first are `data`, but for a number at their start."""
    memory = GuestMemory(size + BLOCK_SIZE)
    for block in range(1, 1 + size // BLOCK_SIZE):
        memory.write(memory.gpa_of(block * _FIRST), block.to_bytes(8, "little") + data[8:])
    return memory


def _speed(size: int, action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return size / 1e9 / (time.perf_counter() - begin)


@contextmanager
def _file_of_swap(folder: str) -> Iterator[int]:
    """A descriptor of the file without a name, of which no other is in this folder."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the list itself
            if os.readlink(f"/proc/self/fd/{number}").startswith(f"{folder}/"):
                fd = os.dup(int(number))
                break
    try:
        yield fd
    finally:
        os.close(fd)


def _swapped(found: Collected, kind: str, data: bytes, size: int, codec: str | None) -> None:
    memory, name = _filled(size, data), f"swap, {codec}" if codec else "swap"
    pages, at = size // PAGE_SIZE, ffi.cast("uint8_t *", memory.hva(memory.gpa_of(_FIRST)).value)

    def out() -> None:
        swap.out([(_FIRST, pages)])
        swap.drain()

    def touch() -> None:
        lib.pv_touch(at, pages, PAGE_SIZE)

    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        try:
            swap = Swap(memory, folder, 2 * size, codec)
            begin = time.perf_counter()
            found.add(f"out: {kind}", name, "GB/s", _speed(size, out))
            with _file_of_swap(folder) as fd:
                os.fsync(fd)
                found.add(f"out to the disk: {kind}", name, "GB/s", size / 1e9 / (time.perf_counter() - begin))
                found.add(f"bytes of pages / bytes stored: {kind}", name, "x", swap.stats().ratio)
                found.add(f"in: {kind}", name, "GB/s", _speed(size, lambda: memory.engine.install(_FIRST, pages)))
                unchanged = _speed(size, out)
                if codec is None:
                    found.add(f"out: {kind}", f"{name}, unchanged", "GB/s", unchanged)
                found.add(f"touched: {kind}", name, "GB/s", _speed(size, touch))
                out()
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                found.add(f"touched, from the disk: {kind}", name, "GB/s", _speed(size, touch))
        finally:
            memory.close()


def _plain(found: Collected, kind: str, data: bytes, size: int) -> None:
    memory, pieces = _filled(size, data), range(0, size, BLOCK_SIZE)

    def write() -> None:
        with memory.view(memory.gpa_of(_FIRST), size) as view:
            for at in pieces:
                os.pwrite(fd, view[at : at + BLOCK_SIZE], at)

    def read() -> None:
        fresh = GuestMemory(size)
        with fresh.view(fresh.gpa_of(0), size) as view:
            for at in pieces:
                os.preadv(fd, [view[at : at + BLOCK_SIZE]], at)
        fresh.close()

    with tempfile.TemporaryFile(dir=FOLDER, buffering=0) as file:
        fd = file.fileno()
        begin = time.perf_counter()
        found.add(f"out: {kind}", "pwrite", "GB/s", _speed(size, write))
        os.fsync(fd)
        found.add(f"out to the disk: {kind}", "pwrite, fsync", "GB/s", size / 1e9 / (time.perf_counter() - begin))
        in_cache = _speed(size, read)
        found.add(f"in: {kind}", "preadv", "GB/s", in_cache)
        found.add(f"touched: {kind}", "preadv", "GB/s", in_cache)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        found.add(f"touched, from the disk: {kind}", "preadv", "GB/s", _speed(size, read))
    memory.close()


def _linux(found: Collected, kind: str, data: bytes, size: int, host: HostSwap) -> None:
    """What it has written stays in the kernel's swap cache, as our file's pages do in the page cache."""
    with host.filled(size, data) as memory:
        found.add(f"out: {kind}", LINUX, "GB/s", _speed(size, memory.out))
        found.add(f"touched: {kind}", LINUX, "GB/s", _speed(size, memory.touch))


def measure(quick: bool = False) -> list[Result]:
    """Alternating rounds, each with memory and a file of its own. Each side is run twice on end, and the second time
    counts: it has the memory of the first, and where the host is itself a guest, other memory may be slow.

    quick: the host's swap is left as it is.
    """
    found, size = Collected(), _QUICK_SIZE if quick else _SIZE
    codecs = [None, *(name for name, (number, *_) in CODECS.items() if lib.pv_codec_available(number) == 0)]
    kinds = {"random data": random_data(), "text": text_data()}
    copied = copying(size)
    with host_swap(FOLDER, 2 * size, wanted=not quick) as host:
        sides: list[Callable[[Collected, str, bytes, int], None]] = [_plain]
        sides += [partial(_swapped, codec=codec) for codec in codecs]
        if isinstance(host, HostSwap):
            sides.append(partial(_linux, host=host))
        for _ in range(1 if quick else _ROUNDS):
            for kind, data in kinds.items():
                for side in sides:
                    side(Collected(), kind, data, size)
                    side(found, kind, data, size)
                copied()
                found.add(f"out: {kind}", "memcpy", "GB/s", copied())
        for kind in kinds if isinstance(host, Refused) and not quick else ():
            found.add(f"out: {kind}", f"{LINUX}: {host}", "GB/s")
    return found.results()
