# test_fleet.py: who of a fleet gets how much, and how the rest goes: properties of what is decided, without any VM.
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import BadInput
from pyvmm.fleet.admission import admit
from pyvmm.fleet.demand import CLASSES, MOST, Classes, Demand, WorkingSet, classes_of
from pyvmm.fleet.entitle import entitle
from pyvmm.fleet.means import ORDER, Split, by_class
from pyvmm.fleet.plan import Planner, plan
from pyvmm.fleet.policy import POLICIES, ClassBased, Policy, find
from pyvmm.fleet.states import STATES, TABLE, State, check_table, next_state
from pyvmm.layout import MIB

sizes = st.integers(0, 1 << 36)
few = settings(max_examples=40, deadline=None)
classes = st.builds(Classes, *[sizes] * 6)


@st.composite
def demands(draw, number=0):
    memory = draw(st.integers(1, 1 << 36))
    limit = draw(st.none() | st.integers(1, memory))
    return Demand(
        f"vm{number}", memory, draw(st.none() | st.integers(1, 100_000)),
        draw(st.integers(0, memory if limit is None else limit)) // 4, limit, draw(st.integers(0, memory)),
        draw(st.none() | classes), draw(st.booleans()), draw(st.booleans()),
        draw(st.none() | st.builds(WorkingSet, st.integers(0, memory))),
        wanted=draw(st.none() | st.integers(0, memory)), ballooned=draw(sizes), swapped=draw(sizes),
    )  # fmt: skip


@st.composite
def fleets(draw):
    vms = [draw(demands(number)) for number in range(draw(st.integers(1, 6)))]
    reserved = sum(vm.reservation for vm in vms)
    return vms, draw(st.integers(max(1, reserved), 1 << 39))


def alike(count=2, **fields):
    return [Demand(f"vm{number}", 64 * MIB, **fields) for number in range(count)]


# ---- entitlements ----


class TestEntitle:
    @few
    @given(fleets(), st.floats(0, 0.99))
    def test_all_of_the_budget_or_all_that_is_wanted_within_bounds(self, fleet, tax):
        vms, budget = fleet
        found = entitle(vms, budget, tax)
        assert sum(found) == min(budget, sum(vm.most for vm in vms))
        for vm, got in zip(vms, found, strict=True):
            assert vm.reservation <= got <= vm.most

    @few
    @given(fleets(), st.integers(1, 100_000))
    def test_more_shares_never_get_less(self, fleet, more):
        vms, budget = fleet
        before = entitle(vms, budget)
        vms[0].shares += more
        assert entitle(vms, budget)[0] >= before[0] - 1  # a byte: what is left of the division goes by turns

    @few
    @given(fleets(), st.integers(1, 1 << 36))
    def test_a_larger_budget_takes_from_nobody(self, fleet, more):
        vms, budget = fleet
        for before, after in zip(entitle(vms, budget), entitle(vms, budget + more), strict=True):
            assert after >= before - 1

    @few
    @given(fleets(), st.integers(0, 1 << 36))
    def test_who_uses_less_never_gets_more(self, fleet, less):
        vms, budget = fleet
        vms[0].working_set = WorkingSet(vms[0].memory)
        before = entitle(vms, budget)
        vms[0].working_set = WorkingSet(max(0, vms[0].memory - less))
        assert entitle(vms, budget)[0] <= before[0] + 1

    def test_by_shares(self):
        vms = alike()
        vms[1].shares = 3 * vms[0].shares
        assert entitle(vms, 64 * MIB) == [16 * MIB, 48 * MIB]

    def test_an_idle_page_costs_four_in_use(self):
        """rho = S / (P (f + k (1 - f))): both pay the same at 64 pages all of which are in use, and at 16 idle ones."""
        vms = alike()
        vms[0].working_set, vms[1].working_set = WorkingSet(64 * MIB), WorkingSet(0)
        active, idle = entitle(vms, 40 * MIB)
        assert (active, idle) == (32 * MIB, 8 * MIB)
        assert entitle(vms, 40 * MIB, tax=0.0) == [20 * MIB, 20 * MIB]

    def test_what_is_active_is_charged_as_such_whatever_it_holds(self):
        vms = alike()
        vms[0].working_set, vms[1].working_set = WorkingSet(64 * MIB), WorkingSet(10 * MIB)
        busy, partly = entitle(vms, 60 * MIB)
        assert busy + partly == 60 * MIB
        price = busy  # S / rho of the busy one
        assert abs(10 * MIB + 4 * (partly - 10 * MIB) - price) < 16

    def test_a_reservation_is_kept_and_the_others_share_the_rest(self):
        vms = alike(3)
        vms[0].reservation = 40 * MIB
        assert entitle(vms, 60 * MIB) == [40 * MIB, 10 * MIB, 10 * MIB]

    def test_reservations_beyond_the_budget_and_taxes_that_are_none(self):
        vms = alike(reservation=40 * MIB)
        with pytest.raises(BadInput, match="the reservations of all VMs are 83886080 bytes, and the budget is 1048576"):
            entitle(vms, MIB)
        with pytest.raises(BadInput, match="a tax of 1"):
            entitle(vms, 100 * MIB, 1.0)

    def test_the_upper_end_of_an_estimate_counts(self):
        assert Demand("x", MIB, working_set=WorkingSet(5, 3, 9), classes=Classes(1, 1, 1)).active == 9
        assert Demand("x", MIB, classes=Classes(1, 2, 4, 8, 16, 32)).active == 7
        assert Demand("x", MIB).active is None


