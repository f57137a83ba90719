# test_migration_stream.py: page runs by C over sockets: what arrives, what is refused, how connections fail.
from __future__ import annotations

import errno
import os
import random
import signal
import socket
import threading
from contextlib import contextmanager
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm._native import ffi, lib
from pyvmm.errors import PeerGone, ProtocolError
from pyvmm.migration import frames
from pyvmm.migration.connection import Connection
from pyvmm.migration.frames import Bytes, Decoder, End, Ping, Pull, Request, Zeros, encode
from pyvmm.migration.pages import Arrivals, PageChannel

PAGE = 4096
PAGES = 1100  # two whole blocks, and a piece of a third
ALL = 0x1F
SECOND = 1_000_000_000


class Ram:
    """Memory with a guard before and behind it."""

    GUARD = 64 * PAGE

    def __init__(self, fill=0, pages=PAGES):
        self.raw = bytearray(b"\xa5" * self.GUARD + bytes([fill]) * (pages * PAGE) + b"\xa5" * self.GUARD)
        self.base = ffi.from_buffer("uint8_t[]", self.raw)
        self.at = self.base + self.GUARD

    @property
    def bytes(self):
        return bytes(self.raw[self.GUARD : -self.GUARD])

    @property
    def guarded(self):
        return self.raw[: self.GUARD] == self.raw[-self.GUARD :] == b"\xa5" * self.GUARD

    def part(self, first, count):
        return self.raw[self.GUARD + first * PAGE : self.GUARD + (first + count) * PAGE]

    def write(self, page, data):
        self.raw[self.GUARD + page * PAGE : self.GUARD + page * PAGE + len(data)] = data


def stream_of(sock, timeout=5.0, waits=False):
    stream = ffi.new("struct pv_stream *")
    stream.fd, stream.timeout_ns = sock.fileno(), int(timeout * SECOND)
    if waits:
        assert lib.pv_stream_wait(stream) == 0
    return stream


@contextmanager
def pair(blocking=False, room=None):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for sock in (ours, theirs):
            sock.setblocking(blocking)
            if room:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        yield ours, theirs


def runs_of(*runs):
    return ffi.new("struct pv_run_pages[]", list(runs)), len(runs)


def in_thread(call):
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


@cache
def some_ram(seed, zeros=0.3, pages=PAGES):
    rng, ram = random.Random(seed), Ram(pages=pages)
    for page in range(pages):
        if rng.random() >= zeros:
            ram.write(page, rng.randbytes(8) * 512 if rng.random() < 0.9 else bytes(4095) + b"\1")
    return ram


def move(source, target, runs, zeros=True, blocking=False, room=None, arrivals=None, limit=1 << 20, waits=False):
    """Sends runs as round 1: the streams of both ends."""
    arrivals = arrivals or Arrivals(PAGES)
    arrivals.begin(1)
    with pair(blocking, room) as (out, into):
        sending, receiving = stream_of(out, waits=waits), stream_of(into, waits=waits)
        end = ffi.new("struct pv_run_frame *")

        def receive():
            while not (result := lib.pv_recv_runs(receiving, target.at, PAGES, arrivals.cdata, limit, end)):
                pass
            return result

        thread, results = in_thread(receive)
        table, count = runs_of(*runs)
        sent = lib.pv_send_runs(sending, source.at, PAGES, table, count, 1, zeros)
        sent = sent or lib.pv_send_frame(sending, lib.PV_FRAME_END, sum(n for _, n in runs), 0, 1)
        thread.join()
    assert (sent, results) == (0, [lib.PV_RECV_END])
    assert end.first == sum(n for _, n in runs)
    return sending, receiving


@st.composite
def disjoint_runs(draw):
    ends = sorted(draw(st.sets(st.integers(0, PAGES), min_size=2, max_size=16)))
    return [(a, b - a) for a, b in zip(ends[::2], ends[1::2], strict=False)]


@given(
    disjoint_runs(),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(["", "blocks", "waits"]),
    st.sampled_from([None, 4608, 100_000]),
)
@settings(max_examples=25, deadline=None)
def test_what_is_sent_arrives_and_nothing_else(runs, seed, zeros, how, room):
    source, target = some_ram(seed), Ram(fill=0x77)  # not changed here: one for each seed
    arrivals = Arrivals(PAGES)
    before = target.bytes
    sending, receiving = move(source, target, runs, zeros, how == "blocks", room, arrivals, 100, how == "waits")
    expected = bytearray(before)
    for first, count in runs:
        expected[first * PAGE : (first + count) * PAGE] = source.part(first, count)
    assert target.bytes == expected
    assert target.guarded
    pages = sum(count for _, count in runs)
    assert arrivals.count() == pages == receiving.bytes_pages + receiving.zero_pages
    assert (sending.bytes_pages, sending.zero_pages) == (receiving.bytes_pages, receiving.zero_pages)
    assert sending.wire_bytes == receiving.wire_bytes == sending.bytes_pages * PAGE + sending.runs * 40
    kept = source.bytes
    empty = sum(kept[p * PAGE : (p + 1) * PAGE] == bytes(PAGE) for f, n in runs for p in range(f, f + n))
    assert sending.zero_pages == (empty if zeros else 0)


