# format.py: the fixed header of a snapshot file, and the limits of all that follows it. docs/snapshot-format.md
# describes the file. Units: bytes, pages of 4 KiB. Nothing here opens a file.
"""`Header`, `Section`: what the first 4096 bytes of a snapshot say, encoded and decoded."""

from __future__ import annotations

import mmap
import os
import struct

from pyvmm._native import ffi, lib
from pyvmm.errors import SnapshotError
from pyvmm.layout import BLOCK_SIZE, MIN_MEMORY, PAGE_SIZE
from pyvmm.record import Record

MAGIC = b"\x93PVSNAP\n"
"""Not text, and with a line end, so that a transfer as text shows."""
VERSION = 1
HEADER_SIZE = 4096
CHUNK: int = lib.PV_CHUNK
"""Bytes of a section under one checksum."""
MAX_MEMORY = 1 << 40
"""1 TiB: so that opening a file reads less than 1 MiB beside its states, and all maps take less than 8 GiB, whatever a
file says."""
MAX_STATES = 64 << 20
MAX_DEPTH = 32
"""A snapshot has so many ancestors at most."""
MAX_PATH = 1024
MAX_WSET = 1 << 22
"""Pages in a working set."""
ROW_SIZE = ffi.sizeof("struct pv_stored")
ID_SIZE = 16
NO_ID = bytes(ID_SIZE)

CODECS = ("raw", "lz4", "zstd")
"""By number, as PV_CODEC_* of cffi_build/snapshot.h."""

SECTIONS = ("states", "index", "blocks", "back", "large", "wset")
"""In the order of the table and of the file; the kind of each is its place here, from 1 on."""

_FIXED = struct.Struct(f"<8sII32s{ID_SIZE}s{ID_SIZE}sQQQQQIIII")
_SECTION = struct.Struct("<QQQQ")
_PATH_AT = 512
_SUM = struct.Struct("<Q")


def align(size: int) -> int:
    """The next multiple of 8."""
    return (size + 7) & ~7


def checksum(data: bytes | bytearray | memoryview) -> int:
    """XXH64, seed 0."""
    return lib.pv_hash(ffi.from_buffer(data), len(data), 0)


