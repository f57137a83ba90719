# test_sharing.py: estimates by tables of hashes, the scanner's pace, tables that come from others. Needs no KVM.
from __future__ import annotations

import binascii
import random
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.control import wire
from pyvmm.control.server import MAX_UNREAD, Server
from pyvmm.control.sharing import fetch, hashes, sharing
from pyvmm.errors import BadInput, ControlError, MemoryAccessError
from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.memory import GuestMemory
from pyvmm.memory.reclaim.policies import duplicates_needed
from pyvmm.memory.reclaim.policy import Policy
from pyvmm.memory.sharing.estimate import BLOCK_PAGES, Estimate
from pyvmm.memory.sharing.scanner import Scanner, free_share, pace
from pyvmm.memory.sharing.sharer import Sharer
from pyvmm.memory.sharing.table import CONTENT, NOTHING, PIECE, UNKNOWN, ZERO, decode, encode, scan

TABLES = st.lists(st.integers(0, CONTENT + 6), min_size=1, max_size=40)


def table_of(values):
    return np.array(values, np.uint64)


@pytest.fixture
def memory():
    made = GuestMemory(6 * MIB + 5 * PAGE_SIZE, "4k")
    yield made
    made.close()


# ---- estimates ----


@given(TABLES, st.lists(TABLES, max_size=3))
def test_an_estimate_is_what_counting_gives(mine, others):
    found = Estimate(table_of(mine), [table_of(other) for other in others])
    contents = [value for value in mine if value >= CONTENT]
    each = [{value for value in table if value >= CONTENT} for table in (mine, *others)]
    assert found.pages == len(mine)
    assert found.scanned == len(mine) - mine.count(UNKNOWN)
    assert found.zeros == mine.count(ZERO)
    assert found.copies == len(contents) - len(set(contents))
    assert found.across == sum(map(len, each)) - len(set().union(*each))
    again = {ZERO, *set().union(*each[1:])} | {value for value, times in Counter(contents).items() if times > 1}
    assert found.again.tolist() == [value in again for value in mine]
    assert found.freed == found.zeros + found.copies + found.across


def test_counts_and_bits_of_blocks():
    table = np.arange(CONTENT, CONTENT + 2 * BLOCK_PAGES + 3, dtype=np.uint64)
    table[[0, BLOCK_PAGES + 7]] = 99
    table[99 - CONTENT] = CONTENT  # that content is planted above
    table[2 * BLOCK_PAGES + 2] = ZERO
    table[5:9] = NOTHING
    found = Estimate(table)
    assert found.counts() == [1, 1, 1]
    assert [found.bits(block) for block in range(3)] == [1, 1 << 7, 1 << 2]


# ---- what memory holds ----


def test_a_scan_says_what_pages_hold(memory):
    noise = random.Random(1).randbytes(PAGE_SIZE)
    for page, data in ((1, noise), (700, noise), (2, bytes(PAGE_SIZE)), (1540, noise[::-1])):
        memory.write(memory.gpa_of(page), data)
    table = scan(memory)
    assert table[2] == ZERO
    assert table[1] == table[700] >= CONTENT
    assert table[1540] not in (table[1], ZERO, NOTHING, UNKNOWN)
    assert np.count_nonzero(table == NOTHING) == len(table) - 4
    assert (scan(memory, 699, 3) == table[699:702]).all()
    assert memory.pages().bytes_populated == 4 * PAGE_SIZE
    for first, count in ((-1, 1), (0, len(table) + 1), (len(table), 1)):
        with pytest.raises(MemoryAccessError):
            scan(memory, first, count)


def test_one_byte_makes_another_page(memory):
    rng = random.Random(2)
    data = bytearray(rng.randbytes(PAGE_SIZE))
    seen = set()
    for page in range(200):
        memory.write(memory.gpa_of(page), data)
        seen.add(int(scan(memory, page, 1)[0]))
        data[rng.randrange(PAGE_SIZE)] ^= 1 << rng.randrange(8)
    assert len(seen) == 200


# ---- the scanner ----


def test_the_pace_follows_free_memory_and_the_estimate():
    assert pace(0.5, 1000, 100_000, 0.25, 0.9) == 1000  # plenty: slow, whatever there is to be had
    assert pace(0.1, 1000, 100_000, 0.25, None) == 100_000
    assert pace(0.1, 1000, 100_000, 0.25, 0.3) == 30_000
    assert pace(0.1, 1000, 100_000, 0.25, 0.0) == 1000
    assert 0 < free_share() < 1


def test_rounds_of_the_scanner(memory):
    class Told(Policy):
        def __init__(self):
            self.blocks = {}

        def scanned(self, block, duplicates):
            self.blocks[block] = duplicates

    policy, free = Told(), [1.0]
    scanner = Scanner(memory, 10, 1000, free=lambda: free[0], on_block=policy.scanned)
    for page in (3, BLOCK_PAGES, 3 * BLOCK_PAGES + 4):
        memory.write(memory.gpa_of(page), b"x" * PAGE_SIZE)
    assert [scanner.step() for _ in range(3)] == [BLOCK_PAGES] * 3
    assert not policy.blocks
    assert (scanner.pace(), scanner.rounds) == (10, 0)
    free[0] = 0.0
    assert scanner.pace() == 1000  # nothing is known yet
    assert scanner.step() == 5
    assert policy.blocks == {0: 8, 1: 1, 2: 0, 3: 16}
    assert scanner.pace() == max(10, 1000 * 2 / (3 * BLOCK_PAGES + 5))
    assert scanner.round().copies == 2
    assert scanner.rounds == 2
    with pytest.raises(BadInput):
        Scanner(memory, 0)


