# block.py: virtio block device (virtio 1.2, section 5.2). Units: bytes; sectors of 512 bytes.
"""`Block`: requests, checked and answered; where sectors are kept, a `Backend` says."""

from __future__ import annotations

import struct

from pyvmm.devices.virtio.model import Model
from pyvmm.devices.virtio.queue import RingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pyvmm.devices.virtio.queue import Buffers, Chain, Queue
    from pyvmm.state import State

    class Backend(Protocol):
        """What keeps the sectors. All but `sectors` to `id` are called on the device's worker; ranges are within
        0..sectors-1. An OSError answers the request with an error. A FetchError comes from `Buffers`: the request will
        be made once more, from its start, so that nothing of it may count twice."""

        sectors: int
        read_only: bool
        id: str
        """Up to 20 characters by which a guest may know it."""

        def read(self, sector: int, into: Buffers) -> None:
            """Fills the buffers, of whole sectors, from `sector` on."""

        def write(self, sector: int, source: Buffers) -> None:
            """The other way round."""

        def flush(self) -> None:
            """What was written before is there after a crash of the host."""

        def discard(self, sector: int, count: int) -> None:
            """These sectors are of no use any more; what they hold then is anything."""

        def write_zeroes(self, sector: int, count: int, unmap: bool) -> None:
            """These sectors are zeros; with unmap their space may be given up."""

        def activate(self) -> None:
            """From now on the guest may read and write here. Raises BadInput where somebody else does."""

        def figures(self) -> dict[str, int]:
            """Counts of its own."""

        def require_lasting(self) -> None:
            """Raises BadInput where what the guest wrote is gone with this process."""

        def settle(self) -> None:
            """The VM's state is saved: what was written is to be in the file. Raises BadInput, HostError."""

        def release(self) -> None:
            """Another process may read and write, until activate()."""

        def close(self) -> None: ...


SECTOR = 512
F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE = (1 << bit for bit in (1, 2, 5, 6))
F_FLUSH, F_DISCARD, F_WRITE_ZEROES = (1 << bit for bit in (9, 13, 14))
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
"""Types of requests."""
OK, IOERR, UNSUPPORTED = 0, 1, 2
"""How a request ended."""
ID_BYTES = 20
MAX_SEGMENTS, MAX_SEGMENT = 254, 256 << 10
"""Buffers of a request beside header and status, and bytes of each. More than all of them together have is refused,
since who pauses the VM waits for the request at hand."""
MAX_RANGES = 16
MAX_RANGE = 32 << 20 >> 9
"""Of discard and write-zeroes: ranges in one request, and sectors in one range."""
UNMAP = 1
_HEADER = struct.Struct("<IIQ")
_RANGE = struct.Struct("<QII")
_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")


class _Failed(Exception):
    """The request is answered with this status."""

    def __init__(self, status: int) -> None:
        self.status = status


