# fuzz_snapshot.py: a snapshot file, hostile, read in each way that there is. Beside it lies the parent of the one seed
# that has one.
"""`one_input()`; `repaired()` and `mutate()` for fuzzers."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from functools import cache

from checks import one_line
from seeds import parent_file, snapshots
from snapshot_files import ROW, TABLE, WORD, Forge, put, sealed, xxh64

import pyvmm.snapshot.inspect
import pyvmm.snapshot.load  # noqa: F401  (else imported when it is first used: too late to be instrumented)
from pyvmm.errors import SnapshotError
from pyvmm.layout import BLOCK_SIZE, MIB, PAGE_SIZE, Gpa
from pyvmm.memory import GuestMemory
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.format import CHUNK, HEADER_SIZE, MAGIC, SECTIONS, align
from pyvmm.state import State

MAX_SIZE = 64 << 10
MOST_WORDS = 16_000
"""Characters of an error: two names of a parent of 1024 bytes, each of which may be shown as \\udcff."""
_MOST_RAM = 4 * MIB
"""Of more no page is read: a file of MAX_SIZE may say that it has this."""


@cache
def _place() -> tempfile.TemporaryDirectory:
    at = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    parent_file(os.path.join(at.name, "parent"))
    return at  # removed when the process ends


def one_input(data: bytes) -> None:
    """What `check()` finds whole is read in each way, and always the same; else a SnapshotError of one line."""
    path = os.path.join(_place().name, "file")
    with open(path, "wb") as file:
        file.write(data)
    try:
        snapshot = Snapshot.open(path)
    except SnapshotError as error:
        one_line(error, MOST_WORDS)
        return
    with snapshot:
        whole = _attempt(snapshot.check)
        readings = [
            _attempt(reading)
            for reading in (
                snapshot.info,
                lambda: _maps(snapshot),
                lambda: [snapshot.page_home(page) for page in range(0, snapshot.pages, 37)],
                lambda: [snapshot.read_page(page) for page in range(0, snapshot.pages, 61)],
            )
        ]
        same = _attempt(lambda: _loaded_as_read(snapshot)) if snapshot.memory_size <= _MOST_RAM else True
        assert not whole or (all(readings) and same), "it was found whole, and then it was not"


def _attempt(reading: object) -> bool:
    """Was it read?"""
    try:
        reading()
    except SnapshotError as error:
        one_line(error, MOST_WORDS)
        return False
    return True


def _loaded_as_read(snapshot: Snapshot) -> None:
    memory = GuestMemory(snapshot.memory_size, "4k")
    snapshot.load_into(memory)
    expected = bytearray(snapshot.memory_size)
    inherited = [page for page in range(snapshot.pages) if snapshot.page_home(page).kind == "parent"]
    found = [(page, snapshot.read_page(page)) for page in inherited]
    for block in range(snapshot.blocks):
        found += snapshot.read_block(block)
    for page, data in found:
        expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = data
    with memory.view(Gpa(0), snapshot.memory_size) as view:
        assert bytes(view) == expected


def _maps(snapshot: Snapshot) -> None:
    """What is not pages: numbers that others rely on."""
    assert all(block * BLOCK_SIZE < snapshot.memory_size for block in snapshot.large)
    assert all(page < snapshot.pages for page in snapshot.wset)
    assert len(set(snapshot.wset)) == len(snapshot.wset)
    assert isinstance(snapshot.states, State)


# ---- for fuzzers ----


def repaired(data: bytes) -> bytes:
    """The same with all checksums right that are where the header says, so that maps and values are looked at."""
    raw = bytearray(data.ljust(HEADER_SIZE, b"\0"))
    raw[:16] = MAGIC + struct.pack("<II", 1, HEADER_SIZE)
    WORD.pack_into(raw, 80, len(raw))
    rows = [struct.unpack_from("<QQQ", raw, TABLE + 32 * number) for number in range(len(SECTIONS))]
    _seal_blocks(raw, *rows[SECTIONS.index("blocks")][1:])
    for number, (_, offset, length) in enumerate(rows):
        sums = offset + align(length)
        if sums + 8 * -(-length // CHUNK) > len(raw):
            continue
        for at in range(offset, sums, CHUNK):
            WORD.pack_into(raw, sums, xxh64(bytes(raw[at : min(at + CHUNK, offset + align(length))])))
            sums += 8
        WORD.pack_into(raw, TABLE + 32 * number + 24, xxh64(bytes(raw[offset + align(length) : sums])))
    return bytes(sealed(raw))


def _seal_blocks(raw: bytearray, offset: int, length: int) -> None:
    """The checksums of the storage blocks of which all bytes are there."""
    for at in range(offset, min(offset + length, len(raw)) - ROW.size + 1, ROW.size):
        start, _, _, size, _, _ = ROW.unpack_from(raw, at)
        if HEADER_SIZE <= start <= len(raw) - align(size):
            WORD.pack_into(raw, at + 8, xxh64(bytes(raw[start : start + align(size)])))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Other values in header and maps, and maps that grow or shrink, the file being laid out anew."""
    try:
        made = Forge(data)
    except SnapshotError:
        made = Forge(_seeds()[rng.randrange(len(_seeds()))])
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(("head", "pages", *SECTIONS))
        area = made.head if name == "head" else made.blocks if name == "pages" else made.sections[name]
        if name == "head":
            size = rng.choice((1, 2, 4, 8))
            place = rng.choice((rng.randrange(12, 530), 4 * rng.randrange(3, 34), TABLE + 8 * rng.randrange(24)))
            put(made, place, f"{size}s", _bytes(rng, size))
        elif not area or rng.random() < 0.1:
            area[rng.randrange(len(area) + 1) :] = rng.randbytes(8 * rng.randrange(3))
        else:
            _change(area, rng)
    return repaired(bytes(made.raw()))


def _change(area: bytearray, rng: random.Random) -> None:
    """Another value; or one of the others, whole words of which may be in the wrong place."""
    if rng.random() < 0.5:
        size = rng.choice((1, 2, 4, 8))
        at = rng.randrange(max(1, len(area) - size + 1)) // size * size
        area[at : at + size] = _bytes(rng, size)[: len(area) - at]
        return
    size = rng.choice((8, 32, PAGE_SIZE))
    at, other = (rng.randrange(max(1, len(area) // size)) * size for _ in range(2))
    area[at : at + size], area[other : other + size] = area[other : other + size], area[at : at + size]


def _bytes(rng: random.Random, size: int) -> bytes:
    value = rng.choice(
        (0, 1, rng.randrange(600), 1 << rng.randrange(64), rng.randrange(20) << 12 | 1, -1, rng.getrandbits(64))
    )
    return (value % (1 << 8 * size)).to_bytes(size, "little")


@cache
def _seeds() -> list[bytes]:
    return snapshots()
