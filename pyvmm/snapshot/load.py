# load.py: all of a snapshot into fresh RAM, by several threads. Units: bytes, pages of RAM.
"""`load()`. The work is in cffi_build/load.c, without the GIL."""

from __future__ import annotations

import os
import threading

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, SnapshotError
from pyvmm.layout import MIB, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import CData
    from pyvmm.memory import GuestMemory
    from pyvmm.snapshot.reader import Progress, Snapshot

_STEP = 16 * MIB
"""Bytes of pages that a thread reads in one go, so that Ctrl-C does not wait long."""
_MOST = 8
"""Threads: with more than this, memory is the limit."""


def load(
    snapshot: Snapshot, memory: GuestMemory, progress: Progress | None, readers: int | None = None, chain: bool = True
) -> tuple[CData, CData]:
    """As Snapshot.load_into(); unless `chain`, of this file alone.

    Returns bitmaps: of the pages that are in files beyond those that were read, and of those that were read. All else
    is zeros.
    """
    if memory.size != snapshot.memory_size:
        sizes = f"{format_size(snapshot.memory_size)}, not {format_size(memory.size)}"
        raise BadInput(f"{snapshot.name} is of a VM with {sizes} of memory")
    if not memory.untouched:
        raise BadInput("a snapshot is loaded into fresh memory: this has been written to")
    if readers is not None and not 1 <= readers <= 64:
        raise BadInput(f"{readers} readers: give 1 to 64")
    readers = readers or min(_MOST, max(2, len(os.sched_getaffinity(0))))
    views = [memory.view(region.gpa, region.size) for region in memory.regions]
    # SAFETY: the regions follow each other in one mapping; the views keep it, and its pages, where they are.
    ram = ffi.from_buffer("uint8_t[]", views[0]) + 0
    words = snapshot.pages // 64 + 1
    missing, held = ffi.new("uint64_t[]", words), ffi.new("uint64_t[]", words)
    lib.pv_bits_set(missing, 0, snapshot.pages)
    done, total = 0, _bytes_in_chain(snapshot, chain)
    file: Snapshot | None = snapshot
    while file is not None:
        wanted = ffi.new("uint64_t[]", words)
        file._check(lib.pv_snapshot_choose(file._live(), missing, wanted), "its index")
        lib.pv_bits_or(held, wanted, words)
        crew = _Crew(file, wanted, ram, progress, done, total)
        crew.run(readers)
        done = crew.done
        if progress is not None:
            progress(min(done, total), total)
        if lib.pv_bits_count(wanted, snapshot.pages):
            raise SnapshotError(f"{file.name}: damaged: its index has pages that no storage block holds")
        left = chain and lib.pv_bits_count(missing, snapshot.pages)
        file = file.require_parent() if left else None
    for view in views:
        view.release()
    if progress is not None and done < total:  # no page of the oldest ancestors was wanted
        progress(total, total)
    return missing, held


def _bytes_in_chain(snapshot: Snapshot, chain: bool) -> int:
    own = snapshot.blocks * snapshot.header.block_size
    return own + _bytes_in_chain(snapshot.parent, True) if chain and snapshot.parent is not None else own


class _Crew:
    """Threads that read one file; each takes the next step of its blocks when it is done with one."""

    def __init__(
        self, file: Snapshot, wanted: CData, ram: CData, progress: Progress | None, done: int, total: int
    ) -> None:
        self._file = file
        self._native = file._live()
        self._wanted = wanted
        self._ram = ram
        self._progress = progress
        self._total = total
        self._step = _STEP // file.header.block_size
        self._starts = iter(range(0, file.blocks, self._step))
        self._lock = threading.Lock()
        self._failed: tuple[int, int] | None = None  # block, -errno: of the lowest block, so that it is always the same
        self._ending = False
        self.done = done

    def run(self, readers: int) -> None:
        """Reads all. Raises what was found; no thread is left then."""
        others = min(readers, -(-self._file.blocks // self._step)) - 1
        threads: list[threading.Thread] = []
        try:
            for _ in range(others):
                thread = threading.Thread(target=self._work, name="snapshot reader", daemon=True)
                thread.start()
                threads.append(thread)
            self._work(self._progress)
        finally:
            self._ending = True
            for thread in threads:
                thread.join()
        if self._failed is not None:
            block, result = self._failed
            self._file._check(result, f"storage block {block}")

    def _work(self, progress: Progress | None = None) -> None:
        block = ffi.new("uint64_t *")
        while not self._ending:
            with self._lock:
                first = next(self._starts, None)
            if first is None:
                return
            count = min(self._step, self._file.blocks - first)
            result = lib.pv_snapshot_load(self._native, first, count, self._wanted, self._ram, block)
            with self._lock:
                self.done += count * self._file.header.block_size
                if result and (self._failed is None or block[0] < self._failed[0]):
                    self._failed = block[0], result
                self._ending = self._ending or bool(result)
            if progress is not None:
                progress(min(self.done, self._total), self._total)
