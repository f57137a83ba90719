# test_migration_peer.py: post-copy's C at both ends: the destination's engine on the stand-in for userfaultfd, the
# source's as it is, a pair of sockets for each connection. Needs no KVM, no userfaultfd.
from __future__ import annotations

import errno
import random
import socket
import struct
import threading
from contextlib import contextmanager

import pytest
from cffi import FFI
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from test_pagemap_machine import (
    ASIDE,
    BLOCK,
    DECLARATIONS,
    MISSING,
    MOVE,
    PAGES,
    POISON,
    TORN,
    ZERO,
    compile_engine,
)

from pyvmm._native import lib as real
from pyvmm.errors import PeerGone, ProtocolError
from pyvmm.layout import PAGE_SIZE, Gpa
from pyvmm.memory.pageset import PageSet
from pyvmm.memory.space import GuestMemory
from pyvmm.migration.connection import Connection
from pyvmm.migration.frames import RUNS, Bytes, Decoder, End, Request, Zeros, encode
from pyvmm.migration.pages import PageChannel
from pyvmm.migration.peer import Served

PEER = 5
ADAPTIVE, UNIT_PAGE, STORE, LARGE = range(4)
APART, CONNECTED, ENDED = range(3)
SMALL = 1 << 2
EXAMPLES = 20
SECONDS = 20

ffi = FFI()
ffi.cdef(
    DECLARATIONS
    + """
struct pv_run_frame { uint8_t magic[4], version, type; uint16_t flags; uint32_t length, sequence; uint64_t checksum;
                      uint64_t first; uint32_t count, round; };
struct pv_stream { int fd; uint32_t fault; int64_t timeout_ns; uint32_t waits, sending, receiving;
                   uint64_t runs, bytes_pages, zero_pages, wire_bytes; void *notes;
                   uint64_t notes_room, notes_used, notes_lost; uint32_t pulled; int32_t pull_pid; uint64_t pull_ram;
                   uint8_t ahead[120]; uint32_t ahead_at, ahead_used; };
struct pv_inbox { uint64_t block, settled; uint32_t count; uint64_t came, dropped, failed, pages[8], zeros[8];
                  uint8_t bytes[2097152]; };
struct pv_peer_told { uint32_t state, fault; int error; struct pv_run_frame frame;
                      uint64_t breaks, requests, pages, nanoseconds, longest; };
struct pv_peer;
void fake_stock(struct pv_engine *engine, const uint64_t *values);
void pv_engine_home(struct pv_engine *engine, uint32_t number, const void *home);
void pv_engine_unit(struct pv_engine *engine, uint32_t unit);
void pv_engine_workers(struct pv_engine *engine, uint32_t workers);
int pv_engine_assign_all(struct pv_engine *engine, uint32_t home);
int pv_engine_assign_bits(struct pv_engine *engine, uint32_t home, const uint64_t *bits, const uint64_t *large);
int pv_engine_held(struct pv_engine *engine, uint64_t page, uint64_t count, uint64_t *bits);
uint64_t pv_engine_at_home(struct pv_engine *engine, uint32_t home, uint64_t *bits);
uint64_t *pv_engine_pages(struct pv_engine *engine);
int pv_engine_look(struct pv_engine *engine, uint64_t *large, uint64_t *small, uint8_t *looks);
int pv_peer_open(struct pv_engine *engine, const uint64_t *large, int store, struct pv_peer **out);
void pv_peer_close(struct pv_peer *peer);
void pv_peer_home(struct pv_peer *peer, void *out);
int pv_peer_connect(struct pv_peer *peer, struct pv_stream *stream);
void pv_peer_break(struct pv_peer *peer);
void pv_peer_end(struct pv_peer *peer, int error);
int pv_peer_wait(struct pv_peer *peer, uint32_t milliseconds);
void pv_peer_look(struct pv_peer *peer, struct pv_peer_told *out);
int pv_peer_receive(struct pv_peer *peer, struct pv_inbox *inbox, struct pv_stream *stream, uint64_t limit,
                    struct pv_run_frame *end);
"""
)


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """The destination's C on the stand-in."""
    others = ("peerhome", "inbox", "stream", "checksum")
    return ffi.dlopen(str(compile_engine(tmp_path_factory.mktemp("peer"), others=others)))