def test_frames_are_those_of_the_protocol():
    ram = Ram()
    for page in (*range(510, 514), 600):
        ram.write(page, b"x")
    with pair() as (out, into):
        sending = stream_of(out)
        sending.sending = 0xFFFF_FFFE
        table, count = runs_of((500, 101), (1000, 100))
        assert lib.pv_send_runs(sending, ram.at, PAGES, table, count, 9, True) == 0
        for kind in (lib.PV_FRAME_PULL, lib.PV_FRAME_REQUEST):
            assert lib.pv_send_frame(sending, kind, 3, 4, 0) == 0
        assert lib.pv_send_frame(sending, lib.PV_FRAME_END, 201, 0, 9) == 0
        raw = into.recv(1 << 20)
    decoder, came = Decoder(sequence=0xFFFF_FFFE), []
    while raw:
        came += decoder.feed(raw[:40])
        raw = raw[40:]
        if isinstance(came[-1], Bytes) and not isinstance(came[-1], (Pull, Request)):
            size = came[-1].count * PAGE
            assert raw[:size] == ram.bytes[came[-1].first * PAGE :][:size]
            raw = raw[size:]
    assert came == [
        Zeros(500, 10, 9), Bytes(510, 2, 9), Bytes(512, 2, 9), Zeros(514, 86, 9), Bytes(600, 1, 9),
        Zeros(1000, 100, 9), Pull(3, 4, 0), Request(3, 4, 0), End(201, 0, 9),
    ]  # fmt: skip


def test_zeros_are_stored_where_something_is_or_the_block_is_large():
    """T1: in a block that is large at the source zeros are stored; elsewhere fresh memory is left untouched."""
    source, target = Ram(), Ram(fill=0x77)  # 0x77 stands for memory that nobody has touched
    source.write(700, b"x" * PAGE)
    arrivals = Arrivals(PAGES, large=(0b001).to_bytes(8, "little"))
    move(source, target, [(0, 1100)], arrivals=arrivals)
    assert target.bytes[: 512 * PAGE] == bytes(512 * PAGE)
    assert target.bytes[512 * PAGE : 700 * PAGE] == b"\x77" * (188 * PAGE)
    assert target.bytes[700 * PAGE : 701 * PAGE] == b"x" * PAGE
    source.write(700, bytes(PAGE))
    move(source, target, [(512, 588)], arrivals=arrivals)
    assert target.bytes[700 * PAGE : 701 * PAGE] == bytes(PAGE)  # it held something
    assert target.bytes[701 * PAGE :] == b"\x77" * (399 * PAGE)


@pytest.mark.parametrize(
    "runs",
    [[(0, 0)], [(PAGES, 1)], [(PAGES - 1, 2)], [(0, 1), (5, (1 << 64) - 1)], [((1 << 64) - 1, 1)], [(1, 1 << 63)]],
)
def test_runs_outside_memory_are_not_sent(runs):
    with pair() as (out, into):
        table, count = runs_of(*runs)
        assert lib.pv_send_runs(stream_of(out), Ram().at, PAGES, table, count, 1, True) == -errno.EINVAL
        with pytest.raises(BlockingIOError):
            into.recv(1)
        assert lib.pv_send_frame(stream_of(out), lib.PV_FRAME_BYTES, 0, 1, 1) == -errno.EINVAL
        first, count = runs[-1]
        if count < 1 << 32:
            assert lib.pv_recv_run(stream_of(into), Ram().at, PAGES, first, count) == -errno.EINVAL


def received(raw, types=ALL, sequence=0, pages=PAGES):
    with pair() as (out, into):
        out.sendall(raw)
        stream = stream_of(into, 0.002)  # all that will come is there
        stream.receiving = sequence
        frame = ffi.new("struct pv_run_frame *")
        return lib.pv_recv_frame(stream, pages, types, frame), stream.fault


