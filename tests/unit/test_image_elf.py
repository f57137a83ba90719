# test_image_elf.py: the ELF reader: what it finds in sound files, and that it names what is wrong with others.
import pytest
from test_image_builders import CODE, build_elf, note, program_header

from pyvmm.errors import ImageError
from pyvmm.image import elf
from pyvmm.image.model import Segment
from pyvmm.layout import Gpa


@pytest.mark.parametrize("bits", [32, 64])
def test_segments_are_at_physical_addresses(bits):
    read = elf.read(build_elf(bits, loads=((0x100000, b"text", 4), (0x200000, b"bss", 0x5000)), higher_half=0x40000000))
    assert read.bits == bits
    assert read.segments == (Segment(Gpa(0x100000), b"text", 4), Segment(Gpa(0x200000), b"bss", 0x5000))
    assert [virtual for virtual, _ in read.loads] == [0x40100000, 0x40200000]


def test_virtual_entry_is_translated_and_a_physical_one_kept():
    read = elf.read(build_elf(higher_half=0xFFFFFFFF80000000, entry=0xFFFFFFFF80100010))
    assert read.physical(read.entry) == Gpa(0x100010)
    assert read.physical(0x100010) == Gpa(0x100010)
    assert read.physical(0xFFFFFFFF80100000 + 0x1000) == Gpa(0xFFFFFFFF80101000)


def test_segments_without_memory_are_ignored():
    read = elf.read(build_elf(loads=((0x100000, CODE, 0x1000), (0x100000, b"x", 0))))
    assert len(read.segments) == 1


def test_zeroed_segment_may_lie_behind_the_end_of_the_file():
    data = bytearray(build_elf(loads=((0x100000, b"", 0x1000),)))
    data[64 + 8 : 64 + 16] = (0x5000).to_bytes(8, "little")
    assert elf.read(bytes(data)).segments == (Segment(Gpa(0x100000), b"", 0x1000),)


def test_notes_are_read_in_order_with_their_padding():
    notes = note(b"GNU", 3, b"12345") + note(b"Xen", 18, b"abcd")
    read = elf.read(build_elf(notes=notes + bytes(8)))
    assert read.notes == (elf.Note(b"GNU", 3, b"12345"), elf.Note(b"Xen", 18, b"abcd"))


def test_notes_aligned_to_eight_bytes():
    first = note(b"GNU", 5, b"1234") + bytes(4)
    read = elf.read(build_elf(notes=first + note(b"Xen", 18, b"abcd"), align=8))
    assert [found.name for found in read.notes] == [b"GNU", b"Xen"]


def _many_notes():
    return build_elf(notes=note(b"", 0, b"") * (elf.MAX_NOTES + 1))


def _shared_bytes():
    data = build_elf(loads=())
    table = program_header(64, 1, 0, 0, 0, 64, 64, 1) + program_header(64, 1, 0, 4096, 4096, 2 * 56 + 64, 4096, 1)
    return data[:56] + (2).to_bytes(2, "little") + data[58:] + table


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"#!/bin/sh\n", "not an ELF file"),
        (b"\x7fELF\x02\x01", "truncated: ELF identification at 0x0 needs 0x10 bytes, the file has 0x6"),
        (build_elf()[:40], "truncated: ELF header at 0x10 needs 0x30 bytes, the file has 0x28"),
        (build_elf()[:100], "truncated: program headers at 0x40 needs 0x38 bytes, the file has 0x64"),
        (build_elf()[:-1], "truncated: segment 0 at 0x78 needs 0x40 bytes, the file has 0xb7"),
        (build_elf(phoff=1 << 63), "truncated: program headers at 0x8000000000000000 needs"),
        (build_elf()[:5] + b"\x02" + build_elf()[6:], "not a little-endian 32- or 64-bit ELF file (e_ident 02 02 01)"),
        (build_elf(machine=183), "64-bit ELF for machine 183, where 62 (x86-64) is needed"),
        (build_elf(32, machine=62), "32-bit ELF for machine 62, where 3 (i386) is needed"),
        (build_elf(type=1), "not an executable: ELF type 1, a relocatable object: link it first"),
        (build_elf(type=4), "not an executable: ELF type 4, a core dump"),
        (build_elf(loads=()), "no loadable segment: no program headers"),
        (build_elf(phnum=0xFFFF), "65535 program headers, more than 128"),
        (build_elf(phentsize=32), "program headers of 32 bytes, where 56 are needed"),
        (build_elf(loads=((0x1000, CODE, 8),)), "segment at 0x1000 has 0x40 bytes of data in 0x8 of memory"),
        (
            build_elf(loads=(((1 << 64) - 4096, CODE, 4096),)),
            "segment at 0xfffffffffffff000 of 0x1000 bytes overflows the address space",
        ),
        (_shared_bytes(), "segments share bytes of the file: together they are larger than it"),
        (build_elf(notes=note(b"Xen", 18, b"abcd")[:-1]), "truncated: note at 0xb0 needs 0x4 bytes at 0xc0"),
        (_many_notes(), "more than 1024 notes"),
    ],
)
def test_damage_is_named_in_one_line(data, message):
    with pytest.raises(ImageError) as caught:
        elf.read(data)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
