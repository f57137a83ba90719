# soak.py: guests that check all of their memory, under random operations of all kinds on it (measure P19): is a page
# ever wrong, and how many operations a second are there. Units: operations, pages; operations a second.
"""The torture of `pyvmm torture`, a number of operations for each seed: one with dirty rings, one with the host's swap
and a limit that changes, others without. What is wrong is told on stderr with its seed, and counts.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from pyvmm.bench import Collected, Result
from pyvmm.layout import MIB
from pyvmm.record import Record
from pyvmm.testing.torture import Torture, TortureFailure

if TYPE_CHECKING:
    from pyvmm.testing.operations import Operation

_SUMS = "in all"
_RATES = "operations a second, of the time of that kind"


class Size(Record):
    """seeds; operations: of each, at most; seconds: until then it ends in any case; memory: of each guest."""

    __slots__ = ("memory", "operations", "seconds", "seeds")

    def __init__(self, seeds: tuple[int, ...], operations: int, seconds: float, memory: int) -> None:
        self.seeds = seeds
        self.operations = operations
        self.seconds = seconds
        self.memory = memory


FULL = Size((0, 1, 2, 3), 2500, 600.0, 64 * MIB)
QUICK = Size((1, 2), 60, 10.0, 16 * MIB)


class _Timed(Torture):
    """took: seconds by kind."""

    took: dict[str, float]

    def do(self, operation: Operation) -> None:
        """See Torture; with the look at the guest that follows each operation."""
        begin = time.perf_counter()
        super().do(operation)
        self.took[operation.kind] = self.took.get(operation.kind, 0.0) + time.perf_counter() - begin


def measure(quick: bool = False) -> list[Result]:
    """A value for each seed; "in all" are sums. "wrong": seeds whose guest, model, books or kernel found something that
    must not be: it ends with the first. The rate in all has the full checks in it, those by kind have not.
    """
    size, found = QUICK if quick else FULL, Collected()
    sums: Counter[str] = Counter()
    for seed in size.seeds:
        _soak(found, sums, seed, size)
    for name, unit in (("operations", "operations"), ("full checks", "checks"), ("checked by guests", "pages")):
        found.add(_SUMS, name, unit, sums[name])
    found.add(_SUMS, "wrong", "seeds", sums["wrong"])
    return found.results()


def _soak(found: Collected, sums: Counter[str], seed: int, size: Size) -> None:
    torture = _Timed(seed, size.memory, cpus=2)
    torture.took = {}
    with torture:
        begin = time.perf_counter()
        try:
            torture.run(size.seconds, most=size.operations)
        except TortureFailure as failure:
            sums["wrong"] += 1
            print(failure.report, file=sys.stderr)
        seconds = time.perf_counter() - begin
        sums["operations"] += torture.operations
        sums["full checks"] += torture.checks
        sums["checked by guests"] += torture.vm.progress().count
        found.add("operations a second", "all, with full checks", "ops/s", torture.operations / seconds)
        for kind, count in torture.done.most_common():
            found.add(_RATES, kind, "ops/s", count / torture.took[kind])
