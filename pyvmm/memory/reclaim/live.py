# live.py: what a policy sees of a VM that runs: the page map, looked at at times. Units: small pages, blocks of 512.
"""`LiveView`: a View kept by the page map."""

from __future__ import annotations

import time

import numpy as np

from pyvmm._native import lib
from pyvmm.memory.reclaim.policy import BLOCK_PAGES, View

TYPE_CHECKING = False
if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pyvmm.memory.engine import Engine

_NOT_LARGE = lib.PV_BLOCK_SMALL | lib.PV_BLOCK_BROKEN | 0x3FF << lib.PV_BLOCK_AWAY_SHIFT


class LiveView(View):
    """`used` counts what takes memory of the host: pages in the guest, and those aside. Whoever looks is one thread."""

    __slots__ = ("_began", "_blocks", "_engine", "_low", "_seen", "_there", "_words")

    def __init__(self, engine: Engine, limit: int, seed: int) -> None:
        self._words, self._blocks = engine.page_words, engine.block_words
        super().__init__(len(self._words), limit, seed)
        self._engine = engine
        # A look goes over a word of each page: it makes no copy of them, nor memory that the kernel clears each time.
        self._low = self._words.view(np.uint8)[:: self._words.itemsize]
        self._there = np.zeros(self.blocks * BLOCK_PAGES, np.uint8)
        self._seen = np.frombuffer(self.resident, np.uint8)
        self._seen.flags.writeable = True
        self._began = time.monotonic()

    def _present(self) -> NDArray[np.uint8]:
        """1 for each page that is there now, until the next call; blocks that are sampled count as they were: there."""
        found = self._there[: self.pages]
        np.bitwise_and(self._low, lib.PV_PAGE_HOME, out=found)
        np.equal(found, lib.PV_HOME_PRESENT, out=found.view(np.bool_))
        for block in np.flatnonzero(self._blocks & np.uint64(lib.PV_BLOCK_SAMPLED)).tolist():
            found[block * BLOCK_PAGES : (block + 1) * BLOCK_PAGES] = 1
        return found

    def look(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Has the view say what is so now. Returns the pages that are there now, and those that are not any more."""
        now = self._present()
        changed = np.flatnonzero(now != self._seen)
        are = now[changed]
        came, left = changed[are == 1], changed[are == 0]
        self._seen[changed] = are
        blocks = changed // BLOCK_PAGES
        blocks = blocks[np.diff(blocks, prepend=-1) != 0]
        counts = self._there.reshape(self.blocks, BLOCK_PAGES)[blocks].sum(axis=1, dtype=np.int64)
        for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
            self.present[block] = count
        words = self._blocks.copy()
        large = ((words & np.uint64(_NOT_LARGE)) == 0) | ((words & np.uint64(lib.PV_BLOCK_SAMPLED)) != 0)
        self.large[:] = large.astype(np.uint8).tobytes()
        self.now = int((time.monotonic() - self._began) * 1e6)
        self.measure()
        return came, left

    def measure(self) -> int:
        """Looks at `used` alone, and returns it."""
        self.used = int(self._engine.call(lib.pv_limit_resident, equip=False))
        return self.used

    def gone(self, first: int, count: int) -> None:
        """Pages of one block have been chosen: they count as gone, until the next look says otherwise."""
        part = slice(first, first + count)
        self.present[first // BLOCK_PAGES] -= int(self._seen[part].sum())
        self._seen[part] = 0

    def aside_of(self, block: int) -> int:
        """How many of a block's pages are aside now, and not to be sampled."""
        if int(self._blocks[block]) & lib.PV_BLOCK_SAMPLED:
            return 0
        words = self._words[block * BLOCK_PAGES : (block + 1) * BLOCK_PAGES]
        return int(((words & np.uint64(lib.PV_PAGE_HOME)) == lib.PV_HOME_ASIDE).sum())