def forged(kind=64, first=0, count=1, round=1, sequence=0, version=1, flags=0, length=16, magic=frames.MAGIC):
    body = first.to_bytes(8, "little") + count.to_bytes(4, "little") + round.to_bytes(4, "little")
    raw = frames._HEAD.pack(magic, version, kind, flags, length, sequence, 0) + body
    return raw[:16] + frames.checksum(raw).to_bytes(8, "little") + raw[24:]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({}, "NONE"),
        ({"kind": 65, "count": PAGES}, "NONE"),
        ({"kind": 67, "count": 0, "first": PAGES}, "NONE"),
        ({"magic": b"\x93PVN"}, "MAGIC"),
        ({"version": 2}, "VERSION"),
        ({"kind": 63}, "TYPE"),
        ({"kind": 69}, "TYPE"),
        ({"kind": 255}, "TYPE"),
        ({"kind": 0}, "TYPE"),
        ({"flags": 1}, "FLAGS"),
        ({"length": 15}, "LENGTH"),
        ({"length": 0xFFFF_FFFF}, "LENGTH"),
        ({"sequence": 1}, "SEQUENCE"),
        ({"count": 0}, "RANGE"),
        ({"first": PAGES}, "RANGE"),
        ({"first": PAGES - 1, "count": 2}, "RANGE"),
        ({"first": (1 << 64) - 1, "count": 1}, "RANGE"),
        ({"first": (1 << 64) - 1, "count": 2}, "RANGE"),
        ({"kind": 65, "first": 1, "count": PAGES}, "RANGE"),
        ({"kind": 65, "count": 0xFFFF_FFFF}, "RANGE"),
        ({"first": 511, "count": 2}, "RANGE"),
        ({"kind": 66, "count": 513}, "RANGE"),
        ({"kind": 67, "count": 1}, "RANGE"),
        ({"kind": 67, "count": 0, "first": PAGES + 1}, "RANGE"),
    ],
)
def test_hostile_frames(fields, fault):
    number = getattr(lib, f"PV_FAULT_{fault}")
    assert received(forged(**fields)) == (-errno.EBADMSG if number else 0, number)


def test_each_changed_byte_of_a_frame():
    raw = forged()
    for at in range(40):
        wrong = bytearray(raw)
        wrong[at] ^= 0x40
        assert received(bytes(wrong))[0] == -errno.EBADMSG
    assert received(raw, types=ALL & ~1)[1] == lib.PV_FAULT_TYPE
    for size in range(40):
        assert received(raw[:size])[0] == -errno.ETIMEDOUT


@given(st.binary(max_size=60))
@settings(max_examples=50, deadline=None)
def test_c_and_python_refuse_alike(tail):
    raw = (forged()[: 40 - len(tail)] + tail)[:40]
    try:
        found = len(list(Decoder(frames.RUNS).feed(raw)))
    except ProtocolError:
        found = 0
    assert (received(raw)[0] == 0) == (found == 1)


def round_of(raw, **known):
    """What one round of such bytes does to a target: (result, fault, target)."""
    target, arrivals = Ram(fill=0x77), Arrivals(PAGES)
    arrivals.begin(1)
    with pair() as (out, into):
        out.sendall(raw)
        out.shutdown(socket.SHUT_WR)
        stream = stream_of(into, 1)
        end = ffi.new("struct pv_run_frame *")
        result = lib.pv_recv_runs(stream, target.at, PAGES, arrivals.cdata, 1 << 20, end)
    assert target.guarded
    return result, stream.fault, target


def test_rounds_keep_their_rules():
    page = bytes(PAGE)
    twice = forged() + page + forged(sequence=1) + page
    assert round_of(twice)[:2] == (-errno.EBADMSG, lib.PV_FAULT_TWICE)
    overlap = forged(65, 60, 70) + forged(65, 129, 1, sequence=1)
    assert round_of(overlap)[:2] == (-errno.EBADMSG, lib.PV_FAULT_TWICE)
    assert round_of(forged(round=2) + page)[:2] == (-errno.EBADMSG, lib.PV_FAULT_ROUND)
    assert round_of(forged(67, 0, 0, round=2))[:2] == (-errno.EBADMSG, lib.PV_FAULT_ROUND)
    assert round_of(forged(66))[:2] == (-errno.EBADMSG, lib.PV_FAULT_TYPE)
    assert round_of(forged(68))[:2] == (-errno.EBADMSG, lib.PV_FAULT_TYPE)


