# trace.py: the trace of a VM's accesses to its memory, and the file that holds one (docs/reclaim.md describes it).
# Units: small pages by number, us.
"""`Trace`, with `Sample` and `Duplicates`; `save()`, `load()`, which raises BadInput for all that is wrong."""

from __future__ import annotations

import os
import struct
import zlib
from array import array

from pyvmm.errors import BadInput, HostError
from pyvmm.memory.reclaim.policy import BLOCK_PAGES
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO, TypeAlias

    Event: TypeAlias = "Sample | Duplicates"

MAGIC = b"\x93PVACC\n\0"
VERSION = 1
MAX_PAGES = 1 << 27
"""512 GiB of RAM."""
MAX_RECORDS = 1 << 26
MAX_SOURCE = 200
"""Bytes of UTF-8."""
CHUNK_RECORDS = 1 << 16

_HEAD = struct.Struct("<8sIIQQI")  # magic, version, flags, pages, seed, bytes of the source; then that, and a checksum
_CHUNK = struct.Struct("<4sIII")  # kind, records, bytes stored, checksum
_MARKS = struct.Struct(f"<I{BLOCK_PAGES // 8}s")
_END = struct.Struct("<QQ")
_CRC = struct.Struct("<I")
_SIZES = {b"TOUC": 8, b"SAMP": _MARKS.size, b"DUPL": _MARKS.size, b"END ": _END.size}
"""kind -> bytes of a record, before it is compressed."""


class Marks(Record):
    """Something about a block's small pages. bits: 512 of them, bit i for its page i."""

    __slots__ = ("bits", "block")

    def __init__(self, block: int, bits: int) -> None:
        self.block = block
        self.bits = bits

    def pages(self) -> list[int]:
        """Those whose bit is set."""
        first = self.block * BLOCK_PAGES
        return [first + i for i in range(self.bits.bit_length()) if self.bits >> i & 1]


class Sample(Marks):
    """A block was watched for a time: the pages that were touched."""

    __slots__ = ()


class Duplicates(Marks):
    """A block was scanned: pages of which the content is kept elsewhere too, in pages that are not marked themselves.

    All that is marked can be given up. Marks of a block add up; whoever writes a page clears its mark.
    """

    __slots__ = ()


