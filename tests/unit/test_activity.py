# test_activity.py: the working set from samples of populations that are known, the heat map, options. Needs no KVM.
from __future__ import annotations

import random

import pytest

from pyvmm import BadInput
from pyvmm.layout import MIB
from pyvmm.memory import GuestMemory
from pyvmm.memory.activity import HeatMap, Sampler, WorkingSet
from pyvmm.memory.activity.working_set import BLOCK_PAGES, student

SEEDS = 1000


def truth(kind, blocks, rng):
    """Pages in use of each block."""
    if kind == "few hot":
        return [BLOCK_PAGES if i < blocks // 5 else 0 for i in range(blocks)]
    if kind == "half":
        return [BLOCK_PAGES if i % 2 else rng.randrange(32) for i in range(blocks)]
    pages = [int(rng.paretovariate(0.8)) for _ in range(blocks)]  # zipf: few have much
    return [BLOCK_PAGES if each >= 32 else each for each in pages]


def estimated(pages, count, rng, period=30.0):
    found = WorkingSet(period)
    for block in rng.sample(range(len(pages)), count):
        found.add(block, pages[block], pages[block] == BLOCK_PAGES, 1.0)
    return found.estimate(len(pages), 2.0)


@pytest.mark.parametrize(
    ("kind", "blocks", "count", "least"),
    [("few hot", 400, 60, 0.93), ("half", 400, 40, 0.93), ("half", 60, 40, 0.93), ("half", 4000, 12, 0.90),
     ("zipf", 1000, 200, 0.91)],
)  # fmt: skip
def test_the_interval_has_the_truth_in_95_of_100_cases(kind, blocks, count, least):
    """In somewhat fewer where few samples, or few blocks that are hot, say little of the spread."""
    rng = random.Random(kind)
    pages = truth(kind, blocks, rng)
    inside, total = 0, 0.0
    for seed in range(SEEDS):
        found = estimated(pages, count, random.Random(seed))
        assert found.low <= found.pages <= found.high
        inside += found.low <= sum(pages) <= found.high
        total += found.pages
    assert least <= inside / SEEDS <= 0.985
    assert total / SEEDS == pytest.approx(sum(pages), rel=0.03)  # it has no bias


def test_all_blocks_sampled_leave_no_doubt():
    pages = truth("half", 50, random.Random(1))
    found = estimated(pages, 50, random.Random(2))
    assert (found.low, found.pages, found.high) == (sum(pages),) * 3
    assert (found.blocks, found.samples, found.active) == (50, 50, 25)


@pytest.mark.parametrize("value", [0, BLOCK_PAGES])
def test_samples_that_are_all_alike_do_not_say_that_all_is(value):
    found = estimated([value] * 1000, 20, random.Random(1))
    assert found.pages == 1000 * value
    assert found.high - found.low > 100 * BLOCK_PAGES
    rng, wrong = random.Random(3), 0
    pages = [BLOCK_PAGES] * 30 + [0] * 970  # 20 samples often see none of these
    for _ in range(SEEDS):
        one = estimated(pages, 20, rng)
        wrong += not one.low <= sum(pages) <= one.high
    assert wrong / SEEDS < 0.05


def test_nothing_known_may_be_anything():
    found = WorkingSet().estimate(10, 0.0)
    assert (found.low, found.high, found.samples) == (0, 10 * BLOCK_PAGES, 0)
    assert WorkingSet().estimate(0, 0.0).pages == 0


def test_the_last_sample_of_a_block_counts_and_old_ones_do_not():
    found = WorkingSet(10)
    found.add(1, 5, False, 0.0)
    found.add(2, 7, False, 5.0)
    found.add(1, 9, False, 6.0)
    assert found.estimate(2, 8.0).pages == 16
    assert found.estimate(2, 15.5).pages == 18  # of block 1 alone
    assert found.estimate(2, 30.0).samples == 0
    found.add(3, 40, True, 31.0)
    assert found.estimate(1, 31.0).pages == BLOCK_PAGES


@pytest.mark.parametrize(
    ("freedom", "right"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (29, 2.045), (1000, 1.962)]
)
def test_students_quantiles(freedom, right):
    assert student(freedom) == pytest.approx(right, rel=0.006)


def test_a_heat_map_has_means_and_gaps():
    found = HeatMap(8)
    assert found.cells(2, 3) == [[None] * 3] * 2
    for at, block, touched in ((0.0, 0, 10), (0.1, 3, 30), (1.0, 4, 7), (3.0, 7, 9)):
        found.add(block, touched, at)
    assert found.span == (0.0, 3.0)
    assert found.cells(2, 3) == [[20, None, None], [None, 7, 9]]
    assert found.held(2, 3) == [[20, 20, 20], [None, 7, 9]]
    assert found.cells(1, 1) == [[14]]
    assert found.first_blocks(2) == [0, 4]
    assert [found.first_blocks(3)[row * 3 // 8] <= row for row in range(8)] == [True] * 8
    assert len(found) == 4


@pytest.mark.parametrize(
    ("options", "text"),
    [({"window": 0.0}, "a window of 0 s"), ({"share": 0.0}, "a share of 0"), ({"share": 1.5}, "a share of 1.5"),
     ({"threshold": 0}, "a threshold of 0"), ({"threshold": 513}, "a threshold of 513"),
     ({"order": "best"}, "order='best': choose random or clock"), ({"budget": 0.0}, "a budget of 0"),
     ({"budget": float("nan")}, "a budget of nan"), ({"window": float("nan")}, "a window of nan"),
     ({"cpus": 0}, "0 vCPUs")],
)  # fmt: skip
def test_options_that_cannot_be(options, text):
    memory = GuestMemory(16 * MIB)
    try:
        with pytest.raises(BadInput, match=text):
            Sampler(memory, **options)
        with pytest.raises(BadInput, match="a working set of the last 0 s"):
            WorkingSet(0)
    finally:
        memory.close()
