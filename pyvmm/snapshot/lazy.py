# lazy.py: RAM that is read from a snapshot file when it is touched (technique T3, US9053065B2). The work is in
# cffi_build/filehome.c and unit.c; the engine's threads do it, without the GIL.
"""`FileHome`: the home FILE of one VM, what comes ahead of touches, and the order in which pages were touched."""

from __future__ import annotations

import os
import threading
import time
from array import array
from contextlib import suppress

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, FetchError, MemoryAccessError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, format_size
from pyvmm.memory.source import Source
from pyvmm.snapshot.format import MAX_WSET
from pyvmm.snapshot.results import reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm._native import CData
    from pyvmm.memory import GuestMemory
    from pyvmm.snapshot.reader import Snapshot

WORKERS = 2
"""Threads that answer faults: while one waits for the disk, the other serves."""
_STEP = 64
"""Pages of a working set that C brings at once, so that whoever closes the VM does not wait long."""
_NICE = 10
"""Of what comes ahead: a vCPU, or who answers its fault, goes first."""
_NONE_YET = (1 << 64) - 1


class FileHome:
    """The pages of `snapshot`, and of what it builds on, that `memory` has not touched yet. Owns the snapshot.

    memory: of the same size, and never touched; unit: how much a touch brings (pyvmm.memory.source.UNITS).
    Raises BadInput. A damaged file is found when what is damaged is needed: the VM is paused then.
    """

    def __init__(self, snapshot: Snapshot, memory: GuestMemory, unit: str = "adaptive", workers: int = WORKERS) -> None:
        if memory.size != snapshot.memory_size:
            raise BadInput(f"{snapshot.name} is of a VM with {format_size(snapshot.memory_size)} of memory")
        self._snapshot = snapshot
        self._memory = memory
        self._ahead: threading.Thread | None = None
        self._threads: list[threading.Thread] = []
        self._end = threading.Event()
        self._record: array[int] | None = None
        self.struct = ffi.new("struct pv_home *")
        self._native = ffi.new("struct pv_file_home *")
        self._native.as_it_was = memory.backing == "auto"
        self.struct.self = self._native
        self.struct.fetch, self.struct.find = lib.pv_file_fetch, lib.pv_file_find
        self.struct.gather, self.struct.read = lib.pv_file_gather, lib.pv_file_read
        each: Snapshot | None = snapshot
        while each is not None:
            self._native.file[self._native.files] = each.native
            self._native.files += 1
            each = each.parent
        try:
            self._source = Source(memory.engine, "file", self, unit, workers)
        except BadInput:
            if memory.untouched:
                raise
            raise BadInput(f"{snapshot.name} is restored into fresh memory: this has been written to") from None

    # ---- what is known ----

    @property
    def reads(self) -> int:
        """Storage blocks read so far, those read again counted again."""
        return int(self._native.reads)

    @property
    def bytes_read(self) -> int:
        """Stored bytes of these."""
        return int(self._native.bytes_read)

    @property
    def ids(self) -> list[bytes]:
        """The ids of the file and its ancestors: whose content a page has that is still in the home FILE."""
        each: Snapshot | None = self._snapshot
        found = []
        while each is not None:
            found.append(each.id)
            each = each.parent
        return found

    def explain(self, number: int) -> str:
        """What an errno of a failed fetch means."""
        return f"{self._snapshot.name}: {reason(number)}"

    # ---- ahead of touches ----

    def prefetch(self, pages: Iterable[int] | None = None) -> None:
        """Brings pages in this order, none twice; those of the snapshot's working set where none are given. Raises
        BadInput, FetchError."""
        order, wanted = self._snapshot.wset_words if pages is None else self._words(pages)
        words = ffi.from_buffer("uint64_t[]", order)
        for first in range(0, len(order), _STEP):
            if self._end.is_set():
                return
            self._source.prefetch(words + first, min(_STEP, len(order) - first), wanted)

    def _words(self, pages: Iterable[int]) -> tuple[array[int], CData]:
        order, count = array("Q", pages), self._memory.size // PAGE_SIZE
        wanted = ffi.new("uint64_t[]", count // 64 + 1)
        if lib.pv_bits_mark(wanted, ffi.from_buffer("uint64_t[]", order), len(order), count):
            raise BadInput("what is to be prefetched names a page twice, or one beyond the VM's RAM")
        return order, wanted

    def run_ahead(self, prefetch: bool = False, fill: bool = True, rate: float | None = None) -> None:
        """In a thread of its own, from begin() on: the working set, then all the rest, at most `rate` bytes a second of
        it. Faults of the guest's go between two blocks. What cannot be brought pauses the VM, as if it had been
        touched."""

        def run() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread alone, on Linux
            with suppress(MemoryAccessError):  # the VM is closed
                if prefetch:
                    with suppress(FetchError):  # whoever touches the page, or fills, will say so
                        self.prefetch()
                if fill:
                    self._fill(rate)

        self._ahead = threading.Thread(target=run, name="snapshot filler", daemon=True)

    def begin(self) -> None:
        """The guest runs: what was asked for ahead may come now. Not before, since that would take its CPU."""
        thread, self._ahead = self._ahead, None
        if thread is not None:
            self._threads.append(thread)
            thread.start()

    def _fill(self, rate: float | None) -> None:
        """Block by block, from where the guest touched last: what follows may be touched next."""
        source, pages, step = self._source, self._memory.size // PAGE_SIZE, BLOCK_SIZE // PAGE_SIZE
        todo = bytearray(b"\1") * -(-pages // step)
        begin, block, touched = time.monotonic(), 0, source.touched
        for done in range(len(todo)):
            due = begin + done * BLOCK_SIZE / rate - time.monotonic() if rate else 0
            if self._end.wait(due) if due > 0 else self._end.is_set():
                return
            if (last := source.touched) != touched:
                block = touched = last
            block = next_block if (next_block := todo.find(1, block)) >= 0 else todo.find(1)
            todo[block] = 0
            source.fill(block * step, min(step, pages - block * step))

    def wait(self) -> None:
        """Waits until all that was asked for ahead has come, also before the guest runs."""
        self.begin()
        for thread in self._threads:
            thread.join()

    # ---- the order of first touches ----

    def record(self) -> None:
        """From now on, keeps the order in which pages are touched first, for working_set()."""
        self._record = array("Q", (_NONE_YET,)) * min(self._memory.size // PAGE_SIZE, MAX_WSET)
        self._source.record(ffi.from_buffer("uint64_t[]", self._record), len(self._record))

    def working_set(self) -> list[int]:
        """Pages in the order of their first touch since record(), none twice. Raises BadInput without record()."""
        if self._record is None:
            raise BadInput("no touches have been recorded: restore with record=True")
        with suppress(MemoryAccessError):  # else what is there at the VM's end
            self._recorded = self._source.recorded()
        return [page for page in dict.fromkeys(self._record[: self._recorded]) if page != _NONE_YET]

    # ---- its end ----

    def end(self) -> None:
        """Before the engine's end: nothing more is brought ahead."""
        if self._record is not None:
            self.working_set()
        self._end.set()

    def close(self) -> None:
        """After the engine's end: closes the file."""
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._snapshot.close()
