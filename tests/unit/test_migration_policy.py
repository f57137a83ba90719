# test_migration_policy.py: when pre-copy switches over and what helps it there; what is mapped before the guest runs.
from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from pyvmm import host
from pyvmm.errors import KernelError
from pyvmm.layout import Gpa
from pyvmm.machine.migrating.populating import second_level
from pyvmm.memory.pageset import PageSet
from pyvmm.migration.convergence import GIVE_UP, POSTCOPY, ROUND, STATE_COST, STEPS, SWITCH, Convergence
from pyvmm.migration.sending import Pace

GB = 1e9


def course(lefts, bandwidth=GB, downtime=0.02, throttle=True, postcopy=False, rounds=30, fine=False):
    policy = Convergence(downtime, throttle, postcopy, rounds, fine)
    return [policy.after(number, left, bandwidth) for number, left in enumerate(lefts, 1)]


def test_switches_over_when_what_is_left_fits():
    fits = int((0.02 - STATE_COST) * GB / 4096)
    assert [one.next for one in course([fits, fits])] == [ROUND, SWITCH]
    assert [one.next for one in course([fits, fits + 2])] == [ROUND, ROUND]
    assert course([fits])[0].expected == pytest.approx(0.02, rel=1e-3)


def test_a_round_more_where_that_makes_the_downtime_much_shorter():
    decisions = course([4000, 1500, 700, 300])
    assert [one.next for one in decisions] == [ROUND, ROUND, ROUND, SWITCH]
    assert decisions[-1].expected < 1.5 * STATE_COST
    assert [one.next for one in course([4000, 2500])] == [ROUND, SWITCH]
    assert [one.next for one in course([4000], rounds=1)] == [SWITCH]


def test_a_finer_trace_comes_before_throttling():
    decisions = course([100_000] * 5, fine=True)
    assert [one.help for one in decisions] == ["", "hot pages last", "small pages traced", "throttle", "throttle"]
    assert [one.fine for one in decisions] == [False, False, True, True, True]


def test_an_idle_guest_needs_one_round():
    (only,) = course([0], bandwidth=1.0)
    assert (only.next, only.expected) == (SWITCH, STATE_COST)


def test_rounds_that_shrink_need_no_help():
    decisions = course([100_000, 60_000, 40_000, 20_000, 300])
    assert [one.next for one in decisions] == [ROUND] * 4 + [SWITCH]
    assert not any(one.help or one.defer or one.throttle for one in decisions)


def test_help_comes_in_the_stated_order():
    decisions = course([100_000] * 12, postcopy=True)
    assert [one.help for one in decisions] == ["", "hot pages last", *["throttle"] * len(STEPS), *["postcopy"] * 4]
    assert [one.throttle for one in decisions[2:8]] == list(STEPS)
    assert decisions[8].next == POSTCOPY


def test_no_throttle_where_it_is_not_allowed():
    decisions = course([100_000] * 5, throttle=False)
    assert [one.help for one in decisions] == ["", "hot pages last", "", "", ""]
    assert not any(one.throttle for one in decisions)


@pytest.mark.parametrize(("postcopy", "end"), [(False, GIVE_UP), (True, POSTCOPY)])
def test_rounds_are_bounded(postcopy, end):
    decisions = course([100_000, 60_000, 40_000], postcopy=postcopy, rounds=3)
    assert [one.next for one in decisions] == [ROUND, ROUND, end]


def test_pace(monkeypatch):
    """Whoever comes waits for what those before him may still send."""
    now = 100.0
    monkeypatch.setattr("pyvmm.migration.sending.time", SimpleNamespace(monotonic=lambda: now))
    waits = []
    stop, pace = SimpleNamespace(wait=waits.append), Pace(1000.0)
    for _ in range(4):
        pace.wait(100, stop)
    assert waits == pytest.approx([0.09, 0.19, 0.29], abs=1e-6)
    now += 10  # what was not used is not saved up
    for _ in range(3):
        pace.wait(100, stop)
    assert waits[3:] == pytest.approx([0.09, 0.19], abs=1e-6)
    Pace(0).wait(1 << 40, None)


# ---- technique T4 ----


@pytest.fixture
def vm(monkeypatch):
    """Two vCPUs that note what they map; RAM of 8 blocks."""
    monkeypatch.setattr(host, "has", lambda feature: True)

    class Fd:
        def __init__(self):
            self.calls, self.error = [], None

        def pre_fault_memory(self, gpa, size):
            if self.error:
                raise self.error
            self.calls.append((gpa.value, size))

    vcpus = [SimpleNamespace(fd=Fd()), SimpleNamespace(fd=Fd())]
    return SimpleNamespace(vcpus=vcpus, memory=SimpleNamespace(gpa_of=lambda page: Gpa(page * 4096)))


def mapped(vm):
    return sorted(call for vcpu in vm.vcpus for call in vcpu.fd.calls)


BLOCK = 2 << 20


def test_hot_blocks_first_and_each_once(vm):
    hot, rest = PageSet(4000, [(700, 1), (1030, 600)]), PageSet(4000, [(0, 4000)])
    second_level(vm, hot, rest, budget=10)
    first = [vcpu.fd.calls[0][0] for vcpu in vm.vcpus]
    assert first == [1 * BLOCK, 2 * BLOCK]
    assert mapped(vm) == [(block * BLOCK, BLOCK) for block in range(7)] + [(7 * BLOCK, (4000 - 7 * 512) * 4096)]


def test_the_budget_ends_it(vm):
    vm.memory.gpa_of = lambda page: time.sleep(0.002) or Gpa(page * 4096)
    second_level(vm, PageSet(4000), PageSet(4000, [(0, 4000)]), budget=0.003)
    assert len(mapped(vm)) < 8


def test_a_kvm_that_cannot_leaves_it_to_the_guest(vm, monkeypatch):
    for vcpu in vm.vcpus:
        vcpu.fd.error = KernelError(95, "KVM_PRE_FAULT_MEMORY")
    second_level(vm, PageSet(4000, [(0, 9)]), PageSet(4000), budget=1)
    assert mapped(vm) == []
    monkeypatch.setattr(host, "has", lambda feature: False)
    assert second_level(vm, PageSet(4000, [(0, 9)]), PageSet(4000)) == 0.0
