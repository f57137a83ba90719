# simulator.py: a fleet on paper: what a policy would cost hundreds of VMs, from what they use over time. Pages of 4 KiB
# and bytes; ticks of one second. Needs no KVM.
"""`simulate()`; what it finds is an `Outcome`. docs/fleet.md says what the model is, and what it is not."""

from __future__ import annotations

from pyvmm.errors import BadInput
from pyvmm.fleet.demand import CLASSES, Classes, Demand
from pyvmm.fleet.means import ORDER
from pyvmm.fleet.plan import Planner
from pyvmm.fleet.states import STATES, TABLE
from pyvmm.layout import PAGE_SIZE
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.fleet.plan import Target
    from pyvmm.fleet.policy import Policy
    from pyvmm.fleet.states import State
    from pyvmm.fleet.synthetic import Series

TOUCHED = {
    "unreclaimable": 1.0,
    "active_anonymous": 1.0,
    "active_buffer": 1.0,
    "inactive_anonymous": 0.02,
    "inactive_buffer": 0.02,
    "free": 0.01,
}
"""Of a class, what is touched in a tick; free pages: what is used anew."""
MISTAKEN = 0.05
"""Of what host swap takes, so much is active: it looks for what is idle, and is wrong now and then."""
BALLOON_RATE = 0.1
"""Of its memory a guest gives up so much in a tick at most."""
GUEST_ORDER = ("free", "inactive_buffer", "inactive_anonymous", "active_buffer", "active_anonymous")
"""In which a guest gives pages to its balloon; anonymous ones only where it swaps by itself."""
REFAULT_SECONDS = 0.0002
"""A guest stands still so long for a page that comes back."""


class Outcome(Record):
    """What a policy cost. refaults: pages that came back from disk; of these, stale: free ones, read for nothing; given
    up, by means: pages. slowdown: of the fleet's ticks, how many times as long they took; worst: of one VM. over: the
    most that the fleet had above its budget in the second half of the time, as a fraction. states: ticks in each."""

    __slots__ = ("ballooned", "name", "over", "refaults", "slowdown", "stale", "states", "swapped", "worst")

    def __init__(self, name: str) -> None:
        self.name = name
        self.refaults = self.stale = self.ballooned = self.swapped = 0
        self.slowdown = self.worst = 1.0
        self.over = 0.0
        self.states = dict.fromkeys(STATES, 0)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


