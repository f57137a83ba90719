# test_image_pvh.py: PVH images, and that hvm_start_info is laid out as Xen's header says.
import struct

import pytest
from test_image_builders import CODE, build_elf, build_multiboot, build_pvh, note, pvh_note

from pyvmm.errors import BadInput, ImageError
from pyvmm.image import pvh
from pyvmm.image.model import Boot, Entry, Module, Segment
from pyvmm.layout import GIB, MIB, Gpa, ram_regions


def read_guest(boot: Boot, gpa: int, size: int) -> bytes:
    """What the guest would read from the boot structures."""
    for segment in boot.segments:
        start = gpa - segment.gpa.value
        if start >= 0 and start + size <= len(segment.data):
            return segment.data[start : start + size]
    raise AssertionError(f"{gpa:#x} is in no boot structure")


def read_text(boot: Boot, gpa: int) -> bytes:
    (segment,) = (segment for segment in boot.segments if Gpa(gpa) in segment)
    return segment.data[gpa - segment.gpa.value :].split(b"\0")[0]


@pytest.mark.parametrize("size", [4, 8])
def test_image_of_a_pvh_elf(size):
    image = pvh.parse(build_pvh(entry=0x100008, size=size))
    assert image.format == "pvh"
    assert image.entry == Entry("protected32", Gpa(0x100008))
    assert image.segments == (Segment(Gpa(0x100000), CODE, 0x1000),)


def test_entry_is_that_of_the_note_not_of_the_header():
    assert pvh.parse(build_pvh(entry=0x100004, higher_half=1 << 40)).entry.rip == Gpa(0x100004)


def test_other_notes_do_not_count():
    other = note(b"Xen", 17, bytes(4)) + note(b"Zen", 18, bytes(4))
    assert not pvh.probe(build_elf(notes=other))
    assert pvh.parse(build_elf(notes=other + pvh_note(0x100001))).entry.rip == Gpa(0x100001)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (build_elf(), "no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)"),
        (build_multiboot(), "32-bit ELF, where 64-bit is needed for PVH"),
        (build_pvh(size=5), "PVH note: entry of 5 bytes, where 4 or 8 are needed"),
        (build_pvh(entry=0x101000), "entry 0x101000 is outside the image's segments"),
        (build_pvh(entry=0xFFFFF), "entry 0xfffff is outside the image's segments"),
        (
            build_pvh(entry=4 * GIB, size=8, loads=((4 * GIB, CODE, 64),)),
            "entry 0x100000000 is beyond what protected32 mode can address",
        ),
        (
            build_pvh(loads=((0x100000, CODE, 0x1001), (0x101000, CODE, 64))),
            "segment 0x100000..0x101000 overlaps segment 0x101000..0x10103f",
        ),
        (build_pvh(loads=()), "no loadable segment"),
    ],
)
def test_what_is_wrong_is_named(data, message):
    with pytest.raises(ImageError) as caught:
        pvh.parse(data)
    assert str(caught.value) == message


def test_an_address_cannot_be_chosen():
    with pytest.raises(BadInput, match="says itself where"):
        pvh.parse(build_pvh(), Gpa(0x1000))


def test_start_info():
    ram = ram_regions(5 * GIB)
    modules = (Module(Gpa(64 * MIB), 12345, "initrd"), Module(Gpa(32 * MIB), 0, ""))
    boot = pvh.boot(pvh.parse(build_pvh()), ram, "console=ttyS0 größe=1", modules)
    assert boot.entry == Entry("protected32", Gpa(0x100000), {"rbx": 0x6000})

    magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap, entries, reserved = struct.unpack(
        "<IIIIQQQQII", read_guest(boot, 0x6000, 56)
    )
    assert (magic, version, flags, rsdp, reserved) == (0x336EC578, 1, 0, 0, 0)
    assert cmdline == 0x20000
    assert read_text(boot, cmdline) == "console=ttyS0 größe=1".encode()

    table = list(struct.iter_unpack("<QQII", read_guest(boot, memmap, 24 * entries)))
    assert table == [
        (0, 0x9FC00, 1, 0),
        (0x9FC00, 0x60400, 2, 0),
        (MIB, 3 * GIB - MIB, 1, 0),
        (4 * GIB, 2 * GIB, 1, 0),
    ]

    listed = list(struct.iter_unpack("<QQQQ", read_guest(boot, modlist, 32 * nr_modules)))
    assert [(start, size, reserved) for start, size, _, reserved in listed] == [
        (64 * MIB, 12345, 0),
        (32 * MIB, 0, 0),
    ]
    assert [read_text(boot, entry[2]) for entry in listed] == [b"initrd", b""]
    assert not any(address % 8 for address in (memmap, modlist))


def test_no_modules_and_an_empty_command_line():
    boot = pvh.boot(pvh.parse(build_pvh()), ram_regions(2 * MIB), "", ())
    assert struct.unpack("<IQ", read_guest(boot, 0x600C, 12)) == (0, 0)
    assert read_text(boot, 0x20000) == b""


def test_boot_structures_leave_the_own_area_free_or_are_refused():
    image = pvh.parse(build_pvh())
    ram = ram_regions(8 * MIB)
    fitting = tuple(Module(Gpa(4 * MIB), 0, "x" * 4000) for _ in range(9))
    boot = pvh.boot(image, ram, "c" * 4096, fitting[:1])
    assert all(segment.end <= Gpa(0x10000) or Gpa(0x20000) <= segment.gpa for segment in boot.segments)
    with pytest.raises(ImageError, match="too many modules"):
        pvh.boot(image, ram, "", (*fitting, *fitting))


@pytest.mark.parametrize(
    ("address", "other"),
    [
        (0x5FFF, "boot information"),
        (0xF000, "pyvmm's own area"),
        (0x1FFFF, "boot information"),
        (0x20000, "boot information"),
    ],
)
def test_an_image_in_the_way_of_boot_structures_is_refused(address, other):
    image = pvh.parse(build_pvh(entry=address, loads=((address, CODE, 0x1001),)))
    with pytest.raises(ImageError, match=f"overlaps|{other}"):
        pvh.boot(image, ram_regions(2 * MIB), "", ())


def test_a_module_over_the_image_is_refused():
    with pytest.raises(ImageError, match=r"image segment 0x100000\.\.0x100fff overlaps module 0x100000"):
        pvh.boot(pvh.parse(build_pvh()), ram_regions(2 * MIB), "", (Module(Gpa(MIB), 4096),))
