# coarse.py: write traces by userfaultfd write protection in large units (technique T7, US11995459B2). The work is in
# cffi_build/coarse.c; faults are answered by the memory engine's thread.
"""`Coarse`: the first write to a 2 MiB block marks the block and lifts its trace, and large pages stay large."""

from __future__ import annotations

import errno
from contextlib import suppress

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, HostError, PyvmmError, check
from pyvmm.layout import BLOCK_SIZE, GIB, PAGE_SIZE, parse_size
from pyvmm.memory.trace.trace import Trace
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import CData
    from pyvmm.memory.trace.trace import Target

REFINE = 4
"""Rounds in a row in which a block must have been written to be traced by small pages. A block costs one fault a round;
traced by small pages it costs one for each page written, and is sent again by what was written only."""


class CoarseStats(Record):
    """faults: writes that lifted a trace; installed: pages reported because they came back to the guest while traced,
    written or not; refined: blocks traced by small pages now; dense: blocks that were, until too many of their pages
    were written in one round; protected: bytes protected, all rounds together."""

    __slots__ = ("dense", "faults", "installed", "protected", "refined")

    def __init__(self, native: CData) -> None:
        self.faults = int(native.faults)
        self.installed = int(native.installed)
        self.refined = int(native.refined)
        self.dense = int(native.dense)
        self.protected = int(native.protected)


class Coarse(Trace):
    """unit: bytes marked by one write, a power of two from 4K to 1G. A block written in `refine` successive rounds is
    traced by small pages until stop(), which makes it large again. Where that turns out to cost too many faults (32 of
    a block in a round, or 2 a ms of all), the block is made large and traced whole again, for good. 0: never refine.

    Reports whole units: more pages than were written, for one fault a unit and round. The VMM's own writes fault like
    the guest's. Pages that are away are reported when they come back.
    """

    def __init__(self, target: Target, unit: int | str = "2M", refine: int = REFINE) -> None:
        super().__init__(target)
        size = parse_size(unit)
        if not PAGE_SIZE <= size <= GIB or size & (size - 1):
            raise BadInput(f"unit={unit}: give a power of two from 4K to 1G")
        if not 0 <= refine < 253:
            raise BadInput(f"refine={refine}: give a number of rounds from 1 to 252, or 0 for never")
        self._shift = size.bit_length() - 1
        self._refine = refine
        self._engine = target.memory.engine

    @property
    def coarse_stats(self) -> CoarseStats:
        """Counts of this trace; after stop(), its last."""
        out = ffi.new("struct pv_trace_stats *")
        self._look(out, ffi.NULL)
        return CoarseStats(out)

    def _arm(self) -> None:
        result = self._engine.call(lib.pv_trace_start, self._shift, self._refine)
        if result == -errno.EBUSY:
            raise HostError("a live snapshot is being saved, which uses the same protection: trace when it is done")
        check(result, "UFFDIO_WRITEPROTECT")

    def _fetch(self, bits: CData) -> None:
        check(self._engine.call(lib.pv_trace_collect, bits), "UFFDIO_WRITEPROTECT")

    def _disarm(self) -> None:
        check(self._engine.call(lib.pv_trace_stop), "UFFDIO_WRITEPROTECT")
        refined = bytearray(-(-self._target.memory.size // BLOCK_SIZE))
        out = ffi.new("struct pv_trace_stats *")
        self._look(out, ffi.from_buffer("uint8_t[]", refined))
        for block, small in enumerate(refined):
            if small and self._engine.is_for_large(block):
                with suppress(PyvmmError):  # in use for the moment, or no large page free: khugepaged will do it
                    self._engine.merge(block)

    def _look(self, out: CData, refined: CData) -> None:
        def look(native: CData) -> int:
            lib.pv_trace_look(native, out, refined)
            return 0

        self._engine.call(look)