def test_where_the_stream_ends():
    whole = forged() + b"y" * PAGE
    assert round_of(b"")[0] == -errno.EPIPE
    assert round_of(whole)[0] == -errno.EPIPE
    assert round_of(whole + forged(67, 1, 0, sequence=1))[0] == lib.PV_RECV_END
    for size in (1, 24, 39, 40, 41, 120, 40 + PAGE - 1, 40 + PAGE + 1):
        assert round_of((whole + b"\x93" * 9)[:size])[0] == -errno.ECONNRESET, size
    _, _, target = round_of(whole[:2000])
    assert target.bytes[PAGE:] == b"\x77" * (PAGE * (PAGES - 1))


def test_bytes_that_come_one_by_one():
    raw = forged(first=3, count=2) + b"ab" * PAGE + forged(65, 7, 1, sequence=1) + forged(67, 3, 0, sequence=2)
    target, arrivals = Ram(fill=0x77), Arrivals(PAGES)
    arrivals.begin(1)
    with pair() as (out, into):
        out.setblocking(True)
        end = ffi.new("struct pv_run_frame *")
        stream = stream_of(into)
        thread, results = in_thread(lambda: lib.pv_recv_runs(stream, target.at, PAGES, arrivals.cdata, 1 << 20, end))
        for at in range(0, len(raw), 7):
            out.send(raw[at : at + 7])
        thread.join()
    assert results == [lib.PV_RECV_END]
    assert target.bytes[3 * PAGE : 5 * PAGE] == b"ab" * PAGE
    assert target.bytes[7 * PAGE : 8 * PAGE] == bytes(PAGE)


def test_a_limit_of_pages():
    target, arrivals = Ram(), Arrivals(PAGES)
    arrivals.begin(1)
    with pair() as (out, into):
        out.sendall(forged(65, 0, 10) + forged(65, 10, 10, sequence=1))
        stream, end = stream_of(into, 0.02), ffi.new("struct pv_run_frame *")
        receive = (stream, target.at, PAGES, arrivals.cdata)
        assert lib.pv_recv_runs(*receive, 0, end) == -errno.EINVAL
        assert lib.pv_recv_runs(*receive, 10, end) == 0
        assert arrivals.count() == 10
        assert lib.pv_recv_runs(*receive, 11, end) == -errno.ETIMEDOUT
        assert arrivals.count() == 20


# ---- connections that fail ----


@pytest.mark.parametrize(("blocking", "waits"), [(False, False), (True, False), (False, True)])
def test_who_stalls_is_not_waited_for(blocking, waits):
    ram = Ram(fill=1)
    table, count = runs_of((0, PAGES))
    with pair(blocking) as (out, into):
        assert lib.pv_send_runs(stream_of(out, 0.03, waits), ram.at, PAGES, table, count, 1, True) == -errno.ETIMEDOUT
        stream = stream_of(out, 0.03, waits)
        assert lib.pv_recv_frame(stream, PAGES, ALL, ffi.new("struct pv_run_frame *")) == -errno.ETIMEDOUT
        assert lib.pv_recv_run(stream, ram.at, PAGES, 0, 1) == -errno.ETIMEDOUT
        into.send(b"x" * 100)
        assert lib.pv_recv_run(stream, ram.at, PAGES, 0, 1) == -errno.ETIMEDOUT


def test_who_has_gone_is_no_signal():
    """EPIPE, and SIGPIPE would end this process: Python ignores it, so it is not ignored here."""
    table, count = runs_of((0, PAGES))
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        with pair() as (out, into):
            into.close()
            assert lib.pv_send_runs(stream_of(out), Ram(1).at, PAGES, table, count, 1, False) == -errno.EPIPE
            assert lib.pv_send_frame(stream_of(out), lib.PV_FRAME_END, 0, 0, 1) == -errno.EPIPE
    finally:
        signal.signal(signal.SIGPIPE, before)


def test_who_goes_while_a_page_is_on_its_way():
    table, count = runs_of((0, PAGES))
    with pair() as (out, into):
        thread, results = in_thread(lambda: lib.pv_send_runs(stream_of(out), Ram(1).at, PAGES, table, count, 1, False))
        into.setblocking(True)
        into.recv(5000)
        into.close()
        thread.join()
    assert results[0] in (-errno.EPIPE, -errno.ECONNRESET)


@pytest.mark.parametrize("waits", [False, True])
def test_another_thread_ends_a_call(waits):
    table, count = runs_of((0, PAGES))
    with pair() as (out, into):  # one who sends
        stream, ram = stream_of(out, -1e-9, waits), Ram(1)
        thread, results = in_thread(lambda: lib.pv_send_runs(stream, ram.at, PAGES, table, count, 1, False))
        into.setblocking(True)
        into.recv(1)
        out.shutdown(socket.SHUT_RDWR)
        thread.join()
        assert results == [-errno.EPIPE]
    with pair() as (out, into):
        waiting = threading.Event()

        def receive():
            waiting.set()
            return lib.pv_recv_frame(stream_of(into, -1e-9, waits), PAGES, ALL, ffi.new("struct pv_run_frame *"))

        thread, results = in_thread(receive)
        waiting.wait()
        into.shutdown(socket.SHUT_RDWR)
        thread.join()
        assert results == [-errno.EPIPE]
        assert out.recv(1) == b""


