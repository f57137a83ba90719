# bare.py: page faults answered by the barest userfaultfd loop (cffi_build/bare.c), and by the engine for a thread of
# ours: what bench/faults.py compares the engine with. Units: seconds; pages of 4 KiB.
"""`BareLoop`: the limit. `Touched`: small pages that a thread touches, under the loop or under the engine."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pyvmm._native import ffi, lib
from pyvmm.errors import check
from pyvmm.host.uffd import Uffd
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, Gpa
from pyvmm.memory import GuestMemory
from pyvmm.memory.engine import BLOCK_PAGES

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from pyvmm._native import CData


class BareLoop:
    """Answers faults of small pages in [address, address + size), which are absent because drop() dropped them.

    move: by UFFDIO_MOVE of the page at the same offset of an area of its own, else by UFFDIO_COPY of one page. A
    context manager.
    """

    def __init__(self, address: int, size: int, move: bool = False) -> None:
        self._base, self._move = ffi.cast("uint8_t *", address), move
        self._source = GuestMemory(max(size, BLOCK_SIZE), "4k")
        self._source.zero(Gpa(0), PAGE_SIZE)
        self._uffd = Uffd(*(("UFFD_FEATURE_MOVE",) if move else ()))
        self._uffd.register(address, "MISSING", size)

    def drop(self, page: int, count: int) -> None:
        """Takes pages away; for UFFDIO_MOVE prepares others of zeros."""
        at = page * PAGE_SIZE, count * PAGE_SIZE
        check(lib.pv_madvise(self._base + at[0], at[1], lib.MADV_DONTNEED), "madvise")
        if self._move:
            check(lib.pv_madvise(self._from + at[0], at[1], lib.MADV_POPULATE_WRITE), "madvise")

    @property
    def _from(self) -> CData:
        return ffi.cast("uint8_t *", self._source.hva(Gpa(0)).value)

    def answer(self, faults: int) -> Answering:
        """Begins to answer so many faults, in a thread."""
        return Answering(self._uffd.fd, self._base, self._from, self._move, faults)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._uffd.close()
        self._source.close()


class Answering:
    """A thread in the bare loop."""

    def __init__(self, fd: int, base: CData, source: CData, move: bool, faults: int) -> None:
        self._faults = faults
        self._nanoseconds = ffi.new("uint64_t *")
        self._result = 0
        self._thread = threading.Thread(target=self._run, args=(fd, base, source, move), name="bare loop")
        self._thread.start()

    def _run(self, fd: int, base: CData, source: CData, move: bool) -> None:
        self._result = lib.pv_uffd_bare(fd, base, source, move, self._faults, self._nanoseconds)

    def seconds(self) -> float:
        """Waits until all are answered; seconds of one, from the message read. Raises KernelError."""
        self._thread.join()
        check(self._result, "UFFDIO_COPY", faults=self._faults)
        return int(self._nanoseconds[0]) / 1e9 / self._faults


def touch(address: int, pages: int) -> float:
    """Seconds that reading a byte of each page took, each."""
    return int(lib.pv_touch(ffi.cast("uint8_t *", address), pages, PAGE_SIZE)) / 1e9 / pages


class Touched:
    """Small pages of ours, without a VM, fewer than a 2 MiB block has. A context manager.

    bare: under the bare loop, else under an engine; move: by UFFDIO_MOVE.
    """

    def __init__(self, bare: bool, move: bool) -> None:
        self._memory = GuestMemory(2 * BLOCK_SIZE, "4k")
        self._memory.zero(Gpa(0), self._memory.size)
        self._address = self._memory.hva(Gpa(0)).value
        self._loop = BareLoop(self._address, self._memory.size, move) if bare else None
        if not bare:
            self._memory.engine.has = lambda feature: move

    def measure(self, pages: int) -> tuple[float, float]:
        """Takes pages away and touches them in turn: seconds of a fault for who waits, and of its answer."""
        if self._loop is not None:
            self._loop.drop(0, pages)
            answering = self._loop.answer(pages)
            return touch(self._address, pages), answering.seconds()
        engine = self._memory.engine
        engine.remove(0, BLOCK_PAGES)  # what is not touched keeps userfaultfd armed
        before = engine.stats()
        waited = touch(self._address, pages)
        after = engine.stats()
        engine.install(0, BLOCK_PAGES)
        return waited, (after.nanoseconds - before.nanoseconds) / 1e9 / max(after.faults - before.faults, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._loop is not None:
            self._loop.__exit__(kind, error, tb)
        self._memory.close()