class Block(Model):
    """backend: where the sectors are. `counts`: of requests by kind, and of those that failed."""

    name, id = "block", 2

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend
        self.features = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH
        self.features |= F_RO if backend.read_only else F_DISCARD | F_WRITE_ZEROES
        self.counts = dict.fromkeys(("reads", "writes", "flushes", "discards", "zeroes", "errors"), 0)
        self._kinds = {
            IN: (self._read, "reads"),
            OUT: (self._write, "writes"),
            FLUSH: (self._flush, "flushes"),
            GET_ID: (self._get_id, ""),
            DISCARD: (self._discard, "discards"),
            WRITE_ZEROES: (self._write_zeroes, "zeroes"),
        }

    def config(self) -> bytes:
        # geometry and topology, which were not offered, are zeros; one queue; ranges may be given up by write-zeroes
        ranges = (0, 0, 0, 0, 0, 0) if self._backend.read_only else (MAX_RANGE, MAX_RANGES, 1, MAX_RANGE, MAX_RANGES, 1)
        return _CONFIG.pack(
            self._backend.sectors, MAX_SEGMENT, MAX_SEGMENTS, 0, 0, 0, SECTOR, 0, 0, 0, 0, 0, 0, 1, *ranges
        )

    def serve(self, index: int, queue: Queue, features: int) -> bool | None:
        chain = queue.take()
        if chain is None:
            return None
        if chain.readable.size < _HEADER.size or not chain.writable.size:
            raise RingError("a block request without room for its header or status")
        status, written = OK, 0
        try:
            written = self._do(chain, features)
        except _Failed as failed:
            status = failed.status
        except OSError:  # the file's; FetchError is none
            status = IOERR
        if status != OK:
            self.counts["errors"] += 1
        last = chain.writable.size - 1
        chain.writable.part(last, 1).write(bytes((status,)))
        # "Written" counts from the first byte on: after a failed read that is nothing that the driver could use.
        return queue.give(chain.head, written + 1)

    def _do(self, chain: Chain, features: int) -> int:
        """Bytes written to the buffers in front of the status."""
        kind, _, sector = _HEADER.unpack(chain.readable.part(0, _HEADER.size).read())
        if kind not in self._kinds:
            raise _Failed(UNSUPPORTED)
        call, name = self._kinds[kind]
        source = chain.readable.part(_HEADER.size, chain.readable.size)
        into = chain.writable.part(0, chain.writable.size - 1)
        written = call(sector, source, into, features)
        if name:
            self.counts[name] += 1
        return written

    def _require(self, sector: int, size: int) -> int:
        """Sectors of so many bytes, from `sector` on."""
        if size > MAX_SEGMENTS * MAX_SEGMENT:
            raise _Failed(IOERR)
        if size % SECTOR or sector + size // SECTOR > self._backend.sectors:
            raise _Failed(IOERR)
        return size // SECTOR

    def _require_writable(self) -> None:
        if self._backend.read_only:
            raise _Failed(IOERR)

    def _read(self, sector: int, source: Buffers, into: Buffers, features: int) -> int:
        self._require(sector, into.size)
        self._backend.read(sector, into)
        return into.size

    def _write(self, sector: int, source: Buffers, into: Buffers, features: int) -> int:
        self._require_writable()
        self._require(sector, source.size)
        self._backend.write(sector, source)
        self._settle(features)
        return 0

    def _settle(self, features: int) -> None:
        """A driver that did not agree on flushes takes what is answered for written (5.2.6.2)."""
        if not features & F_FLUSH:
            self._backend.flush()

    def _flush(self, sector: int, source: Buffers, into: Buffers, features: int) -> int:
        if not self._backend.read_only:
            self._backend.flush()
        return 0

    def _get_id(self, sector: int, source: Buffers, into: Buffers, features: int) -> int:
        if into.size < ID_BYTES:
            raise _Failed(IOERR)
        return into.write(self._backend.id.encode("ascii", "replace")[:ID_BYTES].ljust(ID_BYTES, b"\0"))

    def _discard(self, sector: int, source: Buffers, into: Buffers, features: int) -> int:
        for first, count, _ in self._ranges(source, features, F_DISCARD, 0):
            self._backend.discard(first, count)
        self._settle(features)
        return 0

    def _write_zeroes(self, sector: int, source: Buffers, into: Buffers, features: int) -> int:
        for first, count, unmap in self._ranges(source, features, F_WRITE_ZEROES, UNMAP):
            self._backend.write_zeroes(first, count, unmap)
        self._settle(features)
        return 0

    def _ranges(self, source: Buffers, features: int, feature: int, flags: int) -> list[tuple[int, int, bool]]:
        """(first sector, count, unmap) of each range, all of them checked before one of them is touched."""
        self._require_writable()
        if not features & feature:
            raise _Failed(UNSUPPORTED)
        if not source.size or source.size % _RANGE.size or source.size > MAX_RANGES * _RANGE.size:
            raise _Failed(IOERR)
        found = []
        for first, count, given in _RANGE.iter_unpack(source.read()):
            if given & ~flags:
                raise _Failed(UNSUPPORTED)
            if count > MAX_RANGE or first + count > self._backend.sectors:
                raise _Failed(IOERR)
            if count:
                found.append((first, count, bool(given & UNMAP)))
        return found

    @property
    def backend(self) -> Backend:
        """Where the sectors are."""
        return self._backend

    def figures(self) -> dict[str, int]:
        return self.counts | self._backend.figures()

    def require_lasting(self) -> None:
        self._backend.require_lasting()

    def save(self) -> State:
        self._backend.settle()
        return super().save()

    def activate(self) -> None:
        self._backend.activate()

    def release(self) -> None:
        self._backend.release()

    def close(self) -> None:
        self._backend.close()
