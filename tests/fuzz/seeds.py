# seeds.py: what fuzzers begin with, made by code: for each target inputs that are right, by the name of the target.
"""`SEEDS`: name -> a call that gives inputs; `some_frame()`: any frame, as FIELDS of its class say."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from contextlib import suppress

from fuzz_virtio import FEED, GET, HALF, KINDS, MOVE, PUT, SERVE, SET, SWAP_DISKS, step
from snapshot_files import AVAILABLE, PAGES, Forge, put, save
from swap_disk import CLOSE, OUT, REPLACE
from test_image_builders import build_elf, note, pvh_note
from test_image_hostile import VALID
from test_migration_order import WELCOME, WHOLE, hello

from pyvmm.errors import ProtocolError
from pyvmm.layout import PAGE_SIZE
from pyvmm.migration import capture, frames
from pyvmm.migration.fields import Fixed, Number, Rest, Text
from pyvmm.migration.frames import CONTROL, MAX_PAGES, MAX_RUN, RUNS, encode
from pyvmm.migration.shape import Shape
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.format import CODECS, HEADER_SIZE, checksum, decode
from pyvmm.snapshot.states import encode as encode_state
from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FRAME_KINDS = (*CONTROL, *RUNS)
_LETTERS = "abc 019:/.\u00e4\u4e2d"


# ---- frames ----


def some_frame(rng: random.Random, kind: type | None = None) -> frames.Frame:
    """A frame that can be sent, of that kind or of any."""
    while True:
        chosen = kind or rng.choice(FRAME_KINDS)
        values = {name: _value(rng, field) for name, field in chosen.FIELDS.items()}
        _agree(rng, chosen, values)
        with suppress(ProtocolError):
            return chosen(**values)


def _value(rng: random.Random, field: object) -> object:
    if isinstance(field, Number):
        small = min(field.high, field.low + 9)
        return rng.choice((field.low, field.high, rng.randint(field.low, small), rng.randint(field.low, field.high)))
    if isinstance(field, Fixed):
        return rng.randbytes(field.size)
    if isinstance(field, Text):
        return "".join(rng.choices(_LETTERS, k=rng.randrange(20)))
    assert isinstance(field, Rest)
    return rng.randbytes(rng.randint(field.low, field.low + 40))


def _agree(rng: random.Random, kind: type, values: dict) -> None:
    """Fields that depend on each other."""
    if "bits" in values:
        count = values["count"] = rng.randint(1, 300)
        values["first"] %= kind.LIMIT - 300
        values["bits"] = rng.getrandbits(count).to_bytes(-(-count // 8), "little")
    elif "count" in values:
        values["first"] %= MAX_PAGES
        values["count"] = rng.randint(0, min(20, MAX_PAGES - values["first"], MAX_RUN - values["first"] % MAX_RUN))
    elif "total" in values:
        values["total"] = min(values["offset"] + len(values["data"]), kind.FIELDS["total"].high)


def _stream(sent: list, sequence: int = 0) -> bytes:
    return b"".join(encode(frame, sequence + number) for number, frame in enumerate(sent))


def frame_streams() -> list[bytes]:
    """Whole migrations, and each kind of frame for itself."""
    rng = random.Random(1)
    found = [
        bytes(4) + _stream([hello(mode), WELCOME, *(frame for _, frame in steps)]) for mode, steps in WHOLE.items()
    ]
    for kind in FRAME_KINDS:
        found.append(bytes((1, 2, 3, 4)) + _stream([some_frame(rng, kind) for _ in range(3)], (1 << 32) - 2))
    return found


# ---- shapes and captures ----


def shapes() -> list[bytes]:
    """Shapes of small and large VMs."""
    return [
        Shape(2 << 20, 1, {"vm": 1}, 2_000_000, 4096, codecs=("raw",)).encode(),
        Shape(4 << 30, 2, {"vm": 1, "vcpu": 3}, 2_400_000, 8192, "2m", True, ("zstd", "lz4", "raw")).encode(),
        Shape(8192 << 10, 64, {}, 1, 1, "4k", regions=((0, 1 << 20), (2 << 20, 7 << 20))).encode(),
    ]


def captures() -> list[bytes]:
    """Some of each kind, a HELLO with a real shape, and one without any frame."""
    rng = random.Random(2)
    sent = [some_frame(rng, kind) for kind in FRAME_KINDS]
    sent.append(frames.Hello(bytes(16), bytes(32), 1, 1, 0, "tcp:host:1", shapes()[0]))
    head = capture._FILE.pack(capture.MAGIC, capture.VERSION, 0)
    rows = []
    for number, frame in enumerate(sent):
        raw = encode(frame, number)
        rows.append(capture._ENTRY.pack(number * 1000, number % 2, number % 3, 0, len(raw)) + raw)
    return [head, head + b"".join(rows), *(head + row for row in rows[::5])]


# ---- snapshots ----


def small_ram(seed: int) -> bytes:
    """Of a snapshot: what a codec makes small, so that little of the file is pages."""
    return b"".join(bytes((seed, page % 7)) * (PAGE_SIZE // 2) for page in range(PAGES))


def parent_file(path: str) -> None:
    """Writes the snapshot that child files of these seeds build on, always with the same id."""
    save(path, small_ram(9), range(4), AVAILABLE[-1], wset=[1])
    with open(path, "r+b") as file:
        made = Forge(file.read())
        put(made, 48, "<16s", b"p" * 16)
        file.seek(0)
        file.write(made.raw())


def snapshots() -> list[bytes]:
    """Small files of each codec, with working set and large pages; one that has a parent; one without any page."""
    found = []
    with tempfile.TemporaryDirectory() as at:
        parent, path = os.path.join(at, "parent"), os.path.join(at, "file")
        parent_file(parent)
        for number, codec in enumerate(AVAILABLE):
            pages = range(0, 5 if codec == "raw" else 40, 1 + number)
            save(path, small_ram(number), pages, codec, large=(0,), wset=[2, 0])
            found.append(_bytes_of(path))
        with Snapshot.open(parent) as opened:
            save(path, small_ram(5), [3, 400, 9], AVAILABLE[-1], parent=opened)
        found.append(_bytes_of(path))
        save(path, small_ram(5), [], large=())
        found.append(_bytes_of(path))
    return found


def _bytes_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def block_maps() -> list[bytes]:
    """What fuzz_blocks.c reads: options, then the maps of a snapshot and its storage blocks, from byte 4096 of its file
    on. Small files; one of larger blocks in which all pages are; and with pages that are there already."""
    files = snapshots()
    with tempfile.TemporaryDirectory() as at:
        path = os.path.join(at, "file")
        save(path, small_ram(1), None, AVAILABLE[-1], block_size=64 << 10)
        files.append(_bytes_of(path))
    return [_maps_of(raw, unwanted) for raw in files for unwanted in (0, 0x155)]


def _maps_of(raw: bytes, unwanted: int) -> bytes:
    header = decode(raw[:HEADER_SIZE], len(raw), "")
    slots = header.block_size // PAGE_SIZE
    options = CODECS.index(header.codec), slots.bit_length() - 3, header.depth > 0, unwanted > 0
    counts = header.pages - 1, header.blocks, header.backs, unwanted, 0, 0
    maps = [raw[each.offset : each.offset + each.length] for each in map(header.sections.get, _MAPS)]
    area = raw[HEADER_SIZE : header.sections["states"].offset]
    return struct.pack("<4B6H", *options, *counts) + b"".join(maps) + area


_MAPS = ("index", "blocks", "back", "large")


# ---- page streams ----


def page_streams() -> list[bytes]:
    """What fuzz_stream.c reads: 8 bytes of options, then frames of pages without the pages."""
    rounds = [
        [frames.Bytes(0, 3, 1), frames.Zeros(3, 700, 1), frames.Bytes(1023, 1, 1), frames.End(704, 0, 1)],
        [frames.Zeros(0, 1100, 1), frames.End(1100, 0, 1), frames.Bytes(512, 64, 2), frames.End(64, 0, 2)],
        [frames.Request(5, 1, 0), frames.Pull(0, 512, 0), frames.Zeros(9, 1, 0), frames.Bytes(1099, 1, 0)],
        [frames.Bytes(page, 1, 1) for page in range(20)],
        [frames.Bytes(512, 512, 1), frames.End(512, 0, 1)],
    ]
    return [
        bytes((how, how * 7 & 0xFF, 3 + how, 40, 255, 1, 24, 0)) + _stream(sent)
        for sent in rounds
        for how in (0, 1, 2, 9, 15)
    ]


# ---- what a destination hears ----


def destinations() -> list[bytes]:
    """Whole migrations in each mode, of 512 pages over two channels, up to PREPARE."""
    states = encode_state(State("vm", 1, {"answer": 42, "name": "x" * 40}))
    found = []
    for number, (mode, rounds) in enumerate((("precopy", 1), ("postcopy", 0), ("hybrid", 2), ("precopy", 3))):
        control: list = [frames.Large(0, 1, bytes((number % 2,)))]
        channels: tuple[list, list] = ([], [])
        for round in range(1, rounds + 1):
            control.append(frames.Round(round, 512 if round == 1 else 16))
            if round == 1:
                channels[0].extend((frames.Bytes(0, 40, 1), frames.Zeros(40, 216, 1), frames.End(256, 0, 1)))
                channels[1].extend((frames.Zeros(256, 250, 1), frames.Bytes(506, 6, 1), frames.End(256, 0, 1)))
            else:
                channels[0].extend((frames.Bytes(100 * round, 15, round), frames.End(15, 0, round)))
                channels[1].extend((frames.Zeros(3, 1, round), frames.End(1, 0, round)))
        control += [frames.States(len(states), 0, states[:30]), frames.States(len(states), 30, states[30:])]
        if mode == "hybrid":
            control += [frames.Away(0, 256, bytes(31) + b"\x80"), frames.Away(256, 256, b"\1" + bytes(31))]
        away = {"precopy": 0, "postcopy": 512, "hybrid": 2}[mode]
        control.append(frames.Prepare(rounds, away, len(states), checksum(states)))
        streams = [_stream(control), *map(_stream, channels)]
        sizes = len(streams[0]), len(streams[1])
        head = struct.pack("<BHHB", list(frames.MODES).index(mode), *sizes, number % 2)
        found.append(head.ljust(8, b"\0") + b"".join(streams))
    return found


# ---- images ----


def images() -> list[bytes]:
    """Of each format; a byte before says which one is asked for."""
    notes = pvh_note(0x100000, 8) + note(b"GNU", 3, b"1" * 12)  # a descriptor has room to grow
    found = [bytes((0,)) + data for data in (*VALID.values(), build_elf(notes=notes))]
    found.append(bytes((3,)) + b"\xf4" * 16)
    found.append(bytes((4,)) + b"\xf4" * 16)
    return [*found, bytes((130,)) + with_symbols()]


def with_symbols() -> bytes:
    """An ELF file with nothing but sections: names, two symbols and their names."""
    names, strings = b"\0.shstrtab\0.symtab\0.strtab\0.text\0", b"\0main\0table\0"
    symbols = (
        bytes(24)
        + struct.pack("<IBBHQQ", 1, 0x12, 0, 4, 0x100000, 16)
        + struct.pack("<IBBHQQ", 6, 0x11, 0, 4, 0x100010, 0)
    )
    parts = [b"", names, symbols, strings, b"\xf4" * 32]
    rows, at = [], 64
    kinds = [(0, 0, 0, 0, 0), (1, 3, 0, 0, 0), (11, 2, 3, 1, 24), (19, 3, 0, 0, 0), (27, 1, 0, 0, 0)]
    for (name, kind, link, info, size), part in zip(kinds, parts, strict=True):
        address = 0x100000 if kind == 1 else 0
        rows.append(struct.pack("<IIQQQQIIQQ", name, kind, 2, address, at, len(part), link, info, 1, size))
        at += len(part)
    ident = b"\x7fELF\2\1\1" + bytes(9)
    head = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x100000, 0, at, 0, 64, 56, 0, 64, len(rows), 1)
    return ident + head + b"".join(parts) + b"".join(rows)


# ---- virtio ----


def _virtio(kind: int, features: int, requests: list[tuple], feeds: tuple[int, ...] = ()) -> bytes:
    """A driver that does all as it should. requests: queue, then for each descriptor address, bytes, flags but NEXT,
    and what is put there: (8 bytes, 4 bytes) after each other. feeds: before each of the requests is served."""
    out = [step(GET, 0), step(SET, 0x70, c=1), step(SET, 0x70, c=3)]
    for half in (0, 1):
        out += [step(SET, 0x24, c=half), step(SET, 0x20, c=features >> 32 * half & 0xFFFF_FFFF)]
    out.append(step(SET, 0x70, c=11))
    for queue in range({1: 2, 3: 6}.get(kind, 1)):
        base = 0x10000 + 0x4000 * queue
        out += [step(SET, 0x30, c=queue), step(SET, 0x38, c=8), step(SET, 0x80, c=base)]
        out += [step(SET, 0x90, c=base + 0x1000), step(SET, 0xA0, c=base + 0x2000), step(SET, 0x44, c=1)]
    out += [step(SET, 0x70, c=15), step(FEED, 50)]
    for posted, (queue, *parts) in enumerate(requests):
        base = 0x10000 + 0x4000 * queue
        for index, (address, size, flags, *given) in enumerate(parts):
            at, more = base + 16 * index, index + 1 < len(parts)
            out += [step(PUT, at, address, size), step(HALF, at + 12, c=flags | more), step(HALF, at + 14, c=index + 1)]
            out += [step(PUT, address + 12 * n, b, c) for n, (b, c) in enumerate(given)]
        out += [step(HALF, base + 0x1004 + 2 * posted, c=0), step(HALF, base + 0x1002, c=posted + 1)]
        out += [step(FEED, feed) for feed in feeds[posted : posted + 1]]
        out += [step(SET, 0x50, c=queue), step(SERVE), step(GET, 0x60), step(SET, 0x64, c=1)]
    out += [step(MOVE), step(SET, 0x70, c=0)]
    return bytes((kind,)) + b"".join(out)


def virtio() -> list[bytes]:
    """Each device at work, with and without the features of rings."""
    plain, rings = 1 << 32, 1 << 32 | 3 << 28
    found = []
    for features in (plain, rings):
        found.append(_virtio(0, features, [(0, (0x30000, 100, 2)), (0, (0x30000, 1, 2), (0x30100, 64, 2))]))
        found.append(_virtio(1, features, [(0, (0x30000, 100, 2))]))
        found.append(_virtio(1, features, [(1, (0x30000, 64, 0))]))
    # a table of one descriptor: address and size, then flags and next one
    found.append(_virtio(0, rings, [(0, (0x34000, 16, 4, (0x30000, 100), (2, 0)))]))
    for kind, sector, size in ((1, 3, 512), (0, 3, 512), (4, 0, 0), (8, 0, 20), (0, 63, 1024), (9, 0, 512)):
        data = [(0x31000, size, 0 if kind == 1 else 2)] if size else []
        found.append(_virtio(2, plain | 1 << 9, [(0, (0x30000, 16, 0, (kind, sector)), *data, (0x33000, 1, 2))]))
    balloon = plain | 1 << 63 | 0x27
    for queue, flags in ((0, 0), (1, 0), (4, 2), (3, 2), (5, 2)):
        found.append(
            _virtio(3, balloon, [(queue, (0x32000, 0x2000 if flags else 12, flags, (0x41 << 32 | 0x40, 0x1FF)))])
        )
    entry = (0xF005 | 0x2000 << 16, 0)
    found.append(_virtio(3, balloon, [(2, (0x32000, 20, 0, entry, entry)), (2, (0x32000, 10, 0, entry))]))
    answer = (0x32000, 10, 0, (2 << 32 | 1, 0x0105))
    found.append(_virtio(3, balloon, [(5, (0x33000, 2000, 2)), (5, answer, (0x33000, 2000, 2))]))
    for kind in (11, 13):
        parts = ((0x30000, 16, 0, (kind, 0)), (0x31000, 16, 0, (5, 2)), (0x33000, 1, 2))
        found.append(_virtio(2, plain | 3 << 13, [(0, *parts)]))
    return [seed for seed in found + _swap_disks() if seed[0] < KINDS]


def _swap_disks() -> list[bytes]:
    """Pages that the host has swapped are written to the disk, read, written over, whole or in part, and moved on."""
    size, status = 2 * PAGE_SIZE, (0x33000, 1, 2)

    def write(sector: int, size: int, value: int) -> tuple:
        return (0, (0x30000, 16, 0, (1, sector)), (0x60000, size, 0, (value, value)), status)

    flush = (0, (0x30000, 16, 0, (4, 0)), status)
    zeroes = (0, (0x30000, 16, 0, (13, 0)), (0x31000, 16, 0, (24, 16)), status)
    near, all_of_it = (
        (0, (0x30000, 16, 0, (0, at)), (0xC0000, count, 2), status) for at, count in ((8, size), (0, 32768))
    )
    parts = [write(8, size, 1), near, write(10, 512, 2), write(24, size, 3), all_of_it, flush]
    wholes = [write(8, size, 1), write(8, size, 2), write(24, size, 3), zeroes, all_of_it]
    found = []
    for kind in SWAP_DISKS:
        for requests, feeds in (
            (parts, (OUT,) * 6),
            (parts, (OUT, OUT, REPLACE, OUT, REPLACE, OUT)),
            (parts, (OUT, CLOSE, OUT, OUT, CLOSE, OUT)),
            (wholes, (OUT, REPLACE, OUT, REPLACE, OUT)),
        ):
            found.append(_virtio(kind, 1 << 32 | 1 << 14 | 1 << 9, requests, feeds))
    return found


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "frames": frame_streams,
    "shape": shapes,
    "capture": captures,
    "snapshot": snapshots,
    "image": images,
    "stream": page_streams,
    "blocks": block_maps,
    "destination": destinations,
    "virtio": virtio,
}
