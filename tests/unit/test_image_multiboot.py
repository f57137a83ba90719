# test_image_multiboot.py: Multiboot 1 images of each container, and that multiboot_info is as the specification says.
import struct

import pytest
from test_image_builders import CODE, build_aout, build_elf, build_multiboot, multiboot_header
from test_image_pvh import read_guest, read_text

from pyvmm.errors import BadInput, ImageError
from pyvmm.image import multiboot
from pyvmm.image.model import Entry, Module
from pyvmm.layout import GIB, MIB, Gpa, ram_regions


@pytest.mark.parametrize("bits", [32, 64])
def test_image_of_an_elf(bits):
    image = multiboot.parse(build_multiboot(bits))
    assert (image.format, image.entry) == ("multiboot", Entry("protected32", Gpa(0x100010)))
    assert [(segment.gpa.value, segment.memory_size) for segment in image.segments] == [(0x100000, 0x1000)]


def test_higher_half_kernel_is_entered_at_its_physical_address():
    image = multiboot.parse(build_multiboot(entry=0xC0100010, higher_half=0xC0000000))
    assert image.entry.rip == Gpa(0x100010)


def test_image_of_address_fields_to_the_end_of_the_file():
    data = build_aout()
    (segment,) = multiboot.parse(data).segments
    assert (segment.gpa, segment.data, segment.memory_size) == (Gpa(0x100000), data, len(data))


def test_image_of_address_fields_with_an_end_and_bss():
    data = build_aout(load=0x100004, load_end=0x100054, bss_end=0x108000)
    (segment,) = multiboot.parse(data).segments
    assert (segment.gpa, segment.data, segment.memory_size) == (Gpa(0x100004), data[:0x50], 0x7FFC)


def test_address_fields_may_leave_out_what_lies_before_the_header():
    header = multiboot_header(0x10003, 0x100000, 0x100000, 0x100060, 0, 0x100020)
    data = bytes(8) + header + CODE
    (segment,) = multiboot.parse(data).segments
    assert (segment.gpa, segment.data) == (Gpa(0x100000), header + CODE)
    with pytest.raises(ImageError, match="load_end_addr 0x100060 is not within the file"):
        multiboot.parse(data[:-1])


def test_address_fields_come_before_an_elf_header():
    header = multiboot_header(0x10003, 0x200078, 0x200078, 0, 0, 0x200080)
    image = multiboot.parse(build_elf(32, loads=((0x100000, bytes(36) + header + CODE, 0x1000),)))
    assert [segment.gpa for segment in image.segments] == [Gpa(0x200078)]


@pytest.mark.parametrize(("offset", "found"), [(0, True), (8180, True), (8184, False), (2, False), (8192, False)])
def test_header_is_found_only_aligned_and_in_the_first_8192_bytes(offset, found):
    assert multiboot.probe(bytes(offset) + multiboot_header() + bytes(64)) is found


def test_a_stray_magic_does_not_hide_the_header():
    assert multiboot.probe(multiboot_header(checksum=1) + multiboot_header())


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 0x20003, 0x80000000])
def test_flags_that_are_met_or_optional(flags):
    assert multiboot.parse(build_multiboot(flags=flags)).format == "multiboot"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no multiboot header"),
        (bytes(100), "no multiboot header"),
        (bytes(4) + multiboot_header(checksum=7), "multiboot header at 0x4: wrong checksum"),
        (build_multiboot(flags=7), "multiboot header demands a video mode (flag bit 2), and the VM has no display"),
        (build_multiboot(flags=0x8013), "multiboot header demands unknown features: mandatory flag bits 0x8010"),
        (multiboot_header(), "multiboot header without load addresses (flag bit 16) in a file that is not ELF"),
        (multiboot_header(0x10003), "truncated: multiboot header at 0x0 without its address fields"),
        (
            bytes(8192 - 16) + multiboot_header(0x10003, *[0x100000] * 5),
            "truncated: multiboot header at 0x1ff0 without its address fields",
        ),
        (
            multiboot_header(0x10003, 0x100004, 0x100000, 0, 0, 0x100000),
            "multiboot header at 0x0: load_addr 0x100000, header_addr 0x100004 contradict it",
        ),
        (build_aout(load_end=0x100200), "truncated: multiboot load_end_addr 0x100200 is not within the file"),
        (build_aout(load_end=0xFFFFF), "truncated: multiboot load_end_addr 0xfffff is not within the file"),
        (
            build_aout(load_end=0x100050, bss_end=0x100040),
            "multiboot bss_end_addr 0x100040 is below load_end_addr 0x100050",
        ),
        (build_aout(entry=0x200000), "entry 0x200000 is outside the image's segments"),
        (build_multiboot(entry=0x8), "entry 0x8 is outside the image's segments"),
        (build_multiboot()[:-1], "truncated: segment 0 at 0x54 needs 0x50 bytes, the file has 0xa3"),
    ],
)
def test_what_is_wrong_is_named(data, message):
    with pytest.raises(ImageError) as caught:
        multiboot.parse(data)
    assert str(caught.value) == message


def test_an_address_cannot_be_chosen():
    with pytest.raises(BadInput, match="says itself where"):
        multiboot.parse(build_multiboot(), Gpa(0x1000))


def test_info():
    ram = ram_regions(4 * GIB)
    modules = (Module(Gpa(64 * MIB), 4097, "first"), Module(Gpa(80 * MIB), 5, "second"))
    boot = multiboot.boot(multiboot.parse(build_multiboot()), ram, "quiet", modules)
    assert boot.entry == Entry("protected32", Gpa(0x100010), {"rax": 0x2BADB002, "rbx": 0x6000})

    info = read_guest(boot, 0x6000, 116)
    flags, mem_lower, mem_upper, _, cmdline, mods_count, mods_addr = struct.unpack_from("<7I", info)
    mmap_length, mmap_addr = struct.unpack_from("<II", info, 44)
    (loader_name,) = struct.unpack_from("<I", info, 64)
    assert flags == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (mem_lower, mem_upper) == (639, (3 * GIB - MIB) // 1024)
    assert min(mmap_addr, mods_addr, loader_name) >= 0x6000 + 116
    assert read_text(boot, cmdline) == b"quiet"
    assert read_text(boot, loader_name) == b"pyvmm"

    mods = list(struct.iter_unpack("<4I", read_guest(boot, mods_addr, 16 * mods_count)))
    assert [entry[:2] for entry in mods] == [(64 * MIB, 64 * MIB + 4097), (80 * MIB, 80 * MIB + 5)]
    assert [entry[3] for entry in mods] == [0, 0]
    assert [read_text(boot, entry[2]) for entry in mods] == [b"first", b"second"]

    ranges = list(struct.iter_unpack("<IQQI", read_guest(boot, mmap_addr, mmap_length)))
    assert ranges == [
        (20, 0, 0x9FC00, 1),
        (20, 0x9FC00, 0x60400, 2),
        (20, MIB, 3 * GIB - MIB, 1),
        (20, 4 * GIB, GIB, 1),
    ]


def test_a_module_beyond_4_gib_is_refused():
    with pytest.raises(ImageError, match="beyond the 32-bit addresses"):
        multiboot.boot(
            multiboot.parse(build_multiboot()), ram_regions(5 * GIB), "", (Module(Gpa(4 * GIB), 4096, "far"),)
        )