def test_the_scanner_s_thread_ends_with_the_memory():
    memory = GuestMemory(4 * MIB, "4k")
    scanner = Scanner(memory, 1e9)
    scanner.start()
    scanner.start()
    end = threading.Event()
    while scanner.rounds < 3:
        assert not end.wait(0.001)
    memory.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "sharing scanner"]
    slow = GuestMemory(4 * MIB, "4k")
    with Scanner(slow, 1.0):
        pass  # it stops at once
    slow.close()


# ---- who is chosen ----


def test_fewer_duplicates_suffice_the_less_is_free():
    assert [duplicates_needed(free) for free in (1.0, 0.125, 0.0625, 0.01, 0.0)] == [512, 512, 256, 40, 16]


def test_the_best_first_but_no_hot_ones_and_none_twice():
    table = np.arange(CONTENT, CONTENT + 4 * BLOCK_PAGES, dtype=np.uint64)
    for block, zeros in enumerate((20, 100, 15, 300)):
        table[block * BLOCK_PAGES :][:zeros] = ZERO
    free, hot = [0.0], set()
    sharer = Sharer(SimpleNamespace(size=4 * 2 * MIB), lambda block: block in hot, lambda: free[0])
    assert sharer.choose(Estimate(table)) == [3, 1, 0]
    free[0] = 0.05
    assert sharer.choose(Estimate(table)) == [3]
    free[0] = 0.0
    hot.add(1)
    sharer.shared.add(0)
    assert sharer.choose(Estimate(table)) == [3]


# ---- tables of others ----


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=20))
def test_a_piece_is_what_it_was(values):
    assert decode(encode(table_of(values)), len(values)).tolist() == values


@pytest.mark.parametrize(
    "text", [None, 7, [], "", "AAAA", "AAAAAAAAAA==", "é" * 12, "!" * 12, "AAAAAAAAA\nA=", "A" * 16]
)
def test_what_is_no_piece_is_refused(text):
    with pytest.raises(ControlError, match="piece of a table"):
        decode(text, 1)


def test_a_piece_fits_an_answer():
    assert len(wire.encode({"hashes": encode(table_of([1] * PIECE))})) * 16 < MAX_UNREAD


@pytest.fixture
def answering(tmp_path):
    """Starts a server that answers with what a function gives, and says where."""
    made = []

    def start(answer):
        path = str(tmp_path / f"c{len(made)}")
        made.append(Server(path, lambda request, reply: reply.result(answer(**request.arguments))))
        return path

    yield start
    for each in made:
        each.close()


def test_a_table_comes_in_pieces(memory, answering):
    memory.write(memory.gpa_of(5), b"y" * PAGE_SIZE)
    vm = SimpleNamespace(memory=memory)
    asked = []

    def answer(first, count):
        asked.append(first)
        return hashes(vm, first, min(count, PIECE))

    assert (fetch(answering(answer)) == scan(memory)).all()
    assert asked == [0]
    large = table_of(range(2 * PIECE + 3))

    def pieces(first, count):
        return {"pages": len(large), "hashes": encode(large[first : first + count])}

    assert (fetch(answering(pieces)) == large).all()
    assert hashes(vm, 10**9, 5)["count"] == 0
    told = sharing(vm, 2)
    assert (told["pages"], told["zeros"], told["copies"], told["blocks"]) == (len(scan(memory)), 0, 0, [])


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"pages": 0, "hashes": ""},
        {"pages": -1, "hashes": ""},
        {"pages": True, "hashes": encode(table_of([1]))},
        {"pages": 1.0, "hashes": encode(table_of([1]))},
        {"pages": "1" * 10000},
        {"pages": 1 << 60, "hashes": encode(table_of([1] * PIECE))},
        {"pages": 2, "hashes": encode(table_of([1]))},
        {"pages": 1, "hashes": encode(table_of([1, 2]))},
        {"pages": 1, "hashes": binascii.b2a_base64(b"1234567").decode()},
        {"pages": 1 << 28, "hashes": "A" * 4 * PIECE},
    ],
)
def test_answers_that_no_vm_gives(answering, answer):
    with pytest.raises(ControlError) as caught:
        fetch(answering(lambda first, count: answer))
    assert len(str(caught.value)) < 300


def test_a_vm_that_changes_its_size(answering):
    sizes = iter((2 * PIECE, 3 * PIECE))
    path = answering(lambda first, count: {"pages": next(sizes), "hashes": encode(table_of([1] * PIECE))})
    with pytest.raises(ControlError, match="answers in a way"):
        fetch(path)
