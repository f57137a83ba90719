# fuzz_capture.py: the capture of a migration, hostile: `pyvmm migration dissect` reads files that others made.
"""`one_input()`; `repaired()` and `mutate()` for fuzzers."""

from __future__ import annotations

import json
import os
import random

from checks import one_line
from fuzz_frames import repair_frames
from seeds import some_frame

from pyvmm.errors import BadInput
from pyvmm.migration import capture
from pyvmm.migration.capture import describe, entries
from pyvmm.migration.frames import HEAD_SIZE, encode

MAX_SIZE = 16 << 10
_START = capture._FILE.size


def one_input(data: bytes) -> None:
    """Whole entries up to the first damage, which is told in one line; what is shown of them is printable."""
    fd = os.memfd_create("capture")
    try:
        os.write(fd, data)
        again, whole = bytearray(data[:_START]), True
        try:
            for entry in entries(f"/proc/self/fd/{fd}"):
                one_line(entry.error)
                assert (entry.frame is None) == bool(entry.error)
                if entry.frame is None:
                    whole = False
                    continue
                raw = encode(entry.frame, entry.sequence)
                again += capture._ENTRY.pack(entry.at, not entry.out, entry.channel, 0, len(raw)) + raw
                shown = describe(entry.frame)
                json.dumps(shown)
                _printable(shown)
        except BadInput as error:
            one_line(error)
        else:
            assert not whole or again == data
        assert not whole or data.startswith(again), "an entry is not what is in the file"
    finally:
        os.close(fd)


def _printable(value: object) -> None:
    if isinstance(value, str):
        one_line(value, 1100)  # a text of a frame, and what it is
    elif isinstance(value, dict):
        for name, inner in value.items():
            _printable(name)
            _printable(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _printable(inner)


# ---- for fuzzers ----


def repaired(data: bytes) -> bytes:
    """With a right head, and entries whose sizes and frames are right as far as their bodies."""
    return capture._FILE.pack(capture.MAGIC, capture.VERSION, 0) + b"".join(
        _entry(row, frame) for row, frame in _split(data)
    )


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Whole entries come, go, or change places."""
    rows = _split(data)
    at = rng.randrange(len(rows) + 1)
    what = rng.randrange(3)
    if what == 0 or not rows:
        row = capture._ENTRY.pack(rng.getrandbits(64), rng.randrange(2), rng.randrange(256), 0, 0)
        rows.insert(at, (row, encode(some_frame(rng), rng.getrandbits(32))))
    elif what == 1:
        del rows[at : at + 2]
    else:
        rng.shuffle(rows)
    return capture._FILE.pack(capture.MAGIC, capture.VERSION, 0) + b"".join(_entry(*row) for row in rows)


def _split(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at, size = [], _START, capture._ENTRY.size
    while len(data) - at >= size + HEAD_SIZE:
        row = data[at : at + size]
        most = len(data) - at - size
        length = min(max(int.from_bytes(row[-4:], "little"), HEAD_SIZE), most, capture.MAX_FRAME)
        found.append((row, data[at + size : at + size + length]))
        at += size + length
    return found


def _entry(row: bytes, frame: bytes) -> bytes:
    frame = repair_frames(frame, int.from_bytes(frame[12:16], "little"))
    since, inward, channel, _, _ = capture._ENTRY.unpack(row)
    return capture._ENTRY.pack(since, inward & 1, channel, 0, len(frame)) + frame
