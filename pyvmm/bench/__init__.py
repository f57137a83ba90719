# bench: measures, as data. A benchmark asserts nothing.
"""Benchmarks by name: each yields `Result`s, of alternating rounds in one run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import nan
from statistics import median
from typing import TYPE_CHECKING

from pyvmm.bench.warm import warm_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

ROUNDS = 9
"""Rounds of A B C A B C ...: medians and extremes are over these."""

MANY = 20
"""So many values are single operations, not rounds: a 90th percentile says something, a ratio one by one nothing."""

BETTER = {
    **dict.fromkeys(("s", "ms", "us", "reads", "faults"), -1),
    **dict.fromkeys(("GB/s", "M/s", "exits/s", "blocks/s", "VMs/s", "ops/s", "% large"), 1),
    **dict.fromkeys(("%", "x", "bytes", "MiB", "MiB/s", "operations", "checks", "pages", "seeds"), 0),
}
"""All units: 1 where more of it is better, -1 where less is. 0: the unit alone does not tell, as with MiB/s, in which
is counted what is sent or written once more."""


@dataclass(frozen=True)
class Result:
    """One side of a comparison: what was measured, in which unit, once a round or once an operation.

    group: what it is compared in; results of one group that have the same unit are compared with the first of them.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    group: str = ""

    @property
    def median(self) -> float:
        """The middle of the values; not a number where there are none."""
        return median(self.values) if self.values else nan

    def quantile(self, share: float) -> float:
        """The value that the share (0 to 1) of all values does not exceed."""
        return sorted(self.values)[min(int(share * len(self.values)), len(self.values) - 1)] if self.values else nan

    def ratios(self, base: Result) -> tuple[float, ...]:
        """Round by round, over `base` of the same rounds; of the medians, where there are many values or unequal."""
        if len(self.values) == len(base.values) < MANY:
            return tuple(own / other for own, other in zip(self.values, base.values, strict=True) if other)
        return (self.median / base.median,) if base.median else ()


def alternate(
    sides: Mapping[str, Callable[[], float]], unit: str, rounds: int = ROUNDS, group: str = "", warm: int = 0
) -> list[Result]:
    """Measures the sides in turn, `rounds` times each; one more round before that warms host and code up.

    warm: bytes of memory that the host gives out and takes back right before each side.
    """
    values: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, measure in sides.items():
            if warm:
                warm_host(warm)
            value = measure()
            if turn:
                values[name].append(value)
    return [Result(name, unit, tuple(values[name]), group) for name in sides]


class Collected:
    """Values by group and name, in the order in which they first came: for rounds that yield several at once."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str, str], list[float]] = {}

    def add(self, group: str, name: str, unit: str, *values: float) -> None:
        """One round's value, or several operations'."""
        self._values.setdefault((group, name, unit), []).extend(values)

    def results(self) -> list[Result]:
        """All of them, groups together."""
        found = [Result(name, unit, tuple(values), group) for (group, name, unit), values in self._values.items()]
        groups = list(dict.fromkeys(result.group for result in found))
        return sorted(found, key=lambda result: groups.index(result.group))


def grouped(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results by group."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def scaled(result: Result) -> Result:
    """The same in a unit in which its median is a number of a few digits: seconds become ms or us."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if result.unit == "s" and (result.median * factor >= 1 or unit == "us"):
            return replace(result, unit=unit, values=tuple(value * factor for value in result.values))
    return result
