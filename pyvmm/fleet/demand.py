# demand.py: what is known of one VM of a fleet when its memory is decided on. Plain data, no VM. Bytes, seconds.
"""`Demand`, and the usage `Classes` that a guest tells of."""

from __future__ import annotations

from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

CLASSES = (
    "unreclaimable", "active_anonymous", "active_buffer", "inactive_anonymous", "inactive_buffer", "free",
)  # fmt: skip
"""Each page that a guest has is in one of them (US9529609B2). A buffer is a page whose content is on the guest's disk
too; anonymous is what is nowhere else."""
ACTIVE = CLASSES[:3]
_PLENTY = 16
"""One in so many pages."""
MOST = 1 << 52
"""Bytes: no figure is larger."""


class Classes(Record):
    """Bytes of each class."""

    __slots__ = CLASSES

    def __init__(
        self,
        unreclaimable: int = 0,
        active_anonymous: int = 0,
        active_buffer: int = 0,
        inactive_anonymous: int = 0,
        inactive_buffer: int = 0,
        free: int = 0,
    ) -> None:
        self.unreclaimable = unreclaimable
        self.active_anonymous = active_anonymous
        self.active_buffer = active_buffer
        self.inactive_anonymous = inactive_anonymous
        self.inactive_buffer = inactive_buffer
        self.free = free

    @property
    def total(self) -> int:
        """Of all classes."""
        return sum(self.as_dict().values())

    @property
    def active(self) -> int:
        """What the guest uses now, or cannot give up."""
        return self.unreclaimable + self.active_anonymous + self.active_buffer

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {name: getattr(self, name) for name in CLASSES}


def classes_of(found: object, memory: int) -> Classes | None:
    """Classes of what a guest of so much memory told by its VMM: None for anything but all of them, each a number of
    bytes, or None for what its driver cannot tell, which counts as nothing; None too where it tells nothing at all.

    A guest may lie: more than half of its memory is not believed to be unreclaimable, but active; so none can keep for
    ever what others are entitled to, and by what it says is idle it but harms itself."""
    if not isinstance(found, dict):
        return None
    named = {str(name).replace(" ", "_").replace("-", "_"): value for name, value in found.items()}
    if not all(name in named for name in CLASSES):
        return None
    values = [named[name] for name in CLASSES]
    if not all(value is None or (type(value) is int and 0 <= value <= MOST) for value in values):
        return None
    if all(value is None for value in values):
        return None
    classes = Classes(*[value or 0 for value in values])
    surplus = max(0, classes.unreclaimable - memory // 2)
    classes.unreclaimable -= surplus
    classes.active_anonymous += surplus
    return classes


class WorkingSet(Record):
    """What a VM uses, by an estimate: it lies between `low` and `high`, as sure as whoever estimated says."""

    __slots__ = ("high", "low", "size")

    def __init__(self, size: int, low: int | None = None, high: int | None = None) -> None:
        self.size = size
        self.low = size if low is None else low
        self.high = size if high is None else high


def default_shares(memory: int) -> int:
    """Of a VM of which nobody says how much it counts: as large VMs are to be large, 10 for each MiB."""
    return max(1, 10 * memory // MIB)


class Demand(Record):
    """One VM. memory: what it was promised; limit: it never gets more; wanted: it would not use more now (None: all).

    resident: what it takes of the host's memory; swapped: what the host has swapped out of it; ballooned: given up by
    its balloon. classes: what the guest says, which knows nothing of what is swapped. classes, working_set: None where
    nobody knows. balloon: has it one? swap: has the guest a swap device of its own? refaults: pages a second that came
    back soon after they had gone; returned: of these, from the host's swap.
    """

    __slots__ = (
        "balloon", "ballooned", "classes", "limit", "memory", "name", "refaults", "reservation", "resident", "returned",
        "shares", "swap", "swapped", "wanted", "working_set",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        memory: int,
        shares: int | None = None,
        reservation: int = 0,
        limit: int | None = None,
        resident: int = 0,
        classes: Classes | None = None,
        balloon: bool = False,
        swap: bool = False,
        working_set: WorkingSet | None = None,
        refaults: float = 0.0,
        wanted: int | None = None,
        ballooned: int = 0,
        swapped: int = 0,
        returned: float = 0.0,
    ) -> None:
        self.name = name
        self.memory = memory
        self.shares = default_shares(memory) if shares is None else shares
        self.reservation = reservation
        self.limit = memory if limit is None else min(limit, memory)
        self.resident = resident
        self.classes = classes
        self.balloon = balloon
        self.swap = swap
        self.working_set = working_set
        self.refaults = refaults
        self.wanted = wanted
        self.ballooned = ballooned
        self.swapped = swapped
        self.returned = returned

    @property
    def active(self) -> int | None:
        """Bytes in use: by the upper end of the estimate, since a page too few costs more than one too many; else by
        the classes; None where nobody knows."""
        if self.working_set is not None:
            return self.working_set.high
        return None if self.classes is None else self.classes.active

    @property
    def resting(self) -> int:
        """Of what is in the host's swap, bytes that do not come back within a second."""
        return max(0, self.swapped - int(self.returned * PAGE_SIZE))

    @property
    def content(self) -> bool:
        """Has the guest plenty of free memory? It would do nothing with more."""
        return self.classes is not None and self.classes.free * _PLENTY >= self.memory

    @property
    def most(self) -> int:
        """It is given no more: what it would use, within its limit, and its reservation in any case."""
        wanted = self.limit if self.wanted is None else min(self.wanted, self.limit)
        return max(wanted, self.reservation)

    @property
    def settings(self) -> Mapping[str, object]:
        """What somebody has set, for JSON."""
        names = ("memory", "shares", "reservation", "limit", "balloon", "swap")
        return {name: getattr(self, name) for name in names}