def whole(value):
    return struct.pack("<Q", value) * (PAGE_SIZE // 8)


def stream_of(sock, timeout=SECONDS):
    stream = ffi.new("struct pv_stream *")
    stream.fd, stream.timeout_ns = sock.fileno(), int(timeout * 1e9)
    return stream


class Source:
    """A VM that stands still, by the C that serves it: each page is all of one word; 0: never touched."""

    def __init__(self, values):
        self.memory = GuestMemory(PAGES * PAGE_SIZE, pages="4k")
        for page, value in enumerate(values):
            if value:
                self.memory.write(Gpa(page * PAGE_SIZE), whole(value))
        self.served = Served(self.memory)
        self._ends = []

    def channel(self):
        """(one of the source's, the other end's socket)"""
        ours, theirs = socket.socketpair()
        return PageChannel(Connection(ours, "there"), self.memory._mapping(), PAGES, SECONDS), theirs

    def serve(self):
        """A connection for requests, and who answers them: the other end's socket."""
        channel, theirs = self.channel()
        self._ends.append((channel, in_thread(lambda: self.served.serve(channel))))
        return theirs

    def close(self):
        self.memory.close_engine()  # ends the calls that are under way
        for channel, thread in self._ends:
            thread.end()
            channel.close()
        self.memory.close()


class in_thread:
    """What a call returned, or raised."""

    def __init__(self, call):
        self._result = None

        def run():
            try:
                self._result = call()
            except BaseException as error:
                self._result = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def alive(self):
        return self._thread.is_alive()

    def end(self):
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "a thread hangs"
        return self._result


def bitmap(pages):
    bits = ffi.new("uint64_t[]", PAGES // 64 + 1)
    for page in pages:
        bits[page // 64] |= 1 << page % 64
    return bits


class Destination:
    """A VM on the stand-in. values: what its pages hold at the source; stale: those that are there alone; None: all."""

    def __init__(self, fake, values, unit=ADAPTIVE, how=MOVE, small=0, stale=None, large=None, workers=1, scans=1):
        self.fake, self.values = fake, values
        fake.fake_scans(scans)
        self.engine = fake.fake_open(PAGES, small, how)
        self.told, self.sockets, self.inbox = None, [], ffi.new("struct pv_inbox *")
        for page in range(PAGES):
            if stale is not None and (values[page] or page in stale):
                assert fake.guest_write(self.engine, page, 99 if page in stale else values[page]) == 0
        fake.fake_stock(self.engine, values)
        large = ffi.NULL if large is None else ffi.new("uint64_t *", large)
        out, home = ffi.new("struct pv_peer **"), ffi.new("uint64_t[8]")
        assert fake.pv_peer_open(self.engine, large, unit == STORE, out) == 0
        self.peer = out[0]
        fake.pv_peer_home(self.peer, home)
        fake.pv_engine_home(self.engine, PEER, home)
        fake.pv_engine_unit(self.engine, unit)
        fake.pv_engine_workers(self.engine, workers)
        if stale is None:
            assert fake.pv_engine_assign_all(self.engine, PEER) == 0
        else:
            assert fake.pv_engine_assign_bits(self.engine, PEER, bitmap(stale), large) == 0

    def connect(self, sock, timeout=SECONDS):
        stream = stream_of(sock, timeout)
        self.sockets.append((sock, stream))  # until the end: the one before is in use while this connects
        return self.fake.pv_peer_connect(self.peer, stream)

    def receive(self, sock, limit=1 << 40):
        """(result, fault) of the background; sock: where it comes from, to its end."""
        stream, self.end = stream_of(sock), ffi.new("struct pv_run_frame *")
        return self.fake.pv_peer_receive(self.peer, self.inbox, stream, limit, self.end), stream.fault

    def look(self):
        told = ffi.new("struct pv_peer_told *")
        self.fake.pv_peer_look(self.peer, told)
        return told

    def left(self):
        bits = bitmap([])
        count = self.fake.pv_engine_at_home(self.engine, PEER, bits)
        return {page for page in range(PAGES) if bits[page // 64] >> page % 64 & 1}, count

    def held(self):
        bits = bitmap([])
        assert self.fake.pv_engine_held(self.engine, 0, PAGES, bits) == 0
        return {page for page in range(PAGES) if bits[page // 64] >> page % 64 & 1}

    def homes(self, first=0, count=PAGES):
        words = self.fake.pv_engine_pages(self.engine)
        return [words[page] & 15 for page in range(first, first + count)]

    def looks(self):
        large, small, looks = ffi.new("uint64_t *"), ffi.new("uint64_t *"), ffi.new("uint8_t[3]")
        assert self.fake.pv_engine_look(self.engine, large, small, looks) == 0
        return [("untouched", "large", "small", "away")[min(look, 3)] for look in looks]

    def flags(self, block):
        return self.fake.fake_block_flags(self.engine, block)

    def read(self, page):
        return self.fake.guest_read(self.engine, page)

    def check(self):
        """That books and bytes are right, while nothing is under way."""
        text, found = ffi.new("char[300]"), ffi.new("uint64_t[]", PAGES)
        self.fake.fake_check(self.engine, 0, 0, text, 300)
        assert ffi.string(text).decode() == ""
        self.fake.fake_values(self.engine, found)
        wrong = [(page, found[page], is_) for page, is_ in enumerate(self.values) if found[page] != is_]
        assert wrong[:5] == []

    def close(self):
        self.fake.pv_peer_end(self.peer, errno.ECANCELED)
        self.fake.fake_close(self.engine)
        self.fake.pv_peer_close(self.peer)
        for sock, _ in self.sockets:
            sock.close()


def some_values(seed, zeros=0.2):
    rng = random.Random(seed)
    return [0 if rng.random() < zeros else rng.randrange(1, 1000) for _ in range(PAGES)]


@pytest.fixture
def ends(fake):
    """make(values, **options): (source, destination)"""
    made = []

    def make(values, source=True, **options):
        made.append(Destination(fake, list(values), **options))
        if source:
            made.append(Source(values))
            assert made[-2].connect(made[-1].serve()) == 0
            return made[-1], made[-2]
        return None, made[-1]

    yield make
    for each in reversed(made):
        each.close()


def background(source, destination, first=0, blocks=3):
    """The source sends what is left of blocks, and END: the result of receiving it."""
    channel, theirs = source.channel()

    def send():
        channel.send_end(0, source.served.send_rest(channel, first, blocks))

    sender = in_thread(send)
    with theirs:
        result = destination.receive(theirs)
        assert sender.end() is None
    channel.close()
    return result


# ---- whatever happens, in any order ----


class Both(RuleBasedStateMachine):
    """A guest that goes on at the destination; `model`: what it must see."""

    fake = None
    """Set by the test."""

    @initialize(
        how=st.sampled_from([0, MOVE, MOVE | POISON, POISON]),
        small=st.sampled_from([0, 1, 1 << 63]),
        unit=st.sampled_from([ADAPTIVE, ADAPTIVE, UNIT_PAGE, STORE, LARGE]),
        workers=st.sampled_from([1, 2]),
        scans=st.sampled_from([1, 1, 0]),
        hybrid=st.sampled_from([None, 3, 40]),
        zeros=st.sampled_from([0, 0.5, 0.98]),
        large=st.sampled_from([None, 0, 1]),
    )
    def begin(self, how, small, unit, workers, scans, hybrid, zeros, large):
        """hybrid: None, or every so many pages are stale."""
        values = some_values(1, zeros)
        for block in range(3):  # one of three is zeros, or nearly
            if zeros > 0.9 and block != 1:
                values[block * BLOCK : (block + 1) * BLOCK] = [0] * len(values[block * BLOCK : (block + 1) * BLOCK])
        stale = None if hybrid is None else set(range(0, PAGES, hybrid))
        self.source = Source(values)
        if stale is not None:
            self.source.served.begin(PageSet(PAGES, [(page, 1) for page in range(PAGES) if page not in stale]))
        self.there = Destination(self.fake, values, unit, how, small, stale, large, workers, scans)
        assert self.there.connect(self.source.serve()) == 0
        self.model = self.there.values

    def teardown(self):
        if not hasattr(self, "there"):
            return
        try:
            assert background(self.source, self.there) == (real.PV_RECV_END, 0)
            assert self.fake.pv_engine_fill(self.there.engine, 0, PAGES) == 0
            assert self.there.left() == (set(), 0)
            assert [self.there.read(page) for page in range(PAGES)] == self.model
            self.there.check()
            assert not self.fake.fake_armed()
            assert self.there.inbox.failed == 0
        finally:
            self.there.close()
            self.source.close()

    @rule(page=st.integers(0, PAGES - 1))
    def read(self, page):
        assert self.there.read(page) == self.model[page]

    @rule(page=st.integers(0, PAGES - 1), value=st.integers(0, 9), count=st.sampled_from([1, 1, 60]))
    def write(self, page, value, count):
        for each in range(page, min(page + count, PAGES)):
            assert self.fake.guest_write(self.there.engine, each, value) == 0
            self.model[each] = value

    @rule(page=st.integers(0, PAGES - 1), count=st.sampled_from([1, 30, BLOCK, PAGES]))
    def install(self, page, count):
        assert self.fake.pv_engine_install(self.there.engine, page, min(count, PAGES - page)) == 0

    @rule(page=st.integers(0, PAGES - 1), count=st.sampled_from([1, 30, BLOCK]), what=st.sampled_from([0, 1]))
    def remove(self, page, count, what):
        count = min(count, BLOCK - page % BLOCK, PAGES - page)
        assert self.fake.pv_engine_remove(self.there.engine, page, count, what) >= 0

    @rule(block=st.integers(0, 2), blocks=st.integers(1, 3))
    def background(self, block, blocks):
        assert background(self.source, self.there, block, min(blocks, 3 - block)) == (real.PV_RECV_END, 0)

    @rule(lost=st.booleans())
    def again(self, lost):
        """The connection breaks. lost: what the source has sent meanwhile does not come; it begins anew in any case."""
        if lost:
            channel, theirs = self.source.channel()
            theirs.close()
            with pytest.raises(PeerGone):
                self.source.served.send_all(channel)  # END at least
            channel.close()
        self.fake.pv_peer_break(self.there.peer)
        left, count = self.there.left()
        assert len(left) == count
        self.source.served.begin(PageSet(PAGES, [(page, 1) for page in range(PAGES) if page not in left]))
        assert self.there.connect(self.source.serve()) == 0

    @invariant()
    def right(self):
        if not hasattr(self, "there"):
            return
        self.there.check()
        missing = {page for page, value in enumerate(self.model) if value} - self.there.held()
        assert not missing


def test_a_guest_goes_on_with_the_right_bytes(fake):
    class Machine(Both):
        pass

    Machine.fake = fake
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# ---- how much comes with a touch ----


@pytest.mark.parametrize(
    ("unit", "first", "second", "third"),
    [(ADAPTIVE, 1, BLOCK - 1, 0), (UNIT_PAGE, 1, 1, 1), (STORE, 16, 16, 16), (LARGE, BLOCK, 0, 0)],
)
def test_units(ends, unit, first, second, third):
    source, there = ends(some_values(2), unit=unit)
    for page, pages in ((600, first), (800, second), (1000, third)):
        before = int(there.look().pages)
        assert there.read(page) == there.values[page]
        assert int(there.look().pages) - before == pages
    there.check()
    assert source.served.counts().pages == first + second + third
    assert source.served.touched is not None


def test_what_is_asked_for_at_once_is_asked_for_ahead_of_the_answers(ends):
    """A block of which every other page is stale: more requests than may be under way, and one large page."""
    values = some_values(3)
    _, there = ends(values, stale=set(range(BLOCK, 2 * BLOCK, 2)))
    assert there.read(700) == values[700]
    told = there.look()
    assert (told.requests, told.pages) == (BLOCK // 2, BLOCK // 2)
    assert there.homes() == [0] * PAGES
    assert there.looks()[:2] == ["small", "large"]  # by the guest's writes here, and as it came
    there.check()


@pytest.mark.parametrize("how", [0, MOVE])
def test_of_a_block_without_stale_pages_nothing_moves(ends, how):
    values = some_values(4)
    _, there = ends(values, stale={3, 5, 2 * BLOCK + 1}, how=how)
    homes = there.homes()
    assert homes[BLOCK : 2 * BLOCK] == [0] * BLOCK
    assert [homes[page] for page in (3, 5, 2 * BLOCK + 1)] == [PEER] * 3
    assert set(homes[:BLOCK]) == {PEER, ASIDE, ZERO}  # one block comes as a whole
    assert set(homes[2 * BLOCK :]) == {PEER, 0}  # the last one is small: nothing else of it is away
    there.check()


def test_a_stale_page_that_is_pinned(ends, fake):
    _, there = ends(some_values(4), stale=set())
    assert fake.pv_engine_pin(there.engine, 9, 1) == 0
    assert fake.pv_engine_assign_bits(there.engine, PEER, bitmap([600]), ffi.NULL) == 0
    assert fake.pv_engine_assign_bits(there.engine, PEER, bitmap([9]), ffi.NULL) == -errno.EBUSY
    fake.pv_engine_unpin(there.engine, 9, 1)
    assert fake.pv_engine_assign_bits(there.engine, PEER, bitmap([601]), ffi.NULL) == -errno.EEXIST
    assert fake.pv_engine_assign_bits(there.engine, ASIDE, bitmap([9]), ffi.NULL) == -errno.EINVAL


# ---- ahead of touches ----


def test_the_background_brings_whole_blocks_and_leaves_zeros_untouched(ends):
    values = [7] * BLOCK + [0] * BLOCK + [3, 0, 3, 0, 3]
    source, there = ends(values)
    assert background(source, there) == (real.PV_RECV_END, 0)
    assert there.end.first == PAGES
    assert (there.inbox.came, there.inbox.dropped, there.inbox.failed) == (PAGES, 0, 0)
    assert there.homes() == [0] * PAGES
    assert there.held() == {*range(BLOCK), 2 * BLOCK, 2 * BLOCK + 2, 2 * BLOCK + 4}
    assert there.look().requests == 0
    assert source.memory.pages().small == BLOCK + 3  # to send zeros, none was made resident
    assert there.looks() == ["large", "untouched", "small"]
    there.check()


def test_what_is_small_at_the_source_and_holds_little_stays_small(ends):
    values = [0] * PAGES
    values[10:20] = [8] * 10
    values[BLOCK + 3] = 1
    source, there = ends(values, large=0b10)
    assert background(source, there) == (real.PV_RECV_END, 0)
    assert there.flags(0) & SMALL
    assert not there.flags(1) & SMALL
    assert there.held() == {*range(10, 20), *range(BLOCK, 2 * BLOCK)}
    there.check()


def test_what_the_guest_wrote_is_not_overwritten(ends, fake):
    values = some_values(5, 0)
    _, there = ends(values, source=False, unit=UNIT_PAGE)
    with answered_by(there, lambda request: Bytes(request.first, request.count, 0)):
        for page in (0, 5, 600):
            assert fake.guest_write(there.engine, page, 4) == 0
            there.values[page] = 4
        assert there.homes(0, 2 * BLOCK).count(0) == 3
        assert sent_to(there, [(Bytes(0, 8, 0), 6), (Zeros(598, 5, 0), 0), (End(13, 0, 0), 0)])[0] == real.PV_RECV_END
    assert there.inbox.dropped == 3
    assert [there.read(page) for page in (0, 5, 600)] == [4, 4, 4]
    assert [there.read(page) for page in (1, 7, 598, 602)] == [6, 6, 0, 0]


def test_touches_alone_bring_a_block_and_it_is_merged_when_its_rest_comes(ends, fake):
    _, there = ends(some_values(6, 0), unit=UNIT_PAGE)
    for page in range(BLOCK):
        assert there.read(page) == there.values[page]
    assert there.looks()[0] == "small"
    assert sent_to(there, [(Bytes(8, 2, 0), 1), (Bytes(80, 2, 0), 1), (End(4, 0, 0), 0)])[0] == real.PV_RECV_END
    assert there.looks()[0] == "large"
    assert (there.inbox.dropped, there.inbox.failed) == (4, 0)
    there.check()


def test_what_cannot_be_installed_stays_with_the_source(ends, fake):
    source, there = ends(some_values(7, 0))
    fake.fake_inject(1, 0, 0, errno.ENOMEM, 5000)  # copy
    fake.fake_inject(0, 0, 0, errno.ENOMEM, 5000)  # move
    assert background(source, there) == (real.PV_RECV_END, 0)
    assert there.inbox.failed == 3
    fake.fake_clear()
    there.check()
    assert there.left()[1] == PAGES
    assert fake.pv_engine_fill(there.engine, 0, PAGES) == 0
    assert there.left()[1] == 0
    there.check()


# ---- who sends what it should not ----


@contextmanager
def answered_by(there, answer, timeout=SECONDS):
    """A source in Python: for each request the frames that `answer` gives, each page of its value; or bytes; None: it
    closes."""
    ours, theirs = socket.socketpair()
    assert there.connect(theirs, timeout) == 0

    def run():
        decoder, sequence = Decoder(RUNS), 0
        while data := ours.recv(40):
            for request in decoder.feed(data):
                assert isinstance(request, Request)
                found = answer(request)
                for frame in found if isinstance(found, list) else [found]:
                    if frame is None:
                        ours.shutdown(socket.SHUT_WR)
                        return
                    if isinstance(frame, bytes):
                        ours.sendall(frame)
                        continue
                    ours.sendall(encode(frame, sequence))
                    sequence += 1
                    for page in range(frame.first, frame.first + frame.count) if isinstance(frame, Bytes) else ():
                        ours.sendall(whole(there.values[page % PAGES]))

    thread = in_thread(run)
    try:
        yield ours
    finally:
        there.fake.pv_peer_break(there.peer)
        ours.shutdown(socket.SHUT_RDWR)
        thread.end()
        ours.close()


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Bytes(601, 1, 0), "RANGE"),
        (Bytes(600, 2, 0), "RANGE"),
        (Zeros(600, 2, 0), "RANGE"),
        (Zeros(0, PAGES, 0), "RANGE"),
        (Bytes(PAGES, 1, 0), "RANGE"),
        (Bytes(1 << 27, 1, 0), "RANGE"),
        (Bytes(600, 1, 1), "ROUND"),
        (Zeros(600, 1, 7), "ROUND"),
        (End(0, 0, 0), "TYPE"),
        (Request(600, 1, 0), "TYPE"),
        (b"\0" * 40, "MAGIC"),
    ],
)
def test_answers_that_are_none(ends, answer, fault):
    """Nothing of them is believed; the connection is given up, and the touch waits for another one."""
    values = some_values(8, 0)
    _, there = ends(values, source=False)
    with answered_by(there, lambda request: answer):
        guest = in_thread(lambda: there.read(600))
        assert there.fake.pv_peer_wait(there.peer, SECONDS * 1000) == APART
        told = there.look()
        assert (told.error, told.fault) == (errno.EBADMSG, getattr(real, f"PV_FAULT_{fault}"))
        assert told.frame.first == getattr(answer, "first", 0)
    source = Source(values)
    try:
        assert there.connect(source.serve()) == 0
        assert guest.end() == values[600]
        there.check()
    finally:
        there.close()
        source.close()
        there.close = lambda: None


def sent_to(there, frames, tail=b"", cut=None):
    """What the background makes of these frames, each with a value for its pages."""
    raw = b""
    for sequence, (frame, value) in enumerate(frames):
        count = frame.count if type(frame) is Bytes else 0
        raw += encode(frame, sequence) + whole(value) * count
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = in_thread(lambda: (ours.sendall((raw + tail)[:cut]), ours.shutdown(socket.SHUT_WR)))
        result = there.receive(theirs)
        theirs.shutdown(socket.SHUT_RDWR)
        sender.end()
    return result


@pytest.mark.parametrize(
    ("frames", "fault"),
    [
        ([(Bytes(0, 1, 1), 5)], "ROUND"),
        ([(End(0, 0, 3), 0)], "ROUND"),
        ([(Request(0, 1, 0), 0)], "TYPE"),
        ([(Bytes(PAGES, 1, 0), 5)], "RANGE"),
        ([(Bytes(PAGES - 1, 2, 0), 5)], "RANGE"),
        ([(Zeros(PAGES - 1, 2, 0), 5)], "RANGE"),
        ([(Zeros(0, 1 << 28, 0), 5)], "RANGE"),
        ([(End(PAGES + 1, 0, 0), 0)], "RANGE"),
    ],
)
def test_a_background_that_breaks_a_rule(ends, frames, fault):
    _, there = ends(some_values(9), source=False)
    assert sent_to(there, frames) == (-errno.EBADMSG, getattr(real, f"PV_FAULT_{fault}"))
    assert sent_to(there, [(Bytes(3, 1, 0), 5), *frames])[0] == -errno.EBADMSG  # and a page waits to be installed
    assert there.left()[1] == PAGES
    there.check()


def test_a_background_that_ends_anywhere(ends):
    """What has not come whole is not installed."""
    _, there = ends(some_values(10), source=False)
    for cut, result in ((0, -errno.EPIPE), (17, -errno.ECONNRESET), (40, -errno.ECONNRESET), (4000, -errno.ECONNRESET),
                        (40 + 4 * PAGE_SIZE, -errno.EPIPE), (40 + 4 * PAGE_SIZE + 2, -errno.ECONNRESET)):  # fmt: skip
        assert sent_to(there, [(Bytes(3, 4, 0), 5), (End(4, 0, 0), 0)], cut=cut)[0] == result
        assert there.left()[1] == PAGES
        there.check()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert there.receive(theirs, 0)[0] == -errno.EINVAL


def test_pages_that_come_twice_before_they_are_installed(ends):
    values = some_values(11, 0)
    _, there = ends(values, source=False)
    frames = [(Bytes(0, 4, 0), 5), (Zeros(2, 4, 0), 0), (Bytes(3, 1, 0), 6), (End(9, 0, 0), 0)]
    assert sent_to(there, frames)[0] == real.PV_RECV_END
    assert [there.read(page) for page in range(6)] == [5, 5, 0, 6, 0, 0]
    assert there.inbox.dropped == 3


@pytest.mark.parametrize(
    "raw", [encode(Bytes(1, 1, 0), 0), encode(Request(1, 1, 4), 0), encode(Request(PAGES, 1, 0), 0)]
)
def test_requests_that_are_none(raw):
    source = Source([1] * PAGES)
    channel, theirs = source.channel()
    with theirs:
        theirs.sendall(raw)
        with pytest.raises(ProtocolError):
            source.served.serve(channel)
        channel.close()
    source.close()


# ---- connections that break ----


def test_an_answer_that_breaks_off_is_asked_for_again(ends):
    """In the midst of a block; others wait behind it, and the session is told."""
    values = some_values(12, 0)
    _, there = ends(values, source=False, unit=LARGE, workers=2)
    half = [Bytes(BLOCK, 100, 0), b"\x93PV", None]
    with answered_by(there, lambda request: half if request.first == BLOCK else None):
        guests = [in_thread(lambda page=page: there.fake.pv_engine_install(there.engine, page, 1)) for page in (600, 9)]
        assert there.fake.pv_peer_wait(there.peer, SECONDS * 1000) == APART
    told = there.look()
    assert told.breaks == 1
    assert told.error in (errno.ECONNRESET, errno.EPIPE)
    assert all(guest.alive for guest in guests)  # they wait, and for no time
    source = Source(values)
    try:
        assert there.connect(source.serve()) == 0
        assert [guest.end() for guest in guests] == [0, 0]
        there.check()
    finally:
        there.close()
        source.close()
        there.close = lambda: None


def test_a_connection_that_is_given_up_and_one_that_replaces_another(ends):
    values = some_values(13, 0)
    _, there = ends(values, source=False)
    with answered_by(there, lambda request: []):  # it never answers
        guest = in_thread(lambda: there.read(5))
        while there.fake.pv_peer_wait(there.peer, 1) != CONNECTED:
            pass
        there.fake.pv_peer_break(there.peer)
        assert there.fake.pv_peer_wait(there.peer, SECONDS * 1000) == APART
        assert there.look().error == errno.ECONNABORTED
    with answered_by(there, lambda request: []):
        source = Source(values)
        assert there.connect(source.serve()) == 0  # at once, without a break
        assert guest.end() == values[5]
        assert there.read(6) == values[6]
    there.close()
    source.close()
    there.close = lambda: None


def test_a_source_that_stalls(ends):
    _, there = ends(some_values(13, 0), source=False)
    with answered_by(there, lambda request: [], timeout=0.02):
        guest = in_thread(lambda: there.read(5))
        assert there.fake.pv_peer_wait(there.peer, SECONDS * 1000) == APART
        assert there.look().error == errno.ETIMEDOUT
        there.fake.pv_peer_end(there.peer, errno.EHOSTDOWN)
        assert guest.end() == MISSING


def test_the_end(ends, fake):
    """Who waits is told, and who comes later; what is here stays, and nothing is lost."""
    values = some_values(14)
    _, there = ends(values, source=False, unit=LARGE)
    waiting = in_thread(lambda: fake.pv_engine_install(there.engine, 600, 1))
    waiting_too = in_thread(lambda: fake.pv_engine_install(there.engine, 5, 1))
    assert fake.pv_peer_wait(there.peer, 5) == APART
    fake.pv_peer_end(there.peer, errno.EHOSTDOWN)
    fake.pv_peer_end(there.peer, errno.EIO)  # the first one counts
    assert [waiting.end(), waiting_too.end()] == [-errno.EHOSTDOWN] * 2
    assert fake.pv_peer_wait(there.peer, SECONDS * 1000) == ENDED
    assert there.look().error == errno.EHOSTDOWN
    assert there.read(600) == MISSING
    assert sent_to(there, [(Bytes(BLOCK + 1, 2, 0), 5), (End(2, 0, 0), 0)])[0] == real.PV_RECV_END
    assert there.read(BLOCK + 1) == 5  # what comes unasked still does
    ours, theirs = socket.socketpair()
    with ours:
        assert there.connect(theirs) == -errno.ECANCELED
    there.values[BLOCK + 1 : BLOCK + 3] = [5, 5]
    there.check()


# ---- all at once ----


@pytest.mark.parametrize("how", [0, MOVE])
@pytest.mark.parametrize("unit", [ADAPTIVE, UNIT_PAGE, STORE])
@pytest.mark.parametrize("hybrid", [False, True])
def test_guests_two_backgrounds_and_duplicates(ends, fake, how, unit, hybrid):
    """Two threads of the guest, two of the host's, two channels that bring everything, connections that break."""
    values = some_values(15, 0.3)
    stale = set(range(0, PAGES, 3)) if hybrid else None
    source, there = ends(values, unit=unit, how=how, workers=2, stale=stale)

    def guest(seed):
        rng = random.Random(seed)
        pages = rng.sample(range(PAGES), PAGES)
        for page in pages:
            while (found := there.read(page)) == MISSING:  # the stand-in gives up early where two touch at once
                pass
            if found != values[page]:
                return page, found, TORN
        return None

    def host(page):
        return fake.pv_engine_install(there.engine, page, 200)

    inboxes = [ffi.new("struct pv_inbox *") for _ in range(2)]

    def bring(inbox):
        served = Served(source.memory)  # has sent nothing: all comes twice
        channel, theirs = source.channel()
        with theirs:
            sender = in_thread(lambda: served.send_all(channel))
            end, stream = ffi.new("struct pv_run_frame *"), stream_of(theirs)
            while not (result := fake.pv_peer_receive(there.peer, inbox, stream, 100, end)):
                pass
            assert sender.end() == PAGES == end.first
        channel.close()
        return result

    def trouble():
        for _ in range(4):
            fake.pv_peer_break(there.peer)
            assert there.connect(source.serve()) == 0

    calls = [lambda: guest(1), lambda: guest(2), lambda: host(300), lambda: host(700), trouble]
    threads = [in_thread(call) for call in (*calls, *(lambda each=each: bring(each) for each in inboxes))]
    assert [thread.end() for thread in threads] == [None, None, 0, 0, None, real.PV_RECV_END, real.PV_RECV_END]
    assert there.left() == (set(), 0)
    assert sum(inbox.came for inbox in inboxes) == 2 * PAGES
    there.check()