class _Vm:
    """What a VM lacks of each class, by balloon and by swap. Bytes."""

    def __init__(self, series: Series) -> None:
        self.series = series
        self.balloon = dict.fromkeys(CLASSES, 0)
        self.swap = dict.fromkeys(CLASSES, 0)
        self.use = series.looks[0].as_dict()
        self.ceiling = series.memory
        self.refaulted = self.returned = 0
        self.ticks = 0

    def here(self, name: str) -> int:
        """Of a class."""
        return self.use[name] - self.balloon[name] - self.swap[name]

    @property
    def resident(self) -> int:
        return sum(self.here(name) for name in CLASSES)

    def demand(self) -> Demand:
        series = self.series
        classes = Classes(**{name: self.use[name] - self.balloon[name] for name in CLASSES})
        return Demand(
            series.name, series.memory, series.shares, series.reservation, series.limit, self.resident, classes,
            series.balloon, series.swap, ballooned=sum(self.balloon.values()), swapped=sum(self.swap.values()),
            returned=self.returned,
        )  # fmt: skip

    def turn(self, tick: int) -> None:
        """The guest's pages change their classes. What is away of a class that has become smaller is free now."""
        looks = self.series.looks
        self.use = looks[tick % len(looks)].as_dict()
        for away in (self.swap, self.balloon):
            for name in CLASSES[:-1]:
                surplus = max(0, self.balloon[name] + self.swap[name] - self.use[name])
                moved = min(surplus, away[name])
                away[name] -= moved
                away["free"] += moved
        self.balloon["free"] = min(self.balloon["free"], self.use["free"])
        self.swap["free"] = min(self.swap["free"], self.use["free"] - self.balloon["free"])

    def touch(self, outcome: Outcome) -> None:
        """The guest works for a tick: what it touches comes back, as far as its VM's ceiling lets it: else something
        else goes for that. Free pages that are ballooned are just not there."""
        self.returned = 0
        for name in CLASSES:
            for away in (self.balloon, self.swap):
                if name == "free" and away is self.balloon:
                    continue
                came = _pages(away[name] * TOUCHED[name])
                away[name] -= came
                self._read(came, outcome)
                if away is self.swap:
                    self.returned += came // PAGE_SIZE
                if name == "free":
                    outcome.stale += came // PAGE_SIZE
        self.ticks += 1
        self._swap_out(max(0, self.resident - self.ceiling), outcome)

    def _read(self, size: int, outcome: Outcome) -> None:
        self.refaulted += size // PAGE_SIZE
        outcome.refaults += size // PAGE_SIZE

    def follow(self, target: Target, outcome: Outcome) -> None:
        """What was decided is done."""
        change = target.balloon - sum(self.balloon.values())
        if change < 0:
            self._deflate(-change)
        else:
            self._inflate(min(change, int(self.series.memory * BALLOON_RATE)), outcome)
        self.ceiling = target.ceiling
        self._swap_out(max(0, self.resident - self.ceiling), outcome)

    def _deflate(self, more: int) -> None:
        """What the guest needs most is there again first."""
        for name in reversed(GUEST_ORDER):
            part = min(more, self.balloon[name])
            self.balloon[name] -= part
            more -= part

    def _inflate(self, wanted: int, outcome: Outcome) -> None:
        """The guest does not know which of its pages are in the host's swap. It writes anonymous ones to its own disk,
        for which those must be read first: double paging."""
        for name in GUEST_ORDER:
            anonymous = name.endswith("anonymous")
            if anonymous and not self.series.swap:
                continue
            part = _pages(max(0, min(wanted, self.use[name] - self.balloon[name])))
            swapped = _pages(part * self.swap[name] / max(1, self.use[name] - self.balloon[name]))
            self.swap[name] -= swapped
            self.balloon[name] += part
            wanted -= part
            outcome.ballooned += part // PAGE_SIZE
            if anonymous:
                self._read(swapped, outcome)

    def _swap_out(self, wanted: int, outcome: Outcome) -> None:
        """The host sees no classes, only what is idle: of all that is so it takes alike."""
        idle = [name for name in ORDER if not name.startswith("active")]
        active = [name for name in ORDER if name.startswith("active")]
        taken = self._alike(active, int(wanted * MISTAKEN))
        taken += self._alike(idle, wanted - taken)
        taken += self._alike(active, wanted - taken)
        outcome.swapped += taken // PAGE_SIZE

    def _alike(self, names: list[str], wanted: int) -> int:
        here = {name: self.here(name) for name in names}
        whole = sum(here.values())
        if whole <= 0:
            return 0
        taken = 0
        for name, size in here.items():
            part = _pages(min(size, size * wanted / whole))
            self.swap[name] += part
            taken += part
        return taken


def simulate(
    fleet: Sequence[Series],
    budget: int,
    policy: Policy,
    name: str,
    ticks: int = 60,
    table: Sequence[State] = TABLE,
) -> Outcome:
    """So many ticks of these VMs with so many bytes for all. Raises BadInput for a policy that breaks its rules."""
    if not fleet or not all(series.looks for series in fleet):
        raise BadInput("a fleet without any VM, or one of which nothing is known")
    outcome = Outcome(name)
    vms = [_Vm(series) for series in fleet]
    planner = Planner(budget, policy, table)
    for tick in range(ticks):
        for vm in vms:
            vm.turn(tick)
            vm.touch(outcome)
        targets = planner([vm.demand() for vm in vms])
        outcome.states[planner.state] += 1
        for vm, target in zip(vms, targets, strict=True):
            vm.follow(target, outcome)
        if tick >= ticks // 2:
            outcome.over = max(outcome.over, sum(vm.resident for vm in vms) / budget - 1)
    slow = [1 + vm.refaulted * REFAULT_SECONDS / vm.ticks for vm in vms]
    outcome.slowdown, outcome.worst = sum(slow) / len(slow), max(slow)
    return outcome


def _pages(size: float) -> int:
    """Whole pages of it, in bytes."""
    return int(size) // PAGE_SIZE * PAGE_SIZE
