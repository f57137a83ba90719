# test_migration_frames.py: frames there and back, however the stream is cut; and everything that is none.
from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ProtocolError
from pyvmm.migration import frames
from pyvmm.migration.frames import (
    BY_TYPE,
    CONTROL,
    HEAD_SIZE,
    MAX_BITS,
    MAX_BLOCKS,
    MAX_PAGES,
    MAX_PIECE,
    MAX_RUN,
    RUN_SIZE,
    RUNS,
    Decoder,
    Fixed,
    Number,
    Rest,
    Text,
    encode,
)
from pyvmm.snapshot.format import checksum

DOCUMENT = (Path(__file__).parents[2] / "docs/migration-protocol.md").read_text()
KINDS = (*CONTROL, *RUNS)


def of_kind(kind):
    if isinstance(kind, Number):
        return st.integers(kind.low, kind.high) | st.sampled_from([kind.low, kind.high])
    if isinstance(kind, Fixed):
        return st.binary(min_size=kind.size, max_size=kind.size)
    if isinstance(kind, Text):
        return st.text(max_size=40).map(lambda text: "".join(c for c in text if c.isprintable()))
    assert isinstance(kind, Rest)
    return st.binary(min_size=kind.low, max_size=100)


@st.composite
def some(draw, kinds=KINDS):
    kind = draw(st.sampled_from(kinds))
    fields = {name: draw(of_kind(each)) for name, each in kind.FIELDS.items()}
    if "bits" in fields:
        fields["count"] = draw(st.integers(1, 300))
        fields["first"] %= kind.LIMIT - 300
        fields["bits"] = draw(st.integers(0, (1 << fields["count"]) - 1)).to_bytes(-(-fields["count"] // 8), "little")
    elif kind is frames.End:
        fields["count"] = 0
    elif kind in RUNS:
        fields["first"] %= MAX_PAGES
        room = MAX_PAGES - fields["first"]
        if kind.MOST == MAX_RUN:
            room = MAX_RUN - fields["first"] % MAX_RUN
        fields["count"] = fields["count"] % room + 1
    elif kind is frames.States:
        fields["offset"] = fields["offset"] % (kind.FIELDS["offset"].high - 100)
        fields["total"] = fields["offset"] + len(fields["data"]) + draw(st.integers(0, 50))
    return kind(**fields)


def decoded(raw, **options):
    decoder = Decoder(**options)
    found = list(decoder.feed(raw))
    assert decoder.between
    return found


def sealed(raw):
    """With the checksum that it should have."""
    raw = bytearray(raw)
    raw[16:24] = bytes(8)
    raw[16:24] = checksum(raw).to_bytes(8, "little")
    return bytes(raw)


def test_each_frame_has_a_type_of_its_own_and_is_in_the_document():
    assert len(BY_TYPE) == len(KINDS)
    told = {int(number): name for number, name in re.findall(r"(\d+) ([A-Z_]{3,})(?= \||,)", DOCUMENT)}
    assert told == {number: kind.name() for number, kind in BY_TYPE.items()}


def test_fields_are_in_the_document():
    for kind in CONTROL:
        row = next(line for line in DOCUMENT.splitlines() if re.search(rf"\b{kind.TYPE} {kind.name()}\b", line))
        names = [part.split()[0] for part in row.split("|")[3].split(",") if part.strip()]
        assert names == list(kind.FIELDS), kind


@given(some(), st.integers(0, (1 << 32) - 1))
def test_there_and_back(frame, sequence):
    raw = encode(frame, sequence)
    assert decoded(raw, sequence=sequence) == [frame]
    assert len(raw) <= HEAD_SIZE + frame.most()
    if type(frame) in RUNS:
        assert len(raw) == RUN_SIZE


@given(
    st.lists(some(), max_size=6), st.lists(st.integers(0, 400), max_size=40), st.integers((1 << 32) - 4, (1 << 32) - 1)
)
def test_however_the_stream_is_cut(sent, cuts, sequence):
    raw = b"".join(encode(frame, sequence + number) for number, frame in enumerate(sent))
    decoder, came, at = Decoder(sequence=sequence), [], 0
    for cut in [*cuts, len(raw)]:
        came += decoder.feed(raw[at : at + cut])
        at += cut
    came += decoder.feed(raw[at:])
    assert came == sent
    assert decoder.between
    assert decoder.wants == HEAD_SIZE


@given(some())
def test_a_reader_that_takes_what_is_wanted_never_takes_more(frame):
    raw, decoder, at = encode(frame, 0) + encode(frame, 1), Decoder(), 0
    came = []
    while not came:
        wants = decoder.wants
        assert wants > 0
        came += decoder.feed(raw[at : at + wants])
        at += wants
    assert came == [frame]
    assert at * 2 == len(raw)


@given(some())
@settings(max_examples=40)
def test_each_truncation_is_not_a_frame(frame):
    raw = encode(frame, 7)
    for size in range(len(raw)):
        decoder = Decoder(sequence=7)
        assert list(decoder.feed(raw[:size])) == []
        assert decoder.between == (size == 0)


@given(some(), st.integers(1, 255))
@settings(max_examples=25)
def test_each_changed_byte_is_seen(frame, change):
    raw = encode(frame, 7)
    for at in range(len(raw)):
        wrong = bytearray(raw)
        wrong[at] ^= change
        try:
            # a longer length leaves the frame unfinished: so something follows
            found = list(Decoder(sequence=7).feed(wrong + bytes(frame.most())))
        except ProtocolError:
            continue
        assert found == []
        assert 8 <= at < 12  # the length, whose body has not come


@given(some(), st.data())
def test_what_is_sealed_wrongly_is_decoded_strictly(frame, data):
    """Whatever is accepted is exactly what would have been sent: there is one encoding for each frame."""
    raw = bytearray(encode(frame, 0))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(4, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw[8:12] = (len(raw) - HEAD_SIZE).to_bytes(4, "little")
    raw = sealed(raw)
    try:
        (found,) = Decoder().feed(raw)
    except ProtocolError:
        return
    assert encode(found, 0) == raw


@given(st.binary(max_size=300), st.booleans(), st.sampled_from(sorted(BY_TYPE)))
def test_random_bytes(raw, framed, number):
    if framed:
        raw = sealed(frames._HEAD.pack(frames.MAGIC, 1, number, 0, len(raw), 0, 0) + raw)
    try:
        found = list(Decoder().feed(raw))
    except ProtocolError:
        return
    assert len(found) <= 1


HEAD = frames._HEAD.pack(frames.MAGIC, 1, 18, 0, 8, 0, 0)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"GET / HTTP/1.1", "not a frame"),
        (b"\x93PVSNAP\n", "not a frame"),
        (frames.MAGIC + b"\x02", "speaks protocol version 2, and this pyvmm version 1"),
        (frames.MAGIC + b"\x01\xff", "type 255"),
        (frames._HEAD.pack(frames.MAGIC, 1, 18, 4, 8, 0, 0), "flags 0x4"),
        (frames._HEAD.pack(frames.MAGIC, 1, 18, 0, 9, 0, 0), "PING: a body of 9 bytes, 8 at most"),
        (frames._HEAD.pack(frames.MAGIC, 1, 10, 0, (1 << 32) - 1, 0, 0), "STATES: a body of 4294967295 bytes"),
        (frames._HEAD.pack(frames.MAGIC, 1, 18, 0, 8, 3, 0), "frame 3 comes where 0 should"),
        (HEAD + bytes(8), "checksum is wrong"),
        (sealed(frames._HEAD.pack(frames.MAGIC, 1, 18, 0, 7, 0, 0) + bytes(7)), "PING: number: the body is too short"),
        (sealed(frames._HEAD.pack(frames.MAGIC, 1, 3, 0, 3, 0, 0) + b"\0\0x"), "REFUSE: 1 bytes too many"),
        (sealed(frames._HEAD.pack(frames.MAGIC, 1, 3, 0, 3, 0, 0) + b"\1\0\n"), "not printable"),
        (sealed(frames._HEAD.pack(frames.MAGIC, 1, 3, 0, 3, 0, 0) + b"\1\0\xff"), "utf-8"),
        (sealed(frames._HEAD.pack(frames.MAGIC, 1, 3, 0, 3, 0, 0) + b"\2\0x"), "longer than it can be"),
    ],
)
def test_what_is_refused_is_named(raw, words):
    with pytest.raises(ProtocolError, match=re.escape(words)):
        list(Decoder().feed(raw))


