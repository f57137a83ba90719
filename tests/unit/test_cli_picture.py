# test_cli_picture.py: tables, maps and histograms of pages, of records made by hand, at several widths.
from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pyvmm._native import ffi
from pyvmm.cli.picture import (
    KINDS,
    ROWS,
    BlockMap,
    Histogram,
    PagesTable,
    Stage,
    bar,
    map_rows,
    map_shape,
    nanoseconds,
    operations_table,
    stalls_table,
)
from pyvmm.layout import BLOCK_SIZE, GIB, MIB, ram_regions
from pyvmm.memory.counts import LOOKS, EngineStats, PageCounts
from pyvmm.memory.homes import HOMES

WIDTHS = (40, 80, 200)


def shown(*renderables, width=80, encoding="utf-8", **options):
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding) as file:
        console = Console(file=file, width=width, highlight=False, **options)
        for make in renderables:
            console.print(make(console) if callable(make) else make)
        file.flush()
        return raw.getvalue().decode(encoding)


def counts(total, large=0, small=0, **homes):
    return PageCounts(total, large, small, dict.fromkeys(HOMES[1:], 0) | homes, bool(homes))


def stage(title="before", size=64 * MIB, looks=None, mappings=(15, 31), **pages):
    by_4k, by_2m = mappings
    return Stage(
        title,
        counts(size // 4096, **({"large": 15872, "small": 24} | pages)),
        {"pages_4k": by_4k, "pages_2m": by_2m, "pages_1g": 0},
        looks or ["small"] + ["large"] * (size // BLOCK_SIZE - 1),
    )


THREE = [
    stage(),
    stage("after --do", large=8704, small=1560, aside=5632, mappings=(15, 17)),
    stage("1 s later", large=14336, small=1560, mappings=(1551, 28)),
]
HUGE = [stage(title, 4 << 40, ["large"], (1 << 30, 1 << 21), large=1 << 29, small=1 << 28) for title in ("a", "b", "c")]


def stats(asleep=(0, 0), **fields):
    native = ffi.new("struct pv_engine_stats *")
    for name, values in fields.items():
        for index, value in values.items():
            getattr(native, name)[index] = value
    return EngineStats(native, list(asleep))


# ---- the table ----


def figures(text):
    """The table's lines: name -> figures."""
    lines = [line.split("  ") for line in text.splitlines()]
    return {words[0]: [word.strip() for word in words[1:] if word.strip()] for words in lines}


def test_the_table_has_all_kinds_and_kvms_own_count_in_pages():
    found = figures(shown(PagesTable(THREE[:1])))
    assert list(found) == ["kind", *KINDS, "KVM by 2M", "KVM by 4K"]
    assert found["kind"] == ["before", "MiB", "share"]
    assert found["large"] == ["15,872", "62.0", "96.9%"]
    assert found["untouched"] == ["488", "1.9", "3.0%"]
    assert found["swap"] == ["0", "0.0", "0.0%"]
    assert found["KVM by 2M"] == found["large"]
    assert found["KVM by 4K"] == ["15", "0.1", "0.1%"]


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (40, ["before", "after --do", "1 s later"]),
        (70, ["before", "after --do", "1 s later", "MiB", "share"]),
        (200, [word for title in ("before", "after --do", "1 s later") for word in (title, "MiB", "share")]),
    ],
)
def test_figures_give_way_to_the_width_but_pages_are_never_cut(width, columns):
    text = shown(PagesTable(THREE), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    found = figures(text)
    assert found["kind"] == columns
    pages = [found["aside"][columns.index(title)] for title in ("before", "after --do", "1 s later")]
    assert pages == ["0", "5,632", "0"]


def test_a_large_pages_mapping_of_1_gib_counts_as_large():
    mapped = stage()._replace(mappings={"pages_4k": 0, "pages_2m": 1, "pages_1g": 2})
    assert figures(shown(PagesTable([mapped])))["KVM by 2M"][0] == f"{512 + 2 * 512 * 512:,}"


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_of_a_huge_vm_fits_a_terminal(width):
    text = shown(PagesTable(HUGE), width=width, force_terminal=True, color_system=None)
    assert "536,870,912" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


# ---- the map ----


def rows_of(text):
    """The map's lines that begin with an address: address -> cells."""
    return {int(line.split()[0], 16): line.split()[1] for line in text.splitlines() if line.startswith("0x")}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", [2 * MIB, 3 * MIB, 64 * MIB, 3 * GIB, 5 * GIB, 64 * GIB])
def test_the_map_fits_and_has_each_block_in_the_cell_of_its_address(width, size):
    regions = ram_regions(size)
    blocks = sum(-(-region.size // BLOCK_SIZE) for region in regions)
    looks = ["small", *["large"] * (blocks - 1)]
    text = shown(BlockMap(looks, regions), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert not any(line != line.rstrip() for line in text.splitlines())
    found = rows_of(text)
    assert len(found) <= ROWS
    digits = len(f"{regions[-1].end.value:#x}")
    across, share = map_shape(regions, width - digits - 1, ROWS)
    assert sum(map(len, found.values())) == sum(-(-region.size // (BLOCK_SIZE * share)) for region in regions)
    assert all(len(cells) <= across for cells in found.values())
    assert all(
        (address - (4 * GIB if address >= 4 * GIB else 0)) % (across * share * BLOCK_SIZE) == 0 for address in found
    )
    assert found[0][0] == KINDS["large" if share > 2 else "small"].glyph  # of a tie the first


def test_ram_behind_the_hole_is_a_new_group_of_rows():
    lines = shown(BlockMap(["large"] * 1536 + ["aside"] * 512, ram_regions(4 * GIB))).splitlines()
    hole = lines.index("hole up to 0x100000000")
    assert lines[hole + 1].startswith("0x100000000 A")
    assert "A" not in "".join(line.split()[1] for line in lines[:hole])
    assert all(int(line.split()[0], 16) < 3 * GIB for line in lines[:hole])


def test_a_small_vm_has_no_hole():
    assert "hole" not in shown(BlockMap(["large"] * 1536, ram_regions(3 * GIB)))


def test_one_cell_a_block_in_the_order_of_addresses():
    looks = [LOOKS[i % len(LOOKS)] for i in range(32)]
    looks = [look if look in KINDS else "large" for look in looks]
    text = shown(BlockMap(looks, ram_regions(64 * MIB)), width=28)
    expected = "".join(KINDS[look].glyph for look in looks)
    assert rows_of(text) == {0: expected[:16], 0x2000000: expected[16:]}


def test_cells_shared_by_blocks_show_most_of_them_and_the_map_says_so():
    looks = ["large"] * 32768
    looks[100:124] = ["aside"] * 24  # more than half of 64 to 127 they are not; of 96 to 127 they are
    text = shown(BlockMap(looks, ram_regions(64 * GIB)))
    assert "a cell: what most of 32 blocks are" in text
    assert rows_of(text)[0][:5] == "███A█"
    assert "large 32,744" in text
    assert "aside 24" in text


def test_what_no_cell_shows_is_in_the_legend():
    looks = ["large"] * 32768
    looks[7] = "swap"
    text = shown(BlockMap(looks, ram_regions(64 * GIB)))
    assert "S" not in "".join(rows_of(text).values())
    assert "S swap 1 " in text


def test_the_legend_names_only_what_occurs():
    text = shown(BlockMap(["zero", "large"], ram_regions(4 * MIB)))
    assert {kind for kind in KINDS if kind in text} == {"zero", "large"}


def test_kinds_differ_without_colours_and_without_unicode():
    for characters in ([kind.glyph for kind in KINDS.values()], [kind.ascii for kind in KINDS.values()]):
        assert len({*characters}) == len(KINDS)
    assert all(kind.ascii.isascii() and len(kind.ascii) == 1 for kind in KINDS.values())
    assert "0x000000 #+" in shown(BlockMap(["large", "small"], ram_regions(4 * MIB)), encoding="ascii")


def test_kinds_are_all_that_the_engine_can_say():
    assert set(KINDS) == set(LOOKS) - {"present"} == {name for name, _ in counts(1).rows()}


def test_colours_are_for_terminals():
    renderables = (PagesTable(THREE), BlockMap(["large", "aside"], ram_regions(4 * MIB)), Histogram([0, 1]))
    assert "\x1b" not in shown(*renderables)
    coloured = shown(*renderables, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;0;158;115m█" in coloured
    assert "\x1b[38;2;204;121;167mA" in coloured


@given(st.integers(1, 40000), st.integers(1, 300), st.integers(1, 60))
def test_map_rows_lose_no_block(blocks, width, rows):
    regions = ram_regions(blocks * BLOCK_SIZE)
    across, share = map_shape(regions, width, rows)
    assert across <= width < 2 * across
    found = [row for region in regions for row in map_rows(["large"] * blocks, region, across, share)]
    assert len(found) <= max(rows, len(regions))
    assert sum(len(cells) for _, cells in found) == sum(-(-r.size // (BLOCK_SIZE * share)) for r in regions)


# ---- histogram and times ----


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_histogram_fits_and_its_longest_bar_is_the_greatest_count(width, encoding):
    lines = shown(Histogram([0] * 13 + [8, 0, 1, 1234567] + [0] * 23), width=width, encoding=encoding).splitlines()
    assert len(lines) == 4  # empty ends are left out, gaps are not
    assert max(map(len, lines)) <= width
    assert max(lines, key=len) is lines[3]
    assert lines[0].startswith("  8.2 us to  16.4 us ")
    assert lines[1].endswith("  0")
    assert lines[2][-1] == ("▏" if encoding == "utf-8" else "#")  # little, but seen
    assert lines[3].startswith(" 65.5 us to 131.1 us 1,234,567 ")


def test_no_counts_are_no_histogram():
    assert shown(Histogram([0] * 40)) == ""


@given(st.floats(0, 1), st.integers(1, 300), st.booleans())
def test_a_bar_is_never_longer_than_its_room(share, width, unicode):
    drawn = bar(share, width, unicode)
    assert len(drawn) <= width
    assert (drawn == "") == (share == 0)
    assert len(bar(1, width, unicode)) == width


def test_an_eighth_of_a_cell_is_seen():
    assert [bar(eighths / 8, 1) for eighths in range(1, 9)] == list("▏▎▍▌▋▊▉█")
    assert bar(0.5, 3) == "█▌"


@pytest.mark.parametrize(
    ("time", "text"),
    [(0, "0 ns"), (999, "999 ns"), (1000, "1.0 us"), (8192, "8.2 us"), (2.6e6, "2.6 ms"), (1.5e9, "1.5 s")],
)
def test_times_as_people_read_them(time, text):
    assert nanoseconds(time) == text


# ---- operations and stalls ----


def test_operations_that_occurred_are_shown_with_their_mean():
    made = stats(ops={0: {"done": 3, "failed": 1, "nanoseconds": 8000, "longest": 5000}, 2: {"done": 1}})
    lines = shown(lambda console: operations_table(console, made.operations)).splitlines()
    assert [line.split() for line in lines] == [
        ["operation", "done", "failed", "mean", "longest"],
        ["remove", "3", "1", "2.0", "us", "5.0", "us"],
        ["split", "1", "0", "0", "ns", "0", "ns"],
    ]


def test_who_waited_is_named():
    made = stats(asleep=(0, 9000), stalls={1: {"faults": 2, "nanoseconds": 6000, "longest": 4000}})
    made.workers.faults, made.workers.nanoseconds, made.workers.longest = 1, 1e6, 1e6
    lines = shown(lambda console: stalls_table(console, made), width=60).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["vCPU", "1", "2", "6.0", "us", "3.0", "us", "4.0", "us", "9.0", "us"],
        ["KVM's", "workers", "1", "1.0", "ms", "1.0", "ms", "1.0", "ms"],
    ]
