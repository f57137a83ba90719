# test_image_flat.py: flat binaries, their addresses and limits.
import pytest
from test_image_builders import build_elf

from pyvmm.errors import BadInput, ImageError
from pyvmm.image import flat
from pyvmm.image.model import Entry, Module, Segment
from pyvmm.layout import MIB, Gpa, ram_regions

RAM = ram_regions(2 * MIB)


@pytest.mark.parametrize(
    ("parse", "format", "mode", "usual"),
    [(flat.parse16, "flat16", "real16", 0x7C00), (flat.parse64, "flat64", "long64", 0x100000)],
)
@pytest.mark.parametrize("at", [None, Gpa(0), Gpa(0x8000)])
def test_image(parse, format, mode, usual, at):
    image = parse(b"\xf4\xf4", at)
    place = Gpa(usual) if at is None else at
    assert (image.format, image.entry, image.segments) == (
        format,
        Entry(mode, place),
        (Segment(place, b"\xf4\xf4", 2),),
    )


@pytest.mark.parametrize(
    ("parse", "data", "at", "message"),
    [
        (flat.parse16, b"", None, "empty file"),
        (flat.parse64, b"", None, "empty file"),
        (flat.parse64, build_elf(), None, "an ELF file, not a flat binary: make one with `objcopy -O binary`"),
        (flat.parse16, b"x", 0x10000, "entry 0x10000 is beyond what real16 mode can address"),
        (flat.parse16, bytes(MIB), 1, "flat16 image ends at 0x100001, real mode ends at 1 MiB"),
        (flat.parse64, b"x", (1 << 64) - 1, "segment at 0xffffffffffffffff of 0x1 bytes overflows the address space"),
    ],
)
def test_what_is_wrong_is_named(parse, data, at, message):
    with pytest.raises(ImageError) as caught:
        parse(data, None if at is None else Gpa(at))
    assert str(caught.value) == message


def test_flat16_may_end_at_1_mib():
    assert flat.parse16(bytes(MIB - 1), Gpa(1)).segments[0].end == Gpa(MIB)


def test_flat64_gets_its_command_line_in_registers():
    boot = flat.boot64(flat.parse64(b"\xf4"), RAM, "pages=7 ä", ())
    assert boot.segments == (Segment(Gpa(0x20000), b"pages=7 \xc3\xa4\0", 11),)
    assert boot.entry == Entry("long64", Gpa(0x100000), {"rdi": 0x20000, "rsi": 10})


def test_flat16_gets_nothing():
    boot = flat.boot16(flat.parse16(b"\xf4"), RAM, "", ())
    assert (boot.segments, boot.entry) == ((), Entry("real16", Gpa(0x7C00)))


def test_what_a_flat_image_cannot_be_given_is_refused():
    module = (Module(Gpa(MIB), 1),)
    with pytest.raises(BadInput, match="a flat16 image takes no command line"):
        flat.boot16(flat.parse16(b"\xf4"), RAM, "x", ())
    with pytest.raises(BadInput, match="a flat16 image takes no modules"):
        flat.boot16(flat.parse16(b"\xf4"), RAM, "", module)
    with pytest.raises(BadInput, match="a flat64 image takes no modules"):
        flat.boot64(flat.parse64(b"\xf4"), RAM, "", module)


def test_images_do_not_reach_into_the_own_area():
    largest = flat.parse16(bytes(0x10000 - 0x7C00))
    assert flat.boot16(largest, RAM, "", ()).entry == largest.entry
    with pytest.raises(
        ImageError, match=r"image segment 0x7c00\.\.0x10000 overlaps pyvmm's own area 0x10000\.\.0x1ffff"
    ):
        flat.boot16(flat.parse16(bytes(0x10001 - 0x7C00)), RAM, "", ())
