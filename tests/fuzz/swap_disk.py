# swap_disk.py: a swap disk with the host's real swap behind it, and a plain model beside it, for fuzz_virtio.py. Units:
# bytes, sectors of 512 bytes, pages of 4 KiB.
"""`CheckedSwapDisk`: after each request the disk has what it was given. `host_does()`: what the host does meanwhile."""

from __future__ import annotations

import os

from pyvmm.devices.virtio.queue import Buffers
from pyvmm.devices.virtio.rawfile import SECTOR, RawFile
from pyvmm.devices.virtio.swapdisk import SwapDisk
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory import GuestMemory
from pyvmm.memory.swap import Swap

OUT, REPLACE, CLOSE = range(3)
"""What host_does(): RUN pages go out; the thread's next step; the swap ends, and another one begins."""
ACTIONS = 3
RUN = 128
FILLED = range(64, RUN)
"""Pages that have something at first: of zeros nothing goes to the swap file, and where few pages do, all of them come
back with the first that is touched."""
_SWAP = 4 << 20


class CheckedSwapDisk(SwapDisk):
    """A SwapDisk whose thread is host_does(), by a clock that stands otherwise."""

    def __init__(self, memory: GuestMemory, sectors: int, mode: str, durable: bool) -> None:
        fd = os.memfd_create("fuzz")
        try:
            os.ftruncate(fd, sectors * SECTOR)
            local = RawFile(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        self._now = 1.0
        super().__init__(local, mode, durable=durable, clock=lambda: self._now)
        self._memory = memory
        self._model = bytearray(sectors * SECTOR)
        self.swap = Swap(memory, None, _SWAP)
        for page in FILLED:
            memory.write(memory.gpa_of(page), page.to_bytes(4, "little"))

    def write(self, sector: int, source: Buffers) -> None:
        super().write(sector, source)
        data = source.read()  # not before: that brings the pages
        self._set(sector, data)
        self._check(sector, len(data))

    def read(self, sector: int, into: Buffers) -> None:
        self._check(sector, into.size)  # not afterwards: a driver may give the same room twice
        super().read(sector, into)

    def discard(self, sector: int, count: int) -> None:
        super().discard(sector, count)
        self._set(sector, bytes(self._bytes(sector * SECTOR, count * SECTOR)))  # anything, but for good

    def write_zeroes(self, sector: int, count: int, unmap: bool) -> None:
        super().write_zeroes(sector, count, unmap)
        self._set(sector, bytes(count * SECTOR))
        self._check(sector, count * SECTOR)

    def _set(self, sector: int, data: bytes) -> None:
        self._model[sector * SECTOR : sector * SECTOR + len(data)] = data

    def _check(self, sector: int, size: int) -> None:
        at = sector * SECTOR
        assert 0 <= at <= at + size <= len(self._model)
        assert size == 0 or bytes(self._bytes(at, size)) == self._model[at : at + size], (
            f"sector {sector}, {size} bytes"
        )

    def host_does(self, value: int) -> None:
        """value: which of the three, and with which pages."""
        what, pages = value % ACTIONS, self._memory.size // PAGE_SIZE
        if what == OUT:
            first = value // ACTIONS % pages
            self.swap.out([(first, min(RUN, pages - first))])
            self.swap.drain()
        elif what == REPLACE:
            self._now += 1
            self.replace_next()
        else:
            self.swap.close()
            assert self.swap.stats().references == 0
            self.swap = Swap(self._memory, None, _SWAP)
        self._check(0, len(self._model))

    def close(self) -> None:
        self._check(0, len(self._model))
        super().close()
        counts = self.swap.stats()
        assert (counts.references, counts.held) == (0, 0)
