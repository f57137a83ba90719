# balance.py: do the memory engine's books agree with each other and with the kernel's page tables? For tests.
"""`imbalances`: what is wrong with the page map, in words. `populated`: which pages the kernel has, by its own word."""

from __future__ import annotations

import os

from pyvmm._native import lib
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, Gpa
from pyvmm.memory.homes import HOMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pyvmm.memory import GuestMemory

_PRESENT_OR_SWAPPED = 3 << 62
"""Of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst)."""
_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE


def populated(memory: GuestMemory) -> NDArray[np.bool_]:
    """For each page of RAM: has the kernel something there?"""
    import numpy as np

    pages = memory.size // PAGE_SIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        data = os.pread(file.fileno(), pages * 8, memory.hva(Gpa(0)).value // PAGE_SIZE * 8)
    there: NDArray[np.bool_] = (np.frombuffer(data, np.uint64) & np.uint64(_PRESENT_OR_SWAPPED)) != 0
    return there


def imbalances(memory: GuestMemory, pinned: int = 0, armed: bool | None = None) -> list[str]:
    """Compares the words of pages and blocks, the counts and the kernel's page tables; [] is good.

    No operation may be under way, and no vCPU may run. pinned: views that are held, times their blocks; armed: must
    userfaultfd be registered? (None: where pages are away, and only there.)
    """
    import numpy as np

    engine = memory.engine
    count, words, blocks = engine.count(), engine.page_words.copy(), engine.block_words.copy()
    homes = words & lib.PV_PAGE_HOME
    by_home = np.bincount(homes.astype(np.int64), minlength=len(HOMES))
    away = homes != 0
    by_block = np.add.reduceat(away.astype(np.int64), np.arange(0, len(words), _BLOCK_PAGES))
    noted = (blocks >> lib.PV_BLOCK_AWAY_SHIFT) & 0x3FF
    there = populated(memory)
    wrong = []

    def equal(what: str, found: object, right: object) -> None:
        if found != right:
            wrong.append(f"{what}: {found}, not {right}")

    equal("pages in all", count.present + count.away, memory.size // PAGE_SIZE)
    equal("pages by home, counted and by words", count.homes, dict(zip(HOMES[1:], by_home[1:].tolist(), strict=True)))
    for block in np.flatnonzero(noted != by_block)[:4]:
        equal(f"pages away in block {block}, by its word and by theirs", int(noted[block]), int(by_block[block]))
    equal("pages that the kernel has, by PAGEMAP_SCAN and by pagemap", count.large + count.small, int(there.sum()))
    both = np.flatnonzero(there & away)
    equal("pages that are away, and in the guest as well", both[:8].tolist(), [])
    equal("blocks locked", np.flatnonzero(blocks & lib.PV_BLOCK_LOCKED).tolist(), [])
    equal("pins", int((blocks >> lib.PV_BLOCK_PINS_SHIFT).sum()), pinned)
    equal("armed", count.armed, bool(count.away) if armed is None else armed)
    return wrong
