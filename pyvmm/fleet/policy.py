# policy.py: who decides what each VM of a fleet may have and how it gives up the rest. docs/fleet.md tells how to write
# one. Bytes.
"""`Policy`, the base; those that pyvmm brings; `find()`, by name or file."""

from __future__ import annotations

from pyvmm.fleet.demand import Demand
from pyvmm.fleet.entitle import TAX, entitle
from pyvmm.fleet.means import Split, by_class
from pyvmm.memory.reclaim.policy import find_class

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


class Policy:
    """Asked once in each interval; one object for the life of a fleet, so it may remember."""

    tax = TAX
    """Of idle memory, for entitle()."""

    def entitle(self, vms: Sequence[Demand], budget: int) -> list[int]:
        """What each VM may have: within reservation and limit, no more than the budget in all."""
        return entitle(vms, budget, self.tax)

    def split(self, vm: Demand, over: int, means: Collection[str]) -> Split:
        """How `vm` has `over` bytes less in the host's memory than the guest has: by no other means than these, no more
        than `over` in all. vm.swapped of it are in the host's swap already; what is given to the balloon instead comes
        off that. vm.balloon: has it one at all?"""
        raise NotImplementedError

    def back(self, vm: Demand, room: int, over: int) -> int:
        """How much of what its balloon holds the guest of `vm` gets back, which has `room` bytes more in the host's
        memory from now on. over: as in split(), or less than nothing. By default what is swapped comes back first."""
        return min(room, max(0, -over))


class ClassBased(Policy):
    """Technique T2: what is idle is taxed, and what is given up goes as its class wants."""

    def split(self, vm: Demand, over: int, means: Collection[str]) -> Split:
        """By class."""
        return by_class(vm, over, means)

    def back(self, vm: Demand, room: int, over: int) -> int:
        """For what is swapped and does not come back no room is kept."""
        return min(room, max(0, vm.resting - over))


class _Blind(Policy):
    """Knows shares, but no classes: nothing is idle for it."""

    tax = 0.0


class BalloonOnly(_Blind):
    """All by balloon, whatever the state; by swap where there is none, since nothing else is left."""

    def split(self, vm: Demand, over: int, means: Collection[str]) -> Split:
        """By balloon."""
        if not means:
            return Split()
        return Split(balloon=over) if vm.balloon else Split(swap=over if "swap" in means else 0)


class SwapOnly(_Blind):
    """All by host swap, where the state allows anything at all."""

    def split(self, vm: Demand, over: int, means: Collection[str]) -> Split:
        """By swap."""
        return Split(swap=over if means else 0)


class Proportional(_Blind):
    """Half by each of the means that are there."""

    def split(self, vm: Demand, over: int, means: Collection[str]) -> Split:
        """Half and half."""
        inflates = "balloon" in means and vm.balloon
        if "swap" not in means:
            return Split(balloon=over if inflates else 0)
        half = max(0, (over + vm.ballooned) // 2 - vm.ballooned) if inflates else 0
        return Split(half, over - half)


POLICIES: dict[str, type[Policy]] = {
    "class-based": ClassBased,
    "balloon-only": BalloonOnly,
    "swap-only": SwapOnly,
    "proportional": Proportional,
}


def find(name: str) -> type[Policy]:
    """The class of a policy: one of POLICIES, or `file.py:Class`, which is run. Raises BadInput."""
    return find_class(name, POLICIES, Policy, "split")
