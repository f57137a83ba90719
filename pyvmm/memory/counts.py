# counts.py: what the memory engine says of itself, as plain records. Units: pages of 4 KiB, ns, or as named.
"""`PageCounts`, `EngineStats` and their parts."""

from __future__ import annotations

from pyvmm.layout import PAGE_SIZE
from pyvmm.memory.homes import HOMES
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm._native import CData

OPERATIONS = ("remove", "install", "split", "merge", "break", "store")
ANSWERS = ("block", "collapsed", "pages", "merged", "trace", "failed", "unit")
"""How a fault was answered: by a whole large page; by one that MADV_COLLAPSE made; by small pages; it had come by the
answer to another fault; a write trace was lifted; not at all; by what its home keeps together, as small pages."""


class PageCounts(Record):
    """Where a guest's pages are. present + away = total.

    large, small: of the present ones, those that the kernel's page tables map by 2 MiB or by 4 KiB; untouched: the rest
    of them, never populated. homes: pages away, by HOMES. armed: is any range registered with userfaultfd?
    """

    __slots__ = ("armed", "homes", "large", "present", "small", "total")

    def __init__(self, total: int, large: int, small: int, homes: dict[str, int], armed: bool) -> None:
        self.total = total
        self.large = large
        self.small = small
        self.homes = homes
        self.present = total - sum(homes.values())
        self.armed = armed

    __hash__ = None  # type: ignore[assignment]

    @property
    def away(self) -> int:
        """Pages that are not in the guest."""
        return self.total - self.present

    @property
    def untouched(self) -> int:
        """Pages that are present and cost nothing: they were never written or read."""
        return max(self.present - self.large - self.small, 0)

    def rows(self) -> list[tuple[str, int]]:
        """(kind, pages) of all kinds, for tables."""
        present = [("large", self.large), ("small", self.small), ("untouched", self.untouched)]
        return present + [(home, self.homes[home]) for home in HOMES[1:]]

    @property
    def bytes_populated(self) -> int:
        """Bytes that the guest's mapping takes of the host."""
        return (self.large + self.small) * PAGE_SIZE


class Operation(Record):
    """How often something was done, and how long that took: `nanoseconds` all together, `longest` of one."""

    __slots__ = ("done", "failed", "longest", "nanoseconds")

    def __init__(self, native: CData) -> None:
        self.done = int(native.done)
        self.failed = int(native.failed)
        self.nanoseconds = int(native.nanoseconds)
        self.longest = int(native.longest)


class Stall(Record):
    """Faults of one who waited: ns from where the engine read the fault to the answer, all together and the longest.

    asleep: of a vCPU, all ns since its start in which it neither ran, nor was ready to run, nor was paused, by the
    kernel's count: faults with all that the kernel does about them, HLT, and waiting for a device in Python.
    """

    __slots__ = ("asleep", "faults", "longest", "nanoseconds")

    def __init__(self, native: CData, asleep: int = 0) -> None:
        self.asleep = asleep
        self.faults = int(native.faults)
        self.nanoseconds = int(native.nanoseconds)
        self.longest = int(native.longest)


class EngineStats(Record):
    """Since the engine began.

    faults: answered; by_home: where the page was ("present": untouched ones, traces, faults merged with others);
    answers: by ANSWERS; latency: counts by power of two, bucket b for 2^b to 2^(b+1)-1 ns; nanoseconds: of all;
    retries: times that the kernel asked to try again; arms, disarms: (un)registrations with userfaultfd;
    kept_large, collapsed, stayed_small: whole blocks installed, by what became of the large page;
    operations: by OPERATIONS; vcpus: a Stall each; workers: KVM's asynchronous page faults, for one of several vCPUs;
    others: threads that are no vCPU.
    """

    __slots__ = (
        "answers", "arms", "by_home", "collapsed", "disarms", "faults", "kept_large", "latency", "nanoseconds",
        "operations", "others", "retries", "stayed_small", "vcpus", "workers",
    )  # fmt: skip

    def __init__(self, native: CData, asleep: list[int]) -> None:
        self.faults = int(native.faults)
        self.by_home = dict(zip(HOMES, native.by_home, strict=True))
        self.answers = dict(zip(ANSWERS, native.answers, strict=True))
        self.latency = list(native.latency)
        self.nanoseconds = int(native.nanoseconds)
        self.retries = int(native.retries)
        self.arms = int(native.arms)
        self.disarms = int(native.disarms)
        self.kept_large = int(native.kept_large)
        self.collapsed = int(native.collapsed)
        self.stayed_small = int(native.stayed_small)
        self.operations = {name: Operation(native.ops[i]) for i, name in enumerate(OPERATIONS)}
        self.vcpus = [Stall(native.stalls[i], ns) for i, ns in enumerate(asleep)]
        self.workers = Stall(native.workers)
        self.others = Stall(native.others)

    __hash__ = None  # type: ignore[assignment]

    def add(self, other: EngineStats) -> None:
        """Counts in those of another engine, of a VM with as many vCPUs."""
        for name in self.__slots__:
            setattr(self, name, _sum(getattr(self, name), getattr(other, name)))

    def percentile(self, share: float) -> int:
        """A latency in ns that the given share (0 to 1) of the faults stayed below, to the next power of two."""
        left = share * sum(self.latency)
        for bucket, count in enumerate(self.latency):
            left -= count
            if left <= 0:
                return 2 << bucket
        return 0


LOOKS = ("untouched", "large", "small", *HOMES)
"""How a block looks, by number (PV_LOOK_*); "present" is never said."""


def _sum(one: Any, other: Any) -> Any:  # noqa: ANN401 (numbers, and what is made of them)
    """`longest` is no sum."""
    if isinstance(one, Record):
        for name in one.__slots__:
            mine, theirs = getattr(one, name), getattr(other, name)
            setattr(one, name, max(mine, theirs) if name == "longest" else _sum(mine, theirs))
        return one
    if isinstance(one, dict):
        return {name: _sum(one[name], other[name]) for name in one}
    if isinstance(one, list):
        return [_sum(mine, theirs) for mine, theirs in zip(one, other, strict=True)]
    return one + other
