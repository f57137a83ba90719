# test_fleet_simulator.py: fleets on paper: pages neither come from nowhere nor get lost, and what is known to be better
# is found to be.
from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import BadInput
from pyvmm.fleet.demand import CLASSES, Classes
from pyvmm.fleet.plan import Target
from pyvmm.fleet.policy import POLICIES, ClassBased
from pyvmm.fleet.simulator import Outcome, _Vm, simulate
from pyvmm.fleet.synthetic import Series, load, make, three
from pyvmm.layout import MIB, PAGE_SIZE


def outcomes(fleet, budget, ticks=30):
    return {name: simulate(fleet, budget, policy(), name, ticks) for name, policy in POLICIES.items()}


@pytest.mark.parametrize("share", [0.6, 0.7, 0.8])
def test_by_class_costs_a_fifth_of_the_best_fixed_way_for_three_unlike_guests(share):
    fleet = three(ticks=60)
    found = outcomes(fleet, int(share * 3 * 256 * MIB), 60)
    least = min(found[name].refaults for name in ("balloon-only", "swap-only"))
    assert least >= 5 * found["class-based"].refaults > 0
    assert found["class-based"].slowdown < found["swap-only"].slowdown
    assert found["class-based"].over <= 0.02


def test_with_all_the_memory_nothing_is_given_up():
    for outcome in outcomes(three(), 3 * 256 * MIB).values():
        assert (outcome.refaults, outcome.ballooned, outcome.swapped, outcome.over) == (0, 0, 0, 0)
        assert (outcome.slowdown, outcome.states["low"], outcome.states["hard"]) == (1.0, 0, 0)


def test_a_guest_alone_that_uses_more_than_it_gets():
    """All of 64 MiB is touched in each tick, and 32 are there: the other 32 come back, whatever goes for them."""
    fleet = [Series("x", 64 * MIB, [Classes(active_anonymous=64 * MIB)], balloon=False)]
    outcome = simulate(fleet, 32 * MIB, ClassBased(), "x", ticks=11)
    assert outcome.refaults == 10 * 32 * MIB // PAGE_SIZE
    assert outcome.worst == pytest.approx(1 + outcome.refaults * 0.0002 / 11)


def test_a_free_page_that_the_host_swapped_is_read_for_nothing():
    fleet = [Series("x", 64 * MIB, [Classes(free=64 * MIB)], balloon=False)]
    outcome = simulate(fleet, 32 * MIB, ClassBased(), "x", ticks=10)
    assert outcome.stale == outcome.refaults > 0


def test_double_paging():
    """A guest that is to swap by itself what the host has swapped has it read first."""
    vm = _Vm(Series("x", 64 * MIB, [Classes(active_anonymous=64 * MIB)], swap=True))
    vm.swap["active_anonymous"] = 32 * MIB
    outcome = Outcome("x")
    vm.follow(Target("x", 0, 64 * MIB, 4 * MIB, None), outcome)
    assert outcome.refaults == 2 * MIB // PAGE_SIZE
    assert vm.resident == 30 * MIB


ROUNDED = 6 * PAGE_SIZE
pages = st.integers(0, 4096).map(lambda count: count * PAGE_SIZE)


@settings(max_examples=100)
@given(
    st.lists(st.builds(Classes, *[pages] * 6), min_size=1, max_size=4),
    st.lists(st.tuples(pages, pages), min_size=1, max_size=8),
    st.booleans(),
)
def test_no_class_ever_lacks_more_than_it_has(looks, targets, swap):
    memory = max(PAGE_SIZE, *(look.total for look in looks))
    for look in looks:  # a guest's classes are all of its memory
        look.free += memory - look.total
    vm = _Vm(Series("x", memory, looks, swap=swap))
    outcome = Outcome("x")
    for tick, (ceiling, balloon) in enumerate(targets):
        vm.turn(tick)
        vm.touch(outcome)
        assert vm.resident <= max(vm.ceiling, vm.use["unreclaimable"]) + ROUNDED
        vm.follow(Target("x", 0, ceiling, balloon, None), outcome)
        for name in CLASSES:
            assert min(vm.balloon[name], vm.swap[name], vm.here(name)) >= 0
        assert vm.resident <= max(ceiling, vm.use["unreclaimable"]) + ROUNDED


def test_the_same_seed_is_the_same_fleet():
    assert make(5, 10, 3) == make(5, 10, 3) != make(5, 10, 4)
    for series in make(20, 30, 1):
        assert {look.total for look in series.looks} == {series.memory}


# ---- recorded ----


def line(**fields):
    return json.dumps(
        {"event": "demand", "vm": "a", "memory": 6 * MIB, "classes": Classes(*[MIB] * 6).as_dict()} | fields
    )


def test_a_log_of_a_fleet_is_a_trace(tmp_path):
    path = tmp_path / "log"
    path.write_text(
        "\n".join(
            [
                line(shares=7, reservation=5, limit=6 * MIB, balloon=False, swap=True),
                '{"event": "state", "state": "soft"}',
                line(classes=None),
                line(vm="b"),
                line(),
            ]
        )
    )
    first, second = load(str(path))
    assert (first.name, first.shares, first.reservation, first.limit) == ("a", 7, 5, 6 * MIB)
    assert (first.balloon, first.swap, len(first.looks)) == (False, True, 2)
    assert (second.name, second.shares, len(second.looks)) == ("b", 60, 1)
    assert simulate([first, second], 12 * MIB, ClassBased(), "x").refaults == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no line of it"),
        ("{", "line 1: no JSON object"),
        ("[]", "line 1: no JSON object"),
        ("[" * 60000, "line 1: no JSON object"),
        (line() + "\n" + line(vm=5), "line 2: a demand has vm, a name"),
        (line(memory=0), "line 1: a demand has vm"),
        (line(memory=True), "line 1: a demand has vm"),
        (line(classes={"free": 1}), "line 1: classes are six numbers"),
        (line(shares=0), "line 1: shares is a whole number, 1 to"),
        (line(limit="x"), "line 1: limit is a whole number"),
        ("x" * 100_000, "line 1: no JSON object"),
    ],
)
def test_what_is_no_trace(tmp_path, text, words):
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(BadInput, match=words) as caught:
        load(str(path))
    assert str(path) in str(caught.value)


def test_what_is_no_fleet(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        load(str(tmp_path / "none"))
    with pytest.raises(BadInput, match="0 VMs: give 1 to 4096"):
        make(0, 1)
    with pytest.raises(BadInput, match="a fleet without any VM"):
        simulate([], MIB, ClassBased(), "x")
