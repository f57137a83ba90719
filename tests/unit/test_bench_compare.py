# test_bench_compare.py: what moved between two sets of results, on values made by hand, and the test that says so.
from __future__ import annotations

import json
from itertools import combinations

import pytest

from pyvmm.bench import Result
from pyvmm.bench.compare import LEVEL, _normal, compare, mann_whitney
from pyvmm.bench.results import Entry, Run, result_as_json
from pyvmm.cli import main
from pyvmm.errors import EXIT_BAD_INPUT

LOW, HIGH = (1.0, 1.1, 1.2, 1.3, 1.4), (2.0, 2.1, 2.2, 2.3, 2.4)
HEAD = {
    "pyvmm_bench": 1, "version": "0.1.0", "commit": "abc", "date": "2026-01-01T00:00:00+00:00",
    "command": "pyvmm bench all", "quick": False, "load": 0.5, "host": {"kernel": "6", "cores": 2},
    "features": {"kvm": True},
}  # fmt: skip


def written(path, *results, **head):
    lines = [
        HEAD | head,
        {"benchmark": "faults", "seconds": 1, "load": 1, "results": list(map(result_as_json, results))},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def one(a, b, unit="s"):
    rows, alone = compare({"x": [Result("r", unit, a)]}, {"x": [Result("r", unit, b)]})
    assert alone == 0
    return rows[0]


def brute(a, b):
    """All ways to deal the values out, by the definition."""
    values = [*a, *b]

    def distance(chosen):
        mine, others = [values[i] for i in chosen], [values[i] for i in range(len(values)) if i not in chosen]
        wins = sum((x > y) + (x == y) / 2 for x in mine for y in others)
        return abs(wins - len(mine) * len(others) / 2)

    ways = [distance(chosen) for chosen in combinations(range(len(values)), len(a))]
    return sum(way >= distance(tuple(range(len(a)))) for way in ways) / len(ways)


@pytest.mark.parametrize(
    ("a", "b"),
    [(LOW, HIGH), (LOW, (1.05, 1.5, 2.0)), ((1, 1, 1, 1), (1, 1, 2)), ((3, 1, 2), (2, 2, 2, 5)), ((1, 1), (1, 1))],
)
def test_few_values_are_counted_out(a, b):
    assert mann_whitney(a, b) == pytest.approx(brute(a, b))
    assert mann_whitney(b, a) == pytest.approx(mann_whitney(a, b))


def test_what_is_wholly_apart_is_as_unlikely_as_the_book_says():
    assert mann_whitney(LOW, HIGH) == pytest.approx(2 / 252)


def test_many_values_are_near_what_counting_out_says():
    a, b = [float(i) for i in range(10)], [i + 4.5 for i in range(10)]
    exact = mann_whitney(a, b)
    wins = sum(x > y for x in a for y in b)
    assert _normal(10, 10, abs(wins - 50), 0) == pytest.approx(exact, abs=0.003)
    many = [float(i % 50) for i in range(200)]
    assert mann_whitney(many, many) == 1.0
    assert mann_whitney(many, [value + 20 for value in many]) < LEVEL
    assert mann_whitney([1.0] * 30, [1.0] * 30) == 1.0


@pytest.mark.parametrize(
    ("a", "b", "unit", "said"),
    [
        (LOW, HIGH, "s", "worse"),
        (HIGH, LOW, "ms", "better"),
        (LOW, HIGH, "GB/s", "better"),
        (HIGH, LOW, "VMs/s", "worse"),
        (LOW, HIGH, "%", "moved"),
        (LOW, HIGH, "of another pyvmm", "moved"),
        (LOW, (1.05, 1.15, 1.25, 1.35, 1.45), "s", ""),
        (LOW[:4], HIGH, "s", "too few"),
    ],
)
def test_better_and_worse_are_the_units(a, b, unit, said):
    assert one(a, b, unit).said == said


def test_what_is_in_one_alone_is_counted(tmp_path, capsys):
    a, b, c = Result("a", "s", LOW, "g"), Result("b", "s", LOW, "g"), Result("c", "s", LOW)
    rows, alone = compare({"x": [a, b, Result("none", "s", ())]}, {"x": [a, c]})
    assert [row.name for row in rows] == ["a"]
    assert alone == 2
    first = written(tmp_path / "a", a, b)
    second = written(tmp_path / "b", Result("a", "s", HIGH, "g"), Result("[/b]", "s", LOW, "g"))
    assert main(["bench", "compare", first, second]) == 0
    text = capsys.readouterr().out
    assert "worse" in text
    assert text.endswith("0 better, 1 worse, 0 moved, 0 within the noise, 2 in one of the two alone.\n")
    assert main(["bench", "compare", first, second, "--json"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["a"], row["b"], row["ratio"], row["said"]) == (1.2, 2.2, pytest.approx(2.2 / 1.2), "worse")


def test_runs_of_one_file_count_together(tmp_path, capsys):
    low = written(tmp_path / "a", Result("a", "s", LOW[:3]))
    high = written(tmp_path / "b", Result("a", "s", HIGH[:3]))
    for path in (tmp_path / "a", tmp_path / "b"):
        path.write_text(path.read_text() * 2)
    assert main(["bench", "compare", low, high]) == 0
    assert "1 worse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["compare", "A"], "two files"),
        (["compare", "A", "quick"], "--quick"),
        (["compare", "A", "other"], "no result in common"),
        (["compare", "A", "missing"], "No such file"),
        (["report", "A"], "--output DIR"),
        (["nosuch"], "no benchmark 'nosuch'"),
        (["faults", "nosuch", "--quick"], "no benchmark 'nosuch'"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(tmp_path, monkeypatch, capsys, words, named):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "A", Result("a", "s", LOW))
    written(tmp_path / "quick", Result("a", "s", LOW), quick=True)
    written(tmp_path / "other", Result("b", "s", LOW))
    assert main(["bench", *words]) == EXIT_BAD_INPUT
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert named in said.err


def test_entries_and_runs_are_plain():
    entry = Entry("exits", (Result("bare", "exits/s", (1.0,)),), 1.0, 0.5)
    told = entry.as_json(quick=True)
    assert told["measures"] == ("P2",)
    assert told["results"][0] == {"name": "bare", "unit": "exits/s", "median": 1.0, "values": [1.0]}
    assert Entry("exits", (), 1.0, 0.5, "why").as_json(quick=True)["error"] == "why"
    assert Run(HEAD, []).quick is False