def test_what_is_no_socket():
    read, write = os.pipe()
    stream = ffi.new("struct pv_stream *")
    try:
        for fd, code in ((read, errno.ENOTSOCK), (write, errno.ENOTSOCK), (-1, errno.EBADF)):
            stream.fd = fd
            assert lib.pv_send_frame(stream, lib.PV_FRAME_END, 0, 0, 1) == -code
            assert lib.pv_recv_run(stream, Ram().at, PAGES, 0, 1) == -code
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("waits", [False, True])
def test_signals_do_not_disturb(waits):
    """EINTR, many times, in poll and in the calls themselves; a handler that Python runs later."""
    source, target, caught = some_ram(1), Ram(), []
    before = signal.signal(signal.SIGALRM, lambda *_: caught.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(10):
            move(source, target, [(0, PAGES)], room=4608, waits=waits)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert target.bytes == source.bytes
    assert caught


@pytest.mark.parametrize("waits", [False, True])
def test_signals_do_not_put_the_end_off(waits):
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        with pair() as (out, _into):
            assert lib.pv_recv_run(stream_of(out, 0.03, waits), Ram().at, PAGES, 0, 1) == -errno.ETIMEDOUT
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- notes, and the classes around it ----


def test_notes_for_a_capture():
    with pair() as (out, _into):
        stream = stream_of(out)
        notes = ffi.new("struct pv_noted[]", 2)
        stream.notes, stream.notes_room = notes, 2
        table, count = runs_of((0, 3))
        assert lib.pv_send_runs(stream, some_ram(1, zeros=0).at, PAGES, table, count, 1, True) == 0
        for _ in range(3):
            assert lib.pv_send_frame(stream, lib.PV_FRAME_END, 3, 0, 1) == 0
        assert (stream.notes_used, stream.notes_lost) == (2, 2)
        assert list(Decoder().feed(bytes(ffi.buffer(ffi.addressof(notes[0], "frame"))))) == [Bytes(0, 3, 1)]
        assert 0 < notes[0].at <= notes[1].at


@contextmanager
def channels(ram_out, ram_in, timeout=5.0):
    ours, theirs = socket.socketpair()
    out, into = Connection(ours, "there"), Connection(theirs, "here")
    out.send(Ping(1))
    assert into.recv() == Ping(1)
    sending, receiving = PageChannel(out, ram_out.at, PAGES, timeout), PageChannel(into, ram_in.at, PAGES, timeout)
    try:
        yield sending, receiving
    finally:
        sending.close()
        receiving.close()


def test_channels_go_on_counting_after_control_frames():
    source, target, arrivals = some_ram(2, pages=PAGES), Ram(), Arrivals(PAGES)
    with channels(source, target) as (out, into):
        for number, runs in ((1, [(0, PAGES)]), (2, [(5, 1), (700, 20)])):
            arrivals.begin(number)
            thread, results = in_thread(lambda: into.receive(arrivals, 1 << 20))
            out.send(runs, number)
            out.send_end(number, sum(count for _, count in runs))
            thread.join()
            assert results == [sum(count for _, count in runs)] == [arrivals.count()]
    assert target.bytes == source.bytes


def test_channels_name_what_is_wrong():
    arrivals = Arrivals(PAGES)
    arrivals.begin(1)
    with channels(Ram(1), Ram(), 0.02) as (out, into):
        with pytest.raises(PeerGone, match="here stalled while receiving pages"):
            into.receive(arrivals, 1)
        with pytest.raises(PeerGone, match="there stalled while sending pages"):
            out.send([(0, PAGES)], 1)
    with channels(Ram(), Ram()) as (out, into):
        out.send([(0, 7)], 2)
        with pytest.raises(
            ProtocolError, match=r"a frame ZEROS \(7 pages from 0 on, round 2\): it is of another round"
        ):
            into.receive(arrivals, 1)
        out.end()
        with pytest.raises(PeerGone, match="there broke the connection off"):
            out.send([(0, 7)], 2)


def test_a_frame_in_python_is_one_in_c():
    assert encode(Bytes(5, 1, 1), 0) == forged(first=5)
