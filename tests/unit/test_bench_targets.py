# test_bench_targets.py: what results say of targets, on values made by hand; the literal tables, against each other.
from __future__ import annotations

import pytest

from pyvmm.bench import BETTER, Result
from pyvmm.bench.catalogue import BENCHMARKS, INSTEAD, LIMIT, OURS
from pyvmm.bench.runner import _read, lacks
from pyvmm.bench.targets import TARGETS, figure, verdicts
from pyvmm.cli.bench import _Progress
from pyvmm.cli.bench_tables import show

EXITS = [
    Result("bare", "exits/s", (100.0, 200.0, 300.0)),
    Result("C", "exits/s", (95.0, 180.0, 300.0)),
    Result("Python", "exits/s", (40.0, 50.0, 60.0)),
]


def said(name, results, quick=False):
    return [
        (each.target.measure, each.group, each.what, each.figure(), each.said)
        for each in verdicts(name, results, quick)
    ]


def test_ratios_are_of_rounds_and_judged_by_their_median():
    assert said("exits", EXITS) == [
        ("P2", "", "C / bare", "0.95 (0.900 to 1.000)", "met"),
        ("P2", "", "Python / bare", "0.25 (0.200 to 0.400)", "missed"),
    ]
    assert {row[-1] for row in said("exits", EXITS, quick=True)} == {"quick: not judged"}


def test_each_side_and_each_group_is_judged_where_a_side_alone_is_bound():
    group = "VM.restore() to the first entry into the guest"
    rows = [Result(name, "s", (seconds,), group) for name, seconds in (("256M", 0.002), ("4G", 0.004))]
    assert said("restore", rows) == [
        ("P8", group, "256M", "2 ms", "met"),
        ("P8", group, "4G", "4 ms", "missed"),
        ("P8", group, "4G / 256M", "2", "missed"),
    ]


def test_what_must_beat_all_must_beat_the_best():
    policies = {"class-based": 10.0, "balloon-only": 80.0, "swap-only": 40.0, "proportional": 90.0}
    rows = [
        Result(name, "faults", (value,), "refaults for 1,000 touches, all guests") for name, value in policies.items()
    ]
    (row,) = said("overcommit", rows)
    assert row[2:] == ("swap-only / class-based", "4", "missed")


def test_units_tell_rows_of_one_name_apart_and_bounds_can_be_two():
    group = "dense writes, warm file: what it took"
    rows = [Result("lazy", "faults", (7.0,), group), Result("lazy", "% large", (100.0,), group)]
    assert [row[2:] for row in said("restore", rows)] == [("lazy", "100 % large", "met")]
    (low, high) = (Result(name, "x", (value,), "estimated / actual") for name, value in (("a", 0.97), ("b", 1.02)))
    assert [row[2:] for row in said("sharing", [low, high])] == [("a", "0.97", "missed"), ("b", "1.02", "met")]
    assert verdicts("sharing", [low])[0].bound == "0.98 to 1.02"


def test_what_is_not_here_has_no_verdict_and_what_is_zero_no_ratio():
    rows = [Result("pyvmm run hello", "ms", (30.0,)), Result("QEMU microvm", "ms", ())]
    assert [row[2] for row in said("start", rows)] == ["pyvmm run hello"]
    zero = [Result("not populated", "s", (1.0,), "1M of large pages: the first pass")]
    zero.append(Result("populated", "s", (0.0,), zero[0].group))
    assert [row[2:] for row in said("populate", zero)] == [("not populated / populated", "-", "no figure")]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.0025, "s", "2.5 ms"), (12345.6, "exits/s", "12,346 exits/s"), (0.98, "x", "0.98"), (0, "bytes", "0 bytes")],
)
def test_figures(value, unit, text):
    assert figure(value, unit) == text


def test_tables_say_what_targets_are_and_how_they_were_met(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show("exits", EXITS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{BENCHMARKS['exits'].text} (P2)"
    assert lines[-2:] == [
        "  P2: C / bare, wanted >= 0.9: 0.95 (0.900 to 1.000), met",
        "  P2: Python / bare, wanted >= 0.5: 0.25 (0.200 to 0.400), missed",
    ]
    assert sum(line.startswith("┏") for line in lines) == 1


# ---- the tables ----


def test_targets_are_of_benchmarks_that_say_so():
    for target in TARGETS:
        assert target.measure in BENCHMARKS[target.benchmark].measures
        assert (target.least, target.most) != (None, None)


def test_sides_have_kinds():
    assert [BENCHMARKS["migrate"].kind(side) for side in ("tcp", "QEMU, unix", "process_vm_readv()")] == [
        OURS,
        INSTEAD,
        LIMIT,
    ]
    assert BENCHMARKS["restore"].numbers == "P8, P9, P7; T3"


def test_all_techniques_have_a_benchmark():
    assert {each for row in BENCHMARKS.values() for each in row.techniques} == {f"T{n}" for n in range(1, 9)}


def test_units_that_go_either_way_are_not_decided():
    assert (BETTER["s"], BETTER["GB/s"], BETTER["MiB/s"]) == (-1, 1, 0)


# ---- the runner ----


def test_what_a_benchmark_lacks_is_told():
    assert lacks("exits", EXITS, quick=True) == []
    assert lacks("exits", EXITS[:2], quick=True) == ["no 'Python' in ''", "nothing to judge P2 by: 'Python' in ''"]
    other = Result("more", "furlongs", (float("inf"),))
    assert lacks("exits", [*EXITS, other], quick=True) == [
        "unknown unit 'furlongs' of 'more'",
        "a value of 'more' is no figure",
    ]
    empty = [Result(each.name, each.unit, ()) for each in EXITS]
    assert len(lacks("exits", empty, quick=True)) == 5


@pytest.mark.parametrize(
    ("status", "out", "err", "reason"),
    [
        (0, b'{"error": "no\\nroom"}', b"", "no room"),
        (-11, b"", b"", "its process ended by signal 11"),
        (1, b"{", b"Traceback\nMemoryError\n", "its process ended by status 1: MemoryError"),
    ],
)
def test_why_a_process_has_no_results(status, out, err, reason):
    assert _read(status, out, err) == ((), reason)


def test_the_time_left_is_by_what_the_others_took():
    class Took:
        seconds = 2 * BENCHMARKS["start"].seconds[0]

    progress = _Progress(["start", "exits"], [Took()], quick=False)
    own = BENCHMARKS["exits"].seconds[0]
    assert progress.left(0) == 2 * own
    assert progress.left(1) == 2 * own - 1
    assert progress.left(100 * own) == 0