# ---- states ----


class TestStates:
    @pytest.mark.parametrize(
        ("frees", "states"),
        [
            ((0.5, 0.11, 0.09, 0.11, 0.12), "high high clear clear high"),
            ((0.055, 0.04, 0.055, 0.07, 0.2), "clear soft soft clear high"),
            ((-0.03, -0.01, 0.0, -0.01), "hard hard soft soft"),
            ((-0.5, -0.05, -0.03, 0.5), "low low hard high"),
            ((0.5, -0.07), "high low"),
        ],
    )
    def test_hysteresis(self, frees, states):
        state, found = "high", []
        for free in frees:
            state = next_state(TABLE, state, free).name
            found.append(state)
        assert " ".join(found) == states

    @few
    @given(st.floats(-2, 1), st.sampled_from(STATES))
    def test_it_rests_where_nothing_changes(self, free, now):
        first = next_state(TABLE, now, free)
        assert next_state(TABLE, first.name, free) == first

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda table: table[:-1], "has these, in this order: high, clear, soft, hard, low"),
            (lambda table: [*table[:4], State("low", 0.0, 0.1, ())], "low: it is worse than hard"),
            (lambda table: [*table[:4], State("low", -0.1, -0.2, ())], "low: it ends above -0.2, and begins below"),
            (lambda table: [*table[:4], State("low", -0.1, -0.1, ("magic",))], "low: no means 'magic'"),
        ],
    )
    def test_tables_that_are_none(self, change, words):
        with pytest.raises(BadInput, match=words):
            check_table(change(list(TABLE)))

    def test_the_one_that_is_there(self):
        assert check_table(TABLE) == TABLE


# ---- means ----

BOTH = ("balloon", "swap")
MIX = Classes(*(MIB * part for part in (1, 2, 4, 8, 16, 32)))


def of(**fields):
    return Demand("x", 63 * MIB, resident=63 * MIB, classes=MIX, **fields)


