# targets.py: the literal table of targets, and what results say of them. Nothing asserts by it.
"""`TARGETS`, and `verdicts()`: met or missed, by the medians."""

from __future__ import annotations

from fnmatch import fnmatchcase
from statistics import median
from typing import TYPE_CHECKING

from pyvmm.bench import Result, grouped, scaled
from pyvmm.record import Record

if TYPE_CHECKING:
    from collections.abc import Iterable

MET, MISSED, NO_FIGURE, NOT_JUDGED = "met", "missed", "no figure", "quick: not judged"


class Target(Record):
    """A bound for a side of a benchmark's group, or for it over another one; all three are patterns, as fnmatch has
    them, with "|" between several.

    measure: its number; least, most: the bounds, either or both; unit: of the side, where its group has several; full:
    the sides are not there in quick runs. Without `over` each side is judged; with it only the worst of all pairs, so
    that what must beat all others must beat the best of them.
    """

    __slots__ = ("benchmark", "full", "group", "least", "measure", "most", "over", "side", "unit")

    def __init__(
        self,
        measure: str,
        benchmark: str,
        group: str,
        side: str,
        over: str = "",
        least: float | None = None,
        most: float | None = None,
        unit: str = "",
        full: bool = False,
    ) -> None:
        self.measure = measure
        self.benchmark = benchmark
        self.group = group
        self.side = side
        self.over = over
        self.least = least
        self.most = most
        self.unit = unit
        self.full = full

    def met(self, value: float) -> bool:
        """Is it within the bounds?"""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def bound(self, unit: str) -> str:
        """Such as ">= 0.9", "<= 40 ms" or "0.98 to 1.02"."""
        texts = [figure(each, unit) for each in (self.least, self.most) if each is not None]
        return " to ".join(texts) if len(texts) == 2 else f"{'>=' if self.most is None else '<='} {texts[0]}"


class Verdict(Record):
    """What results say of a target. value, low, high: of the side, or of the ratio, round by round; low and high are
    the value where rounds cannot be told apart; None: there is no figure. unit: "" of a ratio."""

    __slots__ = ("group", "high", "low", "quick", "target", "unit", "value", "what")

    def __init__(
        self, target: Target, group: str, what: str, unit: str, values: tuple[float, ...], quick: bool
    ) -> None:
        self.target = target
        self.group = group
        self.what = what
        self.unit = unit
        self.quick = quick
        self.value = median(values) if values else None
        self.low = min(values, default=None)
        self.high = max(values, default=None)

    @property
    def said(self) -> str:
        """MET, MISSED, NO_FIGURE, or NOT_JUDGED: what is measured small and short is not what the target is about."""
        if self.value is None:
            return NO_FIGURE
        if self.quick:
            return NOT_JUDGED
        return MET if self.target.met(self.value) else MISSED

    @property
    def bound(self) -> str:
        """The target's."""
        return self.target.bound(self.unit)

    def figure(self) -> str:
        """Such as "0.85 (0.41 to 1.38)"."""
        if self.value is None or self.low is None or self.high is None:
            return "-"
        text = figure(self.value, self.unit)
        if self.low == self.high:
            return text
        shown = scaled(Result("", self.unit, (self.value, self.low, self.high)))
        low, high = (f"{each:,.{digits(shown.median)}f}" for each in (min(shown.values), max(shown.values)))
        return f"{text} ({low} to {high})"

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        return {
            "measure": self.target.measure, "group": self.group, "what": self.what, "unit": self.unit or "x",
            "at_least": self.target.least, "at_most": self.target.most,
            "value": self.value, "low": self.low, "high": self.high, "verdict": self.said,
        }  # fmt: skip


def digits(value: float) -> int:
    """Behind the point, so that a figure has three or so in all."""
    return next((places for places, below in ((3, 1), (2, 10), (1, 1000)) if abs(value) < below), 0)


def figure(value: float, unit: str) -> str:
    """For people: with its unit, seconds as ms or us where that is shorter; "x" goes without saying."""
    shown = scaled(Result("", unit, (value,)))
    text = f"{shown.median:,.{digits(shown.median)}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text if unit == "x" else f"{text} {shown.unit}".strip()


