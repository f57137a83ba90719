# snapshot_files.py: small snapshot files for tests, the RAM that they are of, and files forged from them.
from __future__ import annotations

import random
import struct

from pyvmm._native import ffi, lib
from pyvmm.layout import PAGE_SIZE
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.format import CHUNK, CODECS, HEADER_SIZE, SECTIONS, align, decode
from pyvmm.snapshot.writer import Writer
from pyvmm.state import State

PAGES = 515
"""As few as a VM can have, and not a multiple of anything."""
BLOCK = 16 << 10
AVAILABLE = tuple(name for number, name in enumerate(CODECS) if lib.pv_codec_available(number) == 0)
STATE = State(
    "vm", 3, {"clock": 1 << 63, "name": "kern\u00e4l", "on": True, "parts": [State("uart", 1, {"fifo": b"x" * 99})]}
)


def some_ram(seed, pages=PAGES):
    """Zeros, noise, and what can be compressed."""
    rng = random.Random(seed)
    kinds = (lambda: bytes(PAGE_SIZE), lambda: rng.randbytes(PAGE_SIZE), lambda: rng.randbytes(64) * 64)
    return bytearray().join(rng.choice(kinds)() for _ in range(pages))


def page_of(ram, page):
    return bytes(ram[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])


def save(path, ram, order=None, codec="raw", block_size=BLOCK, parent=None, states=STATE, large=(1,), wset=None):
    """Saves the pages in `order`; all of them if it is None."""
    order = range(len(ram) // PAGE_SIZE) if order is None else order
    with Writer(str(path), len(ram), block_size, codec, parent) as writer:
        writer.add_pages([(page, 1) for page in order], b"".join(page_of(ram, page) for page in order))
        writer.finish(states, large, wset)


def pages_in(path):
    """All pages, read one by one."""
    with Snapshot.open(str(path)) as snapshot:
        return bytearray().join(snapshot.read_page(page) for page in range(snapshot.pages))


def xxh64(data):
    return lib.pv_hash(ffi.from_buffer(data), len(data), 0)


def sealed(raw):
    """The header of these bytes with its checksum put right."""
    raw[HEADER_SIZE - 8 : HEADER_SIZE] = xxh64(bytes(raw[: HEADER_SIZE - 8])).to_bytes(8, "little")
    return raw


# ---- forged: with all checksums right ----

WORD = struct.Struct("<Q")
ROW = struct.Struct("<QQQIHH")
TABLE = 136
"""Where the table of sections begins."""


class Forge:
    """The bytes of a snapshot, to be changed: sections by name, checksums made right at the end."""

    def __init__(self, raw):
        self.header = decode(raw[:HEADER_SIZE], len(raw), "")
        self.head = bytearray(raw[:HEADER_SIZE])
        self.blocks = bytearray(raw[HEADER_SIZE : self.header.sections["states"].offset])
        sections = self.header.sections
        self.sections = {
            name: bytearray(raw[sections[name].offset : sections[name].offset + sections[name].length])
            for name in SECTIONS
        }

    def word(self, section, index, value=None):
        if value is not None:
            WORD.pack_into(self.sections[section], 8 * index, value & (1 << 64) - 1)
        return WORD.unpack_from(self.sections[section], 8 * index)[0]

    def row(self, block, **changed):
        names = ("offset", "checksum", "first", "length", "slots", "codec")
        values = dict(zip(names, ROW.unpack_from(self.sections["blocks"], 32 * block), strict=True))
        values.update(changed)
        ROW.pack_into(self.sections["blocks"], 32 * block, *values.values())
        return values

    def raw(self):
        out = self.head + self.blocks
        for number, name in enumerate(SECTIONS):
            data = self.sections[name]
            padded = bytes(data).ljust(align(len(data)), b"\0")
            sums = b"".join(WORD.pack(xxh64(padded[at : at + CHUNK])) for at in range(0, len(padded), CHUNK))
            struct.pack_into("<QQQQ", out, TABLE + 32 * number, number + 1, len(out), len(data), xxh64(sums))
            out += padded + sums
        WORD.pack_into(out, 80, len(out))
        return sealed(out)


def put(made, at, kind, *values):
    struct.pack_into(kind, made.head, at, *values)
