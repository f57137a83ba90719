# test_reclaim_simulator.py: the simulator of victim policies beside a naive one; Belady's bound beside all that could
# be done; what policies choose; policies that fail.
from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reclaim_help import Chaos, Lru, trace_of, traces

from pyvmm.errors import BadInput
from pyvmm.memory.reclaim.opt import optimum
from pyvmm.memory.reclaim.policies import POLICIES, Activity, Clock, SharingFirst
from pyvmm.memory.reclaim.policy import BLOCK_PAGES, Block, Policy, Share, View, find
from pyvmm.memory.reclaim.simulator import simulate
from pyvmm.memory.reclaim.synthetic import KINDS, make
from pyvmm.memory.reclaim.trace import Duplicates, Sample, Trace

ALL = [*POLICIES.values(), Lru, Chaos]
SIZES = st.sampled_from([1, 5, 12, BLOCK_PAGES, BLOCK_PAGES + 7, 3 * BLOCK_PAGES])


def block_of(page):
    return page // BLOCK_PAGES


def naive(trace, policy_class, limit, seed, large):
    """The same as simulate(), page by page, with sets."""
    view = View(trace.pages, limit, seed)
    policy = policy_class(view)
    here, away, shared, marked, slots, touched, whole, broken, blocks = (set() for _ in range(9))
    count = dict.fromkeys(("faults", "refaults", "read", "written", "saved", "zeros", "shared", "unshared"), 0)

    def look():
        view.resident[:] = bytes(page in here for page in range(trace.pages))
        view.present[:] = [sum(block_of(page) == block for page in here) for block in range(view.blocks)]
        view.large[:] = bytes(block in whole for block in range(view.blocks))
        view.used = len(here)

    def go(page, to):
        here.remove(page)
        to.add(page)
        if to is away:
            kind = "zeros" if page not in touched else "saved" if page in slots else "written"
            count[kind] += 1
            slots.update({page} & touched)
        else:
            count["shared"] += 1
        look()
        policy.left(page)

    def room(size):
        victims = iter(policy.victims(len(here) + size - limit)) if len(here) + size > limit else None
        while len(here) + size > limit:
            victim = next(victims)
            block = victim.number if isinstance(victim, (Block, Share)) else block_of(victim)
            if not isinstance(victim, Block) and block in whole:
                whole.remove(block)
                broken.add(block)
            if isinstance(victim, int):
                go(victim, away)
            for page in sorted(page for page in here if block_of(page) == block):
                if isinstance(victim, Block) or (isinstance(victim, Share) and page in marked):
                    go(page, away if isinstance(victim, Block) else shared)

    def fault(page):
        count["faults"] += 1
        count["refaults"] += page in away
        count["unshared"] += page in shared
        if large and page not in away | shared:
            whole.add(block_of(page))
            blocks.add(block_of(page))
        coming = [p for p in range(trace.pages) if block_of(p) == block_of(page)] if block_of(page) in whole else [page]
        room(len(coming))
        for each in coming:
            count["read"] += each in away and each in slots
            away.discard(each)
            shared.discard(each)
            here.add(each)
        look()
        for each in coming:
            policy.came(each)

    steps = list(trace.events)
    for place, word in enumerate([*trace.words, None]):
        while steps and steps[0][0] == place:
            event = steps.pop(0)[1]
            if isinstance(event, Sample):
                policy.sampled(event.block, event.bits)
                continue
            marked.update(event.pages())
            of_block = [page % BLOCK_PAGES for page in marked if block_of(page) == event.block]
            policy.scanned(event.block, sum(1 << bit for bit in of_block))
        if word is None:
            break
        page, write = word >> 1, bool(word & 1)
        if page in shared and not write:
            continue
        if page not in here:
            fault(page)
        if write:
            marked.discard(page)
            slots.discard(page)
        touched.add(page)
        policy.touched(page, write)
    return count | {"blocks": len(blocks), "broken": len(broken), "large": len(whole)}


@given(traces(SIZES, 25), st.sampled_from(ALL), st.integers(0, 3), st.booleans(), st.data())
@settings(max_examples=120, deadline=None)
def test_the_same_as_a_naive_simulator(trace, policy, seed, large, data):
    least = min(trace.pages, BLOCK_PAGES) if large else 1
    limit = data.draw(st.integers(least, min(trace.pages, least + 6)))
    trace.add(Sample(0, 0))  # the simulator does not sample then
    expected = naive(trace, policy, limit, seed, large)
    outcome = simulate(trace, policy, limit, seed=seed, large=large)
    assert {name: getattr(outcome, name) for name in expected} == expected


