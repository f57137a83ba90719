# dup_model.py: what the guest `dup` (guest/dup.c) has in its memory, and how many of its pages are duplicates.
# For tests. Page numbers count the guest's region: page 0 lies at 2 MiB.
"""`Dup`: a stopped guest's pages. `Dup.sharing()`: what sharing could free, truly; `between()`: across VMs."""

from __future__ import annotations

from pyvmm.errors import BadInput, StateError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.record import Record
from pyvmm.testing.passes_model import Passes
from pyvmm.testing.stamps import GOLDEN, MASK, WrongPage, mix, mix_one, shuffled

TYPE_CHECKING = False
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pyvmm.machine import Progress
    from pyvmm.memory import GuestMemory
    from pyvmm.testing.passes_model import Order
    from pyvmm.testing.stamps import U64

_A_BLOCK = BLOCK_SIZE // PAGE_SIZE


class Sharing(Record):
    """The truth about a VM's duplicates, in pages. zeros: all zeros. duplicates: not zeros, with the same content as
    another page of the VM; contents: different ones among those, so that duplicates - contents can be freed.

    Per block of 2 MiB, from the guest's first: block_zeros, block_duplicates.
    """

    __slots__ = ("block_duplicates", "block_zeros", "contents", "duplicates", "pages", "zeros")

    def __init__(self, bases: U64) -> None:
        import numpy as np

        _, which, times = np.unique(bases, return_inverse=True, return_counts=True)
        again = (times[which] > 1) & (bases != 0)
        blocks = -(-len(bases) // _A_BLOCK)
        of_block = np.arange(len(bases)) // _A_BLOCK
        self.pages = len(bases)
        self.zeros = int(np.count_nonzero(bases == 0))
        self.duplicates = int(np.count_nonzero(again))
        self.contents = len(np.unique(bases[again]))
        self.block_zeros = tuple(np.bincount(of_block[bases == 0], minlength=blocks).tolist())
        self.block_duplicates = tuple(np.bincount(of_block[again], minlength=blocks).tolist())

    @property
    def freed(self) -> int:
        """Pages that sharing within the VM frees: all but one of each content, and all zeros."""
        return self.zeros + self.duplicates - self.contents


class Dup:
    """The pages of a guest `dup` that is not running. The arguments are its options; the rest is in its progress.

    Raises StateError where the guest is another one or has not started, BadInput for options that cannot be.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        dups: int = 200,
        groups: int = 0,
        common: int = 100,
        shared: int = 1,
        zeros: int = 100,
        write: int = 0,
        order: Order = "seq",
    ) -> None:
        if min(dups, groups, common, zeros) < 0 or dups + common + zeros > 1000:
            raise BadInput(
                f"dups={dups}, groups={groups}, common={common}, zeros={zeros}: not options of the guest dup"
            )
        self._passes = Passes("dup", progress, write, order)
        self._seed = mix_one(progress.seed)
        self._dups, self._common, self._zeros = dups, common, zeros
        self._groups = groups or len(self._passes.numbers) * dups // 4000 or 1
        self._places = shuffled(len(self._passes.numbers), mix_one(self._seed ^ MASK))
        self._shared_seed = mix_one((shared & MASK) ^ MASK)

    def check(self, memory: GuestMemory) -> list[WrongPage]:
        """Compares every page with what it must be; [] is good."""
        return self._passes.check(memory, self._contents, lambda words, right: "")

    def bases(self) -> U64:
        """What tells each page's content from others': equal for equal pages, 0 for zeros. One that a vCPU is about to
        write counts as not written. Raises StateError where a page was never written."""
        contents = self._passes.contents(self._contents)
        if not contents.known.all():
            raise StateError("the guest dup has not written all of its pages yet")
        return contents.bases

    def sharing(self) -> Sharing:
        """How many duplicates there are."""
        return Sharing(self.bases())

    def _contents(self, numbers: U64, keys: U64, versions: NDArray[np.int64]) -> tuple[U64, U64]:
        """For each page (base, step), as guest/dup.c has them."""
        import numpy as np

        shared = mix(self._places[numbers] * GOLDEN + self._shared_seed)
        own = mix(keys + versions.astype(np.uint64))
        common = shared % 1000 < self._common
        kind = mix(keys) % max(1000 - self._common, 1)
        zero = ~common & (kind < self._zeros)
        copy = ~common & ~zero & (kind < self._zeros + self._dups)
        bases = np.where(copy, mix(own % self._groups + self._seed), own)
        bases[common] = mix(shared[common])
        bases[zero] = 0
        return bases, np.where(zero, np.uint64(0), np.uint64(GOLDEN))


def between(bases: U64, others: U64) -> int:
    """Pages of one VM, not zeros, of which the content occurs in another one. Both by Dup.bases()."""
    import numpy as np

    return int(np.count_nonzero(np.isin(bases, others) & (bases != 0)))