class TestByClass:
    @pytest.mark.parametrize(
        ("over", "balloon", "swap"),
        [(10, 10, 0), (48, 48, 0), (50, 48, 2), (56, 48, 8), (60, 52, 8), (62, 52, 10), (63, 52, 10)],
    )
    def test_the_order(self, over, balloon, swap):
        """Free 32 and idle buffers 16 by balloon; 8 anonymous; then active ones; never what is unreclaimable."""
        assert by_class(of(balloon=True), over * MIB, BOTH) == Split(balloon * MIB, swap * MIB)

    def test_what_nobody_misses_in_the_swap_goes_before_buffers(self):
        """10 MiB are in the swap. While they stay there, 10 of the 16 buffers may stay too; if they come back, none."""
        assert by_class(of(balloon=True, swapped=10 * MIB), 48 * MIB, ("balloon",)) == Split(38 * MIB, 10 * MIB)
        missed = of(balloon=True, swapped=10 * MIB, returned=6 * MIB // 4096)
        assert by_class(missed, 48 * MIB, ("balloon",)) == Split(44 * MIB, 4 * MIB)
        assert by_class(of(balloon=True, swapped=10 * MIB), 20 * MIB, ("balloon",)) == Split(20 * MIB, 0)

    def test_a_guest_that_swaps_gives_all_of_it_by_balloon(self):
        assert by_class(of(balloon=True, swap=True), 62 * MIB, BOTH) == Split(62 * MIB, 0)

    def test_where_the_balloon_is_not_allowed_or_not_there(self):
        assert by_class(of(balloon=True), 40 * MIB, ("swap",)) == Split(0, 40 * MIB)
        assert by_class(of(), 40 * MIB, BOTH) == Split(0, 40 * MIB)

    def test_where_swap_is_not_allowed_anonymous_pages_stay(self):
        assert by_class(of(balloon=True), 60 * MIB, ("balloon",)) == Split(52 * MIB, 0)

    def test_where_nobody_knows_the_classes(self):
        vm = Demand("x", MIB, resident=MIB, balloon=True)
        assert by_class(vm, 100, BOTH) == Split(0, 100)
        assert by_class(vm, 100, ("balloon",)) == Split(100, 0)
        assert by_class(vm, 100, ()) == Split(0, 0)

    @few
    @given(demands(), sizes, st.sets(st.sampled_from(BOTH)))
    def test_never_more_than_asked_nor_by_what_is_forbidden(self, vm, over, means):
        split = by_class(vm, over, means)
        assert 0 <= split.total <= over
        assert split.swap <= vm.resting or "swap" in means
        assert not split.balloon or ("balloon" in means and vm.balloon)

    def test_each_class_but_one_may_go(self):
        assert {*ORDER, "unreclaimable"} == set(CLASSES)


class TestWhatGuestsSay:
    def test_names_as_people_write_them(self):
        found = classes_of({name.replace("_", " "): 7 for name in CLASSES}, 100)
        assert found == Classes(7, 7, 7, 7, 7, 7)

    @pytest.mark.parametrize(
        "change",
        [{"free": -1}, {"free": 1.5}, {"free": True}, {"free": MOST + 1}, {"free": "1"}, dict.fromkeys(CLASSES)],
    )
    def test_what_is_none(self, change):
        assert classes_of(MIX.as_dict() | change, MIB) is None
        assert classes_of([], MIB) is None
        assert classes_of({}, MIB) is None

    def test_who_says_that_nothing_can_be_had_is_half_believed(self):
        found = classes_of(Classes(unreclaimable=100).as_dict(), 100)
        assert found == Classes(50, 50)


# ---- a decision ----


class TestPlan:
    @few
    @given(fleets(), st.sampled_from(sorted(POLICIES)), st.sampled_from([state.means for state in TABLE]))
    def test_no_ceiling_lets_the_fleet_grow_beyond_the_budget(self, fleet, name, means):
        vms, budget = fleet
        targets = plan(vms, budget, POLICIES[name](), means)
        resident = sum(vm.resident for vm in vms)
        assert sum(target.ceiling for target in targets) <= max(budget, resident)
        for vm, target in zip(vms, targets, strict=True):
            assert target.ceiling >= 0
            assert target.balloon >= 0
            assert target.ceiling >= min(vm.resident, target.entitlement)
            assert target.balloon <= vm.ballooned + max(0, vm.resident + vm.swapped - target.entitlement)

    def test_who_is_over_is_swapped_and_who_is_not_waits_for_what_is_free(self):
        vms = alike()
        vms[0].resident, vms[1].resident = 60 * MIB, 10 * MIB
        first, second = plan(vms, 64 * MIB, ClassBased(), BOTH)
        assert (first.entitlement, first.ceiling) == (32 * MIB, 32 * MIB)
        assert (second.entitlement, second.ceiling) == (32 * MIB, 10 * MIB)  # nothing is free yet
        vms[0].resident = 32 * MIB
        assert [target.ceiling for target in plan(vms, 64 * MIB, ClassBased(), BOTH)] == [32 * MIB, 32 * MIB]

    def test_nothing_is_taken_where_the_state_allows_nothing(self):
        vms = alike()
        vms[0].resident = 60 * MIB
        first, second = plan(vms, 64 * MIB, ClassBased(), ())
        assert (first.ceiling, second.ceiling) == (60 * MIB, 4 * MIB)

    def test_what_is_swapped_and_free_goes_to_the_balloon(self):
        (target,) = plan([of(balloon=True, swapped=20 * MIB)], 63 * MIB, ClassBased(), BOTH)
        assert (target.balloon, target.ceiling) == (20 * MIB, 63 * MIB)

    def test_a_balloon_gives_back_what_fits_unless_there_is_plenty(self):
        vm = Demand("x", 64 * MIB, resident=30 * MIB, balloon=True, ballooned=20 * MIB)
        (target,) = plan([vm], 40 * MIB, ClassBased(), BOTH)
        assert (target.ceiling, target.balloon) == (40 * MIB, 10 * MIB)
        vm.classes = Classes(active_anonymous=10 * MIB, free=20 * MIB)
        assert plan([vm], 40 * MIB, ClassBased(), BOTH)[0].balloon == 20 * MIB

    def test_a_balloon_keeps_no_room_for_what_nobody_misses_in_the_swap(self):
        """44 of 48 MiB are there: the guest gets 4 from the balloon, though 6 are in the swap; but for what comes back
        from there, and unless the policy knows no classes."""
        vm = Demand("x", 64 * MIB, resident=44 * MIB, balloon=True, ballooned=10 * MIB, swapped=6 * MIB)
        vm.classes = Classes(active_anonymous=53 * MIB, free=MIB)
        assert plan([vm], 48 * MIB, ClassBased(), ("swap",))[0].balloon == 6 * MIB
        vm.returned = 3 * MIB // 4096
        assert plan([vm], 48 * MIB, ClassBased(), ("swap",))[0].balloon == 9 * MIB
        assert plan([vm], 48 * MIB, POLICIES["swap-only"](), ("swap",))[0].balloon == 10 * MIB

    @pytest.mark.parametrize("back", [-1, 1.5, None])
    def test_a_policy_that_gives_back_what_is_no_size(self, back):
        class Wrong(ClassBased):
            def back(self, vm, room, over):
                return back

        with pytest.raises(BadInput, match=r"policy: back\(\) gave .* for x: give a number of bytes"):
            plan([Demand("x", 64 * MIB, balloon=True, ballooned=MIB)], 48 * MIB, Wrong(), ())

    @pytest.mark.parametrize(
        ("entitled", "split", "words"),
        [
            ([1], Split(), "one whole number of bytes, 0 or more, for each VM"),
            ([1, -1], Split(), "one whole number of bytes"),
            ([64 * MIB, MIB], Split(), "gave 68157440 bytes, and the budget is 67108864"),
            ([0, 0], Split(), "gave vm1 0 bytes, and 7 are reserved for it"),
            ([0, 7], Split(MIB, 1), "split[(][)] gave Split[(]balloon=1048576, swap=1[)] for 1048576 bytes of vm0"),
            ([0, 7], Split(-1, 1), "split[(][)] gave"),
            ([0, 7], None, "split[(][)] gave None"),
        ],
    )
    def test_a_policy_that_breaks_the_rules(self, entitled, split, words):
        class Wrong(Policy):
            def entitle(self, vms, budget):
                return entitled

            def split(self, vm, over, means):
                return split

        vms = alike()
        vms[0].resident, vms[1].reservation = MIB, 7
        with pytest.raises(BadInput, match=f"policy: .*{words}"):
            plan(vms, 64 * MIB, Wrong(), BOTH)

    def test_the_planner_keeps_the_state(self):
        planner = Planner(100 * MIB, ClassBased(), TABLE)
        states = []
        for resident in (0, 91, 89, 110, 103, 99):
            planner([Demand("x", 200 * MIB, resident=resident * MIB)])
            states.append(planner.state)
        assert states == ["high", "clear", "clear", "low", "hard", "soft"]


# ---- policies, by name ----


def test_a_policy_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from pyvmm.fleet.policy import Policy, Split\n"
        "class Mine(Policy):\n    def split(self, vm, over, means):\n        pass\n"
        "class Empty(Policy):\n    pass\n"
    )
    assert find(f"{path}:Mine").__name__ == "Mine"
    with pytest.raises(BadInput, match=r"Empty has no method split\(\)"):
        find(f"{path}:Empty")
    with pytest.raises(BadInput, match=r"Split is no class made from pyvmm\.fleet\.policy\.Policy"):
        find(f"{path}:Split")
    with pytest.raises(BadInput, match="choose one of class-based, balloon-only, swap-only, proportional"):
        find("clock")


