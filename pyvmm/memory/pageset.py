# pageset.py: a set of RAM pages that changes, for who decides which pages to save, and in which order. Unit: RAM pages.
"""`PageSet`: a bitmap in C's memory. `Runs` is one that stays as it is."""

from __future__ import annotations

from pyvmm._native import ffi, lib
from pyvmm.memory.trace.runs import Runs, new_bitmap, words_for

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    from pyvmm._native import CData
    from pyvmm.memory.space import Buffer

_ROOM = 64


class PageSet:
    """Pages of a VM that has `pages` of them. bits: the bitmap, see pyvmm.memory.trace.runs."""

    def __init__(self, pages: int, runs: Iterable[tuple[int, int]] = (), bits: CData | None = None) -> None:
        self.pages = pages
        self.bits = new_bitmap(pages) if bits is None else bits
        for first, count in runs:
            self.add(first, count)

    def _require(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.pages:
            raise IndexError(f"pages {first}+{count} of {self.pages}")

    def add(self, first: int, count: int) -> None:
        """Adds pages. Raises IndexError beyond the last."""
        self._require(first, count)
        lib.pv_bits_set(self.bits, first, count)

    def take(self, first: int, count: int) -> list[tuple[int, int]]:
        """Removes pages; returns the runs of those that were in the set, ascending. Raises IndexError."""
        found = list(self._within(first, count))
        lib.pv_bits_clear(self.bits, first, count)
        return found

    def _within(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        self._require(first, count)
        end = first + count
        at, runs, found = ffi.new("uint64_t *", first), ffi.new("struct pv_run_pages[]", _ROOM), _ROOM
        while found == _ROOM:
            found = lib.pv_bits_runs(self.bits, end, at, runs, _ROOM)
            yield from ((runs[i].first, runs[i].count) for i in range(found))

    def add_bits(self, bits: CData) -> None:
        """Adds what is in a bitmap of as many pages."""
        lib.pv_bits_or(self.bits, bits, words_for(self.pages))

    def remove(self, other: PageSet) -> Self:
        """Removes what is in another set of as many pages."""
        lib.pv_bits_and_not(self.bits, other.bits, words_for(self.pages))
        return self

    def take_common(self, other: PageSet) -> PageSet:
        """Removes what is in another set of as many pages; returns what that was."""
        before = PageSet(self.pages)
        before.add_bits(self.bits)
        self.remove(other)
        return before.remove(self)

    def complement(self) -> PageSet:
        """A set of the pages that are not in this one."""
        return PageSet(self.pages, [(0, self.pages)]).remove(self)

    def count(self) -> int:
        """Pages in it."""
        return lib.pv_bits_count(self.bits, self.pages)

    def put(self, first: int, count: int, bits: Buffer) -> None:
        """Says of `count` pages from `first` on, a multiple of 8, which are in it, as bytes() has it. Raises
        IndexError."""
        self._require(first, count)
        if first % 8 or len(bits) != -(-count // 8):
            raise IndexError(f"{len(bits)} bytes for {count} pages from {first} on")
        ffi.buffer(self.bits)[first // 8 : first // 8 + len(bits)] = bytes(bits)

    def bytes(self) -> bytes:
        """Bit n % 8 of byte n / 8 is page n, and no other bit is set; as many bytes as that takes."""
        raw = bytearray(ffi.buffer(self.bits, -(-self.pages // 8)))
        if self.pages % 8:
            raw[-1] &= (1 << self.pages % 8) - 1
        return bytes(raw)

    def runs(self) -> Runs:
        """What is in it now."""
        return Runs.from_bits(self.bits, self.pages)
