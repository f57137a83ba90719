# test_image_placement.py: what fits into which RAM, where modules go, and which command lines can be passed.
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import BadInput, ImageError
from pyvmm.image.bootinfo import InfoArea, encode_command_line, memory_map
from pyvmm.image.model import Module, Segment, check_apart
from pyvmm.image.placement import check_fits, place_modules
from pyvmm.layout import GIB, MIB, PAGE_SIZE, Gpa, parse_size, ram_regions


def zeros(gpa: int, size: int) -> Segment:
    return Segment(Gpa(gpa), b"", size)


@pytest.mark.parametrize(
    ("segment", "memory"),
    [(zeros(MIB, MIB), 2 * MIB), (zeros(4 * GIB, GIB), 4 * GIB), (zeros(3 * GIB - 1, 1), 3 * GIB)],
)
def test_segments_that_just_fit(segment, memory):
    check_fits([segment], ram_regions(memory))
    with pytest.raises(ImageError):
        check_fits([segment], ram_regions(memory - 1))


@pytest.mark.parametrize(
    ("segments", "memory", "message"),
    [
        (
            [zeros(7 * MIB, MIB), zeros(MIB, 2 * MIB)],
            2 * MIB,
            "needs memory up to 0x800000, the VM has 2M; try --mem 8M",
        ),
        ([zeros(MIB, 3 * GIB - MIB)], 2 * MIB, "needs memory up to 0xc0000000, the VM has 2M; try --mem 3G"),
        ([zeros(2 * MIB, 1)], 2 * MIB, "needs memory up to 0x200001, the VM has 2M; try --mem 4M"),
        ([zeros(4 * GIB, GIB)], 1 * GIB, "needs memory up to 0x140000000, the VM has 1G; try --mem 4G"),
        (
            [zeros(3 * GIB - 4096, 8192)],
            8 * GIB,
            "segment 0xbffff000..0xc0000fff reaches into the hole from 3 to 4 GiB, where a VM has no memory",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_the_memory_that_would_do(segments, memory, message):
    with pytest.raises(ImageError) as caught:
        check_fits(segments, ram_regions(memory))
    assert str(caught.value) == message


@given(st.integers(2 * MIB, 6 * GIB), st.integers(0, 7 * GIB), st.integers(1, 7 * GIB))
def test_memory_is_advised_where_it_helps_and_suffices(memory, start, size):
    segment = zeros(start, size)
    in_hole = start < 4 * GIB and start + size > 3 * GIB
    try:
        check_fits([segment], ram_regions(memory))
    except ImageError as error:
        advice = str(error).partition("--mem ")[2]
    else:
        advice = str(memory)
    assert bool(advice) is not in_hole
    if advice:
        check_fits([segment], ram_regions(parse_size(advice)))


def test_modules_go_to_the_top_of_low_ram():
    placed = place_modules([(4097, "a"), (1, "b")], ram_regions(16 * MIB), ())
    assert placed == (Module(Gpa(16 * MIB - 8192), 4097, "a"), Module(Gpa(16 * MIB - 12288), 1, "b"))
    (low,) = place_modules([(4096, "")], ram_regions(8 * GIB), ())
    assert low.gpa == Gpa(3 * GIB - 4096)


def test_modules_may_begin_at_1_mib_but_not_below():
    (module,) = place_modules([(MIB, "")], ram_regions(2 * MIB), ())
    assert module.gpa == Gpa(MIB)
    with pytest.raises(ImageError):
        place_modules([(MIB + 1, "")], ram_regions(2 * MIB), ())


def test_modules_go_around_segments():
    segments = (zeros(MIB, 4096), zeros(15 * MIB, MIB), zeros(13 * MIB, MIB))
    placed = place_modules([(MIB, "a"), (2 * MIB, "b")], ram_regions(16 * MIB), segments)
    assert [module.gpa.value for module in placed] == [14 * MIB, 11 * MIB]


@pytest.mark.parametrize(
    ("size", "memory", "message"),
    [
        (
            MIB,
            2 * MIB,
            "module 'initrd' of 1M does not fit beside the image in the VM's 2M of memory; try a larger --mem",
        ),
        (3 * GIB, 9 * GIB, "module 'initrd' of 3G does not fit beside the image in the VM's 3G below 3 GiB"),
    ],
)
def test_modules_that_do_not_fit(size, memory, message):
    with pytest.raises(ImageError) as caught:
        place_modules([(size, "initrd")], ram_regions(memory), (zeros(MIB, 4096),))
    assert str(caught.value) == message


@given(
    st.lists(st.integers(0, 3 * MIB), max_size=6),
    st.lists(st.tuples(st.integers(0, 16 * MIB), st.integers(1, 2 * MIB)), max_size=4),
)
def test_placed_modules_are_aligned_in_ram_and_apart(sizes, areas):
    segments = [zeros(*area) for area in areas]
    ram = ram_regions(16 * MIB)
    try:
        placed = place_modules([(size, "") for size in sizes], ram, segments)
    except ImageError:
        assert segments or sum(-(-size // PAGE_SIZE) for size in sizes) > 15 * MIB // PAGE_SIZE
        return
    assert [module.size for module in placed] == sizes
    as_segments = [zeros(module.gpa.value, module.size) for module in placed]
    check_fits(as_segments, ram)
    assert all(module.gpa.value % PAGE_SIZE == 0 and module.gpa.value >= MIB for module in placed)
    for module in as_segments:
        assert all(module.end <= other.gpa or other.end <= module.gpa for other in segments)
    check_apart(("module", module) for module in as_segments if module.memory_size)


def test_memory_map_of_the_smallest_vm():
    assert memory_map(ram_regions(2 * MIB)) == [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (MIB, MIB, 1)]


def test_info_area_is_full_to_the_last_byte_and_no_further():
    area = InfoArea(56)
    assert area.put(b"x") == 0x6000 + 56
    assert area.put(bytes(0xA000 - 64)) == 0x6000 + 64
    segment = area.segment(b"header")
    assert (segment.gpa, segment.end, segment.data[:6]) == (Gpa(0x6000), Gpa(0x10000), b"header")
    with pytest.raises(ImageError, match="too many modules: their descriptions exceed the 40 KiB"):
        area.put(b"x")
    with pytest.raises(ImageError, match="too many modules"):
        InfoArea(56).put(bytes(0xA000 - 55))


def test_command_line_limits():
    assert encode_command_line("ä" * 2048) == b"\xc3\xa4" * 2048
    for text, message in (("x" * 4097, "4097 bytes"), ("a\0b", "NUL"), ("\udcff", r"'\\udcff' cannot be encoded")):
        with pytest.raises(BadInput, match=message):
            encode_command_line(text)
