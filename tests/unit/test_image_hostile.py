# test_image_hostile.py: bytes that mean harm, for each parser: the errors are pyvmm's own, the images always sound.
"""An image that is returned has the invariants of `assert_sound`, whatever bytes it was made from."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_image_builders import CODE, build_aout, build_elf, build_multiboot, build_pvh, note, pvh_note

from pyvmm import image
from pyvmm.errors import BadInput, ImageError
from pyvmm.image import elf
from pyvmm.layout import GIB, MIB, Gpa, ram_regions

VALID = {
    "pvh": build_pvh(loads=((0x100000, CODE, 0x1000), (0x200000, b"data", 0x800))),
    "pvh, more notes": build_elf(notes=note(b"GNU", 3, b"12345") + pvh_note(0x100000, 8)),
    "multiboot elf32": build_multiboot(),
    "multiboot elf64": build_multiboot(64),
    "multiboot addresses": build_aout(load_end=0x100070, bss_end=0x108000),
}
EXTREMES = [0, 1, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF]
FORMAT_NAMES = st.sampled_from([None, *image.FORMATS])


@st.composite
def mutated(draw):
    """A valid image with a few bytes flipped or fields made extreme, cut or lengthened."""
    data = bytearray(draw(st.sampled_from(list(VALID.values()))))
    for _ in range(draw(st.integers(0, 4))):
        position = draw(st.integers(0, len(data) - 1))
        width = draw(st.sampled_from([1, 2, 4, 8]))
        value = draw(st.one_of(st.sampled_from(EXTREMES), st.integers(0, len(data)), st.integers(0, (1 << 64) - 1)))
        position -= position % width
        data[position : position + width] = struct.pack("<Q", value)[:width]
    end = draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    return bytes(data[:end]) + draw(st.binary(max_size=8))


def assert_sound(parsed: image.Image, data: bytes) -> None:
    assert parsed.segments
    assert sum(len(segment.data) for segment in parsed.segments) <= len(data)
    end = 0
    for segment in parsed.segments:
        assert segment.gpa.value >= end
        assert len(segment.data) <= segment.memory_size
        assert segment.data in data
        end = segment.gpa.value + segment.memory_size
    assert end < 1 << 64
    assert any(segment.gpa.value <= parsed.entry.rip.value < segment.end.value for segment in parsed.segments)
    assert parsed.entry.rip.value < {"real16": 1 << 16, "protected32": 1 << 32, "long64": 1 << 64}[parsed.entry.mode]


def check(data: bytes, format: str | None, at: int | None = None) -> None:
    ram = ram_regions(8 * MIB)
    try:
        parsed = image.parse_image(data, format, None if at is None else Gpa(at))
        assert_sound(parsed, data)
        boot = image.boot_image(parsed, ram)
    except BadInput as error:
        message = str(error)
    else:
        message = ""
        assert all(segment.end.value <= 8 * MIB for segment in (*parsed.segments, *boot.segments))
        assert boot.entry.rip == parsed.entry.rip
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("data", VALID.values(), ids=VALID)
def test_the_images_to_be_damaged_are_valid(data):
    parsed = image.parse_image(data)
    assert_sound(parsed, data)
    assert image.boot_image(parsed, ram_regions(8 * MIB)).entry.rip == parsed.entry.rip


@given(st.binary(max_size=200), FORMAT_NAMES, st.one_of(st.none(), st.integers(0, (1 << 64) - 1)))
def test_random_bytes(data, format, at):
    check(data, format, at)


@given(
    st.sampled_from([b"\x7fELF\x01\x01\x01", b"\x7fELF\x02\x01\x01", struct.pack("<I", 0x1BADB002)]),
    st.binary(max_size=200),
)
def test_random_bytes_behind_a_magic(magic, data):
    check(magic + data, None)


@given(mutated(), FORMAT_NAMES)
def test_mutated_images(data, format):
    check(data, format)


@pytest.mark.parametrize("name", VALID)
def test_every_truncation(name):
    data = VALID[name]
    for end in range(len(data)):
        check(data[:end], None)
        with pytest.raises(ImageError):
            image.parse_image(data[:end])


@pytest.mark.parametrize("name", VALID)
def test_every_byte_and_word_made_extreme(name):
    data = VALID[name]
    for position in range(0, len(data) - 8, 2):
        for width in (2, 4, 8):
            for value in EXTREMES:
                field = struct.pack("<Q", value)[:width]
                check(data[:position] + field + data[position + width :], None)


loads = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(EXTREMES), st.integers(0, 8 * MIB)),
        st.binary(max_size=32),
        st.one_of(st.sampled_from(EXTREMES), st.integers(0, 4 * MIB)),
    ),
    max_size=5,
)


@given(loads, st.one_of(st.sampled_from(EXTREMES), st.integers(0, 8 * MIB)))
def test_random_segments(loads, entry):
    data = build_elf(loads=loads, notes=pvh_note(entry, 8))
    check(data, "pvh")


@given(
    *[st.one_of(st.sampled_from([0, 1, 0xFFFFFFFF]), st.integers(0x0FFF00, 0x100200)) for _ in range(5)], st.binary()
)
def test_random_multiboot_addresses(header_addr, load, load_end, bss_end, entry, rest):
    flags = 0x10003
    magic = 0x1BADB002
    check(
        struct.pack("<8I", magic, flags, -(magic + flags) % (1 << 32), header_addr, load, load_end, bss_end, entry)
        + rest,
        None,
    )


def test_sizes_are_believed_only_as_far_as_the_file_goes():
    # 128 segments of the whole file each would be 128 times its size in memory.
    body = bytes(MIB)
    table = b"".join(
        struct.pack("<IIQQQQQQ", 1, 5, 0, 0, gib * GIB, MIB, MIB, 1) for gib in range(elf.MAX_PROGRAM_HEADERS)
    )
    header = build_elf(loads=(), phnum=elf.MAX_PROGRAM_HEADERS)
    with pytest.raises(ImageError, match="share bytes"):
        elf.read(header + table + body)
