# fuzz_image.py: a guest image, hostile: a byte that says which format is asked for, and where a flat one goes, then the
# file.
"""`one_input()`; `repaired()` and `mutate()` for fuzzers."""

from __future__ import annotations

import random
import struct

from checks import one_line
from test_image_hostile import EXTREMES, VALID, assert_sound

from pyvmm import image
from pyvmm.errors import BadInput, ImageError
from pyvmm.image import multiboot
from pyvmm.image.symbols import Symbols
from pyvmm.layout import GIB, MIB, Gpa, ram_regions

MAX_SIZE = 8192
FORMATS = (None, *image.FORMATS)
RAMS = tuple(ram_regions(size) for size in (2 * MIB, 8 * MIB, 4 * GIB))
PLACES = (None, None, None, 0x7C00, 0x100000, (1 << 64) - 8)
MODULES = ((0, "empty"), (5000, "initrd \u00e4"))


def one_input(data: bytes) -> None:
    """ImageError in one line, or an image with which all is right, and that boots in any RAM or says why not."""
    if not data:
        return
    options, file = data[0], data[1:]
    format, at = FORMATS[options % len(FORMATS)], PLACES[options // len(FORMATS) % len(PLACES)]
    if options & 128:  # by pyelftools, which is slow
        _symbols(file)
    try:
        parsed = image.parse_image(file, format, None if at is None else Gpa(at))
    except ImageError as error:
        one_line(error, 300)
        return
    except BadInput as error:
        assert at is not None, "an error that does not name the file"
        one_line(error, 300)
        return
    assert_sound(parsed, file)
    for ram in RAMS:
        try:
            image.check_fits(parsed.segments, ram)
            modules = image.place_modules(MODULES, ram, parsed.segments)
            boot = image.boot_image(parsed, ram, "console=ttyS0", () if options & 64 else modules)
        except BadInput as error:
            one_line(error, 300)
            continue
        image.check_fits((*parsed.segments, *boot.segments), ram)
        assert boot.entry.rip == parsed.entry.rip


def _symbols(file: bytes) -> None:
    found = Symbols.from_elf(file)
    for address in (0, 0x100000, 0x100001, (1 << 64) - 1):
        name = found.lookup(address)
        assert name is None or isinstance(name, str)
    assert len(found) == 0 or found.address("no such name") is None


# ---- for fuzzers ----


def repaired(data: bytes) -> bytes:
    """With a right checksum behind each magic of multiboot."""
    raw = bytearray(data)
    magic = multiboot.HEADER_MAGIC
    at = raw.find(magic.to_bytes(4, "little"))
    while 0 <= at <= len(raw) - 12:
        flags = int.from_bytes(raw[at + 4 : at + 8], "little")
        struct.pack_into("<I", raw, at + 8, -(magic + flags) % (1 << 32))
        at = raw.find(magic.to_bytes(4, "little"), at + 12)
    return bytes(raw)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Fields made extreme, a little larger or those of others; segments with any other part of the file."""
    raw = bytearray(data) if len(data) > 16 else bytearray(b"\0" + rng.choice(list(VALID.values())))
    for _ in range(rng.randint(1, 3)):
        if raw[1:6] == b"\x7fELF\2" and rng.random() < 0.4:
            _change_segment(raw, rng)
            continue
        size = rng.choice((2, 4, 8))
        at, other = (1 + 2 * rng.randrange(max(1, (min(len(raw), 400) - size) // 2)) for _ in range(2))
        near = int.from_bytes(raw[at : at + size], "little") + rng.choice((-8, -1, 1, 4, 8, 16))
        copy = int.from_bytes(raw[other : other + size], "little")
        value = rng.choice((*EXTREMES, near, near, near, copy, len(raw) - 1, rng.randrange(len(raw)), 0x100000))
        raw[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return repaired(bytes(raw))


def _change_segment(raw: bytearray, rng: random.Random) -> None:
    """Another part of the file for one of the first segments of an ELF64, mostly one that is there."""
    at = 1 + 64 + 56 * rng.randrange(3)
    if at + 56 > len(raw):
        return
    start = rng.choice((0, rng.randrange(len(raw)), int.from_bytes(raw[at + 8 : at + 16], "little")))
    size = rng.choice((max(0, len(raw) - 1 - start), rng.randrange(len(raw))))
    struct.pack_into("<Q", raw, at + 8, start)
    struct.pack_into("<QQ", raw, at + 32, size, rng.choice((size, size + rng.randrange(9000))))
