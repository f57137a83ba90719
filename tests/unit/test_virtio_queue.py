# test_virtio_queue.py: split rings (virtio 1.2, 2.7): what a device takes from them, hostile drivers, and chance ones.
from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.devices.virtio.queue import F_EVENT, F_INDIRECT, MAX_SIZE, Buffers, Queue, RingError
from pyvmm.layout import Gpa
from pyvmm.memory import GuestMemory

NEXT, WRITE, TABLE = 1, 2, 4
DESC, AVAIL, USED, TABLES = 0x1000, 0x2000, 0x3000, 0x8000
RAM = 2 << 20


@pytest.fixture(scope="module")
def memory():
    made = GuestMemory(RAM)
    yield made
    made.close()


def queue_of(memory, size=8, features=F_INDIRECT):
    memory.zero(Gpa(0), 0x10000)
    queue = Queue(memory)
    queue.size, queue.descriptors, queue.driver, queue.device, queue.features = size, DESC, AVAIL, USED, features
    queue.check()
    return queue


def describe(memory, index, address, size, flags=0, after=0, table=DESC):
    memory.write(Gpa(table + 16 * index), struct.pack("<QIHH", address, size, flags, after))


def offer(memory, *heads, index=None, size=8):
    for at, head in enumerate(heads):
        memory.write(Gpa(AVAIL + 4 + 2 * (at % size)), struct.pack("<H", head))
    memory.write(Gpa(AVAIL + 2), struct.pack("<H", len(heads) if index is None else index))


def test_a_chain_is_what_the_driver_wrote(memory):
    queue = queue_of(memory)
    describe(memory, 3, 0x9000, 16, NEXT, 5)
    describe(memory, 5, 0xA000, 0, NEXT, 1)  # an empty one is nothing
    describe(memory, 1, 0xB000, 7, NEXT | WRITE, 0)
    describe(memory, 0, 0xC000, 9, WRITE, 3)
    offer(memory, 3)
    chain = queue.take()
    assert (chain.head, chain.readable.parts, chain.writable.parts) == (3, ((0x9000, 16),), ((0xB000, 7), (0xC000, 9)))
    assert queue.take() == chain  # as long as it is not answered
    assert queue.give(3, 16) is True
    assert queue.take() is None
    assert memory.read(Gpa(USED), 12) == struct.pack("<HHII", 0, 1, 3, 16)


def test_a_table_behind_direct_descriptors(memory):
    queue = queue_of(memory)
    describe(memory, 0, 0x9000, 16, NEXT, 1)
    describe(memory, 1, TABLES, 48, TABLE | WRITE)  # that it is "writable" means nothing
    describe(memory, 0, 0xA000, 1, NEXT, 2, TABLES)
    describe(memory, 2, 0xB000, 2, WRITE, 0, TABLES)
    offer(memory, 0)
    chain = queue.take()
    assert (chain.readable.parts, chain.writable.parts) == (((0x9000, 16), (0xA000, 1)), ((0xB000, 2),))


def test_the_longest_chain_that_can_be(memory):
    queue = queue_of(memory)
    for index in range(8):
        describe(memory, index, 0x9000, 1, NEXT if index < 7 else 0, index + 1)
    offer(memory, 0)
    assert queue.take().readable.size == 8
    for index in range(9):
        describe(memory, index, 0x9000, 1, NEXT if index < 8 else 0, index + 1, TABLES)
    describe(memory, 0, TABLES, 16 * 9, TABLE)
    with pytest.raises(RingError, match="more than 8"):
        queue.take()


def test_indices_wrap(memory):
    queue = queue_of(memory, size=2)
    describe(memory, 1, 0x9000, 1, WRITE)
    queue.taken = queue.given = 0xFFFF
    memory.write(Gpa(AVAIL), struct.pack("<HHHH", 0, 1, 1, 1))
    assert queue.take().head == 1
    queue.give(1, 1)
    assert (queue.taken, queue.given) == (0, 0)
    assert queue.take().head == 1
    queue.give(1, 1)
    assert queue.take() is None
    assert memory.read(Gpa(USED + 2), 2) == b"\1\0"


def _bad(*descriptors, heads=(0,), index=None, tables=()):
    return descriptors, heads, index, tables


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (_bad(heads=(8,)), "descriptor 8"),
        (_bad(heads=(0xFFFF,)), "descriptor 65535"),
        (_bad((0x9000, 1, 0, 0), index=9), "9 requests"),
        (_bad((0x9000, 1, 0, 0), index=0xFFFF), "65535 requests"),
        (_bad((0x9000, 1, NEXT, 0)), "without an end"),
        (_bad((0x9000, 0, NEXT, 0)), "without an end"),
        (_bad((0x9000, 1, NEXT, 8)), "next one is 8"),
        (_bad((0x9000, 1, NEXT | WRITE, 1), (0x9000, 1, 0, 0)), "behind a writable"),
        (_bad((RAM - 1, 2, 0, 0)), "not RAM"),
        (_bad((1 << 63, 1, 0, 0)), "not RAM"),
        (_bad(((1 << 64) - 1, 0xFFFF_FFFF, 0, 0)), "not RAM"),
        (_bad((0xD000_0000, 4, WRITE, 0)), "not RAM"),
        (_bad((TABLES, 15, TABLE, 0)), "table of 15"),
        (_bad((TABLES, 0, TABLE, 0)), "table of 0"),
        (_bad((TABLES, 16, TABLE | NEXT, 0)), "has a next one"),
        (_bad((RAM - 16, 32, TABLE, 0)), "not RAM"),
        (_bad((TABLES, 0xFFFF_FFF0, TABLE, 0)), "not RAM"),
        (_bad((TABLES, 16, TABLE, 0), tables=((TABLES, 16, TABLE, 0),)), "within"),
        (_bad((TABLES, 16, TABLE, 0), tables=((0x9000, 1, NEXT, 1),)), "next one is 1, of 1"),
        (_bad((TABLES, 16, TABLE, 0), tables=((0x9000, 1, NEXT, 0),)), "without an end"),
    ],
)
def test_what_no_driver_may_do(memory, case, why):
    queue = queue_of(memory)
    descriptors, heads, index, tables = case
    for table, entries in ((DESC, descriptors), (TABLES, tables)):
        for at, entry in enumerate(entries):
            describe(memory, at, *entry, table=table)
    offer(memory, *heads, index=index)
    with pytest.raises(RingError, match=why):
        queue.take()