class Trace:
    """What a VM's memory was used for. words: a touch each, page * 2 + (1 for a write). deltas: us since the last.

    events: (n, event), which came after n touches, in order. pages: of the VM. seed: of what made it, if anything
    random did; source: says what.
    """

    def __init__(self, pages: int, seed: int = 0, source: str = "") -> None:
        if not 1 <= pages <= MAX_PAGES:
            raise BadInput(f"a trace of a VM of {pages} pages: 1 to {MAX_PAGES} can be")
        if not 0 <= seed < 1 << 64 or len(source.encode("utf-8", "replace")) > MAX_SOURCE or not source.isprintable():
            raise BadInput(f"a trace's seed has 64 bits, its source at most {MAX_SOURCE} bytes, in one line")
        self.pages = pages
        self.seed = seed
        self.source = source
        self.words = array("I")
        self.deltas = array("I")
        self.events: list[tuple[int, Event]] = []

    def __len__(self) -> int:
        return len(self.words)

    @property
    def blocks(self) -> int:
        """Blocks of 2 MiB, of which the last may be smaller."""
        return -(-self.pages // BLOCK_PAGES)

    def touch(self, page: int, write: bool, delta: int = 1) -> None:
        """Adds a touch, `delta` us after the one before. Raises BadInput."""
        if not 0 <= page < self.pages or not 0 <= delta < 1 << 32:
            raise BadInput(f"page {page} of {self.pages}, {delta} us later: cannot be in a trace")
        self.words.append(page << 1 | write)
        self.deltas.append(delta)

    def add(self, event: Event) -> None:
        """Adds what came after the last touch. Raises BadInput."""
        _check(event, self.pages)
        self.events.append((len(self.words), event))

    def seconds(self) -> float:
        """From its begin to the last touch."""
        return sum(self.deltas) / 1e6


def _check(event: Event, pages: int) -> None:
    size = min(BLOCK_PAGES, pages - event.block * BLOCK_PAGES) if event.block >= 0 else 0
    if size <= 0 or not 0 <= event.bits < 1 << size:
        raise BadInput(f"block {event.block} of a VM of {pages} pages: such a {type(event).__name__} cannot be")


# ---- the file ----


def save(trace: Trace, path: str) -> None:
    """Writes a trace into a file of mode 0600, which appears when it is whole. Raises HostError."""
    fresh = f"{path}.new"
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                for part in _encoded(trace):
                    file.write(part)
            os.replace(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from None


def _encoded(trace: Trace) -> Iterator[bytes]:
    source = trace.source.encode()
    head = _HEAD.pack(MAGIC, VERSION, 0, trace.pages, trace.seed, len(source)) + source
    yield head + _CRC.pack(zlib.crc32(head))
    chunks = 0
    for kind, records, data in _chunks(trace):
        stored = zlib.compress(data, 1)
        yield _sealed(chunks, kind, records, stored)
        chunks += 1
    yield _sealed(chunks, b"END ", 1, zlib.compress(_END.pack(len(trace.words), len(trace.events))))


def _sealed(number: int, kind: bytes, records: int, stored: bytes) -> bytes:
    return _CHUNK.pack(kind, records, len(stored), _sum(number, kind, records, stored)) + stored


def _sum(number: int, kind: bytes, records: int, stored: bytes) -> int:
    """Of a chunk and its place, so that none can be left out, doubled or moved."""
    return zlib.crc32(stored, zlib.crc32(struct.pack("<Q4sI", number, kind, records)))


def _chunks(trace: Trace) -> Iterator[tuple[bytes, int, bytes]]:
    """(kind, records, bytes), in the order of the trace."""
    done = 0
    for kind, place, events in _runs(trace):
        while done < place:
            end = min(place, done + CHUNK_RECORDS)
            yield b"TOUC", end - done, trace.deltas[done:end].tobytes() + trace.words[done:end].tobytes()
            done = end
        for first in range(0, len(events), CHUNK_RECORDS):
            part = events[first : first + CHUNK_RECORDS]
            yield kind, len(part), b"".join(map(_packed, part))


def _runs(trace: Trace) -> Iterator[tuple[bytes, int, list[Event]]]:
    """Events of one kind that came one after the other; at the end none, after the last touch."""
    run: list[Event] = []
    kind, place = b"", 0
    for at, event in trace.events:
        its = b"SAMP" if isinstance(event, Sample) else b"DUPL"
        if run and (at != place or its != kind):
            yield kind, place, run
            run = []
        kind, place = its, at
        run.append(event)
    if run:
        yield kind, place, run
    yield b"", len(trace.words), []


def _packed(event: Event) -> bytes:
    return _MARKS.pack(event.block, event.bits.to_bytes(BLOCK_PAGES // 8, "little"))


def load(path: str) -> Trace:
    """Reads a trace. Raises BadInput, in one line, where it is damaged, truncated or none, or too large."""
    try:
        with open(path, "rb") as file:
            return _decoded(file)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _decoded(file: BinaryIO) -> Trace:
    trace = _head(file)
    number = 0
    while True:
        kind, records, data = _chunk(file, number)
        if kind == b"END ":
            break
        if len(trace.words) + len(trace.events) + records > MAX_RECORDS:
            raise BadInput(f"more than {MAX_RECORDS} records")
        if kind == b"TOUC":
            _touches(trace, records, data)
        else:
            made = Sample if kind == b"SAMP" else Duplicates
            for block, bits in _MARKS.iter_unpack(data):
                trace.add(made(block, int.from_bytes(bits, "little")))
        number += 1
    if _END.unpack(data) != (len(trace.words), len(trace.events)):
        raise BadInput("damaged: it does not hold what its end says")
    if file.read(1):
        raise BadInput("damaged: more behind its end")
    return trace


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise BadInput("truncated")
    return data


def _head(file: BinaryIO) -> Trace:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or head[:8] != MAGIC:
        raise BadInput("not an access trace")
    _, version, flags, pages, seed, size = _HEAD.unpack(head)
    if version != VERSION or flags:
        raise BadInput(f"an access trace of version {version}, and this pyvmm reads version {VERSION} alone")
    if size > MAX_SOURCE:
        raise BadInput("damaged in its head")
    source = _read(file, size)
    if _CRC.unpack(_read(file, _CRC.size))[0] != zlib.crc32(head + source):
        raise BadInput("damaged in its head")
    try:
        return Trace(pages, seed, source.decode())
    except UnicodeDecodeError:
        raise BadInput("damaged in its head") from None


def _chunk(file: BinaryIO, number: int) -> tuple[bytes, int, bytes]:
    """Kind, records, and the bytes of these: checked, and no more than the records take."""
    kind, records, size, checksum = _CHUNK.unpack(_read(file, _CHUNK.size))
    whole = records * _SIZES.get(kind, 0)
    most = 1 if kind == b"END " else CHUNK_RECORDS
    if kind not in _SIZES or not 1 <= records <= most or size > whole + whole // 8 + 64:
        raise BadInput(f"damaged in chunk {number}")
    stored = _read(file, size)
    if _sum(number, kind, records, stored) != checksum:
        raise BadInput(f"damaged in chunk {number}: the checksum is wrong")
    unpacking = zlib.decompressobj()
    try:
        data = unpacking.decompress(stored, whole)
        good = len(data) == whole and not unpacking.decompress(unpacking.unconsumed_tail, 1)
    except zlib.error:
        good = False
    if not good or not unpacking.eof or unpacking.unused_data:
        raise BadInput(f"damaged in chunk {number}: not {records} records")
    return kind, records, data


def _touches(trace: Trace, records: int, data: bytes) -> None:
    words = array("I", data[records * 4 :])
    if max(words) >> 1 >= trace.pages:
        raise BadInput(f"damaged: page {max(words) >> 1} of {trace.pages}")
    trace.deltas.frombytes(data[: records * 4])
    trace.words.extend(words)
