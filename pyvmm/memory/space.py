# space.py: the guest's RAM in our address space, and safe access to it. Addresses are Gpa, sizes bytes.
"""`GuestMemory`: allocates RAM and turns guest-physical addresses into bytes, after checking them."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from itertools import count

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, MemoryAccessError, check
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, Gpa, Hva, ram_regions
from pyvmm.memory.mapping import allocate, check_size
from pyvmm.memory.views import NOTHING, Pinned, View, page_range

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    from pyvmm._native import CData
    from pyvmm.memory.counts import PageCounts
    from pyvmm.memory.engine import Engine
    from pyvmm.memory.mapping import Pages
    from pyvmm.memory.reclaim.reclaimer import Reclaimer
    from pyvmm.memory.swap import Swap
    from pyvmm.memory.views import Nothing

    Buffer: TypeAlias = bytes | bytearray | memoryview

_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE


class GuestMemory:
    """All RAM of a guest: one anonymous mapping, 2 MiB aligned, not populated before it is touched.

    `regions` says where its parts lie in guest-physical space. `pages`: "2m" asks for transparent huge pages
    everywhere, "4k" for small pages only; "auto" is "2m" where the host has them, but small in the first 2 MiB, where
    boot structures and page tables would keep KVM from mapping a large page anyway.
    `hugetlb` takes reserved 2 MiB pages of hugetlbfs instead. `untouched`: nothing has been written or viewed yet;
    `backing`: `pages` as it was given.
    Pages may be away (`engine`): whatever is read, written or viewed here is brought back first, and stays meanwhile.
    `on_write`: is told of each write of ours, after it, as (first page, pages) of the mapping; None: no trace runs.
    """

    def __init__(self, size: int, pages: Pages = "auto", hugetlb: bool = False, address_bits: int = 48) -> None:
        check_size(size, pages, hugetlb, address_bits)
        self.size = size
        self.backing = pages
        self.hugetlb = hugetlb
        self.regions = ram_regions(size)
        # The cdata object owns the mapping: it goes when the last view of it has gone, never before.
        self._base: CData | None = allocate(size, pages, hugetlb)
        self.untouched = True
        self.on_engine: Callable[[Engine], None] = lambda engine: None
        """Called with the engine when it is first asked for."""
        self.paused: Callable[[], bool] = lambda: False
        """Does the guest stand?"""
        self._engine: Engine | None = None
        self._kept: list[Callable[[], object]] = []
        self._ends: list[Callable[[], object]] = []
        self._making = threading.Lock()
        self.reclaimer: Reclaimer | None = None
        """What keeps the limit, where there is or was one."""
        self.swap: Swap | None = None
        """The home of pages in a file, while there is one."""
        self.on_write: Callable[[int, int], None] | None = None
        self._views: dict[int, View] = {}
        self._view_numbers = count()
        if pages == "auto" and not hugetlb:
            check(lib.pv_madvise(self._base, min(size, BLOCK_SIZE), lib.MADV_NOHUGEPAGE), "madvise")

    def close(self) -> None:
        """Gives the memory back as soon as no view of it is left. Any later access raises MemoryAccessError."""
        self.close_engine()
        while self._kept:
            self._kept.pop()()
        self._base = None

    def keep(self, close: Callable[[], object]) -> None:
        """Has something called when the memory is closed, after the engine's end: what a home needs until then."""
        self._kept.append(close)

    def before_end(self, end: Callable[[], object]) -> None:
        """Has something called before the engine's end: what uses it in a thread of its own should know."""
        self._ends.append(end)

    def close_engine(self) -> None:
        """Ends the engine: what is away is lost, so that nothing may run in the guest any more."""
        while self._ends:
            self._ends.pop()()
        if self._engine is not None:
            self._engine.close()

    @property
    def engine(self) -> Engine:
        """What takes pages away and brings them back. Made when it is first asked for; costs nothing before.

        Raises BadInput for hugetlb memory, whose pages cannot be taken away one by one.
        """
        with self._making:
            if self._engine is None:
                from pyvmm.memory.engine import Engine

                if self.hugetlb:
                    raise BadInput("the pages of hugetlb memory stay where they are: use --pages 2m")
                small = {"4k": -(-self.size // BLOCK_SIZE), "auto": 1, "2m": 0}[self.backing]
                engine = Engine(self._mapping(), self.size, small)
                engine.name_page = lambda page: f"gfn {self.gpa_of(page).gfn.value:#x}"
                self.on_engine(engine)
                for view in list(self._views.values()):
                    view.pin(engine)
                self._engine = engine
            return self._engine

    def reclaim(
        self,
        swap: str | None = None,
        size: int | None = None,
        compress: str | None = None,
        policy: str | None = None,
        seed: int = 0,
    ) -> Reclaimer:
        """Makes ready what keeps a limit, once. swap, compress: where pages go, see Swap; size: of that, in bytes; by
        default as much as there is RAM. policy, seed: see Reclaimer. Raises BadInput, HostError."""
        from pyvmm.memory.reclaim.reclaimer import Reclaimer
        from pyvmm.memory.swap import Swap

        if self.reclaimer is not None:
            raise BadInput("what this VM gives up has a policy and a swap already")
        home = Swap(self, swap, self.size if size is None else size, compress)
        try:
            self.reclaimer = Reclaimer(self, home, policy, seed)
        except BaseException:
            home.close()
            raise
        return self.reclaimer

    @property
    def limit(self) -> int | None:
        """So many bytes of RAM may take memory of the host, the rest is in a swap file; None: all of it may.

        To set it returns at once. Raises BadInput where it is too low, HostError where there can be no swap file.
        """
        return None if self.reclaimer is None else self.reclaimer.limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        if limit is not None and self.reclaimer is None:
            self.reclaim()
        if self.reclaimer is not None:
            self.reclaimer.limit = limit

    def pages(self) -> PageCounts:
        """Where the guest's pages are: in large or small mappings, untouched, or away, by home."""
        return self.engine.count()

    def large_blocks(self) -> int:
        """Blocks that the kernel maps as one large page now."""
        return self.size // BLOCK_SIZE if self.hugetlb else self.engine.looks().count("large")

    # ---- numbers of pages and blocks: by their place in RAM, which has no holes ----

    def page_of(self, gpa: Gpa) -> int:
        """The number of the page that holds this byte. Raises MemoryAccessError where that is not RAM."""
        return self._offset(gpa, 1) // PAGE_SIZE

    def block_of(self, gpa: Gpa) -> int:
        """The number of the 2 MiB block that holds this byte, likewise."""
        return self._offset(gpa, 1) // BLOCK_SIZE

    def gpa_of(self, page: int) -> Gpa:
        """Where a page begins. Raises MemoryAccessError where there is no such page."""
        for region in self.regions:
            distance = page * PAGE_SIZE - region.offset
            if 0 <= distance < region.size:
                return region.gpa + distance
        raise MemoryAccessError(f"there is no page {page}: the VM has {self.size // PAGE_SIZE}")

    @property
    def base(self) -> CData:
        """Where page 0 lies in our address space, for C; the mapping stays for as long as the caller holds this."""
        return self._mapping()

    def _mapping(self) -> CData:
        """The mapping, which stays for as long as the caller holds this; an address within it would not hold it."""
        if self._base is None:
            raise MemoryAccessError("the VM is closed: its memory is gone")
        return self._base

    def _offset(self, gpa: Gpa, size: int) -> int:
        """Where a range lies in the mapping; raises MemoryAccessError unless all of it is RAM."""
        if size < 0:
            raise MemoryAccessError(f"a range of {size} bytes")
        for region in self.regions:
            distance = gpa.value - region.gpa.value
            if 0 <= distance <= region.size and size <= region.size - distance:
                return region.offset + distance
        raise MemoryAccessError(f"{gpa.value:#x}+{size:#x} is not (wholly) RAM: the VM has {self.describe()}")

    def is_ram(self, address: int, size: int) -> bool:
        """Are these bytes of guest-physical space all RAM? Any numbers from 0 on can be asked about."""
        return any(region.gpa.value <= address <= address + size <= region.end.value for region in self.regions)

    def describe(self) -> str:
        """The RAM ranges, for people."""
        return ", ".join(f"{region.gpa.value:#x}..{region.end.value:#x}" for region in self.regions)

    def hva(self, gpa: Gpa) -> Hva:
        """Where the byte at `gpa` lies in our address space."""
        return Hva(int(ffi.cast("uintptr_t", self._mapping() + self._offset(gpa, 1))))

    def read(self, gpa: Gpa, size: int) -> bytes:
        """A copy of `size` bytes at `gpa`. Raises MemoryAccessError unless all of them are RAM."""
        mapping, offset = self._mapping(), self._offset(gpa, size)
        data = bytearray(size)
        with self._present(offset, size):
            lib.pv_copy(ffi.from_buffer(data), mapping + offset, size)
        return bytes(data)

    def write(self, gpa: Gpa, data: Buffer) -> None:
        """Writes `data` at `gpa`. Raises MemoryAccessError, with nothing written, unless all of it goes into RAM."""
        source = ffi.from_buffer(data)
        size = ffi.sizeof(source)
        mapping, offset = self._mapping(), self._offset(gpa, size)
        self.untouched = False
        with self._present(offset, size):
            lib.pv_copy(mapping + offset, source, size)
        self._wrote(*page_range(offset, size))

    def zero(self, gpa: Gpa, size: int) -> None:
        """Writes zeros. Raises MemoryAccessError unless the whole range is RAM."""
        mapping, offset = self._mapping(), self._offset(gpa, size)
        with self._present(offset, size):
            lib.pv_zero(mapping + offset, size)
        self._wrote(*page_range(offset, size))

    def view(self, gpa: Gpa, size: int) -> memoryview:
        """A writable view of guest memory, without a copy; it stays valid, and the memory mapped, while it is held.

        Nor are its pages taken away meanwhile, and for a write trace all of it counts as written: hold it, or a slice
        of it, no longer than needed.
        """
        mapping, offset = self._mapping(), self._offset(gpa, size)
        self.untouched = False
        buffer = ffi.buffer(mapping, self.size)
        self._watch(buffer, *page_range(offset, size))
        return memoryview(buffer)[offset : offset + size]

    @contextmanager
    def reading(self, page: int, count: int) -> Iterator[memoryview]:
        """The bytes of pages that follow each other in the mapping, without a copy, present and to be read alone: no
        write trace hears of it. Within its `with` only, and only for C, which touches them without the GIL."""
        mapping = self._mapping()
        if page < 0 or count < 0 or (page + count) * PAGE_SIZE > self.size:
            raise MemoryAccessError(f"pages {page}+{count}: the VM has {self.size // PAGE_SIZE}")
        offset, size = page * PAGE_SIZE, count * PAGE_SIZE
        with self._present(offset, size):
            yield memoryview(ffi.buffer(mapping, self.size))[offset : offset + size].toreadonly()

    @contextmanager
    def pinned(self, runs: CData, count: int) -> Iterator[CData]:
        """The mapping, in which the pages of these runs (struct pv_run_pages[count]) are present and stay within its
        `with`. To be read by C alone. Raises FetchError."""
        mapping = self._mapping()
        engine = self._engine
        if engine is not None:
            engine.pin_runs(runs, count)
        try:
            yield mapping
        finally:
            if engine is not None:
                engine.unpin_runs(runs, count)

    def written_views(self) -> list[tuple[int, int]]:
        """(first page, pages) in the mapping of each view that is held: who holds one may be writing there."""
        return [(view.first, view.pages) for view in list(self._views.values())]

    @contextmanager
    def views_settled(self) -> Iterator[bool]:
        """Within its `with` no view is made, and if a home is in Python (yields: is one?), those that are held have all
        pages of their blocks present, so that nothing has to be fetched for a write to one. Raises FetchError."""
        with self._making:
            engine = self._engine
            if engine is None or not engine.has_python_homes:
                yield False
                return
            for first, count in self.written_views():
                start = first // _BLOCK_PAGES * _BLOCK_PAGES
                end = min(-(-(first + count) // _BLOCK_PAGES) * _BLOCK_PAGES, self.size // PAGE_SIZE)
                engine.install(start, end - start)
            yield True

    def _watch(self, buffer: memoryview, first: int, pages: int) -> None:
        from weakref import ref

        number = next(self._view_numbers)

        def gone(_: object) -> None:
            self._wrote(first, pages)  # before it is forgotten: a collection meanwhile sees one or the other
            self._views.pop(number).unpin()

        with self._making:  # not in gone(), which may run at any moment, also while this is held
            view = self._views[number] = View(ref(buffer, gone), first, pages)
            if self._engine is not None:
                view.pin(self._engine)
                if self._engine.has_python_homes:  # who touches a view has the GIL: it must never wait for the engine
                    start = self._mapping() + first * PAGE_SIZE
                    check(lib.pv_madvise(start, pages * PAGE_SIZE, lib.MADV_POPULATE_WRITE), "madvise", pages=pages)

    def _wrote(self, first: int, pages: int) -> None:
        # Looked up after the write: a trace that was started meanwhile must hear of it.
        if (hook := self.on_write) is not None:
            hook(first, pages)

    def _present(self, offset: int, size: int) -> Pinned | Nothing:
        """Within its `with`, these bytes are in the guest's mapping. Raises FetchError."""
        return NOTHING if self._engine is None else Pinned(self._engine, *page_range(offset, size))

    def __getitem__(self, where: slice) -> bytes:
        gpa, size = self._range(where)
        return self.read(gpa, size)

    def __setitem__(self, where: slice, data: Buffer) -> None:
        gpa, size = self._range(where)
        if len(memoryview(data).cast("B")) != size:
            raise BadInput(f"{len(memoryview(data).cast('B'))} bytes do not fit a slice of {size}")
        self.write(gpa, data)

    def _range(self, where: slice) -> tuple[Gpa, int]:
        if not isinstance(where, slice) or where.step is not None or where.start is None or where.stop is None:
            raise BadInput("guest memory takes slices with both ends and no step: memory[gpa : gpa + size]")
        start, stop = Gpa(where.start.__index__()), Gpa(where.stop.__index__())
        return start, stop - start
