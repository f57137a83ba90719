# test_bench_files.py: files of results: what is appended, what is cut off, and what is refused.
from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm import host
from pyvmm.bench import Result, results
from pyvmm.bench.results import Log, joined, read
from pyvmm.errors import BadInput

RESULT = {"name": "a", "unit": "s", "median": 1.0, "values": [1.0, 2.0], "group": "g"}
ENTRY = {"benchmark": "faults", "seconds": 1.5, "load": 0.5, "results": [RESULT]}


@pytest.fixture
def head(monkeypatch):
    monkeypatch.setattr(host, "facts", lambda: {"kernel": "6.1", "cores": 2, "cpu": None})
    monkeypatch.setattr(host, "findings", lambda: [])
    return results.head(quick=False)


def text(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_what_is_written_is_read(tmp_path, head):
    path = str(tmp_path / "log")
    for turn in range(2):
        with Log(path) as log:
            log.add(head)
            log.add(ENTRY)
            log.add({"benchmark": "exits", "seconds": 0, "load": turn, "error": "no /dev/kvm"})
    first, second = read(path)
    assert first.head == head
    assert [(entry.benchmark, entry.reason) for entry in second.entries] == [("faults", ""), ("exits", "no /dev/kvm")]
    assert joined([first, second])["faults"] == [Result("a", "s", (1.0, 2.0, 1.0, 2.0), "g")]


def test_the_head_is_of_this_checkout(head):
    assert head["commit"] is None or len(head["commit"].split(",")[0]) == 12
    assert json.loads(json.dumps(head)) == head


def test_a_line_that_was_cut_is_passed_over_and_then_taken_away(tmp_path, head):
    path = tmp_path / "log"
    path.write_text(text(head, ENTRY) + json.dumps(ENTRY)[:30])
    assert len(read(str(path))[0].entries) == 1
    with Log(str(path)) as log:
        log.add(ENTRY)
    assert path.read_text() == text(head, ENTRY, ENTRY)


def test_two_runs_do_not_write_at_once(tmp_path):
    with Log(str(tmp_path / "log")), pytest.raises(BadInput, match="another run writes to it"):
        Log(str(tmp_path / "log"))


@pytest.mark.parametrize("content", ["my notes\n", "{}\n", "\n", "[1]\n"])
def test_nothing_else_is_appended_to(tmp_path, content):
    path = tmp_path / "notes"
    path.write_text(content)
    with pytest.raises(BadInput, match="no results of pyvmm bench"):
        Log(str(path))
    assert path.read_text() == content


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(BadInput, match="No such file or directory"):
        Log(str(tmp_path / "none" / "log"))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (ENTRY | {"benchmark": 7}, "'benchmark' is no plain text"),
        (ENTRY | {"benchmark": "\x1b[2J"}, "'benchmark' is no plain text"),
        (ENTRY | {"seconds": None}, "'seconds' is no number"),
        (ENTRY | {"seconds": True}, "'seconds' is no number"),
        (ENTRY | {"results": {}}, "results is no list of objects"),
        (ENTRY | {"results": [1]}, "results is no list of objects"),
        (ENTRY | {"results": [RESULT | {"values": "12"}]}, "values is no list"),
        (ENTRY | {"results": [RESULT | {"values": [10**400]}]}, "'values' is no number"),
        (ENTRY | {"results": [RESULT | {"values": [float("nan")]}]}, "NaN is no number"),
        (ENTRY | {"results": [RESULT | {"name": "x" * 2000}]}, "'name' is no plain text"),
        (ENTRY | {"error": ["x"]}, "'error' is no plain text"),
        ({"pyvmm_bench": 2}, "of format '2', and this pyvmm reads 1"),
        ({"pyvmm_bench": 1}, "'version' is no plain text"),
        ([1], "not an object"),
    ],
)
def test_each_thing_that_is_wrong_is_named(tmp_path, head, line, why):
    path = tmp_path / "log"
    path.write_text(text(head, line))
    with pytest.raises(BadInput) as caught:
        read(str(path))
    assert str(caught.value) == f"{path}: line 2: {caught.value.args[0].split(': ', 2)[2]}"
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("host", 7), ("host", {"a": [1]}), ("host", {"a": "\x07"}), ("features", {"kvm": 1}), ("quick", 1), ("load", "x")],
)
def test_heads_are_checked(tmp_path, head, field, value):
    path = tmp_path / "log"
    path.write_text(text(head | {field: value}))
    with pytest.raises(BadInput, match=r"line 1: .*no results of pyvmm bench"):
        read(str(path))


@pytest.mark.parametrize("data", [b"", b"[" * 100_000 + b"\n", b"\xff\n", text(ENTRY).encode(), b"7" * 5000 + b"\n"])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "log"
    path.write_bytes(data)
    with pytest.raises(BadInput, match="no results of pyvmm bench"):
        read(str(path))


def test_huge_files_are_refused_before_they_are_parsed(tmp_path):
    path = tmp_path / "log"
    with open(path, "wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(BadInput, match="larger than 64 MiB"):
        read(str(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ENTRY, *RESULT, "error"]), inner),
    max_leaves=8,
)


@given(JSON)
def test_whatever_a_line_says_it_is_an_entry_or_refused(tmp_path_factory, line):
    path = tmp_path_factory.mktemp("any") / "log"
    with open(path, "w") as file:
        head = {"version": "", "date": "", "command": "", "quick": True, "load": 0, "host": {}, "features": {}}
        file.write(text(head | {"pyvmm_bench": 1}, line))
    told = ""
    try:
        read(str(path))
    except BadInput as error:
        told = str(error)
    assert not told or "line 2: " in told