def test_a_wrong_header_is_refused_before_the_rest_has_come():
    for raw in (b"X", frames.MAGIC + b"\x07", frames.MAGIC + b"\x01\x63"):
        with pytest.raises(ProtocolError):
            list(Decoder().feed(raw))


def test_types_that_cannot_come_here():
    with pytest.raises(ProtocolError, match="BYTES cannot come here"):
        list(Decoder(CONTROL).feed(encode(frames.Bytes(0, 1, 0), 0)))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (frames.Bytes, (0, 0, 1)),
        (frames.Bytes, (0, MAX_RUN + 1, 1)),
        (frames.Bytes, (MAX_RUN - 1, 2, 1)),
        (frames.Pull, (5, MAX_RUN, 1)),
        (frames.Request, (MAX_PAGES, 1, 0)),
        (frames.Zeros, (MAX_PAGES - 1, 2, 1)),
        (frames.End, (0, 1, 1)),
        (frames.Round, (0, 5)),
        (frames.Large, (MAX_BLOCKS - 8, 9, b"\0\0")),
        (frames.Have, (0, 9, b"\0\2")),
        (frames.Have, (0, 9, b"\0")),
        (frames.Have, (0, 8, b"\0\0")),
        (frames.States, (10, 4, b"1234567")),
        (frames.Welcome, (0, 9, bytes(32))),
        (frames.Welcome, (0, True, bytes(32))),
        (frames.Died, (7, bytes(32))),
        (frames.Cancel, ("two\nlines",)),
        (frames.Cancel, ("x" * 1025,)),
        (frames.Cancel, (b"bytes",)),
        (frames.Join, (bytes(15), bytes(32), 1, 0)),
    ],
)
def test_what_cannot_be_sent(kind, fields):
    with pytest.raises(ProtocolError, match=f"^{kind.name()}: "):
        kind(*fields)


