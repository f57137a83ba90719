# inspect.py: counts what is in a snapshot, and proves that it is whole. With numpy, so imported when asked for alone.
"""`info()`, `check()`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy

from pyvmm._native import lib
from pyvmm.errors import SnapshotError
from pyvmm.layout import PAGE_SIZE
from pyvmm.snapshot.format import ROW_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.snapshot.reader import Progress, Snapshot

_ROW = numpy.dtype(
    [
        ("offset", "<u8"), ("checksum", "<u8"), ("first", "<u8"),
        ("length", "<u4"), ("slots", "<u2"), ("codec", "<u2"),
    ]
)  # fmt: skip
_PIECE = 1 << 20
"""Pages looked at in one go."""


class Info(NamedTuple):
    """Pages by where they are; bytes of pages in storage blocks, and what they take there, by codec."""

    zero: int
    stored: int
    inherited: int
    large_blocks: int
    working_set: int
    raw_bytes: int
    stored_bytes: int
    raw_blocks: int
    """Storage blocks that no codec makes smaller."""


def info(snapshot: Snapshot) -> Info:
    """What is in one file, its ancestors left out. Raises SnapshotError."""
    counts = [0, 0, 0]
    for words in _pieces(snapshot, "index", 8, "<u8"):
        kinds = words & numpy.uint64(lib.PV_INDEX_KIND)
        for kind in (lib.PV_INDEX_ZERO, lib.PV_INDEX_BLOCK, lib.PV_INDEX_PARENT):
            counts[kind] += int(numpy.count_nonzero(kinds == kind))
    stored = raw_blocks = 0
    for rows in _pieces(snapshot, "blocks", ROW_SIZE, _ROW):
        stored += int(rows["length"].sum(dtype=numpy.uint64))
        raw_blocks += int(numpy.count_nonzero(rows["codec"] == lib.PV_CODEC_RAW))
    return Info(
        zero=counts[lib.PV_INDEX_ZERO],
        stored=counts[lib.PV_INDEX_BLOCK],
        inherited=counts[lib.PV_INDEX_PARENT],
        large_blocks=len(snapshot.large),
        working_set=len(snapshot.wset),
        raw_bytes=counts[lib.PV_INDEX_BLOCK] * PAGE_SIZE,
        stored_bytes=stored,
        raw_blocks=raw_blocks,
    )


def check(snapshot: Snapshot, progress: Progress | None = None) -> None:
    """Reads everything, from the oldest ancestor on. Raises SnapshotError for the first thing that is wrong."""
    chain = [snapshot]
    while chain[-1].depth:
        chain.append(chain[-1].require_parent())
    done, total = 0, sum(each.header.file_size for each in chain)
    for each in reversed(chain):
        _check_maps(each)
        _ = each.states, each.large, each.wset
        for block in range(each.blocks):
            each.read_block(block)
            if progress is not None and block % 64 == 0:
                progress(done + each.header.file_size * block // each.blocks, total)
        done += each.header.file_size
        if progress is not None:
            progress(done, total)


def _check_maps(snapshot: Snapshot) -> None:
    """Each page is in one place, each slot belongs to one page, and blocks fill their part of the file. That each slot
    is its page's is looked at when its block is read; here remains that no page names another slot, nor one twice."""

    def damaged(what: str) -> SnapshotError:
        return SnapshotError(f"{snapshot.name}: damaged: {what}")

    parent = snapshot.depth > 0
    stored = 0
    for words in _pieces(snapshot, "index", 8, "<u8"):
        kinds = words & numpy.uint64(lib.PV_INDEX_KIND)
        in_block = kinds == lib.PV_INDEX_BLOCK
        others = words[~in_block]
        allowed = (others == lib.PV_INDEX_ZERO) | (parent & (others == lib.PV_INDEX_PARENT))
        if not allowed.all():
            raise damaged("its index has a page that is nowhere")
        stored += int(numpy.count_nonzero(in_block))
    # As many pages name a slot as there are slots, and read_block() finds that each slot is named by its own page:
    # so no other page names one.
    if stored != snapshot.header.backs:
        raise damaged(f"its index has {stored} pages in storage blocks, which have {snapshot.header.backs}")
    offset, first = snapshot.native.begin, 0
    for rows in _pieces(snapshot, "blocks", ROW_SIZE, _ROW):
        lengths = (rows["length"].astype(numpy.uint64) + numpy.uint64(7)) & ~numpy.uint64(7)
        ends = numpy.cumsum(lengths, dtype=numpy.uint64) + numpy.uint64(offset)
        lasts = numpy.cumsum(rows["slots"], dtype=numpy.uint64) + numpy.uint64(first)
        if (rows["offset"] + lengths != ends).any() or (rows["first"] + rows["slots"] != lasts).any():
            raise damaged("its storage blocks overlap, or leave a gap")
        offset, first = int(ends[-1]), int(lasts[-1])
    if offset != snapshot.native.end or first != snapshot.header.backs:
        raise damaged("its storage blocks do not fill their part of the file")


def _pieces(snapshot: Snapshot, kind: str, size: int, dtype: object) -> Iterator[Any]:
    """The rows of a section, verified, as arrays of at most _PIECE."""
    length = snapshot.header.sections[kind].length
    for at in range(0, length, _PIECE * size):
        part = snapshot._bytes(kind, at, min(_PIECE * size, length - at))
        yield numpy.frombuffer(part, dtype=dtype)  # type: ignore[call-overload]
