# plan.py: what each VM of a fleet is to have, and by which means: one decision, of plain data. Bytes.
"""`plan()` makes a `Target` for each VM; `Planner` keeps the state between two of them."""

from __future__ import annotations

from pyvmm.errors import BadInput
from pyvmm.fleet.means import Split
from pyvmm.fleet.states import STATES, State, next_state
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from pyvmm.fleet.demand import Demand
    from pyvmm.fleet.policy import Policy


class Target(Record):
    """Of the VM `name`. entitlement: what it should have; ceiling: more than this it must not have from now on;
    balloon: so much its balloon is to hold; split: how what it has beyond its entitlement is away."""

    __slots__ = ("balloon", "ceiling", "entitlement", "name", "split")

    def __init__(self, name: str, entitlement: int, ceiling: int, balloon: int, split: Split) -> None:
        self.name = name
        self.entitlement = entitlement
        self.ceiling = ceiling
        self.balloon = balloon
        self.split = split


def plan(vms: Sequence[Demand], budget: int, policy: Policy, means: Collection[str]) -> list[Target]:
    """One for each VM, in the same order. Raises BadInput for a policy that breaks its rules, and for reservations that
    are more than the budget.

    What a guest has beyond what its VM is entitled to goes by the means that the state allows: what is swapped out
    already counts, so that it can turn into what the balloon holds, and the guest has room for what it needs. Who has
    less may grow, by its part of what is free *now*: so all ceilings together are within the budget, as soon as what
    VMs have is.
    """
    entitled = list(policy.entitle(vms, budget))
    _check_entitled(vms, entitled, budget)
    free = max(0, budget - sum(vm.resident for vm in vms))
    gaps = sum(max(0, given - vm.resident) for vm, given in zip(vms, entitled, strict=True))
    found = []
    for vm, given in zip(vms, entitled, strict=True):
        over = vm.resident + vm.swapped - given
        split = _split(policy, vm, over, means) if over > 0 else Split()
        if vm.resident > given:
            out = min(vm.resident - given, max(0, split.swap - vm.swapped))
            found.append(Target(vm.name, given, vm.resident - out, vm.ballooned + split.balloon, split))
        else:
            gap = given - vm.resident
            grow = min(gap, free * gap // gaps) if gaps else 0
            balloon = vm.ballooned + (split.balloon or -_back(policy, vm, grow, over))
            found.append(Target(vm.name, given, vm.resident + grow, balloon, split))
    return found


def _back(policy: Policy, vm: Demand, room: int, over: int) -> int:
    """Of what its balloon holds, what the guest gets back."""
    if vm.content:
        return 0
    back = policy.back(vm, room, over)
    if type(back) is not int or back < 0:
        raise BadInput(f"policy: back() gave {back!r} for {vm.name}: give a number of bytes, 0 or more")
    return min(back, room, vm.ballooned)


class Planner:
    """plan() again and again, for one host: `state` follows what is free."""

    def __init__(self, budget: int, policy: Policy, table: Sequence[State]) -> None:
        self.budget = budget
        self.policy = policy
        self.state = STATES[0]
        self._table = table

    def __call__(self, vms: Sequence[Demand]) -> list[Target]:
        """Raises BadInput, as plan() does."""
        free = (self.budget - sum(vm.resident for vm in vms)) / self.budget
        state = next_state(self._table, self.state, free)
        self.state = state.name
        return plan(vms, self.budget, self.policy, state.means)


def _check_entitled(vms: Sequence[Demand], entitled: list[int], budget: int) -> None:
    if len(entitled) != len(vms) or not all(type(given) is int and given >= 0 for given in entitled):
        raise BadInput("policy: entitle() gives one whole number of bytes, 0 or more, for each VM")
    if sum(entitled) > budget:
        raise BadInput(f"policy: entitle() gave {sum(entitled)} bytes, and the budget is {budget}")
    for vm, given in zip(vms, entitled, strict=True):
        if given < vm.reservation:
            raise BadInput(f"policy: entitle() gave {vm.name} {given} bytes, and {vm.reservation} are reserved for it")


def _split(policy: Policy, vm: Demand, over: int, means: Collection[str]) -> Split:
    split = policy.split(vm, over, means)
    if not isinstance(split, Split) or min(split.balloon, split.swap) < 0 or split.total > over:
        raise BadInput(f"policy: split() gave {split!r} for {over} bytes of {vm.name}")
    return split
