# working_set.py: how much memory a guest uses, told from samples of a part of it. Units: pages of 4 KiB, blocks of
# 2 MiB, seconds.
"""`WorkingSet` collects samples, `Estimate` is what they say of all blocks together."""

from __future__ import annotations

from math import ceil, sqrt

from pyvmm.errors import BadInput
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.record import Record

BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
_Z = 1.959963984540054
"""97.5 % of a normal distribution lie below."""
_MISSED = 0.025
"""How probable it may be that something as frequent is not seen at all."""


class Estimate(Record):
    """Pages in use: `pages`, and from `low` to `high` in 95 of 100 cases. blocks: of so many; samples: told by so many
    of them; active: blocks that are to stay large, estimated."""

    __slots__ = ("active", "blocks", "high", "low", "pages", "samples")

    def __init__(self, pages: float, low: float, high: float, active: float, blocks: int, samples: int) -> None:
        self.pages = pages
        self.low = low
        self.high = high
        self.active = active
        self.blocks = blocks
        self.samples = samples


class WorkingSet:
    """What the last `period` seconds said. An active block counts as a whole, since it must stay large; another one by
    the pages that were touched. Of each block, its last sample counts."""

    def __init__(self, period: float = 30.0) -> None:
        if not period > 0:
            raise BadInput(f"a working set of the last {period:g} s: give seconds above 0")
        self.period = period
        self._last: dict[int, tuple[float, int, bool]] = {}

    def add(self, block: int, touched: int, active: bool, at: float) -> None:
        """A sample that ended at that time (time.monotonic()); touched: so many pages."""
        self._last.pop(block, None)  # so that the order is that of time
        self._last[block] = (at, BLOCK_PAGES if active else touched, active)

    def estimate(self, blocks: int, now: float) -> Estimate:
        """Of `blocks` in all, those that were not sampled being like those that were: chosen at random, not by age.

        The blocks are a simple random sample without replacement. With n of N blocks, of mean m and variance s^2, the
        total is N m, and its standard error N s sqrt((1 - n/N) / n): W. G. Cochran, Sampling Techniques, 3rd edition,
        theorems 2.1 and 2.2 with (2.15). The interval takes Student's t with n - 1 degrees of freedom. It is the idea
        of statistical sampling of C. Waldspurger, Memory Resource Management in VMware ESX Server (OSDI 2002), section
        5.3, with blocks for pages. Where all samples are alike nothing is known of the spread: then as many other
        blocks are allowed for as would be missed by all n with a probability of 2.5 %.
        """
        for block, (at, _, _) in list(self._last.items()):
            if at >= now - self.period:
                break
            del self._last[block]
        values = [pages for _, pages, _ in self._last.values()]
        count = len(values)
        blocks = max(blocks, count)
        most = float(blocks * BLOCK_PAGES)
        if not count:
            return Estimate(most / 2, 0.0, most, blocks / 2, blocks, 0)
        mean = sum(values) / count
        least = float(sum(values))  # these were touched, whatever the others are
        left = most - count * BLOCK_PAGES + least
        active = blocks * sum(active for _, _, active in self._last.values()) / count
        half = _half_width(values, mean, blocks)
        low, high = max(blocks * mean - half[0], least), min(blocks * mean + half[1], left)
        return Estimate(blocks * mean, low, high, active, blocks, count)


def _half_width(values: list[int], mean: float, blocks: int) -> tuple[float, float]:
    """How far the interval reaches down and up."""
    count = len(values)
    if count == blocks:
        return 0.0, 0.0
    variance = sum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    if not variance:
        missed = ceil(blocks * (1 - _MISSED ** (1 / count)))
        return missed * mean, missed * (BLOCK_PAGES - mean)
    half = student(count - 1) * blocks * sqrt(variance * (1 - count / blocks) / count)
    return half, half


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for one and two degrees of freedom, else by an expansion in 1 / freedom
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5), right to 0.5 % from three on."""
    if freedom < 1:
        raise BadInput(f"{freedom} degrees of freedom: give 1 or more")
    if freedom <= 2:
        return 12.706204736174698 if freedom == 1 else 4.302652729749464
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))