def test_more_than_4_gib(memory):
    queue = queue_of(memory)
    memory_is_all = Queue(memory)
    assert memory_is_all.size == MAX_SIZE
    with pytest.raises(RingError, match="4 GiB"):
        queue._check_buffer(0x9000, 0xFFFF_FFFF, 0, False, (1 << 32) + 1)


def test_a_table_that_was_not_agreed_on(memory):
    queue = queue_of(memory, features=0)
    describe(memory, 0, TABLES, 16, TABLE)
    offer(memory, 0)
    with pytest.raises(RingError, match="negotiated"):
        queue.take()


def test_a_descriptor_is_looked_at_once(memory):
    """A driver that changes it between two looks would have checked one thing and used another."""
    queue = queue_of(memory)
    describe(memory, 0, TABLES, 32, TABLE)
    describe(memory, 0, 0x9000, 8, NEXT, 1, TABLES)
    describe(memory, 1, 0xA000, 8, WRITE, 0, TABLES)
    offer(memory, 0)
    seen = []
    read = memory.read

    class Watching:
        is_ram = memory.is_ram

        def read(self, gpa, size):
            seen.append((gpa.value, size))
            return read(gpa, size)

    queue._memory = Watching()
    assert queue.take() is not None
    touched = [at + byte for at, size in seen for byte in range(size)]
    assert len(touched) == len(set(touched)), seen


WORD = st.one_of(st.integers(0, 9), st.sampled_from([0x7FFF, 0xFFFF, 255, 256]))
ADDRESS = st.one_of(
    st.sampled_from([0x9000, TABLES, TABLES + 64, DESC, AVAIL, USED, RAM - 8, RAM, (1 << 64) - 8, 0xD000_0000]),
    st.integers(0, (1 << 64) - 1),
)
SIZE = st.one_of(st.sampled_from([0, 1, 16, 32, 64, 128, 4096, 0xFFFF_FFFF]), st.integers(0, (1 << 32) - 1))
ENTRY = st.tuples(ADDRESS, SIZE, st.integers(0, 7), WORD)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ENTRY, max_size=8), st.lists(ENTRY, max_size=8), st.lists(WORD, max_size=8), WORD, st.integers(0, 0xFFFF),
    st.sampled_from([0, F_INDIRECT, F_EVENT, F_INDIRECT | F_EVENT]),
)  # fmt: skip
def test_any_ring_is_taken_or_refused(memory, direct, table, heads, index, taken, features):
    """And what is taken is all RAM, in the order that the device relies on, and no more than the queue can hold."""
    queue = queue_of(memory, features=features)
    for at, entry in enumerate(direct):
        describe(memory, at, *entry)
    for at, entry in enumerate(table):
        describe(memory, at, *entry, table=TABLES)
    offer(memory, *heads, index=(index + taken) & 0xFFFF)
    queue.taken = taken
    try:
        for _ in range(20):
            chain = queue.take()
            if chain is None:
                break
            parts = (*chain.readable.parts, *chain.writable.parts)
            assert len(parts) <= queue.size
            assert all(memory.is_ram(*part) and part[1] for part in parts)
            assert chain.head < queue.size
            queue.give(chain.head, 0)
        else:
            raise AssertionError("more requests than there can be")
    except RingError:
        pass


@given(st.lists(st.integers(1, 40), max_size=6), st.integers(0, 250), st.integers(0, 250), st.binary(max_size=250))
@settings(max_examples=100, deadline=None)
def test_buffers_in_pieces_are_one(memory, sizes, at, size, data):
    memory.write(Gpa(0x9000), bytes(range(256)) * 4)
    parts = [(0x9000 + 64 * index, size) for index, size in enumerate(sizes)]
    all_of_it = b"".join(memory.read(Gpa(start), size) for start, size in parts)
    buffers = Buffers(memory, parts)
    assert buffers.size == len(all_of_it)
    part = buffers.part(at, size)
    assert part.read() == all_of_it[at : at + size]
    assert part.size == len(all_of_it[at : at + size])
    done = part.write(data)
    assert done == min(len(data), part.size)
    assert buffers.read() == all_of_it[:at] + data[:done] + all_of_it[at + done :]
