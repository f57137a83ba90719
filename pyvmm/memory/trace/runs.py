# runs.py: a set of RAM pages as runs of neighbours. Unit: RAM pages, 4 KiB: page n holds byte n * 4096 of the one
# mapping that backs all RAM; that is not the guest frame number where RAM goes on behind the hole below 4 GiB.
"""`Runs`: an immutable sequence of (first_page, count), ascending, never adjacent. Made in C from a bitmap."""

from __future__ import annotations

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput
from pyvmm.layout import PAGE_SIZE, Gpa

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pyvmm._native import CData
    from pyvmm.memory import GuestMemory
    from pyvmm.memory.space import Buffer

MAX_PAGES = 1 << 34
"""64 TiB: more than a process can map."""


def new_bitmap(pages: int) -> CData:
    """A bitmap in C's memory, uint64_t[], all clear: page n is bit n % 64 of word n / 64."""
    return ffi.new("uint64_t[]", max(words_for(pages), 1))


def words_for(pages: int) -> int:
    """64-bit words of a bitmap of so many pages."""
    return (pages + 63) // 64


class Runs:
    """Pages of RAM. `len()` counts runs, `pages` pages; `native` is the same as `struct pv_run_pages *`, for C."""

    __slots__ = ("_count", "native", "pages")

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        """From (first_page, count) in any order, overlapping or not. Raises BadInput for what cannot be pages."""
        wanted = list(runs)
        for first, count in wanted:
            if first < 0 or count < 0 or first + count > MAX_PAGES:
                raise BadInput(f"a run of {count} pages from page {first}: pages are counted from 0 to {MAX_PAGES}")
        pages = max((first + count for first, count in wanted), default=0)
        bits = new_bitmap(pages)
        for first, count in wanted:
            lib.pv_bits_set(bits, first, count)
        self._fill(bits, pages)

    @classmethod
    def from_bits(cls, bits: CData, pages: int) -> Runs:
        """From a bitmap in C's memory (see new_bitmap), of `pages` pages."""
        made = cls.__new__(cls)
        made._fill(bits, pages)
        return made

    @classmethod
    def from_bitmap(cls, bitmap: Buffer) -> Runs:
        """From bytes: page n is bit n % 8 of byte n / 8, as bitmap() gives and KVM's log has it."""
        bits = new_bitmap(len(bitmap) * 8)
        ffi.memmove(bits, bitmap, len(bitmap))
        return cls.from_bits(bits, len(bitmap) * 8)

    def _fill(self, bits: CData, pages: int) -> None:
        self._count: int = lib.pv_bits_count_runs(bits, pages)
        self.pages: int = lib.pv_bits_count(bits, pages)
        self.native = ffi.new("struct pv_run_pages[]", max(self._count, 1))
        lib.pv_bits_runs(bits, pages, ffi.new("uint64_t *"), self.native, self._count)

    @property
    def bytes(self) -> int:
        """Bytes in all pages."""
        return self.pages * PAGE_SIZE

    @property
    def end(self) -> int:
        """The page behind the last one; 0 where there are none."""
        return sum(self[-1]) if self._count else 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[int, int]:
        if not -self._count <= index < self._count:
            raise IndexError(f"run {index} of {self._count}")
        run = self.native[index % self._count]
        return run.first, run.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        native = self.native
        for index in range(self._count):
            run = native[index]
            yield run.first, run.count

    def __contains__(self, page: object) -> bool:
        """Is the page, an int, among them?"""
        low, high = 0, self._count
        while isinstance(page, int) and low < high:
            middle = (low + high) // 2
            first, count = self[middle]
            if first <= page < first + count:
                return True
            low, high = (low, middle) if page < first else (middle + 1, high)
        return False

    def gfns(self, memory: GuestMemory) -> Iterator[tuple[Gpa, int]]:
        """(address, bytes) of each run in guest-physical space; a run that spans the hole becomes two.

        Raises BadInput where a run reaches beyond the RAM of `memory`.
        """
        self.require_within(memory.size // PAGE_SIZE)
        for first, count in self:
            start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
            for region in memory.regions:
                low, high = max(start, region.offset), min(end, region.offset + region.size)
                if low < high:
                    yield region.gpa + (low - region.offset), high - low

    def require_within(self, pages: int) -> None:
        """Raises BadInput unless all are among the first `pages` pages."""
        if self.end > pages:
            raise BadInput(f"page {self.end - 1} is beyond the VM's RAM of {pages} pages")

    def union(self, *others: Runs) -> Runs:
        """The pages of any of them."""
        pages = max(self.end, *(other.end for other in others)) if others else self.end
        bits = new_bitmap(pages)
        for runs in (self, *others):
            runs.mark(bits)
        return Runs.from_bits(bits, pages)

    __or__ = union

    def mark(self, bits: CData) -> None:
        """Sets the pages' bits in a bitmap in C's memory that has room for them."""
        for first, count in self:
            lib.pv_bits_set(bits, first, count)

    def bitmap(self, pages: int | None = None) -> bytearray:
        """Bit n % 8 of byte n / 8 is page n; whole 64-bit words, for `pages` pages (default: as many as needed)."""
        pages = self.end if pages is None else pages
        self.require_within(pages)
        bits = new_bitmap(pages)
        self.mark(bits)
        return bytearray(ffi.buffer(bits, words_for(pages) * 8))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Runs) or (self._count, self.pages) != (other._count, other.pages):
            return NotImplemented if not isinstance(other, Runs) else False
        return bytes(self._raw()) == bytes(other._raw())

    def __hash__(self) -> int:
        return hash(bytes(self._raw()))

    def _raw(self) -> memoryview:
        return ffi.buffer(self.native, self._count * ffi.sizeof("struct pv_run_pages"))

    def __repr__(self) -> str:
        shown = ", ".join(f"{first}+{count}" for first, count in list(self)[:4])
        return f"<Runs of {self.pages} pages: {shown}{', ...' if self._count > 4 else ''}>"
