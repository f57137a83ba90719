# test_migration_capture.py: captures of migrations, written, dissected, and damaged.
from __future__ import annotations

import json
import os
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_migration_frames import some

from pyvmm._native import ffi
from pyvmm.cli import main
from pyvmm.errors import BadInput, HostError
from pyvmm.migration import capture, frames
from pyvmm.migration.capture import Recorder, describe, entries
from pyvmm.migration.connection import Connection
from pyvmm.migration.frames import Bytes, Died, End, Hello, Join, Ping, Pong, Welcome, Zeros, encode
from pyvmm.migration.pages import Arrivals, PageChannel
from pyvmm.migration.shape import Shape

SHAPE = Shape(2 << 20, 1, {"vm": 1}, 2_000_000, 4096, codecs=("raw",))
HELLO = Hello(b"i" * 16, b"SECRET!!" * 4, 3, 2, 5, "", SHAPE.encode())


def written(path, sent, limit=capture.DEFAULT_LIMIT):
    """A capture of these frames, alternately out and in."""
    with Recorder(str(path), limit) as recorder:
        for number, frame in enumerate(sent):
            recorder.note(number % 2 == 0, number % 3, encode(frame, number // 2))
    return recorder


def dissected(capsys, *argv):
    status = main(["migration", "dissect", *map(str, argv)])
    said = capsys.readouterr()
    return status, said.out, said.err


@given(st.lists(some(), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_what_is_written_is_read(tmp_path, sent):
    path = tmp_path / "c"
    written(path, sent)
    found = list(entries(str(path)))
    assert [entry.frame for entry in found] == sent
    assert [(entry.out, entry.channel, entry.sequence) for entry in found] == [
        (number % 2 == 0, number % 3, number // 2) for number in range(len(sent))
    ]
    assert [entry.at for entry in found] == sorted(entry.at for entry in found)
    for frame in sent:
        json.dumps(describe(frame))


def test_a_connection_is_captured(tmp_path):
    """Control frames, then the frames of pages without their bytes, at both ends."""
    ram, target = bytearray(b"x" * 4096 * 8), bytearray(4096 * 8)
    ram[4096:8192] = bytes(4096)
    paths = tmp_path / "source", tmp_path / "destination"
    recorders = [Recorder(str(path)) for path in paths]
    ends = []
    for sock, name, recorder in zip(socket.socketpair(), ("there", "here"), recorders, strict=True):
        ends.append(Connection(sock, name))
        ends[-1].recorder, ends[-1].channel = recorder, 3
    ends[0].send(Ping(1))
    ends[1].recv()
    ends[1].send(Pong(1))
    ends[0].recv()
    out = PageChannel(ends[0], ffi.from_buffer("uint8_t[]", ram), 8)
    into = PageChannel(ends[1], ffi.from_buffer("uint8_t[]", target), 8)
    arrivals = Arrivals(8)
    arrivals.begin(1)
    out.send([(0, 3)], 1)
    out.send_end(1, 3)
    assert into.receive(arrivals, 100) == 3
    out.close()
    into.close()
    for recorder in recorders:
        recorder.close()
    runs = [Bytes(0, 1, 1), Zeros(1, 1, 1), Bytes(2, 1, 1), End(3, 0, 1)]
    for path, first in zip(paths, (True, False), strict=True):
        found = list(entries(str(path)))
        assert [entry.frame for entry in found] == [Ping(1), Pong(1), *runs]
        assert [entry.out for entry in found] == [first, not first, *[first] * 4]
        assert {entry.channel for entry in found} == {3}
        assert path.stat().st_size < 1000


def test_garbage_that_came_is_captured_too(tmp_path):
    ours, theirs = socket.socketpair()
    with Recorder(str(tmp_path / "c")) as recorder, Connection(ours, "there") as end, theirs:
        end.recorder = recorder
        wrong = bytearray(encode(Ping(1), 0))
        wrong[-1] ^= 1
        theirs.send(wrong)
        with pytest.raises(frames.ProtocolError, match="there: PING: damaged on its way"):
            end.recv()
    (entry,) = entries(str(tmp_path / "c"))
    assert "PING: damaged on its way" in entry.error


def test_a_capture_is_for_its_user_alone(tmp_path):
    path = tmp_path / "c"
    path.write_bytes(b"x" * 100)
    path.chmod(0o666)
    written(path, [Ping(1)])
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(HostError, match="No such file"):
        Recorder(str(tmp_path / "none" / "c"))


def test_what_does_not_fit_is_left_out(tmp_path):
    recorder = written(tmp_path / "c", [Ping(1)] * 10, limit=16 + 3 * (16 + 32) + 40)
    assert recorder.lost == 7
    assert len(list(entries(str(tmp_path / "c")))) == 3
    recorder.note(True, 0, encode(Ping(1), 0))  # closed: nothing happens
    assert recorder.lost == 8
    recorder.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_no_error_of_the_migration():
    with Recorder("/dev/full") as recorder:
        for _ in range(3):
            recorder.note(True, 0, bytes(1 << 20))
    assert recorder.error == "No space left on device"
    assert recorder.lost


def test_threads_do_not_mix(tmp_path):
    with Recorder(str(tmp_path / "c")) as recorder:
        raw = encode(Ping(7), 0)
        threads = [
            threading.Thread(target=lambda number=number: [recorder.note(True, number, raw) for _ in range(200)])
            for number in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = list(entries(str(tmp_path / "c")))
    assert len(found) == 800
    assert {entry.error for entry in found} == {""}


# ---- dissect ----


def test_dissect_for_people(tmp_path, capsys):
    path = tmp_path / "c"
    written(path, [HELLO, Welcome(5, 2, bytes(32)), Join(bytes(16), b"SECRET!!" * 4, 2, 0), Zeros(0, 512, 1),
                   Died(3, b"SECRET!!" * 4)])  # fmt: skip
    status, out, err = dissected(capsys, path)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 5
    for line, parts in zip(
        lines,
        (
            ("-> 0 #0", "HELLO", "mode=hybrid", "features=postcopy,local", "memory=2097152", "states={vm=1}"),
            ("<- 1 #0", "WELCOME", "channels=2"),
            ("-> 2 #1", "JOIN", "kind=urgent"),
            ("<- 0 #1", "ZEROS", "first=0 count=512 round=1"),
            ("DIED", "decision=given"),
        ),
        strict=True,
    ):
        for part in parts:
            assert part in line
    assert "SECRET" not in out
    assert b"SECRET!!".hex() not in out


def test_dissect_for_programs(tmp_path, capsys):
    path = tmp_path / "c"
    written(path, [HELLO, frames.Have(8, 9, b"\3\1"), frames.Prepare(1, 0, 5, 0xAB), frames.States(9, 0, b"123")])
    status, out, _ = dissected(capsys, path, "--json")
    found = json.loads(out)
    assert (status, found["schema"], found["damaged"]) == (0, 1, 0)
    assert [row["type"] for row in found["frames"]] == ["HELLO", "HAVE", "PREPARE", "STATES"]
    assert found["frames"][0]["fields"]["shape"]["cpus"] == 1
    assert "token" not in found["frames"][0]["fields"]
    assert found["frames"][1] == {
        "at_ns": found["frames"][1]["at_ns"], "direction": "in", "channel": 1, "sequence": 0, "type": "HAVE",
        "fields": {"first": 8, "count": 9, "set": 3},
    }  # fmt: skip
    assert found["frames"][2]["fields"]["checksum"] == "00000000000000ab"
    assert found["frames"][3]["fields"]["data"] == 3
    written(path, [])
    assert json.loads(dissected(capsys, path, "--json")[1])["frames"] == []


def test_a_damaged_frame_is_told_and_the_rest_shown(tmp_path, capsys):
    path = tmp_path / "c"
    written(path, [Ping(1), Ping(2), HELLO])
    raw = bytearray(path.read_bytes())
    raw[16 + 16 + 30] ^= 1
    path.write_bytes(raw)
    status, out, _ = dissected(capsys, path)
    assert status == 2
    assert [("damaged: PING: damaged" in line) for line in out.splitlines()] == [True, False, False]
    status, out, _ = dissected(capsys, path, "--json")
    assert (status, json.loads(out)["damaged"]) == (2, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: b"", "not a capture"),
        (lambda raw: b"\x93PVSNAP\n" + raw[8:], "not a capture"),
        (lambda raw: raw[:15], "not a capture"),
        (lambda raw: raw[:8] + b"\2" + raw[9:], "a capture of version 2"),
        (lambda raw: raw[:-1], "truncated at byte 16"),
        (lambda raw: raw + b"x", "truncated at byte 64"),
        (lambda raw: raw[:24] + b"\2" + raw[25:], "damaged at byte 16"),
        (lambda raw: raw[:28] + b"\xff\xff\xff\xff" + raw[32:], "damaged at byte 16"),
        (lambda raw: raw[:28] + b"\1\0\0\0" + raw[32:], "damaged at byte 16"),
    ],
)
def test_what_is_no_capture(tmp_path, capsys, change, words):
    path = tmp_path / "c"
    written(path, [Ping(1)])
    path.write_bytes(change(path.read_bytes()))
    for options in ((), ("--json",)):
        status, out, err = dissected(capsys, path, *options)
        assert status == 2
        assert words in err
        if options and out:
            assert words in json.loads(out)["error"]
        assert err.count("\n") == 1


def test_files_that_cannot_be_read(tmp_path, capsys):
    for path in (tmp_path / "none", tmp_path):
        assert dissected(capsys, path)[0] == 2


@given(st.binary(max_size=200), st.integers(0, 300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
def test_hostile_captures(tmp_path, tail, keep):
    path = tmp_path / "c"
    written(path, [Ping(1), HELLO])
    path.write_bytes(path.read_bytes()[:keep] + tail)
    try:
        for entry in entries(str(path)):
            assert (entry.frame is None) == bool(entry.error)
    except BadInput:
        return
