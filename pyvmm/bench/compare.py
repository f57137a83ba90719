# compare.py: two sets of results, side by side: between two commits, or two hosts.
"""`compare()`: what moved beyond the noise, by the test of Mann and Whitney.

H. B. Mann, D. R. Whitney: "On a test of whether one of two random variables is stochastically larger than the other",
Ann. Math. Statist. 18 (1947). It asks nothing of how values are distributed, and one that is far off weighs no
more than its rank. What it cannot see is that rounds of one run share the host's mood: appending several runs to one
file helps.
"""

from __future__ import annotations

from itertools import groupby
from math import nan
from statistics import NormalDist, median
from typing import TYPE_CHECKING

from pyvmm.bench import BETTER
from pyvmm.record import Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyvmm.bench import Result

LEVEL = 0.01
"""Of two-sided significance: in one of a hundred rows that did not move at all, chance makes it look so."""
LEAST = 5
"""With fewer values of a side the test can find nothing at that level."""
_EXACT = 20
"""So many values of both sides at most are counted out; of more, the normal approximation is good."""
BETTER_NOW, WORSE_NOW, MOVED, SAME, FEW = "better", "worse", "moved", "", "too few"


class Row(Record):
    """One result in both. a, b: medians; ratio: b / a; p: of the test; said: one of the words above."""

    __slots__ = ("a", "b", "benchmark", "group", "name", "p", "ratio", "said", "unit")

    def __init__(self, benchmark: str, a: Result, b: Result) -> None:
        self.benchmark = benchmark
        self.group = a.group
        self.name = a.name
        self.unit = a.unit
        self.a = a.median
        self.b = b.median
        self.ratio = self.b / self.a if self.a else nan
        few = min(len(a.values), len(b.values)) < LEAST
        self.p = 1.0 if few else mann_whitney(a.values, b.values)
        self.said = FEW if few else SAME if self.p >= LEVEL else self._moved(median(b.values) - median(a.values))

    def _moved(self, by: float) -> str:
        if by == 0:  # what moved is not the middle
            return MOVED
        better = BETTER.get(self.unit, 0) * by
        return MOVED if better == 0 else BETTER_NOW if better > 0 else WORSE_NOW

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        told = {name: getattr(self, name) for name in ("benchmark", "group", "name", "unit", "a", "b")}
        return told | {"ratio": None if self.ratio != self.ratio else self.ratio, "p": self.p, "said": self.said}


def compare(a: Mapping[str, Sequence[Result]], b: Mapping[str, Sequence[Result]]) -> tuple[list[Row], int]:
    """What is in both, by benchmark, in the order of `a`; and how many results are in one of them alone."""
    first, second = _by_key(a), _by_key(b)
    rows = [Row(key[0], first[key], second[key]) for key in first if key in second]
    return rows, len(first.keys() ^ second.keys())


def _by_key(results: Mapping[str, Sequence[Result]]) -> dict[tuple[str, str, str, str], Result]:
    """Those that have values."""
    return {
        (benchmark, each.group, each.name, each.unit): each
        for benchmark, rows in results.items()
        for each in rows
        if each.values
    }


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """How likely ranks that are so unlike come by chance, where both are drawn alike (two-sided)."""
    ordered = sorted([(value, True) for value in a] + [(value, False) for value in b])
    ranks: list[int] = []  # twice the rank: equal values share the middle of theirs
    ties = 0
    for _, same in groupby(ordered, key=lambda pair: pair[0]):
        count, before = len(list(same)), len(ranks)
        ranks += [2 * before + count + 1] * count
        ties += count**3 - count
    total = sum(rank for rank, (_, of_a) in zip(ranks, ordered, strict=True) if of_a)
    expected = len(a) * (len(ranks) + 1)
    if len(ranks) <= _EXACT:
        return _exact(ranks, len(a), abs(total - expected), expected)
    return _normal(len(a), len(b), abs(total - expected) / 2, ties)


def _exact(ranks: list[int], count: int, distance: int, expected: int) -> float:
    """Of all ways to choose so many of the ranks, the share whose sum is as far from the expected one, or farther."""
    ways: list[dict[int, int]] = [{0: 1}, *({} for _ in range(count))]
    for rank in ranks:
        for chosen in range(count, 0, -1):
            for total, number in ways[chosen - 1].items():
                ways[chosen][total + rank] = ways[chosen].get(total + rank, 0) + number
    far = sum(number for total, number in ways[count].items() if abs(total - expected) >= distance)
    return far / sum(ways[count].values())


def _normal(m: int, n: int, distance: float, ties: int) -> float:
    """With the correction for ties, and for ranks being whole numbers."""
    size = m + n
    variance = m * n / 12 * (size + 1 - ties / (size * (size - 1)))
    if variance <= 0:  # all are the same
        return 1.0
    return min(2 * (1 - NormalDist().cdf(max(distance - 0.5, 0) / variance**0.5)), 1.0)
