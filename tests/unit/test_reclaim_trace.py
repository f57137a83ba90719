# test_reclaim_trace.py: access traces written, read, and damaged; and `pyvmm simulate`.
from __future__ import annotations

import json
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reclaim_help import trace_of, traces

from pyvmm.cli import main
from pyvmm.errors import BadInput, HostError
from pyvmm.memory.reclaim import trace as module
from pyvmm.memory.reclaim.policy import BLOCK_PAGES
from pyvmm.memory.reclaim.trace import Duplicates, Sample, Trace, load, save

SOME = trace_of(1500, [(7, True), (1499, False), Sample(2, 5), Sample(0, 1 << 511), Duplicates(1, 3), (0, True)])


def same(one, other):
    return all(getattr(one, name) == getattr(other, name) for name in vars(one))


@given(traces(st.integers(1, 1600)), st.integers(0, (1 << 64) - 1), st.sampled_from(["", "a VM", "ä" * 100]))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, trace, seed, source):
    path = str(tmp_path_factory.getbasetemp() / "t")
    trace.seed, trace.source = seed, source
    save(trace, path)
    assert same(load(path), trace)


def test_a_long_trace_has_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_RECORDS", 10)
    trace = trace_of(BLOCK_PAGES, [(page, page % 3 == 0) for page in range(BLOCK_PAGES)])
    for bit in range(25):
        trace.add(Sample(0, 1 << bit))
    save(trace, str(tmp_path / "t"))
    assert same(load(str(tmp_path / "t")), trace)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o600


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(BadInput) as caught:
        load(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_damaged_byte_and_each_truncation_is_found(tmp_path):
    save(SOME, str(tmp_path / "t"))
    good = (tmp_path / "t").read_bytes()
    for at in range(len(good)):
        refused(tmp_path / "t", good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        refused(tmp_path / "t", good[:at])
    assert "more behind its end" in refused(tmp_path / "t", good + b"x")


def head(pages=1500, seed=0, source=b"", version=1, flags=0):
    raw = module._HEAD.pack(module.MAGIC, version, flags, pages, seed, len(source)) + source
    return raw + struct.pack("<I", zlib.crc32(raw))


def end(number, touches=0, events=0):
    return module._sealed(number, b"END ", 1, zlib.compress(struct.pack("<QQ", touches, events)))


TOUCH = struct.pack("<II", 1, 3)
# All with right checksums: what is behind the head, what is said.
HOSTILE = [
    (b"", "truncated"),
    (end(1), "checksum"),
    (end(0, 1), "does not hold what its end says"),
    (module._sealed(0, b"TOUC", 1, zlib.compress(struct.pack("<II", 1, 1500 << 1))) + end(1, 1), "page 1500 of 1500"),
    (module._sealed(0, b"TOUC", 1, zlib.compress(TOUCH * 2)) + end(1, 1), "not 1 records"),
    (module._sealed(0, b"TOUC", 2, zlib.compress(TOUCH)) + end(1, 1), "not 2 records"),
    (module._sealed(0, b"TOUC", 1, zlib.compress(TOUCH) + b"x") + end(1, 1), "not 1 records"),
    (module._sealed(0, b"TOUC", 1, TOUCH) + end(1, 1), "not 1 records"),
    (module._sealed(0, b"TOUC", 0, zlib.compress(b"")) + end(1), "damaged in chunk 0"),
    (module._sealed(0, b"TOUC", 1 << 31, zlib.compress(TOUCH)), "damaged in chunk 0"),
    (module._sealed(0, b"NONE", 1, zlib.compress(TOUCH)), "damaged in chunk 0"),
    (module._CHUNK.pack(b"TOUC", 1, 0xFFFFFFFF, 0), "damaged in chunk 0"),
    (module._sealed(0, b"TOUC", 1, zlib.compress(bytes(8 << 20), 9)), "damaged in chunk 0"),
    (module._sealed(0, b"SAMP", 1, zlib.compress(struct.pack("<I64s", 3, b""))) + end(1, 0, 1), "block 3 of a VM"),
    (module._sealed(0, b"SAMP", 1, zlib.compress(b"\2\0\0\0" + b"\xff" * 64)) + end(1, 0, 1), "block 2 of a VM"),
    (module._sealed(0, b"DUPL", 1, zlib.compress(b"\xff" * 68)) + end(1, 0, 1), "block 4294967295 of a VM"),
]
HEADS = [
    (head(0), "0 pages"),
    (head(module.MAX_PAGES + 1), "pages"),
    (head(1 << 63), "pages"),
    (head(version=2), "version 2"),
    (head(flags=1), "version 1"),
    (head(source=b"x" * 201), "head"),
    (head(source=b"\xff"), "head"),
    (head(source=b"a\nb"), "one line"),
]


@pytest.mark.parametrize(("data", "said"), [(head() + data, said) for data, said in HOSTILE] + HEADS)
def test_hostile_files_are_refused(tmp_path, data, said):
    assert said in refused(tmp_path / "t", data + (end(0) if (data, said) in HEADS else b""))


def test_too_many_records_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_RECORDS", 5)
    save(SOME, str(tmp_path / "t"))
    assert "more than 5 records" in refused(tmp_path / "t", (tmp_path / "t").read_bytes())


def test_what_cannot_be_in_a_trace():
    trace = Trace(10)
    for page, delta in ((10, 1), (-1, 1), (0, -1), (0, 1 << 32)):
        with pytest.raises(BadInput):
            trace.touch(page, False, delta)
    for event in (Sample(1, 0), Sample(-1, 0), Sample(0, 1 << 10), Duplicates(0, -1)):
        with pytest.raises(BadInput):
            trace.add(event)
    with pytest.raises(HostError):
        save(trace, "/no/such/file")


# ---- the command ----


def simulate(capsys, *argv):
    status = main(["simulate", *map(str, argv)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_policies_side_by_side(tmp_path, capsys):
    path = tmp_path / "t"
    assert simulate(capsys, "--make", "mixed", "--ram", "8M", "--touches", 20000, "--out", path) == (0, "", "")
    own = tmp_path / "own.py"
    own.write_text("from pyvmm.memory.reclaim.policies import Clock\nclass Mine(Clock): pass\n")
    status, out, err = simulate(capsys, path, "--memory", "4M", "--policy", f"clock,{own}:Mine,random", "--json")
    assert (status, err) == (0, "")
    shown = json.loads(out)
    assert (shown["pages"], shown["limit"], shown["touches"]) == (2048, 1024, 20000)
    clock, mine, random, best = shown["policies"]
    assert {**clock, "name": ""} == {**mine, "name": ""}
    assert min(random["read"], clock["read"]) > best["read"] > 0
    assert best["written"] is None
    status, out, err = simulate(capsys, path, "--memory", "4M", "--window", "1000")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[2:7]] == [
        "clock",
        "random",
        "activity",
        "sharing-first",
        "OPT",
    ]
    assert f"{clock['read']:,}" in out


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--memory", "4M"),
        ("--make", "zipf"),
        ("--make", "zipf", "--memory", "1M"),
        ("--make", "zipf", "--memory", "x"),
        ("--make", "zipf", "--memory", "1", "--small"),
        ("--make", "zipf", "--memory", "4M", "--ram", "1T"),
        ("--make", "zipf", "--memory", "4M", "--touches", "0"),
        ("--make", "zipf", "--memory", "4M", "--seed", str(1 << 64)),
        ("--make", "zipf", "--memory", "4M", "--ram", "8M", "--touches", "10", "--window", "0"),
        ("--make", "zipf", "--memory", "4M", "--policy", "best"),
        ("--make", "zipf", "--memory", "4M", "--policy", ""),
        ("/no/such/trace", "--memory", "4M"),
        ("/no/such/trace", "--make", "zipf", "--memory", "4M"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, argv):
    status, out, err = simulate(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("pyvmm: ")
    assert err.count("\n") == 1
