# entitle.py: divides memory over VMs: shares, reservations, limits, and a tax on what is idle. Whole numbers; bytes.
"""`entitle()`. After C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, section 5."""

from __future__ import annotations

from pyvmm.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.fleet.demand import Demand

TAX = 0.75
"""Of an idle page: it costs as much as 1 / (1 - tax) pages in use, 4 of them."""
MAX_SHARES = 1 << 20
_SHIFT = 20
"""A price is a fraction with so many bits: with one more of its units no VM gets more than a byte more."""
_COST_BITS = 16


def entitle(vms: Sequence[Demand], budget: int, tax: float = TAX) -> list[int]:
    """What each of them may have: between its reservation and its `most`, in all exactly the budget, or exactly the sum
    of all `most` where that is less.

    A VM with shares S that holds P, of which a fraction f is active, pays rho = S / (P (f + k (1 - f))) for a page,
    k = 1 / (1 - tax), and all pay the same but those that are at one of their bounds. Here f = active / P follows P:
    the active pages of a VM cost 1 each, those above k. So P grows steadily as the price falls, and the price at which
    the budget is used up is found by halving. Raises BadInput where the reservations alone are more than the budget.
    """
    if not 0 <= tax < 1:
        raise BadInput(f"a tax of {tax:g}: give 0 to less than 1")
    reserved = sum(vm.reservation for vm in vms)
    if reserved > budget:
        raise BadInput(f"the reservations of all VMs are {reserved} bytes, and the budget is {budget}")
    if sum(vm.most for vm in vms) <= budget:
        return [vm.most for vm in vms]
    cost = round((1 << _COST_BITS) / (1 - tax))
    fills = [_fill(vm, cost) for vm in vms]
    low, high = 0, 1
    while sum(fill(high) for fill in fills) <= budget:
        low, high = high, 2 * high
    while high - low > 1:  # what is given at low fits, at high not
        middle = (low + high) // 2
        low, high = (middle, high) if sum(fill(middle) for fill in fills) <= budget else (low, middle)
    given = [fill(low) for fill in fills]
    left = budget - sum(given)
    for index, fill in enumerate(fills):  # fewer bytes than VMs: those that would have one more
        if left and fill(high) > given[index]:
            given[index] += 1
            left -= 1
    return given


def _fill(vm: Demand, cost: int) -> Callable[[int], int]:
    """What the VM gets as a function of 1 / price, which never falls."""
    shares, least, most = vm.shares, vm.reservation, vm.most
    active = most if vm.active is None else min(vm.active, most)

    def fill(level: int) -> int:
        worth = shares * level >> _SHIFT
        if worth > active:
            worth = active + ((worth - active) << _COST_BITS) // cost
        return least if worth < least else most if worth > most else worth

    return fill
