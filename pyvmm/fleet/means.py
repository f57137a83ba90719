# means.py: how much of what a VM is to give up goes by balloon, and how much by host swap, class by class. Bytes.
"""`Split`, and `by_class()`: technique T2, US9529609B2."""

from __future__ import annotations

from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from pyvmm.fleet.demand import Demand

ORDER = ("free", "inactive_buffer", "inactive_anonymous", "active_buffer", "active_anonymous")
"""Classes, the first to go first. What is unreclaimable never goes."""
_BY_BALLOON = {"free", "inactive_buffer", "active_buffer"}
"""The guest gives these up without writing anything."""


class Split(Record):
    """Bytes that are away by each means. What is left of what was asked for stays."""

    __slots__ = ("balloon", "swap")

    def __init__(self, balloon: int = 0, swap: int = 0) -> None:
        self.balloon = balloon
        self.swap = swap

    @property
    def total(self) -> int:
        """By both."""
        return self.balloon + self.swap


def by_class(vm: Demand, over: int, means: Collection[str]) -> Split:
    """over: so much of what the guest has must not be in the host's memory.

    What is free or a buffer goes by balloon, what is anonymous by host swap, or by balloon where the guest swaps by
    itself: the host would swap what the guest is about to (double paging, T6). Active classes go last.

    What is in the host's swap and does not come back goes right after free pages: it is gone already, and nobody misses
    it. For what comes back room is made as for all else.

    Without a balloon, or where it is not allowed, all goes by swap, and the other way round what is anonymous stays.
    Where nobody knows the classes, it is the host's to find what is idle, by swap.
    """
    inflates = "balloon" in means and vm.balloon
    swaps = "swap" in means
    if vm.classes is None:
        return Split(swap=over) if swaps else Split(balloon=over) if inflates else Split()
    split = Split()
    left = min(over, max(0, vm.resident + vm.swapped - vm.classes.unreclaimable))
    for name in ORDER:
        if name == "inactive_buffer":
            rest = min(left, vm.resting)
            split.swap += rest
            left -= rest
        part = min(left, getattr(vm.classes, name))
        left -= part
        if inflates and (name in _BY_BALLOON or vm.swap):
            split.balloon += part
        elif swaps:
            split.swap += part
    if swaps:
        split.swap += left  # of what the guest did not tell
    return split
