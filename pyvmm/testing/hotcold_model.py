# hotcold_model.py: what the guest `hotcold` (guest/hotcold.c) touches in each phase, and has in its memory; for tests.
# Blocks of 2 MiB and small pages are numbered from the guest's first, which progress.region_gpa is.
"""`HotCold`: which blocks and pages are hot, truly; and is every page as it must be?"""

from __future__ import annotations

from pyvmm.errors import BadInput, StateError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, Gpa
from pyvmm.testing.stamps import GOLDEN, Contents, WrongPage, compare, keys, mix, mix_one, shuffled, words_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine import Progress
    from pyvmm.memory import GuestMemory

_A_BLOCK = BLOCK_SIZE // PAGE_SIZE


class HotCold:
    """A guest `hotcold` at work. hot, pages, shift: its options; the rest is in its progress, of any moment.

    Raises StateError where the guest is another one or has not started, BadInput for an option that cannot be.
    """

    def __init__(self, progress: Progress, *, hot: int = 25, pages: int = 64, shift: int = 100) -> None:
        if not 0 <= hot <= 100 or not 0 <= shift <= 100 or not 1 <= pages <= _A_BLOCK:
            raise BadInput(f"hot={hot}, pages={pages}, shift={shift}: these are not options of the guest hotcold")
        if progress.guest != "hotcold" or progress.status == "booting":
            raise StateError(f"the guest {progress.guest!r} ({progress.status}) is not the guest hotcold at work")
        self.region_gpa = Gpa(progress.region_gpa)
        self.blocks = progress.region_size // BLOCK_SIZE
        self._seed = progress.seed
        self._pages = pages
        self._hot = self.blocks * hot // 100 or 1
        self._shift = self._hot * shift // 100
        self._order = shuffled(self.blocks, mix_one(mix_one(self._seed)))

    def hot_blocks(self, phase: int) -> set[int]:
        """The blocks that are touched in a phase. Which phase it is: phase(), or work[cpu].passes of a vCPU."""
        return {int(self._order[(phase * self._shift + i) % self.blocks]) for i in range(self._hot)}

    def hot_pages(self, phase: int) -> set[int]:
        """The small pages that are touched in a phase, but for those touched by stray=."""
        found: set[int] = set()
        for block in self.hot_blocks(phase):
            order = shuffled(_A_BLOCK, mix_one(mix_one(self._seed) + (block + 1) * GOLDEN))
            found.update(block * _A_BLOCK + int(place) for place in order[: self._pages])
        return found

    def check(self, memory: GuestMemory, progress: Progress) -> list[WrongPage]:
        """Compares every page of the guest, which must not be running, with what it must be; [] is good. The page that
        each vCPU touches may have each 8-byte word of the version in the table or of the next one."""
        import numpy as np

        skip = (self.region_gpa - Gpa(BLOCK_SIZE)) // PAGE_SIZE
        pages = self.blocks * _A_BLOCK
        table = memory.read(Gpa(BLOCK_SIZE), 4 * pages)  # below the hole, with all of the table
        versions = np.frombuffer(table, np.uint32).astype(np.int64)
        of_page = keys(self._seed, np.arange(pages, dtype=np.uint64))
        steps = np.full(pages, GOLDEN, np.uint64)
        bases = mix(of_page + versions.astype(np.uint64))
        other = {}
        for work in progress.work if progress.status != "done" else ():
            if work.index >= pages:
                raise StateError(f"the guest hotcold is at page {work.index} of {pages}")
            one = slice(work.index, work.index + 1)
            other[work.index] = words_of(
                mix(of_page[one] + versions[one].astype(np.uint64) + np.uint64(1)), steps[one]
            )[0]
        contents = Contents(bases, steps, versions, np.ones(pages, bool))
        return compare(memory, contents, other, lambda words, right: "", skip)


def phase(progress: Progress) -> int:
    """The phase that the guest is in, by its first vCPU, which decides; others may have a touch left of the last."""
    return progress.work[0].passes