# ---- admission ----


class TestAdmission:
    def test_with_figures(self):
        running = [
            Demand("a", 64 * MIB, reservation=16 * MIB),
            Demand("b", 64 * MIB, classes=Classes(MIB, 19 * MIB, free=44 * MIB)),
        ]
        admit(running, Demand("c", 64 * MIB, reservation=28 * MIB), 64 * MIB)
        with pytest.raises(BadInput) as caught:
            admit(running, Demand("c", 64 * MIB, reservation=29 * MIB), 64 * MIB)
        assert str(caught.value) == (
            "c does not fit: it needs 29.0 MiB, and 28.0 MiB are left; of the 64.0 MiB others need 36.0 MiB "
            "(b 20.0 MiB, a 16.0 MiB): stop one, or reserve less"
        )

    def test_alone_and_among_many(self):
        with pytest.raises(BadInput, match=r"8\.0 MiB, and 4\.0 MiB are left; the budget is 4\.0 MiB"):
            admit([], Demand("c", 64 * MIB, reservation=8 * MIB), 4 * MIB)
        many = [Demand(f"vm{number}", 64 * MIB, reservation=MIB) for number in range(20)]
        with pytest.raises(BadInput, match=r"vm15 1\.0 MiB, 12 more 12\.0 MiB\)"):
            admit(many, Demand("c", 64 * MIB, reservation=MIB), 20 * MIB)
