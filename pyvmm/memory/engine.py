# engine.py: the memory engine of one VM: pages go away and come back while the guest runs. Units: pages of 4 KiB,
# blocks of 2 MiB, both numbered by their place in RAM (GuestMemory.page_of and block_of give them for an address).
"""`Engine`: what Python decides; cffi_build/engine.h has what is done. "Every page has a home" (docs/design.md)."""

from __future__ import annotations

import _thread
import errno
import os
import threading
from contextlib import contextmanager, suppress
from itertools import pairwise

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, FetchError, HostError, MemoryAccessError, check
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.memory.counts import LOOKS, EngineStats, PageCounts
from pyvmm.memory.homes import HOMES, LOCATOR_LIMIT, Home, Native
from pyvmm.memory.uffd import open_uffd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Literal, Never, Protocol

    import numpy as np
    from numpy.typing import NDArray

    from pyvmm._native import CData
    from pyvmm.memory.pageset import PageSet

    class NativeHome(Protocol):
        """A home in C. struct: its struct pv_home *; explain: what an errno of its fetch means."""

        struct: CData

        def explain(self, number: int) -> str: ...


BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
_WHAT = {"aside": lib.PV_REMOVE_ASIDE, "zero": lib.PV_REMOVE_ZERO}


class Engine:
    """The page map of one VM's RAM, and what can be done to its pages. Any thread may call anything.

    mapping, size: RAM in our address space; small_blocks: so many blocks at its start are of small pages anyway.
    Before anything is asked for that needs it, there is no userfaultfd, no thread and no registration.
    """

    def __init__(self, mapping: CData, size: int, small_blocks: int) -> None:
        self._mapping: CData | None = mapping  # kept alive until close(): C holds a bare pointer
        self._pages = size // PAGE_SIZE
        self._blocks = -(-size // BLOCK_SIZE)
        out = ffi.new("struct pv_engine **")
        check(lib.pv_engine_open(mapping, size, small_blocks, out), "pv_engine_open", size=size)
        self._native: CData | None = out[0]
        self._calls = 0
        self._idle = threading.Condition()
        self._equipping = threading.Lock()
        self._watching = _thread.allocate_lock()  # held by the thread that waits for failures
        self._retried = 0  # failures up to this one have been tried again
        self._homes: dict[int, tuple[Home, Native]] = {}
        self._native_homes: dict[int, NativeHome] = {}
        self._vcpus: list[CData] = []
        self.has: Callable[[str], bool] = lambda feature: True
        """Does the host have a feature (pyvmm.host.Feature)? Without "uffd_move" pages are copied."""
        self.poison = bool(os.environ.get("PYVMM_POISON"))
        """Fill staging memory that holds nothing with 0xA5: debugging. Set it before the first operation."""
        self.name_page: Callable[[int], str] = lambda page: f"page {page}"
        """A page as errors call it."""
        self.on_failure: Callable[[FetchError], None] | None = None
        """Called, on a thread of the engine's, when a page cannot be brought back. Whoever touched it waits."""

    # ---- life ----

    def close(self) -> None:
        """Ends the engine. Pages that are away are lost: nothing may run in the guest any more."""
        with self._idle:
            native, self._native = self._native, None
        if native is None:
            return
        lib.pv_live_cancel(native, True)
        lib.pv_engine_end_failures(native)
        with self._watching:
            pass
        with self._idle:
            self._idle.wait_for(lambda: self._calls == 0)
        lib.pv_engine_close(native)
        self._mapping = None  # else the RAM would stay until the garbage collector comes

    def _enter(self) -> CData:
        with self._idle:
            if self._native is None:
                raise MemoryAccessError("the VM is closed: its memory is gone")
            self._calls += 1
            return self._native

    def _leave(self) -> None:
        with self._idle:
            self._calls -= 1
            self._idle.notify_all()

    def attach_vcpu(self, native: CData) -> None:
        """The next vCPU's struct pv_vcpu, so that its stalls can be told from others'."""
        lib.pv_engine_vcpu(self._native, len(self._vcpus), native)
        self._vcpus.append(native)

    @property
    def cpus(self) -> int:
        """vCPUs that have been attached."""
        return len(self._vcpus)

    def equip(self) -> None:
        """Makes ready what the first operation needs, for who has no time then."""
        self.call(lambda native: 0)

    def _equip(self, native: CData) -> None:
        """Opens the userfaultfds, once."""
        with self._equipping:
            if lib.pv_engine_equipped(native):
                return
            how = (self.has("uffd_move") and lib.PV_ENGINE_MOVE) | (self.poison and lib.PV_ENGINE_POISON)
            ram = open_uffd(for_guests=True)
            try:
                aside = open_uffd(for_guests=True)
            except HostError:
                os.close(ram)
                raise
            check(
                lib.pv_engine_equip(native, ram, aside, how), "UFFDIO_API", features="MOVE|PAGEFAULT_FLAG_WP|THREAD_ID"
            )
            self._watching.acquire()
            _thread.start_new_thread(self._watch, (native,))  # Thread.start() would wait until it runs

    def _watch(self, native: CData) -> None:
        try:
            self._tell_failures(native)
        finally:
            self._watching.release()

    def _tell_failures(self, native: CData) -> None:
        failure = ffi.new("struct pv_failure *")
        while lib.pv_engine_wait_failure(native, failure):
            if self.on_failure is not None and failure.count > self._retried:
                self.on_failure(self.fetch_error(int(failure.page), int(failure.home), int(failure.error)))

    def fetch_error(self, page: int, home: int, number: int) -> FetchError:
        """Of a page that did not come from its home: what to say of it, with the positive errno."""
        cause = self._homes[home][0].error if home in self._homes else None
        text = f"{errno.errorcode.get(number, number)}, {os.strerror(number)}"
        if home in self._native_homes:
            text = self._native_homes[home].explain(number)
        if cause is not None and not isinstance(cause, OSError):
            text += f" ({type(cause).__name__}: {cause})"
        what = f"{self.name_page(page)} cannot be brought back from its home '{HOMES[home]}': {text}"
        return FetchError(what, page, number)

    # ---- pages ----

    def fail(self, pages: Sequence[int], number: int) -> Never:
        """Raises the FetchError of the first of these pages that is still away; number: a positive errno."""
        away = next((page for page in pages if self._home_of(page)), pages[0])
        raise self.fetch_error(away, self._home_of(away), number)

    def remove(self, page: int, count: int = 1, what: Literal["aside", "zero"] = "aside") -> int:
        """Takes pages out of the guest while it runs; a touch brings them back. Returns how many went.

        what: "aside" takes all; "zero" only pages that are all zeros, which then cost nothing (a large page as a whole
        or not at all). Pages in use (a view of them is held, or the kernel works with one) stay.
        """
        if what not in _WHAT:
            raise BadInput(f"remove(what={what!r}): choose aside or zero")
        gone = 0
        for first, part in self.parts(page, count):
            result = self.call(lib.pv_engine_remove, first, part, _WHAT[what])
            if result != -errno.EBUSY:
                gone += check(result, "UFFDIO_MOVE", page=first, pages=part)
        return gone

    def install(self, page: int, count: int = 1) -> None:
        """Brings back what is away of these pages, whole blocks as large pages. Raises FetchError."""
        self._check_range(page, count)
        self._checked(self.call(lib.pv_engine_install, page, count), page, count)

    def store(self, page: int, count: int, home: str) -> int:
        """Puts pages that are aside into another home. Returns how many; raises KernelError, those left still aside."""
        number = self._home_number(home)
        return sum(
            check(self.call(lib.pv_engine_store, first, part, number), f"store in {home}", page=first, pages=part)
            for first, part in self.parts(page, count)
        )

    def assign(self, page: int, count: int, home: str, locator: int = 0) -> None:
        """Says of untouched pages where their bytes are, each by a locator one greater than the one before."""
        self._check_range(page, count)
        if not 0 <= locator <= LOCATOR_LIMIT - count:
            raise BadInput(f"locator {locator:#x}: with {count} pages it must stay below 2^52")
        result = self.call(lib.pv_engine_assign, page, count, self._home_number(home), locator)
        if result == -errno.EEXIST:
            raise BadInput(f"pages {page} to {page + count - 1} are not all untouched: only such can get a home")
        check(result, "assign", page=page, pages=count, home=home)

    def set_home(self, name: str, home: Home) -> None:
        """Says what serves a home other than zero and aside. Not to be changed while pages are in it."""
        number = self._home_number(name)
        native = Native(home)
        self._homes[number] = (home, native)
        self._serve(number, native.struct)

    def set_native_home(self, name: str, home: NativeHome) -> None:
        """The same for a home in C; it is kept as long as the engine."""
        number = self._home_number(name)
        self._native_homes[number] = home
        self._serve(number, home.struct)

    def serves(self, name: str) -> bool:
        """Is there anything that serves this home?"""
        number = self._home_number(name)
        return number in self._homes or number in self._native_homes

    def drop_home(self, name: str) -> None:
        """Undoes set_native_home(). No page may be in it."""
        number = self._home_number(name)
        self._serve(number, ffi.new("struct pv_home *"))
        self._native_homes.pop(number, None)

    def _serve(self, number: int, struct: CData) -> None:
        self.tell(lib.pv_engine_home, number, struct)

    def tell(self, function: Callable[..., None], *arguments: CData | int) -> None:
        """Calls a function of C that returns nothing. Raises MemoryAccessError after close()."""
        handle = self._enter()
        try:
            function(handle, *arguments)
        finally:
            self._leave()

    @property
    def has_python_homes(self) -> bool:
        """Does answering a fault need the GIL?"""
        return bool(self._homes)

    def pin(self, page: int, count: int) -> None:
        """Brings pages back, and keeps their blocks from being removed until unpin(). Raises FetchError."""
        self._check_range(page, count)
        native = self._enter()
        try:
            self._checked(lib.pv_engine_pin(native, page, count), page, count)
        finally:
            self._leave()

    def unpin(self, page: int, count: int) -> None:
        """Undoes one pin(). After close() there is nothing to undo."""
        with suppress(MemoryAccessError):
            native = self._enter()
            lib.pv_engine_unpin(native, page, count)
            self._leave()

    def pin_runs(self, runs: CData, count: int) -> None:
        """The same for struct pv_run_pages[count], all or none of them. Raises FetchError."""
        result = self.call(lib.pv_engine_pin_runs, runs, count, equip=False)
        if result < 0:
            self.fail([runs[i].first + n for i in range(count) for n in range(runs[i].count)], -result)

    def unpin_runs(self, runs: CData, count: int) -> None:
        """Undoes one pin_runs(), likewise."""
        with suppress(MemoryAccessError):
            self.tell(lib.pv_engine_unpin_runs, runs, count)

    def retry(self) -> None:
        """Lets those go on who wait for a page that could not be brought back: they touch it again."""
        native = self._enter()
        self._retried = lib.pv_engine_retry(native)
        self._leave()

    def parts(self, page: int, count: int) -> list[tuple[int, int]]:
        """A range, cut at the ends of blocks: (first page, pages). Raises MemoryAccessError."""
        self._check_range(page, count)
        cuts = [page, *range((page // BLOCK_PAGES + 1) * BLOCK_PAGES, page + count, BLOCK_PAGES), page + count]
        return [(first, end - first) for first, end in pairwise(cuts) if end > first]

    # ---- blocks ----

    def split(self, block: int) -> None:
        """Maps a block by 512 small pages; the physical large page stays whole, and can be mapped as one again."""
        self._on_block(lib.pv_engine_split, block, "madvise", equip=False)

    def merge(self, block: int) -> None:
        """Makes a block one large page again, bringing back what is away in it. Raises FetchError, KernelError."""
        self._on_block(lib.pv_engine_merge, block, "merge", fetches=True)

    def break_(self, block: int) -> None:
        """Splits a block and gives up its physical large page: its small pages can be freed one by one."""
        self._on_block(lib.pv_engine_break, block, "break")

    def share(self, block: int, on: bool = True) -> None:
        """Lets the kernel merge pages of a block with equal ones (KSM), or no more. KernelError for a large one."""
        self._on_block(lambda native, number: lib.pv_engine_share(native, number, on), block, "madvise", equip=False)

    def is_for_large(self, block: int) -> bool:
        """Is a block, that is wholly RAM, to be one large page? Not after split() or break_(), nor of small memory."""
        words = lib.pv_engine_blocks(self._native)
        return block < self._pages // BLOCK_PAGES and not int(words[block]) & lib.PV_BLOCK_SMALL

    def _on_block(
        self, function: Callable[..., int], block: int, call: str, equip: bool = True, fetches: bool = False
    ) -> None:
        if not 0 <= block < self._pages // BLOCK_PAGES:
            raise MemoryAccessError(f"block {block} is not (wholly) RAM: the VM has {self._pages // BLOCK_PAGES}")
        result = self.call(function, block, equip=equip)
        if result in (-errno.EBUSY, -errno.EAGAIN):
            raise HostError(f"block {block} is in use: a view of it is held, or the kernel works with one of its pages")
        if fetches and result < 0 and (kept := self._kept_in(block)) is not None:
            raise self.fetch_error(kept, self._home_of(kept), -result)
        check(result, call, block=block)

    # ---- what is known ----

    def count(self) -> PageCounts:
        """Where all pages are."""
        native = self._enter()
        try:
            homes, armed = ffi.new("uint64_t[]", lib.PV_HOMES), ffi.new("int *")
            large, small = ffi.new("uint64_t *"), ffi.new("uint64_t *")
            lib.pv_engine_count(native, homes, armed)
            check(lib.pv_engine_look(native, large, small, ffi.NULL), "PAGEMAP_SCAN")
        finally:
            self._leave()
        away = dict(zip(HOMES[1:], list(homes)[1:], strict=True))
        return PageCounts(self._pages, int(large[0]), int(small[0]), away, bool(armed[0]))

    def homes(self) -> dict[str, int]:
        """How many pages are away, by home."""
        homes, armed = ffi.new("uint64_t[]", lib.PV_HOMES), ffi.new("int *")
        self.tell(lib.pv_engine_count, homes, armed)
        return dict(zip(HOMES[1:], list(homes)[1:], strict=True))

    def looks(self) -> list[str]:
        """How each block looks, a word of LOOKS: its commonest home where half of it is away, else how it is mapped."""
        native = self._enter()
        try:
            large, small, looks = ffi.new("uint64_t *"), ffi.new("uint64_t *"), bytearray(self._blocks)
            check(lib.pv_engine_look(native, large, small, ffi.from_buffer("uint8_t[]", looks)), "PAGEMAP_SCAN")
        finally:
            self._leave()
        return [LOOKS[look] for look in looks]

    def holds(self) -> bytes:
        """Of each block: PV_HOLDS if it may hold anything but zeros, in the guest or in a home, and PV_HOLDS_LARGE if
        it is a large page, or is to come back as one. The guest must stand still."""
        blocks = bytearray(self._blocks)
        result = self.call(lib.pv_engine_holds, ffi.from_buffer("uint8_t[]", blocks), equip=False)
        check(result, "PAGEMAP_SCAN")
        return bytes(blocks)

    def held(self) -> PageSet:
        """The pages that may hold anything but zeros, in the guest or in a home; of a guest that runs, as it was."""
        from pyvmm.memory.pageset import PageSet

        found = PageSet(self._pages)
        check(self.call(lib.pv_engine_held, 0, self._pages, found.bits, equip=False), "PAGEMAP_SCAN")
        return found

    def at_home(self, home: str) -> PageSet:
        """The pages that are in a home; of those that come back just then, maybe."""
        from pyvmm.memory.pageset import PageSet

        found = PageSet(self._pages)
        self.call(lambda native: lib.pv_engine_at_home(native, HOMES.index(home), found.bits), equip=False)
        return found

    def stats(self) -> EngineStats:
        """Faults, latencies, operations, since the beginning."""
        native = self._enter()
        try:
            out = ffi.new("struct pv_engine_stats *")
            lib.pv_engine_read_stats(native, out)
        finally:
            self._leave()
        return EngineStats(out, [lib.pv_asleep(vcpu) for vcpu in self._vcpus])

    @property
    def page_words(self) -> NDArray[np.uint64]:
        """The page map without a copy, read-only: a word a page, see PV_HOME_* and PV_PAGE_* in cffi_build/engine.h.

        Valid until the VM is closed.
        """
        return self._view(lib.pv_engine_pages, self._pages)

    @property
    def block_words(self) -> NDArray[np.uint64]:
        """A word a block, likewise: PV_BLOCK_*."""
        return self._view(lib.pv_engine_blocks, self._blocks)

    def _view(self, words: Callable[[CData], CData], count: int) -> NDArray[np.uint64]:
        import numpy as np

        native = self._enter()
        try:
            lib.pv_engine_find_all(native)
            view = np.frombuffer(ffi.buffer(words(native), count * 8), np.uint64)
        finally:
            self._leave()
        view.flags.writeable = False
        return view

    def call(self, function: Callable[..., int], *arguments: CData, equip: bool = True) -> int:
        """Calls a function of C that takes the engine first, for the modules beside this one; returns what it returns.

        equip: it needs the userfaultfd. Raises MemoryAccessError after close().
        """
        native = self._enter()
        try:
            if equip:
                self._equip(native)
            return function(native, *arguments)
        finally:
            self._leave()

    @contextmanager
    def using(self) -> Iterator[CData]:
        """Within its `with`, the engine as C has it, for what takes several calls. close() waits for it, and cancels a
        live save before that. Raises MemoryAccessError after close()."""
        native = self._enter()
        try:
            self._equip(native)
            yield native
        finally:
            self._leave()

    # ---- inside ----

    def _checked(self, result: int, page: int, count: int) -> None:
        if result < 0:
            self.fail(range(page, page + max(count, 1)), -result)

    def _home_of(self, page: int) -> int:
        return int(lib.pv_engine_pages(self._native)[page]) & lib.PV_PAGE_HOME

    def _kept_in(self, block: int) -> int | None:
        """The block's first page that is in a home which is not the engine's own."""
        pages = range(block * BLOCK_PAGES, (block + 1) * BLOCK_PAGES)
        return next((page for page in pages if self._home_of(page) >= lib.PV_HOME_FILE), None)

    def _home_number(self, name: str) -> int:
        if name not in HOMES[3:]:
            raise BadInput(f"home {name!r}: choose one of {', '.join(HOMES[3:])}")
        return HOMES.index(name)

    def _check_range(self, page: int, count: int) -> None:
        if page < 0 or count < 0 or page + count > self._pages:
            raise MemoryAccessError(f"pages {page} to {page + count - 1} are not all RAM: the VM has {self._pages}")
