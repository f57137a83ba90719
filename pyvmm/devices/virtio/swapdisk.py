# swapdisk.py: a disk that a guest swaps to, some of whose blocks are references to the host's swap file (technique T6,
# US9342248B2). Units: bytes; sectors of 512; blocks and pages of 4 KiB.
"""`SwapDisk`: a `Backend` (pyvmm.devices.virtio.block).

A guest writes a page that the host has in its swap file: the block becomes a reference to that place, and nothing is
read. Such places are scattered. So what the guest wrote in one go is put together in the disk's own file before it
reads it, by a thread of the disk's own.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from contextlib import suppress
from itertools import groupby

from pyvmm._native import ffi, lib
from pyvmm.devices.virtio.rawfile import PIECE, SECTOR, RawFile
from pyvmm.devices.virtio.sequences import Sequences
from pyvmm.devices.virtio.spans import MOST, spans, whole
from pyvmm.errors import BadInput, HostError, MemoryAccessError
from pyvmm.layout import MIB, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyvmm.devices.virtio.queue import Buffers
    from pyvmm.memory.swap import Swap

MODES = ("naive", "references", "replace")
"""What becomes of a page that is written while it is in the swap file: it is brought back and copied; referred to;
referred to, and soon copied to where it belongs."""
RATE = 64 * MIB
"""Bytes a second that the thread copies at most."""
MOST_UNFLUSHED = 16384
"""References of a durable disk, after which they are copied at once: a flush has to wait for that."""
_GROUP = MOST
"""Blocks that are copied together at most; and by which it is known where references may be."""
_REF = ffi.sizeof("struct pv_swap_ref")
_NONE, _ZERO = lib.PV_REF_NONE, lib.PV_REF_ZERO
_TAKEN = (lib.PV_REFER_SLOT, lib.PV_REFER_ZERO)
_COUNTS = ("blocks_written", "referred", "zeros", "brought", "refused", "blocks_read", "local_reads", "slot_reads",
           "replaced", "replace_failed")  # fmt: skip


class SwapDisk:
    """local: the disk's own file; mode: one of MODES. lasting: the file has a name, so that a VM can be saved.
    durable: what was flushed is there after a crash; else a flush does nothing, as for a disk that is swapped to, whose
    data are of no use then. clock: seconds.

    `counts`: blocks that were written; that became references, or were known to be zeros; whose pages were in the swap
    file and were brought back for that (`refused`: of these, since too much of it is referred to); that were read, with
    so many reads of the own file and of the swap file; that were copied by the thread, and could not be.
    """

    read_only = False

    def __init__(
        self,
        local: RawFile,
        mode: str = "replace",
        lasting: bool = True,
        durable: bool = False,
        rate: int = RATE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if mode not in MODES:
            raise BadInput(f"mode={mode} of a swap disk: choose one of {', '.join(MODES)}")
        self._local = local
        self._mode, self._lasting, self._durable = mode, lasting, durable
        self._rate, self._clock = rate, clock
        self.sectors, self.id = local.sectors, local.id
        self.counts = dict.fromkeys(_COUNTS, 0)
        self._blocks = -(-self.sectors * SECTOR // PAGE_SIZE)
        self._table = mmap.mmap(-1, self._blocks * _REF)  # zeros, that cost nothing until they are written to
        self._refs = ffi.cast("struct pv_swap_ref *", ffi.from_buffer(self._table))
        self._groups: set[int] = set()
        """Of _GROUP blocks each: all references are in these."""
        self._swap: Swap | None = None
        """Of all references."""
        self._lock = threading.Condition()
        """Of all of this. Who has it may wait for the guest's memory."""
        self._sequences = Sequences()
        self._unflushed = 0
        self._copying = self._ending = False
        self._thread: threading.Thread | None = None

    # ---- requests ----

    def write(self, sector: int, source: Buffers) -> None:
        offset, counts = sector * SECTOR, dict.fromkeys(_COUNTS, 0)
        with self._lock:
            swap = self._use(source.memory.swap)
            for at, size, page in spans(source, offset):
                part = source.part(at, size)
                if page is None or swap is None:
                    self._put(part, offset + at)
                else:
                    self._refer(swap, part, (offset + at) // PAGE_SIZE, page, counts)
            first, end = whole(offset, offset + source.size)
            counts["blocks_written"] = max(end - first, 0)
            for name, count in counts.items():  # not before: a page that does not come has all of it done once more
                self.counts[name] += count
            if self._mode == "replace" and end > first:
                self._sequences.wrote(first, end - first, self._clock())
                self._lock.notify_all()
            self._unflushed += counts["referred"]
            if self._durable and self._unflushed > MOST_UNFLUSHED:
                self._settle()

    def _use(self, swap: Swap | None) -> Swap | None:
        """The VM's swap now: that of the references that there are, since it does not go before these."""
        if swap is not None and swap is not self._swap:
            swap.before_close(lambda: self._leave(swap))
            self._swap = swap
        return swap

    def _refer(self, swap: Swap, source: Buffers, first: int, page: int, counts: dict[str, int]) -> None:
        """Whole blocks from `first` on, from pages from `page` on."""
        count, at = source.size // PAGE_SIZE, 0
        became = swap.refer(page, count, self._refs + first, look=self._mode == "naive")
        self._groups.update(range(first // _GROUP, (first + count - 1) // _GROUP + 1) if any(became) else ())
        counts["referred"] += became.count(lib.PV_REFER_SLOT)
        counts["zeros"] += became.count(lib.PV_REFER_ZERO)
        counts["brought"] += became.count(lib.PV_REFER_FULL)
        counts["refused"] += became.count(lib.PV_REFER_FULL) if self._mode != "naive" else 0
        for taken, run in groupby(became, lambda each: each in _TAKEN):
            size = len(list(run)) * PAGE_SIZE
            if not taken:
                self._put(source.part(at, size), first * PAGE_SIZE + at)
            at += size

    def _put(self, source: Buffers, offset: int) -> None:
        """Bytes of the guest's memory to our file. What of a reference they do not cover comes before."""
        at = 0
        while at < source.size:
            start = offset + at
            data = source.part(at, PIECE - start % PIECE).read()
            self._own_ends(start, start + len(data))
            self._local.put(data, start)
            self._drop(*whole(start, start + len(data)))
            at += len(data)

    def read(self, sector: int, into: Buffers) -> None:
        offset, at = sector * SECTOR, 0
        with self._lock:
            while at < into.size:
                part = into.part(at, PIECE - (offset + at) % PIECE)
                part.write(self._bytes(offset + at, part.size))
                at += part.size
            self.counts["blocks_read"] += -(-into.size // PAGE_SIZE)

    def _bytes(self, start: int, size: int) -> bytes | memoryview:
        first, end = start // PAGE_SIZE, -(-(start + size) // PAGE_SIZE)
        runs = list(self._runs(first, end))
        if len(runs) == 1 and not runs[0][2]:
            self.counts["local_reads"] += 1
            return self._local.get(start, size)
        found = bytearray((end - first) * PAGE_SIZE)
        for one, other, refers in runs:
            if not refers:
                begin, stop = max(one * PAGE_SIZE, start), min(other * PAGE_SIZE, start + size)
                found[begin - first * PAGE_SIZE : stop - first * PAGE_SIZE] = self._local.get(begin, stop - begin)
                self.counts["local_reads"] += 1
        assert self._swap is not None  # there are references
        self.counts["slot_reads"] += self._swap.read_refs(self._refs + first, end - first, found)
        return memoryview(found)[start - first * PAGE_SIZE :][:size]

    def flush(self) -> None:
        if self._durable:  # the swap file goes with this process
            with self._lock:
                self._settle()
                self._local.flush()

    def discard(self, sector: int, count: int) -> None:
        with self._lock:
            self._drop(*whole(sector * SECTOR, (sector + count) * SECTOR))
            self._local.discard(sector, count)

    def write_zeroes(self, sector: int, count: int, unmap: bool) -> None:
        start, end = sector * SECTOR, (sector + count) * SECTOR
        with self._lock:
            self._own_ends(start, end)
            self._local.write_zeroes(sector, count, unmap)
            self._drop(*whole(start, end))

    # ---- references: with the lock ----

    def _runs(self, first: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(first block, behind the last one, are these references?)"""
        if self._groups.isdisjoint(range(first // _GROUP, (end - 1) // _GROUP + 1)):
            yield first, end, False
            return
        refs = self._refs
        for refers, run in groupby(range(first, end), lambda block: refs[block].what != _NONE):
            blocks = list(run)
            yield blocks[0], blocks[-1] + 1, refers

    def _drop(self, first: int, end: int) -> None:
        for one, other, refers in self._runs(first, end) if end > first else ():
            if refers and self._swap is not None:
                self._swap.unrefer(self._refs + one, other - one)

    def _own(self, first: int, end: int) -> None:
        """These blocks, _GROUP at most, refer to nothing any more: what they referred to is in our file."""
        runs = [(one, other) for one, other, refers in self._runs(first, end) if refers]
        if not runs or self._swap is None:
            return
        data = bytearray((end - first) * PAGE_SIZE)
        self._swap.read_refs(self._refs + first, end - first, data)
        for one, other in runs:
            self._local.put(memoryview(data)[(one - first) * PAGE_SIZE : (other - first) * PAGE_SIZE], one * PAGE_SIZE)
            self._swap.unrefer(self._refs + one, other - one)

    def _own_ends(self, start: int, end: int) -> None:
        """Blocks of which bytes from `start` to `end` are a part."""
        for at in {start, end}:
            if at % PAGE_SIZE:
                self._own(at // PAGE_SIZE, at // PAGE_SIZE + 1)

    def _settle(self) -> None:
        """There are no references any more. Raises OSError, with those left that could not be copied."""
        for group in sorted(self._groups):
            self._own(group * _GROUP, min((group + 1) * _GROUP, self._blocks))
            self._groups.discard(group)
        self._unflushed = 0
        self._sequences.clear()

    def _settled(self, what: str) -> None:
        try:
            with self._lock:
                self._settle()
        except OSError as error:
            raise HostError(f"{what}: {error.strerror or error}") from None

    def _leave(self, swap: Swap) -> None:
        """The swap is about to go."""
        with self._lock:
            if self._swap is swap:
                self._lock.wait_for(lambda: not self._copying)
                self._settled(f"disk {self.id}: its blocks in the swap file cannot be copied")
                self._swap = None

    # ---- the thread ----

    def replace_next(self) -> float | None:
        """Copies what was written in one go, if there is such a thing by now. After how many seconds this may be called
        again; None: after the next write."""
        with self._lock:
            one = self._sequences.take(self._clock())
            if one is None:
                end = self._sequences.next_end()
                return None if end is None else max(end - self._clock(), 0.0) + 0.001
            copied = self._replace(one.first, one.count)
        return copied * PAGE_SIZE / self._rate

    def _replace(self, first: int, count: int) -> int:
        """How many blocks were copied. They are read without the lock, so that no request waits for that: copies of the
        references hold what they refer to."""
        swap = self._swap
        if swap is None or not any(refers for _, _, refers in self._runs(first, first + count)):
            return 0
        copies, data, done = ffi.new("struct pv_swap_ref[]", count), bytearray(count * PAGE_SIZE), 0
        ffi.memmove(copies, self._refs + first, count * _REF)
        swap.hold(copies, count)
        self._copying = True
        try:
            self._lock.release()
            try:
                swap.read_refs(copies, count, data)
            finally:
                self._lock.acquire()
            done = self._put_same(first, copies, count, data)
        except OSError:  # they stay references, and who reads them is told
            self.counts["replace_failed"] += count
        finally:
            self._copying = False
            swap.unrefer(copies, count)
            self._lock.notify_all()
        return done

    def _put_same(self, first: int, copies: object, count: int, data: bytearray) -> int:
        """Of what was copied, those blocks that have not been written since, each run by one write."""
        now, then = (bytes(ffi.buffer(refs, count * _REF)) for refs in (self._refs + first, copies))
        done, swap = 0, self._swap
        assert swap is not None  # it waits for us

        def same(i: int) -> bool:
            return copies[i].what != _NONE and now[i * _REF : (i + 1) * _REF] == then[i * _REF : (i + 1) * _REF]  # type: ignore[index]

        for alike, run in groupby(range(count), same):
            found = list(run)
            at, end = found[0], found[-1] + 1
            if alike:
                self._local.put(memoryview(data)[at * PAGE_SIZE : end * PAGE_SIZE], (first + at) * PAGE_SIZE)
                swap.unrefer(self._refs + first + at, end - at)
                self.counts["replaced"] += end - at
                done += end - at
        return done

    def _run(self) -> None:
        while True:
            try:
                wait = self.replace_next()
            except MemoryAccessError:  # the VM is being closed
                return
            with self._lock:
                if wait is None:
                    self._lock.wait_for(lambda: self._ending or self._sequences.next_end() is not None)
                else:
                    self._lock.wait_for(lambda: self._ending, wait)
                if self._ending:
                    return

    # ---- its life ----

    def figures(self) -> dict[str, int]:
        return dict(self.counts)

    def require_lasting(self) -> None:
        if not self._lasting:
            raise BadInput("a swap disk without a file is gone with this process: give --swap-disk a FILE, not a SIZE")

    def settle(self) -> None:
        self.require_lasting()
        self._settled(f"disk {self.id} cannot be written out")

    def activate(self) -> None:
        self._local.activate()
        if self._mode == "replace" and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pyvmm swap disk", daemon=True)
            self._thread.start()

    def release(self) -> None:
        self.settle()
        self._local.release()

    def close(self) -> None:
        with self._lock:
            self._ending = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock, suppress(MemoryAccessError):
            for group in self._groups:
                self._drop(group * _GROUP, min((group + 1) * _GROUP, self._blocks))
        self._local.close()


def make(what: str, mode: str = "replace", durable: bool = False) -> SwapDisk:
    """what: a size, of a disk whose file has no name, or the name of a file. Raises BadInput, HostError."""
    from pyvmm.layout import parse_size
    from pyvmm.memory.swap import FOLDER, open_nameless

    try:
        size = parse_size(what)
    except BadInput:
        return SwapDisk(RawFile(what), mode, durable=durable)
    if durable:
        raise BadInput("a swap disk without a file cannot be durable: give it a FILE, not a SIZE")
    if not 0 < size <= 1 << 40 or size % PAGE_SIZE:
        raise BadInput(f"a swap disk of {what}: give pages of 4K, up to 1T")
    fd = open_nameless(FOLDER)
    try:
        os.ftruncate(fd, size)
        return SwapDisk(RawFile(f"/proc/self/fd/{fd}"), mode, lasting=False)
    except OSError as error:
        raise BadInput(f"a swap disk of {what} in {FOLDER}: {error.strerror}") from None
    finally:
        os.close(fd)