@given(traces(SIZES), st.sampled_from(ALL), st.booleans(), st.booleans(), st.integers(1, 30), st.data())
@settings(max_examples=200, deadline=None)
def test_no_policy_reads_less_than_the_optimum(trace, policy, large, blind, window, data):
    limit = data.draw(st.integers(min(trace.pages, BLOCK_PAGES) if large else 1, trace.pages))
    bound = optimum(trace, limit)
    outcome = simulate(trace, policy, limit, large=large, blind=blind, window=window)
    assert bound.read <= outcome.read
    if limit >= trace.pages:
        assert outcome.read == 0


@given(traces(st.integers(1, 5), 12, events=False), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_the_optimum_is_the_least_of_all_choices(trace, limit):
    pages = [word >> 1 for word in trace.words]

    @cache
    def least(place, here):
        if place == len(pages):
            return 0
        page = pages[place]
        if page in here:
            return least(place + 1, here)
        cost = page in pages[:place]
        choices = [here] if len(here) < limit else [here - {out} for out in here]
        return cost + min(least(place + 1, rest | {page}) for rest in choices)

    assert optimum(trace, limit).refaults == least(0, frozenset())


# ---- figures that are known ----


def test_known_figures():
    """Two pages of memory, LRU: 0 1 2 0 0w 3 4: what is clean and stored goes for nothing."""
    trace = trace_of(5, [(0, True), (1, False), (2, False), (0, False), (3, False), (4, False), (0, True), (1, False)])
    outcome = simulate(trace, Lru, 2, large=False)
    assert (outcome.faults, outcome.refaults, outcome.read) == (8, 3, 3)
    assert (outcome.written, outcome.saved) == (5, 1)
    assert optimum(trace, 2).refaults == 1


def test_a_block_goes_and_comes_whole_and_a_page_breaks_it():
    class Whole(Policy):
        def victims(self, wanted):
            return [Block(number) for number, count in enumerate(self.view.present) if count]

    trace = trace_of(2 * BLOCK_PAGES, [(0, True), (BLOCK_PAGES, True), (1, False), (BLOCK_PAGES, False)])
    outcome = simulate(trace, Whole, BLOCK_PAGES)
    assert (outcome.faults, outcome.refaults, outcome.read, outcome.large, outcome.blocks) == (4, 2, 2, 2, 2)
    assert (outcome.written, outcome.saved, outcome.zeros) == (3, 1, 3 * BLOCK_PAGES - 4)
    broken = simulate(trace, Lru, BLOCK_PAGES)
    assert (broken.large, broken.broken) == (0, 2)


def test_shared_pages_are_read_at_their_twin_and_written_apart():
    steps = [(0, True), Duplicates(0, 1), (BLOCK_PAGES, True), (0, False), (0, True)]
    trace = trace_of(BLOCK_PAGES + 1, steps)
    outcome = simulate(trace, SharingFirst, BLOCK_PAGES)
    assert outcome.shared == 0  # one duplicate is not worth a large page
    many = trace_of(BLOCK_PAGES + 1, [steps[0], Duplicates(0, (1 << 100) - 1), *steps[2:]])
    outcome = simulate(many, SharingFirst, BLOCK_PAGES)
    assert (outcome.shared, outcome.unshared, outcome.written, outcome.read) == (100, 1, 0, 0)
    assert outcome.faults == 3
    assert optimum(many, 1).read == 0


# ---- what policies choose ----


def view_of(here, pages=4 * BLOCK_PAGES, limit=4 * BLOCK_PAGES):
    view = View(pages, limit)
    for block in here:
        view.resident[block * BLOCK_PAGES : (block + 1) * BLOCK_PAGES] = b"\1" * BLOCK_PAGES
        view.present[block] = BLOCK_PAGES
        view.large[block] = 1
        view.used += BLOCK_PAGES
    return view


def first(policy, count):
    victims = iter(policy.victims(1))
    return [next(victims) for _ in range(count)]


def test_clock_gives_a_second_chance():
    policy = Clock(view_of([0], pages=BLOCK_PAGES))
    for page in (0, 1, 3):
        policy.touched(page, False)
    assert first(policy, 2) == [2, 4]
    assert next(iter(policy.victims(1))) == 5
    assert 0 in first(policy, 2 * BLOCK_PAGES - 10)


def test_activity_takes_cold_blocks_whole_and_then_what_is_cold_in_others():
    policy = Activity(view_of([0, 1, 2]))
    policy.sampled(0, (1 << 100) - 1)
    policy.sampled(1, 0)
    policy.sampled(2, 0b101)
    assert first(policy, 3) == [Block(1), 2 * BLOCK_PAGES + 1, 2 * BLOCK_PAGES + 3]


def test_sharing_comes_first_in_the_order_of_duplicates_and_spares_what_is_hot():
    policy = SharingFirst(view_of([0, 1, 2, 3]))
    for block, count in enumerate((40, 300, 500, 3)):
        policy.scanned(block, (1 << count) - 1)
        policy.sampled(block, (1 << 200) - 1 if block == 2 else 0)
    assert first(policy, 2) == [Share(1), Share(0)]


def test_the_threshold_falls_with_free_memory():
    thresholds = []
    for used in range(5):
        view = view_of(range(used), pages=64 * BLOCK_PAGES, limit=16 * BLOCK_PAGES)
        view.used = (12 + used) * BLOCK_PAGES
        thresholds.append(SharingFirst(view).threshold())
    assert thresholds[0] == BLOCK_PAGES
    assert thresholds[-1] == 16
    assert thresholds == sorted(thresholds, reverse=True)


def test_activity_keeps_what_is_hot_where_random_does_not():
    trace = make("hotcold", 16 * BLOCK_PAGES, 40_000, 3)
    read = {name: simulate(trace, policy, 4 * BLOCK_PAGES, window=2000).read for name, policy in POLICIES.items()}
    assert optimum(trace, 4 * BLOCK_PAGES).read < read["activity"] < read["random"]
    assert read["clock"] < read["random"]


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_traces_are_the_same_again(kind):
    one, same, other = (make(kind, 3000, 2500, seed) for seed in (1, 1, 2))
    assert (len(one), one.words, one.events) == (2500, same.words, same.events)
    assert one.words != other.words
    assert {word >> 1 for word in one.words} <= set(range(3000))


# ---- policies of one's own ----

GOOD = """
from pyvmm.memory.reclaim.policy import Policy

class Last(Policy):
    def victims(self, wanted):
        while self.view.used:
            yield self.view.resident.rfind(1)
"""
# what is in the file, the class, what is said
BAD = [
    ("", "Last", "Last is no class made from"),
    ("class Last: pass", "Last", "Last is no class made from"),
    ("import no.such", "Last", "line 1: ModuleNotFoundError: "),
    ("x = (", "Last", ", line 1: no Python: "),
    (GOOD.replace("victims", "other"), "Last", "Last has no method victims()"),
]
# the body of victims(), what is said
FAILING = [
    ("return []", "victims(1) ended, and 1 pages are missing"),
    ("return [7, 7]", "7 is no page in memory"),
    ("return [-1]", "-1 is no page in memory"),
    ("return ['a']", "'a' is no page in memory"),
    ("return [Block(9)]", "block 9 has no page in memory"),
    ("return [Share(0)]", "victims(1) ended, and 1 pages are missing"),
    ("while True: yield Share(0)", "Share() of 2 blocks gave no page"),
    ("return [Share(1)]", "block 1 has no page in memory"),
    ("return 1 // 0", "line 6: ZeroDivisionError: "),
    ("return None", "victims(1) gave None: give a list, or yield"),
]


def test_a_policy_of_ones_own(tmp_path):
    path = tmp_path / "p.py"
    path.write_text(GOOD)
    trace = trace_of(9, [(page % 9, True) for page in range(30)])
    outcome = simulate(trace, find(f"{path}:Last"), 4, large=False)
    assert outcome.faults > 9


@pytest.mark.parametrize(("text", "name", "said"), BAD)
def test_a_file_that_has_no_policy_is_refused(tmp_path, text, name, said):
    path = tmp_path / "p.py"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        find(f"{path}:{name}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no", "no.py:A", ":", "a:", ":b", "no:"])