TARGETS = (
    Target("P1", "start", "", "pyvmm run hello", most=40),
    Target("P1", "start", "", "pyvmm run hello", "QEMU microvm", most=1),
    Target("P1", "start", "", "in-process", most=5),
    Target("P2", "exits", "", "C", "bare", least=0.9),
    Target("P2", "exits", "", "Python", "bare", least=0.5),
    Target("P3", "migrate", "* of random data: one over another", "tcp, the round / send() and recv()", least=0.9),
    Target("P3", "migrate", "* of random data: one over another", "tcp, the best / QEMU's best", least=1.5),
    Target("P4", "migrate", "* of random data: one over another", "local, the round / process_vm_readv()", least=0.7),
    Target("P4", "migrate", "* of random data: one over another", "local / QEMU, unix", least=4),
    Target("P5", "migrate", "* of random data: downtime of the idle guest", "tcp|local", most=0.003),
    Target("P5", "migrate", "* written at 10 pages a ms, *: downtime", "tcp", "QEMU, tcp", most=1, full=True),
    Target(
        "P5", "migrate", "* written at 10 pages a ms, *: downtime", "tcp, post-copy", "QEMU, tcp, post-copy", most=1,
        full=True,
    ),
    Target("P6", "migrate", "*: work while it migrates", "coarse", least=80),
    Target("P6", "migrate", "*: work while it migrates", "coarse", "4 KiB log (bitmap)", least=3),
    Target("P6", "traces", "*, as fast as it can: speed", "coarse", least=80),
    Target("P6", "traces", "*, as fast as it can: speed", "coarse", "bitmap", least=3),
    Target("P7", "migrate", "*: large pages afterwards / before", "tcp|tcp, post-copy|tcp, hybrid", least=100),
    Target("P7", "restore", "*, warm file: what it took", "lazy", least=100, unit="% large"),
    Target("P7", "faults", "KVM's 2 MiB mappings afterwards / before", "move", least=100),
    Target("P7", "activity", "large pages kept", "sampled", least=100),
    Target("P8", "restore", "VM.restore() to the first entry into the guest", "*", most=0.003),
    Target("P8", "restore", "VM.restore() to the first entry into the guest", "4G", "256M", most=1.2, full=True),
    Target("P9", "restore", "dense * file", "mmap(MAP_PRIVATE)", "lazy", least=2),
    Target("P9", "restore", "1 page in 64, * file", "mmap(MAP_PRIVATE)", "lazy", least=1),
    Target("P9", "restore", "* file", "mmap(MAP_PRIVATE)", "lazy, prefetch", least=3),
    Target("P10", "save", "* data", "raw", "write() and fsync()", least=0.8),
    Target("P10", "save", "*: its longest stall in a save", "live", most=0.010),
    Target("P11", "swap", "out: *", "swap", "pwrite", least=0.7),
    Target("P11", "swap", "in: *", "swap", "preadv", least=0.7),
    Target("P12", "sharing", "estimated / actual", "*", least=0.98, most=1.02),
    Target("P12", "sharing", "MiB freed a large page broken", "by count", "at random", least=3),
    Target("P13", "activity", "precision: *", "sampled", least=95, full=True),
    Target("P13", "activity", "recall: *", "sampled", least=95, full=True),
    Target("P13", "activity", "the guest's work, of that while nobody watches", "sampled", least=97),
    Target("P14", "overcommit", "refaults for 1,000 touches, all guests", "*", "class-based", least=5),
    Target("P15", "doublepaging", "sequences: read per page written", "references|replace", most=0),
    Target("P15", "doublepaging", "sequences: reads to bring 64 back", "references", "replace", least=8),
    Target("P16", "traces", "*: longest stall of a vCPU", "stop-all 4 KiB", "helper-thread 4 KiB", least=10),
    Target("P16", "traces", "*: longest stall of a vCPU", "stop-all 4 KiB", "coarse", least=10),
    Target("P17", "populate", "* of large pages: the first pass", "not populated", "populated", least=5),
    Target("P18", "scale", "a VMM process, of many", "all", most=12),
    Target("P18", "scale", "a VM of one process", "all", most=3),
    Target("P19", "soak", "in all", "wrong", most=0),
    Target("P19", "soak", "in all", "operations", least=10_000),
)  # fmt: skip
"""What is wanted of each measure."""


def verdicts(benchmark: str, results: Iterable[Result], quick: bool = False) -> list[Verdict]:
    """What results say of their benchmark's targets, in the targets' order."""
    groups = grouped(results)
    return [
        verdict
        for target in TARGETS
        if target.benchmark == benchmark
        for group, rows in groups.items()
        if fnmatchcase(group, target.group)
        for verdict in _judged(target, group, rows, quick)
    ]


def _judged(target: Target, group: str, rows: list[Result], quick: bool) -> list[Verdict]:
    rows = [row for row in rows if row.values and target.unit in ("", row.unit)]
    sides = [row for row in rows if _matches(row.name, target.side)]
    if not target.over:
        return [Verdict(target, group, row.name, row.unit, row.values, quick) for row in sides]
    pairs = [(a, b) for b in rows if _matches(b.name, target.over) for a in sides if a is not b and a.unit == b.unit]
    found = [Verdict(target, group, f"{a.name} / {b.name}", "", a.ratios(b), quick) for a, b in pairs]
    worst = min if target.most is None else max
    told = [verdict for verdict in found if verdict.value is not None]
    return [worst(told, key=lambda verdict: verdict.value or 0.0)] if told else found[:1]


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split("|"))
