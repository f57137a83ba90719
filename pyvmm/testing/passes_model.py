# passes_model.py: which version each page has in a guest that works in passes (guest/lib/passes.h: verify, dup), by its
# progress page. Page numbers count the guest's region, which begins at 2 MiB.
"""`check`: is every page of such a guest, stopped, as it must be?"""

from __future__ import annotations

from pyvmm.errors import BadInput, StateError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.testing.stamps import GOLDEN, MASK, Contents, WrongPage, compare, keys, mix, mix_one, shuffled, words_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal, TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    from pyvmm.machine import Progress
    from pyvmm.memory import GuestMemory
    from pyvmm.testing.stamps import U64

    Order: TypeAlias = Literal["seq", "random"]
    I64: TypeAlias = NDArray[np.int64]
    Rule: TypeAlias = Callable[[U64, U64, I64], tuple[U64, U64]]
    """(pages, their keys, their versions) -> (bases, steps)."""


class Passes:
    """A guest's pages at one moment. keys, and versions (-1: not written yet), of each.

    in_flight: {page: pass} of those that a vCPU may be writing. Raises StateError where the guest is another one or has
    not started, BadInput for an option that cannot be.
    """

    def __init__(self, name: str, progress: Progress, write: int, order: Order) -> None:
        import numpy as np

        if not 0 <= write <= 100 or order not in ("seq", "random"):
            raise BadInput(f"write={write}, order={order}: these are not options of the guest {name}")
        if progress.guest != name or progress.status == "booting" or progress.region_gpa != BLOCK_SIZE:
            raise StateError(f"the guest {progress.guest!r} ({progress.status}) is not the guest {name} at work")
        self.numbers = np.arange(progress.region_size // PAGE_SIZE, dtype=np.uint64)
        self.keys = keys(progress.seed, self.numbers)
        passes, self.in_flight = _places(name, progress, len(self.numbers), order)
        self.versions = versions(self.keys, passes, write)
        self._passes = passes
        self._write = write

    def contents(self, rule: Rule) -> Contents:
        """What each page must be like."""
        return Contents(*rule(self.numbers, self.keys, self.versions), self.versions, self._passes >= 0)

    def check(self, memory: GuestMemory, rule: Rule, looks: Callable[[U64, U64], str]) -> list[WrongPage]:
        """Compares every page, but for those not written for the first time; [] is good.

        The one page that each vCPU may be about to write may have each 8-byte word of its old or its new version.
        """
        import numpy as np

        other = {}
        for page, pass_ in self.in_flight.items():
            one, now = slice(page, page + 1), np.full(1, pass_, np.int64)
            if versions(self.keys[one], now, self._write)[0] == pass_:
                other[page] = words_of(*rule(self.numbers[one], self.keys[one], now))[0]
        return compare(memory, self.contents(rule), other, looks)


def versions(keys: U64, passes: I64, write: int) -> I64:
    """For each page its version after its pass; -1 stays: not written yet. write: the option, per cent."""
    import numpy as np

    if write == 0:
        return np.minimum(passes, 0)
    found = passes.copy()
    unsure = np.flatnonzero(found > 0)
    while len(unsure):
        hashes = mix(~keys[unsure] + found[unsure].astype(np.uint64) * GOLDEN) % 100
        unsure = unsure[hashes >= write]
        found[unsure] -= 1
        unsure = unsure[found[unsure] > 0]
    return found


def _places(name: str, progress: Progress, pages: int, order: Order) -> tuple[I64, dict[int, int]]:
    """The last pass through with each page (-1: none), and {page: pass} of those that a vCPU may be writing."""
    import numpy as np

    passes = np.full(pages, -1, np.int64)
    in_flight = {}
    cpus = len(progress.work)
    for cpu, work in enumerate(progress.work):
        owned = np.arange(cpu, pages, cpus)
        if order == "random":
            owned = owned[shuffled(len(owned), mix_one((mix_one(progress.seed) ^ MASK) + work.passes))]
        if work.index >= len(owned):
            raise StateError(f"CPU {cpu} of the guest {name} is at page {work.index} of {len(owned)}")
        passes[owned[: work.index]] = work.passes
        passes[owned[work.index :]] = work.passes - 1
        if progress.status != "done":
            in_flight[int(owned[work.index])] = work.passes
    return passes, in_flight
