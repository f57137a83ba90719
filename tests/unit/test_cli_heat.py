# test_cli_heat.py: the map of activity, in a terminal and as a picture.
from __future__ import annotations

import io

import pytest
from rich.console import Console

from pyvmm import BadInput
from pyvmm.cli.activity import Seen
from pyvmm.cli.heat import LEVELS, HeatPicture, level
from pyvmm.memory.activity import HeatMap


def drawn(heat, width=40, encoding="utf-8", rows=24):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, force_terminal=False)
    console.print(HeatPicture(heat, lambda block: block << 21, rows))
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()


def a_map():
    heat = HeatMap(4)
    for at, block, touched in ((0.0, 0, 0), (1.0, 1, 5), (2.0, 2, 31), (4.0, 0, 200)):
        heat.add(block, touched, at)
    return heat


def test_levels_are_in_order():
    assert [level(each) for each in LEVELS] == list(range(len(LEVELS)))
    assert [level(each) for each in (0.5, 7.9, 512)] == [0, 1, 4]


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_a_row_a_block_in_any_width(width):
    lines = drawn(a_map(), width)
    assert all(len(line) <= width for line in lines)
    assert [line.split()[0] for line in lines[:4]] == ["0x0", "0x200000", "0x400000", "0x600000"]
    assert lines[0].endswith("█")
    assert lines[0].split()[1].startswith("·" * 10)  # as it was seen last
    assert lines[1].endswith("░")
    assert lines[2].endswith("▒")
    assert lines[3].strip() == "0x600000"
    assert lines[4].split() == ["0", "s", "4.0", "s"]
    assert "128+" in " ".join(lines[5:])


def test_without_unicode_it_says_the_same():
    lines = drawn(a_map(), 40, "ascii")
    assert lines[0].endswith("#")
    assert lines[1].endswith("-")


def test_many_blocks_share_rows():
    heat = HeatMap(1000)
    heat.add(999, 512, 1.0)
    lines = drawn(heat, rows=10)
    assert len(lines) == 10 + 1 + 2
    assert "█" in lines[9]
    assert "█" not in "".join(lines[:9])


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from pyvmm.cli.plot import draw_heat

    path = tmp_path / "heat.png"
    draw_heat(str(path), "what", a_map(), lambda block: block << 21)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    draw_heat(str(path), "nothing", HeatMap(1), lambda block: block << 21)
    with pytest.raises(BadInput, match="--png"):
        draw_heat(str(tmp_path / "no" / "heat.png"), "what", a_map(), lambda block: block << 21)


def test_samples_become_a_trace():
    seen = Seen(4, 4 * 512, "test", 10, True)
    seen(2, 1 << 7 | 1 << 9, False)
    seen(0, 0, False)
    assert list(seen.trace.words) == [(1024 + 7) << 1, (1024 + 9) << 1]
    assert [(at, event.block, event.bits) for at, event in seen.trace.events] == [(2, 2, 1 << 7 | 1 << 9), (2, 0, 0)]
    assert seen.samples == len(seen.heat) == 2
    assert seen.working_set.estimate(2, 0).pages == 2
