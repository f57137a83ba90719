# test_bench_page.py: pages and plots of results: what is in them, and that a file from anywhere harms nobody.
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import pyvmm
from pyvmm.bench import Result
from pyvmm.bench.catalogue import INSTEAD, LIMIT, OURS
from pyvmm.bench.results import Entry, Run, result_as_json
from pyvmm.cli import bench_plots
from pyvmm.cli.bench_page import PAGE, Report
from pyvmm.cli.bench_plots import COLOURS, Panel, draw
from pyvmm.errors import BadInput

HEAD = {
    "pyvmm_bench": 1,
    "version": "0.1.0",
    "commit": None,
    "date": "2026-01-01T00:00:00+00:00",
    "command": "pyvmm bench all",
    "quick": False,
    "load": 0.5,
    "host": {"kernel": "6.<1>", "cores": 2},
    "features": {"kvm": True, "thp": False},
}
POPULATE = [
    Result("not populated", "s", (0.050, 0.080), "256M of large pages: the first pass"),
    Result("populated", "s", (0.002, 0.003), "256M of large pages: the first pass"),
]


def colours(path):
    """How many pixels a kind's colour, or nearly so, has."""
    image = np.rint(imread(path)[:, :, :3] * 255).astype(int)
    found = {}
    for kind, colour in COLOURS.items():
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        found[kind] = int((abs(image - rgb).max(axis=2) < 45).sum())
    return found


def test_a_plot_shows_each_kind_of_side(tmp_path):
    streams = [Result("process_vm_readv()", "GB/s", (6.0,)), Result("page runs, TCP", "GB/s", (3.0,))]
    assert draw(str(tmp_path), "streams", streams) == ["streams.png"]
    found = colours(tmp_path / "streams.png")
    assert found[LIMIT] > 1.8 * found[OURS] > 1000  # a bar twice as long
    assert draw(str(tmp_path), "populate", POPULATE) == ["populate.png"]
    assert colours(tmp_path / "populate.png")[INSTEAD] > 100


def test_scales_and_units():
    panel = Panel("g", POPULATE, [])
    assert (panel.unit, panel.log, panel.better) == ("ms", True, -1)
    assert panel.rows[1].values == pytest.approx((2.0, 3.0))
    near = Panel("g", [Result("a", "s", (1.0,)), Result("b", "s", (0.1,)), Result("c", "s", (0.0,))], [])
    assert (near.unit, near.log) == ("s", False)


def test_much_is_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_plots, "_PANELS", 1)
    rows = [Result("a", "s", (0.0,), f"group {n}, {'with a long name ' * 6}") for n in range(2)]
    assert draw(str(tmp_path), "faults", rows) == ["faults.png", "faults-2.png"]
    assert draw(str(tmp_path), "faults", []) == []


def test_a_page_has_all_in_it(tmp_path):
    missed = [
        Result(row.name, row.unit, row.values[::-1], "4M of large pages: the first pass") for row in POPULATE[::-1]
    ]
    missed = [Result(a.name, b.unit, b.values, a.group) for a, b in zip(missed, POPULATE, strict=True)]
    entries = [
        Entry("populate", (*POPULATE, *missed), 12.0, 1.0),
        Entry("exits", (), 0.5, 1.0, "no /dev/kvm: <b>"),
        Entry("new_one", (Result("<script>", "furlongs", (1.0,)), Result("none", "s", ())), 1.0, 1.0),
    ]
    Report(str(tmp_path / "out")).write([Run(HEAD, entries)])
    page = (tmp_path / "out" / PAGE).read_text()
    assert "Targets: 1 met, 1 missed, 0 not judged" in page
    assert page.count("data:image/png;base64,") == 2
    for text in ("Not measured: no /dev/kvm: &lt;b&gt;", "&lt;script&gt;", "6.&lt;1&gt;", "without</th><td>thp"):
        assert text in page
    assert "<script" not in page
    assert 'src="http' not in page


@pytest.mark.parametrize("name", ["../out", "a/b", "", "x y"])
def test_a_name_leads_nowhere_else(tmp_path, name):
    with pytest.raises(BadInput, match="is no name of a benchmark"):
        Report(str(tmp_path / "out")).write([Run(HEAD, [Entry(name, tuple(POPULATE), 1.0, 1.0)])])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_runs_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(BadInput, match="--quick"):
        Report(str(tmp_path)).write([Run(HEAD, []), Run(HEAD | {"quick": True}, [])])


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="file"):
        Report(str(tmp_path / "file"))


WITHOUT = """
import sys
sys.modules["matplotlib.figure"] = None
from pyvmm.cli import main
sys.exit(main(["bench", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("words", [["report", "log", "--output", "out"], ["all", "--report", "out"]])
def test_without_matplotlib_the_extra_is_named(tmp_path, words):
    """Before anything is measured: this needs no /dev/kvm."""
    entry = {"benchmark": "populate", "seconds": 1, "load": 1, "results": list(map(result_as_json, POPULATE))}
    (tmp_path / "log").write_text(json.dumps(HEAD) + "\n" + json.dumps(entry) + "\n")
    environment = os.environ | {"PYTHONPATH": str(Path(pyvmm.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pyvmm: plots and pages of results need matplotlib: run pip install 'pyvmm[bench]'\n"
