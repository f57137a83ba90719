# fuzz_frames.py: the bytes of a connection, hostile, for frames.Decoder and order.Order. 4 bytes of options, then the
# stream: whether the sequence is about to wrap, and a seed for where the stream is cut.
"""`one_input()`; `repaired()` and `mutate()` for fuzzers; `repair_frames()` for whatever else holds frames."""

from __future__ import annotations

import random

from checks import one_line
from seeds import FRAME_KINDS, some_frame

from pyvmm.errors import ProtocolError
from pyvmm.migration.fields import Rest, Text
from pyvmm.migration.frames import BY_TYPE, HEAD_SIZE, MAGIC, VERSION, Decoder, encode
from pyvmm.migration.order import DESTINATION, RESUMABLE, SOURCE, Order
from pyvmm.snapshot.format import checksum

OPTIONS = 4
MAX_SIZE = 16 << 10
WRAPS = (1 << 32) - 2


def one_input(data: bytes) -> None:
    """Cut in any way the stream is the same; what is decoded is encoded alike; both ends agree on what may come."""
    if len(data) < OPTIONS:
        return
    sequence, stream = _sequence(data), data[OPTIONS:]
    rng = random.Random(data[1:OPTIONS])
    frames, error = _decode(stream, [len(stream)], sequence)
    cuts = [rng.choice((1, 3, 23, 24, 25, 40, 700)) for _ in range(len(stream))]
    assert _decode(stream, cuts, sequence) == (frames, error)
    raw = b"".join(encode(frame, sequence + number) for number, frame in enumerate(frames))
    assert stream.startswith(raw), "not the one encoding of what was decoded"
    for frame in frames:
        assert type(frame)(*(getattr(frame, name) for name in frame.FIELDS)) == frame
    one_line(error)
    _orders(frames)


def _sequence(data: bytes) -> int:
    return WRAPS if data[0] & 1 else 0


def _decode(stream: bytes, sizes: list[int], sequence: int) -> tuple[list, str]:
    decoder, found, at = Decoder(sequence=sequence), [], 0
    for size in sizes:
        if at >= len(stream):
            break
        try:
            found.extend(decoder.feed(stream[at : at + size]))  # those before an error are kept
        except ProtocolError as error:
            return found, str(error)
        at += size
        assert decoder.wants > 0
    used = sum(len(encode(frame, 0)) for frame in found)
    assert decoder.between == (used == len(stream))
    return found, ""


def _orders(frames: list) -> None:
    """Each frame from either side, to ends that have heard the same: both take it, or both refuse it unchanged."""
    ends = {SOURCE: Order(SOURCE), DESTINATION: Order(DESTINATION)}
    for frame in frames:
        if "epoch" in frame.FIELDS and "id" in frame.FIELDS:
            phase = RESUMABLE[frame.epoch % 2]
            if len({_refusal(end.resumed, phase) == "" for end in ends.values()}) > 1:
                return  # the ends are apart for good: phase `ready` is none that a running guest goes back to
        for sender, other in ((SOURCE, DESTINATION), (DESTINATION, SOURCE)):
            before = [end.phase for end in ends.values()]
            sent = _refusal(ends[sender].sent, frame)
            deaf = ends[other].cancelled
            came = _refusal(ends[other].came, frame)
            assert deaf or (sent == "") == (came == ""), (frame, sent, came)
            after = [end.phase for end in ends.values()]
            assert sent == "" or after == before, "what was refused has changed something"
            assert len(set(after)) == 1, after


def _refusal(call: object, argument: object) -> str:
    try:
        call(argument)
    except ProtocolError as error:
        one_line(error)
        return str(error)
    return ""


# ---- for fuzzers ----


def repaired(data: bytes) -> bytes:
    """The same with headers and checksums that are right, so that bodies are looked at."""
    data = data.ljust(OPTIONS, b"\0")
    return data[:OPTIONS] + repair_frames(data[OPTIONS:], _sequence(data))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Whole frames come, go, come twice or change places."""
    data = data.ljust(OPTIONS, b"\0")
    frames = list(_split(data[OPTIONS:]))
    at = rng.randrange(len(frames) + 1)
    what = rng.randrange(4)
    if what == 0 or not frames:
        frames[at:at] = [encode(some_frame(rng), 0) for _ in range(rng.randint(1, 3))]
    elif what == 1:
        del frames[at : at + rng.randint(1, 3)]
    elif what == 2:
        frames[at:at] = frames[: rng.randint(1, 4)]
    else:
        rng.shuffle(frames)
    return repaired(data[:OPTIONS] + b"".join(frames))


def _split(stream: bytes) -> list[bytes]:
    """In frames, as their lengths say as far as they can be; what is left may be half a one."""
    found, at = [], 0
    while at < len(stream):
        size = len(stream) - at
        if size >= HEAD_SIZE:
            size = min(size, HEAD_SIZE + _length(_kind(stream[at + 5]), stream[at + 8 : at + 12]))
        found.append(stream[at : at + size])
        at += size
    return found


def _kind(number: int) -> type:
    return BY_TYPE.get(number) or FRAME_KINDS[number % len(FRAME_KINDS)]


def _length(kind: type, told: bytes) -> int:
    """Of the body: what is told, where a frame of that kind may have several."""
    varies = any(isinstance(field, (Text, Rest)) for field in kind.FIELDS.values())
    return min(int.from_bytes(told, "little"), kind.most()) if varies else kind.most()


def repair_frames(stream: bytes, sequence: int) -> bytes:
    """Frames that are right but for their bodies."""
    out = bytearray()
    for number, frame in enumerate(_split(stream)):
        if len(frame) < HEAD_SIZE:
            out += frame
            break
        raw = bytearray(frame)
        raw[:6] = MAGIC + bytes((VERSION, _kind(frame[5]).TYPE))
        raw[6:8] = bytes((frame[6] if frame[6] == 1 else 0, 0))  # a flag may stay
        raw[8:12] = (len(frame) - HEAD_SIZE).to_bytes(4, "little")
        raw[12:16] = (sequence + number & 0xFFFF_FFFF).to_bytes(4, "little")
        raw[16:24] = bytes(8)
        raw[16:24] = checksum(raw).to_bytes(8, "little")
        out += raw
    return bytes(out)