def room(size: int) -> mmap.mmap:
    """Zeros, which take memory only where they are touched. Raises OSError."""
    return mmap.mmap(-1, max(size, 8), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Section(Record):
    """Where a section lies. Its bytes, filled up to a multiple of 8, are followed by one checksum for each of its
    chunks; `checksum` is of these. length 0: it is not there, and nothing of it is stored."""

    __slots__ = ("checksum", "length", "offset")

    def __init__(self, offset: int, length: int, checksum: int) -> None:
        self.offset = offset
        self.length = length
        self.checksum = checksum

    @property
    def chunks(self) -> int:
        """How many checksums it has."""
        return -(-self.length // CHUNK)

    @property
    def end(self) -> int:
        """The first byte behind its checksums."""
        return self.offset + align(self.length) + 8 * self.chunks


class Header(Record):
    """What a snapshot says of itself.

    producer: the pyvmm that wrote it; id, parent_id: 16 bytes, the latter NO_ID without a parent; parent_path: where
    the parent was, a name alone if it was beside; depth: ancestors; memory_size: bytes of RAM; block_size: bytes of
    pages in a storage block; blocks, backs: rows of BLOCKS, pages in them; codec: of CODECS; sections: by name;
    file_size: bytes.
    """

    __slots__ = (
        "backs", "block_size", "blocks", "codec", "depth", "file_size", "id", "memory_size", "parent_id",
        "parent_path", "producer", "sections",
    )  # fmt: skip

    def __init__(
        self,
        producer: str,
        id: bytes,
        parent_id: bytes,
        parent_path: str,
        depth: int,
        memory_size: int,
        block_size: int,
        codec: str,
        blocks: int,
        backs: int,
        sections: dict[str, Section],
        file_size: int,
    ) -> None:
        self.producer = producer
        self.id = id
        self.parent_id = parent_id
        self.parent_path = parent_path
        self.depth = depth
        self.memory_size = memory_size
        self.block_size = block_size
        self.codec = codec
        self.blocks = blocks
        self.backs = backs
        self.sections = sections
        self.file_size = file_size

    @property
    def pages(self) -> int:
        """Pages of RAM."""
        return self.memory_size // PAGE_SIZE

    def encode(self) -> bytes:
        """The 4096 bytes."""
        path = os.fsencode(self.parent_path)
        raw = bytearray(HEADER_SIZE)
        _FIXED.pack_into(
            raw, 0, MAGIC, VERSION, HEADER_SIZE, self.producer.encode(), self.id, self.parent_id, self.file_size,
            self.memory_size, self.pages, self.blocks, self.backs, self.block_size, CODECS.index(self.codec),
            self.depth, len(path),
        )  # fmt: skip
        for number, name in enumerate(SECTIONS):
            section = self.sections[name]
            row = number + 1, section.offset, section.length, section.checksum
            _SECTION.pack_into(raw, _FIXED.size + number * _SECTION.size, *row)
        raw[_PATH_AT : _PATH_AT + len(path)] = path
        _SUM.pack_into(raw, HEADER_SIZE - 8, checksum(memoryview(raw)[:-8]))
        return bytes(raw)


def decode(raw: bytes, file_size: int, name: str) -> Header:
    """The header of a file of that size. Raises SnapshotError, which names the file, for all that cannot be."""

    def refuse(what: str) -> SnapshotError:
        return SnapshotError(f"{name}: {what}")

    if raw[: len(MAGIC)] != MAGIC:
        raise refuse("not a snapshot of pyvmm")
    if len(raw) >= 12 and (version := int.from_bytes(raw[8:12], "little")) != VERSION:
        raise refuse(f"a snapshot of format version {version}, and this pyvmm reads version {VERSION} alone")
    if len(raw) < HEADER_SIZE:
        raise refuse(f"truncated: {len(raw)} bytes are not even a header of {HEADER_SIZE}")
    if _SUM.unpack_from(raw, HEADER_SIZE - 8)[0] != checksum(raw[:-8]):
        raise refuse("damaged: the checksum of its header is wrong")
    (
        _, _, header_size, producer, own, parent, size, memory_size, pages, blocks, backs, block_size, codec, depth,
        path_size,
    ) = _FIXED.unpack_from(raw)  # fmt: skip
    if size != file_size:
        what = "truncated" if file_size < size else "something is appended"
        raise refuse(f"{what}: it has {file_size} bytes, and {size} when it was written")
    producer = producer.rstrip(b"\0")
    damaged = refuse("damaged: its header contradicts itself")  # with a right checksum: made to deceive, or a bug
    if (
        header_size != HEADER_SIZE
        or not (producer.isascii() and producer.decode("ascii", "replace").isprintable())
        or not (MIN_MEMORY <= memory_size <= MAX_MEMORY and memory_size % PAGE_SIZE == 0)
        or pages != memory_size // PAGE_SIZE
        or not (lib.PV_STORE_MIN <= block_size <= lib.PV_STORE_MAX and block_size & (block_size - 1) == 0)
        or codec >= len(CODECS)
        or own == NO_ID
        or depth > MAX_DEPTH
        or (parent != NO_ID) != (depth > 0)
        or parent == own
        or path_size > MAX_PATH
        or (path_size > 0) != (depth > 0)
        or not blocks <= backs <= min(pages, blocks * (block_size // PAGE_SIZE))
    ):
        raise damaged
    path = raw[_PATH_AT : _PATH_AT + path_size]
    sections = {}
    for number, kind in enumerate(SECTIONS):
        found, *row = _SECTION.unpack_from(raw, _FIXED.size + number * _SECTION.size)
        sections[kind] = Section(*row)
        if found != number + 1:
            raise damaged
    if b"\0" in path or not _sections_fit(sections, pages, blocks, backs, size):
        raise damaged
    return Header(
        producer.decode("ascii"), own, parent, os.fsdecode(path), depth, memory_size, block_size, CODECS[codec], blocks,
        backs, sections, size,
    )  # fmt: skip


def large_size(memory_size: int) -> int:
    """Bytes of the LARGE section: a bit for each block of 2 MiB, in whole words of 64."""
    return -(-memory_size // (BLOCK_SIZE * 64)) * 8


def _sections_fit(sections: dict[str, Section], pages: int, blocks: int, backs: int, file_size: int) -> bool:
    """They have the lengths that they must have, and follow each other up to the end of the file without a gap."""
    lengths = {name: section.length for name, section in sections.items()}
    if not (
        0 < lengths["states"] <= MAX_STATES
        and lengths["index"] == pages * 8
        and lengths["blocks"] == blocks * ROW_SIZE
        and lengths["back"] == backs * 8
        and lengths["large"] == large_size(pages * PAGE_SIZE)
        and lengths["wset"] % 8 == 0
        and lengths["wset"] <= min(pages, MAX_WSET) * 8
    ):
        return False
    at = sections["states"].offset
    if at % 8 or at < HEADER_SIZE:
        return False
    for section in sections.values():
        if section.offset != at:
            return False
        at = section.end
    return at == file_size
