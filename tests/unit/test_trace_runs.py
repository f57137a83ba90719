# test_trace_runs.py: page bitmaps in C and `Runs`, against Python's own sets.
from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput
from pyvmm.layout import GIB, HOLE_END, HOLE_START, PAGE_SIZE, ram_regions
from pyvmm.memory.trace.runs import MAX_PAGES, Runs, new_bitmap, words_for

PAGES = 400
"""Several words, and a last one that is not full."""
# Edges of words are where it goes wrong.
EDGES = st.sampled_from([0, 1, 62, 63, 64, 65, 127, 128, 192, 383, 384, 398, 399])
PLACES = EDGES | st.integers(0, PAGES - 1)
RANGES = st.lists(st.tuples(PLACES, st.integers(0, 200) | st.sampled_from([1, 63, 64, 65, 128, 400])), max_size=12).map(
    lambda found: [(first, min(count, PAGES - first)) for first, count in found]
)


def pages_of(ranges):
    return {page for first, count in ranges for page in range(first, first + count)}


def runs_of(pages):
    """Runs of neighbours in a set, the slow way."""
    starts = sorted(page for page in pages if page - 1 not in pages)
    ends = sorted(page + 1 for page in pages if page + 1 not in pages)
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def bits_of(pages):
    bits = new_bitmap(PAGES)
    for page in pages:
        bits[page // 64] |= 1 << page % 64
    return bits


def set_in(bits, pages=PAGES):
    return {page for page in range(pages) if bits[page // 64] >> page % 64 & 1}


@given(RANGES)
def test_ranges_are_set_bit_by_bit(ranges):
    bits = new_bitmap(PAGES)
    for first, count in ranges:
        lib.pv_bits_set(bits, first, count)
    assert set_in(bits, words_for(PAGES) * 64) == pages_of(ranges)
    assert lib.pv_bits_count(bits, PAGES) == len(pages_of(ranges))


@given(RANGES, RANGES, st.integers(0, PAGES))
def test_counting_or_and_taking(one, other, pages):
    a, b, words = bits_of(pages_of(one)), bits_of(pages_of(other)), words_for(PAGES)
    assert lib.pv_bits_count(a, pages) == len({page for page in pages_of(one) if page < pages})
    lib.pv_bits_or(a, b, words)
    assert set_in(a) == pages_of(one) | pages_of(other)
    assert set_in(b) == pages_of(other)
    target = bits_of(pages_of(one))
    assert lib.pv_bits_take(target, b, words) == len(pages_of(other))
    assert (set_in(target), set_in(b)) == (set_in(a), set())


@given(RANGES, st.integers(1, 7), st.integers(0, PAGES))
def test_runs_can_be_fetched_in_parts(ranges, room, pages):
    """With any room: none is left out, none is split; bits behind the last page do not count."""
    bits, expected = bits_of(pages_of(ranges)), runs_of({page for page in pages_of(ranges) if page < pages})
    assert lib.pv_bits_count_runs(bits, pages) == len(expected)
    cursor, part, found = ffi.new("uint64_t *"), ffi.new("struct pv_run_pages[]", room), []
    while cursor[0] < pages:
        got = lib.pv_bits_runs(bits, pages, cursor, part, room)
        found += [(run.first, run.count) for run in part[0:got]]
    assert found == expected


@given(RANGES)
def test_runs_are_the_set(ranges):
    pages = pages_of(ranges)
    runs = Runs(ranges)
    assert list(runs) == runs_of(pages) == [runs[i] for i in range(len(runs))]
    assert (len(runs), runs.pages, runs.bytes) == (len(runs_of(pages)), len(pages), len(pages) * PAGE_SIZE)
    assert runs.end == max(pages, default=-1) + 1
    assert {page for page in range(-1, PAGES + 1) if page in runs} == pages
    assert bool(runs) == bool(pages)
    bitmap = runs.bitmap()
    assert {page for page in range(len(bitmap) * 8) if bitmap[page // 8] >> page % 8 & 1} == pages
    again = [Runs(runs), Runs.from_bitmap(bitmap), Runs.from_bits(bits_of(pages), PAGES), Runs(reversed(list(runs)))]
    assert all(other == runs and hash(other) == hash(runs) for other in again)
    assert len(runs.bitmap(PAGES)) == words_for(PAGES) * 8


@given(RANGES, RANGES)
def test_union(one, other):
    both = Runs(one) | Runs(other)
    assert list(both) == runs_of(pages_of(one) | pages_of(other))
    assert both == Runs(other).union(Runs(one), Runs())
    assert (both == Runs(one)) == (pages_of(other) <= pages_of(one))


def test_runs_are_not_something_else():
    assert Runs([(1, 2)]) != [(1, 2)]
    assert Runs([(1, 2)]) != Runs([(1, 3)])
    assert "2 pages: 1+1, 3+1" in repr(Runs([(1, 1), (3, 1)]))


class Memory:
    """As much of GuestMemory as Runs look at."""

    def __init__(self, size):
        self.size = size
        self.regions = ram_regions(size)


def test_addresses_skip_the_hole():
    hole = HOLE_START // PAGE_SIZE
    runs = Runs([(0, 2), (hole - 1, 3), (hole + 10, 1)])
    found = [(gpa.value, size) for gpa, size in runs.gfns(Memory(4 * GIB))]
    assert found == [
        (0, 2 * PAGE_SIZE),
        (HOLE_START - PAGE_SIZE, PAGE_SIZE),
        (HOLE_END, 2 * PAGE_SIZE),
        (HOLE_END + 10 * PAGE_SIZE, PAGE_SIZE),
    ]
    assert sum(size for _, size in found) == runs.bytes


def test_pages_that_cannot_be():
    for bad in ((-1, 1), (0, -1), (MAX_PAGES, 1), (1, MAX_PAGES)):
        with pytest.raises(BadInput, match="pages are counted from 0"):
            Runs([bad])
    with pytest.raises(BadInput, match="page 16384 is beyond the VM's RAM of 16384 pages"):
        list(Runs([(16384, 1)]).gfns(Memory(64 << 20)))
    with pytest.raises(BadInput, match="beyond"):
        Runs([(8, 1)]).bitmap(8)
    for index in (1, -2):
        with pytest.raises(IndexError):
            Runs([(3, 4)])[index]


def test_bits_set_while_they_are_taken_are_not_lost():
    """One thread sets each bit once, another takes until it has them all."""
    pages = 1 << 16
    words = words_for(pages)
    source, taken = new_bitmap(pages), new_bitmap(pages)

    def write():
        for first in range(pages):
            lib.pv_bits_set(source, first, 1)

    writer = threading.Thread(target=write)
    writer.start()
    count = 0
    while writer.is_alive():
        count += lib.pv_bits_take(taken, source, words)
    writer.join()
    count += lib.pv_bits_take(taken, source, words)
    assert count == lib.pv_bits_count(taken, pages) == pages
