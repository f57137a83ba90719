# test_cli_dirty.py: how `pyvmm dirty` draws what it measured, and what it refuses before it looks at the host.
from __future__ import annotations

import io

import pytest
from rich.console import Console

from pyvmm.bench.dirty import Measured, Sample
from pyvmm.cli import dirty, main
from pyvmm.memory.trace import TRACKERS


def measured(rates, **fields):
    samples = [Sample((i + 1) * 0.1, 0.1, round(rate / 10), 0.001) for i, rate in enumerate(rates)]
    return Measured("bitmap", 100.0, 25.0, 100.0, samples=samples, **fields)


def drawn(found, width=80, blocks=True):
    return [line.plain for line in dirty.curve(found, width, blocks)]


@pytest.mark.parametrize("count", [0, 1, 2, 30, 67, 68, 69, 500])
@pytest.mark.parametrize("width", [20, 80, 200])
def test_a_curve_fits_its_width(count, width):
    lines = drawn(measured([1000.0 + i for i in range(count)]), width)
    assert len(lines) == 7
    assert max(map(len, lines)) <= width
    assert len({len(line) for line in lines[:6]}) == 1


def test_a_curve_shows_the_rates():
    lines = drawn(measured([0, 10000, 5000, 2500]), width=16)
    assert lines[0] == "  10.0k/s │ █  "
    assert [line[11:] for line in lines[:5]] == [" █  ", " █  ", " █▄ ", " ██▂", " ███"]
    assert lines[5] == "  pages 0 └────"
    assert lines[6].strip() == "0.4 s"  # no room for the beginning


def test_the_time_is_below_a_curve():
    lines = drawn(measured([1000.0] * 60))
    assert lines[6] == f"{'':11}0 s{'6.0 s':>57}"
    assert lines[5] == f"  pages 0 └{'─' * 60}"


def test_a_curve_of_nothing_is_flat():
    assert {line[11:].strip() for line in drawn(measured([0, 0]))[:5]} == {""}


def test_many_looks_are_averaged():
    lines = drawn(measured([1000, 3000] * 50), width=62)
    assert "2.0k/s" in lines[0]  # 100 looks in 50 columns: each the mean of its two


def test_ascii_where_the_terminal_has_no_more():
    assert all(line.isascii() for line in drawn(measured([1, 500, 1000]), blocks=False))


@pytest.mark.parametrize("columns", [80, 120])
def test_a_report_fits_the_terminal(columns):
    found = measured(
        [400_000.0] * 30,
        different_pages=65_026,
        longest_stall_seconds=0.0123,
        longest_gap_untraced_seconds=0.0001,
        ring_full_exits=1234,
        mappings_before={"pages_2m": 127},
        mappings_traced={"pages_2m": 0},
        mappings_after={"pages_2m": 127},
    )
    file = io.StringIO()
    dirty._show(Console(file=file, width=columns, highlight=False), TRACKERS["bitmap"], found)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= columns
    for words in (
        "25% of untraced: 100/s before, 25/s traced, 100/s after",
        "longest vCPU stall 12.30 ms (untraced: 0.10 ms)",
        "65,026 pages (254.0 MiB), reported 1,200,000 times",
        "full 1,234 times",
        "before, during, after: 127, 0, 127",
    ):
        assert words in text


def test_a_share_of_untraced_work():
    assert measured([]).speed == 0.25
    assert Measured("bitmap", 100.0, 50.0).speed == 0.5
    assert Measured("bitmap", 0.0, 50.0, 0.0).speed == 0.0


# options after `dirty touch`; what is said
REFUSED = [
    (["--seconds", "0"], "--seconds 0: give 0.1 to 3600"),
    (["--seconds", "nan"], "--seconds nan: give 0.1 to 3600"),
    (["--interval", "0"], "--interval 0: give 1 to 3000 ms"),
    (["--interval", "200", "--seconds", "0.1"], "--interval 200: give 1 to 100 ms, no more than --seconds"),
    (["--mem", "some"], "'some' is not a size"),
    (["--tracker", "magic"], f"no tracker 'magic': choose one of {', '.join(TRACKERS)}"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_bad_options_are_refused_in_one_line(capsys, options, words):
    assert main(["dirty", "touch", *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"pyvmm: {words}")
    assert said.err.count("\n") == 1


def test_hosts_without_trackers(capsys, monkeypatch):
    features = {feature for row in TRACKERS.values() for feature in row.features}
    monkeypatch.setenv("PYVMM_WITHOUT", ",".join(features))
    assert main(["dirty", "touch"]) == 2
    assert capsys.readouterr().err.startswith("pyvmm: no tracker works here: dirty bitmap: switched off")
    assert main(["dirty", "touch", "--tracker", "ring"]) == 2
    assert capsys.readouterr().err.startswith("pyvmm: no tracker ring here: dirty ring: switched off")
