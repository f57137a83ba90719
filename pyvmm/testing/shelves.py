# shelves.py: where torture has pages kept that are away: a dict of Python's, or the host's swap with a limit that
# changes. Units: pages of 4 KiB, numbered by their place in RAM; sizes in bytes.
"""`Store` and `Swapped`: what serves the home "swap" of a VM under torture, and what must be true of it."""

from __future__ import annotations

import random

from pyvmm.errors import MemoryAccessError
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory.homes import Home
from pyvmm.memory.reclaim.policies import POLICIES
from pyvmm.memory.reclaim.reclaimer import LEAST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from pyvmm.memory import GuestMemory

    Shelf: TypeAlias = "Store | Swapped"


class Store(Home):
    """A home that keeps pages in a dict, and notes whoever treats it wrongly."""

    def __init__(self, memory: GuestMemory) -> None:
        self.wrong: list[str] = []
        self._pages: dict[int, bytes] = {}
        self._next = 0
        self._engine = memory.engine
        self._engine.set_home("swap", self)

    def fetch(self, page: int, locators: Sequence[int]) -> bytes:
        """The bytes."""
        return b"".join(self._pages[locator] for locator in locators)

    def store(self, page: int, data: bytes) -> Sequence[int]:
        """Keeps them."""
        first = self._next
        self._next += len(data) // PAGE_SIZE
        for at in range(first, self._next):
            self._pages[at] = data[(at - first) * PAGE_SIZE :][:PAGE_SIZE]
        return range(first, self._next)

    def forget(self, page: int, locators: Sequence[int]) -> None:
        """Drops them."""
        self.wrong += [f"page {page} forgotten twice" for locator in locators if self._pages.pop(locator, None) is None]

    def put_away(self, page: int, count: int) -> None:
        """Removes pages, and stores those that the guest has not fetched back meanwhile."""
        self._engine.remove(page, count)
        self._engine.store(page, count, "swap")

    def limit(self, value: int) -> None:
        """It has none."""

    def kept(self) -> int:
        """Pages that it keeps."""
        return len(self._pages)


class Swapped:
    """The host's swap, with some policy; limit() changes how much may be resident."""

    def __init__(self, memory: GuestMemory, seed: int) -> None:
        rng = random.Random(seed)
        self._memory = memory
        # No larger than what is kept, so that slots are given up.
        self._reclaimer = memory.reclaim(size=memory.size, policy=rng.choice(list(POLICIES)), seed=seed)
        self._swap = self._reclaimer.swap

    @property
    def wrong(self) -> list[str]:
        """What went wrong with the file; of a VM that is closed, nothing that could be told."""
        try:
            counts = self._swap.stats()
        except MemoryAccessError:
            return []
        return [f"the swap file had {counts.errors} errors, the last {counts.error}"] if counts.errors else []

    def put_away(self, page: int, count: int) -> None:
        """Has pages go out."""
        self._swap.out([(page, count)])

    def limit(self, value: int) -> None:
        """None, or a half, a quarter or an eighth of RAM."""
        share = value % 4
        self._memory.limit = max(LEAST, self._memory.size >> share) if share else None

    def kept(self) -> int:
        """Pages that are in the file, and nowhere else."""
        self._swap.drain()
        return self._swap.stats().live
