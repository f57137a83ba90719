# estimate.py: what sharing would free, by tables of hashes. Units: pages of 4 KiB; counts a block of 2 MiB.
"""`Estimate`: of one VM, and of several together."""

from __future__ import annotations

from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.memory.sharing.table import CONTENT, UNKNOWN, ZERO
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pyvmm.memory.sharing.table import Table

BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE


class Estimate(Record):
    """pages: of the VM; scanned: of these, those of which the content is known.

    What can be freed: zeros, pages of zeros that take memory; copies, of each content in this VM all pages but one;
    across, of each content that several of the VMs have, all but one of what each has left: in all of them together.
    again: a bit a page (an array of bool): zeros that take memory, or its content is elsewhere too. A hash is no proof,
    and the guest goes on: what is shared in the end is decided by the bytes.
    """

    __slots__ = ("across", "again", "copies", "pages", "scanned", "zeros")

    def __init__(self, table: Table, others: Sequence[Table] = ()) -> None:
        import numpy as np

        contents, which, times = np.unique(table, return_inverse=True, return_counts=True)
        real = contents >= CONTENT
        theirs = [np.unique(other[other >= CONTENT]) for other in others]
        union, owners = np.unique(np.concatenate([contents[real], *theirs]), return_counts=True)
        elsewhere = np.isin(contents, union[owners > 1]) | (times > 1)
        self.pages = len(table)
        self.scanned = int(np.count_nonzero(table != UNKNOWN))
        self.zeros = int(np.count_nonzero(table == ZERO))
        self.copies = int((times[real] - 1).sum())
        self.across = int((owners - 1).sum())
        self.again: NDArray[np.bool_] = ((real & elsewhere) | (contents == ZERO))[which.reshape(-1)]

    __hash__ = None  # type: ignore[assignment]

    @property
    def freed(self) -> int:
        """Pages that could be freed."""
        return self.zeros + self.copies + self.across

    def counts(self) -> list[int]:
        """For each block, how many of its pages could be given up, if what is equal to them stays."""
        import numpy as np

        sums: list[int] = np.add.reduceat(self.again.astype(np.int64), np.arange(0, self.pages, BLOCK_PAGES)).tolist()
        return sums

    def bits(self, block: int) -> int:
        """These pages of a block, as Policy.scanned() takes them."""
        import numpy as np

        part = self.again[block * BLOCK_PAGES : (block + 1) * BLOCK_PAGES]
        return int.from_bytes(np.packbits(part, bitorder="little").tobytes(), "little")
