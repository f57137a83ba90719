# fuzz_destination.py: all that a destination hears from WELCOME to PREPARE, hostile: its control connection and two
# pages channels, for machine/migrating/filling.py and what lies below it. 8 bytes of options, then the three streams:
# the mode, the bytes of the first two streams (u16), large or small pages. Frames of pages come without the
# pages, which are made here.
"""`one_input()`; `repaired()` and `mutate()` for fuzzers."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import Counter
from contextlib import ExitStack, suppress
from types import SimpleNamespace

from checks import one_line
from fuzz_frames import _split, repair_frames
from seeds import some_frame

from pyvmm.errors import MigrationError, PeerGone, ProtocolError
from pyvmm.layout import PAGE_SIZE, Gpa
from pyvmm.machine.migrating.filling import Filling
from pyvmm.memory.space import GuestMemory
from pyvmm.migration import frames
from pyvmm.migration.connection import Connection
from pyvmm.migration.control import Cancelled
from pyvmm.migration.events import Report
from pyvmm.migration.frames import MODES, Bytes, Decoder, Hello, Welcome, encode
from pyvmm.migration.opening import Terms
from pyvmm.migration.order import DESTINATION, Order
from pyvmm.migration.pages import PageChannel

OPTIONS = 8
MAX_SIZE = 8 << 10
RAM = 2 << 20
PAGES = RAM // PAGE_SIZE
CHANNELS = 2
MOST_BYTES = 4 << 20
"""Of pages that are made for an input."""
_STREAMS = 1 + CHANNELS
_NAMES = tuple(MODES)


class Heard:
    """A Control without its thread, so that the same input does the same: what came stands in the socket."""

    def __init__(self, connection: Connection, mode: str) -> None:
        self.connection = connection
        self.peer = "the source"
        self.order = Order(DESTINATION)
        self.order.came(Hello(bytes(16), bytes(32), MODES[mode], CHANNELS, 7, "", b"x"))
        self.order.sent(Welcome(7, CHANNELS, bytes(32)))
        self.said: list[frames.Frame] = []

    def check(self) -> None:
        """Nothing has gone wrong that was not raised."""

    def send(self, frame: frames.Frame) -> None:
        """Where the other side would read it."""
        self.order.sent(frame)
        self.said.append(frame)

    def next(self) -> frames.Frame:
        """As Control.next()."""
        while True:
            frame = self.connection.recv(5.0)
            self.order.came(frame)
            if isinstance(frame, frames.Cancel):
                raise Cancelled(f"{self.peer} says: {frame.reason}")
            if not isinstance(frame, frames.Ping):
                return frame


def one_input(data: bytes) -> None:
    """It ends with what a migration may end with, or RAM is what the frames say; and no thread is left."""
    if len(data) < OPTIONS:
        return
    mode, streams = _parts(data)
    before = threading.active_count()
    memory = GuestMemory(RAM, "2m" if data[5] & 1 else "4k")
    try:
        with ExitStack() as stack:
            connections = [_connection(stack, _with_pages(stream) if n else stream) for n, stream in enumerate(streams)]
            control = Heard(connections[0], mode)
            terms = Terms(bytes(16), bytes(32), bytes(32), mode, CHANNELS, 3)  # without local: nobody is read
            filling = Filling(SimpleNamespace(memory=memory), control, terms)
            filling.pages = [PageChannel(each, memory.base, PAGES, timeout=5.0) for each in connections[1:]]
            try:
                away = filling.receive(Report("destination", mode, "unix", CHANNELS, RAM))
            except MigrationError as error:
                one_line(error)
                waits = isinstance(error, PeerGone) and "stalled" in str(error)
            else:
                waits = False
                _judge(memory, filling, away, mode, streams)
            if waits:
                raise AssertionError("it waits, and all has come that will")
        assert threading.active_count() == before
    finally:
        memory.close()


def _parts(data: bytes) -> tuple[str, list[bytes]]:
    first, second = struct.unpack_from("<HH", data, 1)
    body = data[OPTIONS:]
    return _NAMES[data[0] % len(_NAMES)], [body[:first], body[first : first + second], body[first + second :]]


def _joined(data: bytes, mode: str, streams: list[bytes]) -> bytes:
    head = struct.pack("<BHH", _NAMES.index(mode), len(streams[0]) & 0xFFFF, len(streams[1]) & 0xFFFF)
    return head + data[len(head) : OPTIONS] + b"".join(streams)


def _connection(stack: ExitStack, data: bytes) -> Connection:
    """Its other side has sent that, and sends no more."""
    ours, theirs = socket.socketpair()
    stack.callback(theirs.close)
    connection = stack.enter_context(Connection(ours, "the source"))

    def feed() -> None:
        with suppress(OSError):  # nobody reads any more
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)

    if len(data) < 64 << 10:
        feed()
        return connection
    thread = threading.Thread(target=feed)
    thread.start()
    stack.callback(thread.join)
    stack.callback(connection.end)
    return connection


def _runs(stream: bytes) -> list[frames.Frame]:
    decoder, found = Decoder(frames.RUNS), []
    with suppress(ProtocolError):
        found.extend(decoder.feed(stream))
    return found


def _with_pages(stream: bytes) -> bytes:
    """Behind each frame of bytes its pages, as far as frames go that can be read."""
    out, at, room = bytearray(), 0, MOST_BYTES
    for number, frame in enumerate(_runs(stream)):
        raw = encode(frame, number)
        out += raw
        at += len(raw)
        if isinstance(frame, Bytes) and not isinstance(frame, frames.Pull):
            if frame.count * PAGE_SIZE > room:
                return bytes(out)
            room -= frame.count * PAGE_SIZE
            out += b"".join(_page(frame, page) for page in range(frame.count))
    return bytes(out) + stream[at:]


def _page(frame: Bytes, index: int) -> bytes:
    """What that page has, of that frame: all pages of all rounds differ."""
    return struct.pack("<QQ", frame.first + index + 1, frame.round) * (PAGE_SIZE // 16)


def _judge(memory: GuestMemory, filling: Filling, away: int | None, mode: str, streams: list[bytes]) -> None:
    """Each page is here, as the last round that had it says; or away."""
    gone = filling.away.count() if filling.away is not None else PAGES if mode == "postcopy" else 0
    assert (away or 0) == gone
    right: dict[int, bytes] = {}
    waiting = [iter(_runs(stream)) for stream in streams[1:]]
    for _ in (said for said in filling._control.said if isinstance(said, frames.RoundDone)):
        for channel in waiting:
            for frame in channel:
                if isinstance(frame, frames.End):
                    break
                for index in range(frame.count):
                    zeros = isinstance(frame, frames.Zeros)
                    right[frame.first + index] = bytes(PAGE_SIZE) if zeros else _page(frame, index)
    if mode == "precopy":
        assert right.keys() == set(range(PAGES))
    ram = memory.read(Gpa(0), RAM)
    for page in range(PAGES):
        content = right.get(page, bytes(PAGE_SIZE))
        assert ram[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] == content, page


# ---- for fuzzers ----


def repaired(data: bytes) -> bytes:
    """The same with headers and checksums that are right."""
    data = data.ljust(OPTIONS, b"\0")
    mode, streams = _parts(data)
    return _joined(data, mode, [repair_frames(stream, 0) for stream in streams])


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Frames of one stream come, go, come twice or change places; the numbers of pages may agree with that."""
    data = data.ljust(OPTIONS, b"\0")
    mode, streams = _parts(data)
    which = rng.randrange(_STREAMS)
    parts = list(_split(streams[which]))
    at, what = rng.randrange(len(parts) + 1), rng.randrange(4)
    if what == 0 or not parts:
        kinds = frames.RUNS if which else frames.CONTROL
        parts[at:at] = [encode(some_frame(rng, rng.choice(kinds)), 0)]
    elif what == 1:
        del parts[at : at + 1]
    elif what == 2:
        parts[at:at] = parts[max(0, at - 2) : at]
    else:
        other = rng.randrange(len(parts))
        at = min(at, len(parts) - 1)
        parts[at], parts[other] = parts[other], parts[at]
    streams[which] = b"".join(parts)
    if rng.random() < 0.5:
        streams = _agreeing([repair_frames(stream, 0) for stream in streams])
    return repaired(_joined(data, mode, streams))


def _agreeing(streams: list[bytes]) -> list[bytes]:
    """END and ROUND tell as many pages as come."""
    rounds: Counter[int] = Counter()
    told = []
    for stream in streams[1:]:
        pages, frame_list = 0, _runs(stream)
        for number, frame in enumerate(frame_list):
            if isinstance(frame, frames.End):
                frame_list[number] = frames.End(pages, 0, frame.round)
                rounds[frame.round] += pages
                pages = 0
            else:
                pages += frame.count
        told.append(b"".join(encode(frame, 0) for frame in frame_list))
    control: list[frames.Frame] = []
    with suppress(ProtocolError):
        control.extend(Decoder(frames.CONTROL).feed(streams[0]))
    for number, frame in enumerate(control):
        if type(frame) is frames.Round:
            control[number] = frames.Round(frame.round, rounds[frame.round])
    return [b"".join(encode(frame, 0) for frame in control), *told]
