# test_cli_plot.py: the map as a picture: what is drawn is found by its colours.
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from pyvmm.cli.picture import KINDS, Stage
from pyvmm.cli.plot import draw
from pyvmm.errors import BadInput
from pyvmm.layout import BLOCK_SIZE, GIB, MIB, ram_regions
from pyvmm.memory.counts import PageCounts

COUNTS = PageCounts(1, 1, 0, {}, False)


def picture(path, size, *maps):
    draw(
        str(path),
        "a title",
        [Stage(f"stage {i}", COUNTS, {}, looks) for i, looks in enumerate(maps)],
        ram_regions(size),
    )
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    return np.rint(imread(path)[:, :, :3] * 255).astype(int)


def area(image, kind):
    """How many pixels have a kind's colour."""
    colour = [int(KINDS[kind].colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((image == colour).all(axis=2).sum())


def test_each_kind_has_the_area_of_its_blocks(tmp_path):
    looks = ["large"] * 16 + ["aside"] * 8 + ["small"] * 8
    image = picture(tmp_path / "map.png", 64 * MIB, looks)
    legend = {kind: area(picture(tmp_path / "one.png", 64 * MIB, [kind] * 32), kind) for kind in KINDS}
    whole = legend["large"]
    assert area(image, "large") == pytest.approx(whole / 2, rel=0.1)
    assert area(image, "aside") == pytest.approx(whole / 4, rel=0.15)
    assert area(image, "small") == pytest.approx(whole / 4, rel=0.15)
    assert {kind for kind in KINDS if area(image, kind) > 500} == {"large", "aside", "small"}  # letters have greys
    assert all(count == pytest.approx(whole, rel=0.1) for count in legend.values())


def test_a_map_a_stage(tmp_path):
    one = picture(tmp_path / "one.png", 64 * MIB, ["large"] * 32)
    two = picture(tmp_path / "two.png", 64 * MIB, ["large"] * 32, ["large"] * 32)
    assert len(two) > len(one)
    assert area(two, "large") > 1.8 * area(one, "large")


def test_ram_behind_the_hole_is_apart(tmp_path):
    """Lines of pixels in which both kinds are: none; and between them a blank one."""
    image = picture(tmp_path / "map.png", 5 * GIB, ["large"] * 1536 + ["aside"] * 1024)
    colours = {kind: [int(KINDS[kind].colour[i : i + 2], 16) for i in (1, 3, 5)] for kind in ("large", "aside")}
    rows = {kind: np.flatnonzero((image == colour).all(axis=2).sum(axis=1) > 300) for kind, colour in colours.items()}
    assert rows["large"].max() + 5 < rows["aside"].min()


def test_64_gib_have_a_pixel_for_each_block(tmp_path):
    looks = ["large"] * 32768
    looks[20000] = "swap"
    image = picture(tmp_path / "map.png", 64 * GIB, looks)
    plain = picture(tmp_path / "plain.png", 64 * GIB, ["large"] * 32768)
    assert image.shape[1] == plain.shape[1] < 2000
    assert area(image, "large") > 32768 * (1 << 20) / BLOCK_SIZE
    assert area(image, "swap") > area(plain, "swap") == 0


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"--png .*: Is a directory"):
        picture(tmp_path, 64 * MIB, ["large"] * 32)


def test_without_matplotlib_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pyvmm.cli import main; sys.exit(main(['pages', 'hello', '--png', 'x.png']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pyvmm: --png needs matplotlib: run pip install 'pyvmm[plot]'\n"