def test_a_frame_takes_its_fields_and_no_others():
    for arguments in ((1,), (1, 2, 3)):
        with pytest.raises(TypeError):
            frames.Round(*arguments)
    with pytest.raises(TypeError):
        frames.Ping(numbr=1)


def test_the_largest_of_each_fits():
    for frame in (
        frames.States(MAX_PIECE, 0, bytes(MAX_PIECE)),
        frames.Have(0, MAX_BITS * 8, b"\xff" * MAX_BITS),
        frames.Zeros(0, MAX_PAGES, 1),
        frames.Cancel("ü" * 512),
    ):
        assert decoded(encode(frame, 0)) == [frame]


def test_hostile_headers_take_no_memory():
    tracemalloc.start()
    try:
        for number in BY_TYPE:
            decoder = Decoder()
            for length in (0xFFFF_FFFF, BY_TYPE[number].most() + 1):
                with pytest.raises(ProtocolError):
                    list(decoder.feed(frames._HEAD.pack(frames.MAGIC, 1, number, 0, length, 0, 0)))
        decoder = Decoder()
        list(decoder.feed(frames._HEAD.pack(frames.MAGIC, 1, 10, 0, MAX_PIECE, 0, 0) + b"x"))
        assert tracemalloc.get_traced_memory()[1] < 100_000  # what is announced is not set aside
    finally:
        tracemalloc.stop()