def test_an_unknown_policy_is_refused(name):
    with pytest.raises(BadInput):
        find(name)


@pytest.mark.parametrize(("body", "said"), FAILING)
def test_a_policy_that_fails_is_told_in_one_line(tmp_path, body, said):
    path = tmp_path / "p.py"
    path.write_text(f"from pyvmm.memory.reclaim.policy import Policy, Block, Share\n\n\nclass Bad(Policy):\n"
                    f"    def victims(self, wanted):\n        {body}\n")  # fmt: skip
    with pytest.raises(BadInput) as caught:
        simulate(trace_of(9, [(0, True), (1, True), (2, False)]), find(f"{path}:Bad"), 2, large=False)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_limit_that_is_too_low():
    with pytest.raises(BadInput, match="at least 512 are needed"):
        simulate(Trace(1000), Lru, 511)
    with pytest.raises(BadInput, match="at least 1 are needed"):
        optimum(Trace(1000), 0)


def test_the_policy_of_the_documents_runs(tmp_path):
    text = (Path(__file__).parents[2] / "docs/reclaim.md").read_text()
    path = tmp_path / "mine.py"
    path.write_text(text.split("```python\n")[1].split("```")[0])
    trace = trace_of(3, [(0, True), (1, True), (0, True), (2, True), (0, True)])
    assert simulate(trace, find(f"{path}:Fifo"), 2, large=False).refaults == 1


def test_a_shared_page_takes_no_memory_of_the_optimum_while_it_is_read():
    trace = trace_of(2, [(0, True), Duplicates(0, 1), (1, True), (0, False), (1, False), (0, False), (1, False)])
    assert optimum(trace, 1).refaults == 0
    trace.touch(0, True)
    trace.touch(1, False)
    assert optimum(trace, 1).refaults == 1
