# sharer.py: large pages are broken, their zeros dropped and their duplicates merged by the kernel, where that is worth
# it. Units: blocks of 2 MiB, pages of 4 KiB.
"""`share_blocks()`, `unshare()`, and `Sharer`, which chooses under pressure."""

from __future__ import annotations

from pyvmm._native import lib
from pyvmm.errors import HostError
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory.reclaim.policies import duplicates_needed
from pyvmm.memory.sharing.estimate import BLOCK_PAGES
from pyvmm.memory.sharing.ksm import Figures, footprint, ksm_running, settled
from pyvmm.memory.sharing.scanner import free_share
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyvmm.memory import GuestMemory
    from pyvmm.memory.engine import Engine
    from pyvmm.memory.sharing.estimate import Estimate

AT_ONCE = 32
"""Blocks that a Sharer breaks before it looks at the free memory again."""


class Shared(Record):
    """What came of sharing blocks. blocks: that are shared; broken: large pages given up for that; refused: blocks in
    use; zeros: pages dropped, some of which may be back. before, after: bytes of the host's that RAM took, by the
    kernel's figures (ksm.footprint); merging: pages that the kernel has merged, or that stand for others."""

    __slots__ = ("after", "before", "blocks", "broken", "merging", "refused", "zeros")

    def __init__(self) -> None:
        self.blocks = self.broken = self.refused = self.zeros = 0
        self.before = self.after = self.merging = 0

    __hash__ = None  # type: ignore[assignment]

    @property
    def bytes_freed(self) -> int:
        """What sharing has freed, if the guest has brought nothing else meanwhile."""
        return self.before - self.after


def is_shared(memory: GuestMemory, block: int) -> bool:
    """May the kernel merge pages of it?"""
    return bool(int(memory.engine.block_words[block]) & lib.PV_BLOCK_MERGEABLE)


def mark(engine: Engine, block: int) -> int:
    """Breaks a block, drops its pages of zeros, and lets the kernel merge the others. Returns how many were dropped.
    Raises HostError where it is in use."""
    engine.break_(block)
    zeros = engine.remove(block * BLOCK_PAGES, BLOCK_PAGES, what="zero")
    engine.share(block)
    return zeros


def _make_whole(engine: Engine, block: int) -> int:
    engine.merge(block)
    return 0


def _unless_in_use(do: Callable[[Engine, int], int], engine: Engine, block: int) -> int | None:
    """What that returns, or None where the block is in use."""
    try:
        return do(engine, block)
    except HostError as error:
        if "in use" not in str(error):
            raise
        return None


def mark_unless_in_use(engine: Engine, block: int) -> int | None:
    """The same; None where it is in use, or not wholly RAM."""
    return _unless_in_use(mark, engine, block) if engine.is_for_large(block) else None


def _mark_all(engine: Engine, blocks: Iterable[int], found: Shared) -> list[int]:
    """Those that were not in use; counts them."""
    looks, marked = engine.looks(), []
    for block in blocks:
        zeros = _unless_in_use(mark, engine, block)
        if zeros is None:
            found.refused += 1
            continue
        found.zeros += zeros
        marked.append(block)
        found.blocks += 1
        found.broken += looks[block] == "large"
    return marked


def share_blocks(memory: GuestMemory, blocks: Iterable[int], start_ksm: bool = False, seconds: float = 30.0) -> Shared:
    """Shares these blocks, and waits until the kernel has merged what it can, for `seconds` at most.

    start_ksm: has the kernel begin with it, if it does not merge now, and puts its settings back. Raises HostError
    where it does not. Blocks in use stay as they are.
    """
    found = Shared()
    with ksm_running(start_ksm):
        found.before = footprint(memory)
        if _mark_all(memory.engine, blocks, found):
            settled(seconds)
        found.after, found.merging = footprint(memory), Figures().merging
    return found


def unshare(memory: GuestMemory, block: int, large: bool = True) -> None:
    """Gives all pages of a block memory of their own again; large: makes it one large page, with its zeros in it.
    Raises HostError where it is in use."""
    if large:
        _make_whole(memory.engine, block)
    else:
        memory.engine.share(block, False)


class Sharer:
    """Shares blocks in the order of how much that frees, the fewer duplicates sufficing the less memory is free.

    hot: is a block in use by the guest, by what sampling says (technique T8)? Such a block stays whole, and becomes
    whole again. free: the free share of memory now. shared: the blocks that are; done: what was done, without what the
    kernel has freed.
    """

    def __init__(
        self,
        memory: GuestMemory,
        hot: Callable[[int], bool] = lambda block: False,
        free: Callable[[], float] = free_share,
    ) -> None:
        self._memory, self._hot, self._free = memory, hot, free
        self.shared: set[int] = set()
        self.done = Shared()

    def step(self, estimate: Estimate) -> int:
        """Makes whole what has become hot, and shares up to AT_ONCE blocks more. Returns how many are shared now that
        were not."""
        for block in [block for block in sorted(self.shared) if self._hot(block)]:
            if _unless_in_use(_make_whole, self._memory.engine, block) is not None:
                self.shared.discard(block)
        fresh = _mark_all(self._memory.engine, self.choose(estimate)[:AT_ONCE], self.done)
        self.shared.update(fresh)
        return len(fresh)

    def choose(self, estimate: Estimate) -> list[int]:
        """The blocks that are worth it with so little free memory, the best first."""
        least = duplicates_needed(self._free())
        counts = estimate.counts()[: self._memory.size // PAGE_SIZE // BLOCK_PAGES]
        found = [block for block, count in enumerate(counts) if count >= least and block not in self.shared]
        return sorted((block for block in found if not self._hot(block)), key=lambda block: (-counts[block], block))
