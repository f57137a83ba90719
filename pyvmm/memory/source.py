# source.py: RAM that comes from somewhere when it is touched: how much comes, and what comes ahead of touches. The work
# is in cffi_build/unit.c and pagemap.c. Units: pages of 4 KiB, blocks of 2 MiB, numbered by their place in RAM.
"""`Source`: the home of all RAM of a VM, such as a snapshot file's."""

from __future__ import annotations

import errno

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, HostError, check
from pyvmm.memory.homes import HOMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import CData
    from pyvmm.memory.engine import Engine, NativeHome
    from pyvmm.memory.pageset import PageSet

UNITS = ("adaptive", "page", "block", "large")
"""How much a touch brings of what a home keeps in storage blocks: at first such a block, with a second touch of the
same 2 MiB all of that as one large page; always 4 KiB; always a storage block; always 2 MiB. By number (PV_UNIT_*)."""


class Source:
    """Makes a home in C, of that name, the source of all RAM. It is asked where a page is when that is needed, so that
    this takes no time.

    unit: of UNITS; workers: threads that answer faults. Raises BadInput for what these cannot be, and where anything of
    RAM has been touched.
    stale: only of these pages, whatever they hold, of a VM that does not run yet; large: blocks that are to be large, a
    bitmap (NULL: all). Raises HostError where that cannot be; then the VM's RAM is of no use any more.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        home: NativeHome,
        unit: str,
        workers: int,
        stale: PageSet | None = None,
        large: CData = ffi.NULL,
    ) -> None:
        if unit not in UNITS:
            raise BadInput(f"unit={unit!r}: choose one of {', '.join(UNITS)}")
        if not 1 <= workers <= lib.PV_MAX_WORKERS:
            raise BadInput(f"{workers} threads for faults: give 1 to {lib.PV_MAX_WORKERS}")
        self._engine = engine
        engine.tell(lib.pv_engine_unit, UNITS.index(unit))
        engine.tell(lib.pv_engine_workers, workers)
        engine.set_native_home(name, home)
        if stale is not None:
            result = engine.call(lib.pv_engine_assign_bits, HOMES.index(name), stale.bits, large)
            if result in (-errno.EBUSY, -errno.EEXIST):
                raise HostError(
                    "pages that are out of date are in use, or away: nothing else may work with RAM meanwhile"
                )
            check(result, "assign_bits", home=name)
            return
        result = engine.call(lib.pv_engine_assign_all, HOMES.index(name))
        if result == -errno.EEXIST:
            raise BadInput("RAM has been touched: a source of all of it comes first")
        check(result, "assign_all", home=name)

    @property
    def touched(self) -> int:
        """The block in which a page that was away was touched last."""
        return self._engine.call(lib.pv_engine_touched, equip=False)

    def fill(self, page: int, count: int) -> None:
        """Brings pages, but faults that wait come between blocks; what cannot be brought is told as if it was touched.

        Raises MemoryAccessError where the VM is closed, as all of these do.
        """
        self._engine.call(lib.pv_engine_fill, page, count)

    def prefetch(self, pages: CData, count: int, wanted: CData) -> None:
        """Brings pages (uint64_t[count]) in this order; wanted: a bit for each page that is still to be asked for.
        Raises FetchError."""
        result = self._engine.call(lib.pv_engine_prefetch, pages, count, wanted)
        if result < 0:
            self._engine.fail([int(pages[i]) for i in range(count)], -result)

    def record(self, pages: CData, room: int) -> None:
        """Notes the numbers of pages as they come back, in `pages` (uint64_t[room]), which the caller keeps."""
        self._engine.tell(lib.pv_engine_record, pages, room)

    def recorded(self) -> int:
        """How many have been noted. The last ones may be written in a moment only."""
        return self._engine.call(lib.pv_engine_recorded, equip=False)
