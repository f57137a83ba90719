# balloon.py: pages that a guest gives up, and takes back. Units: pages of 4 KiB by their place in RAM; frames are
# pages by their guest-physical address.
"""`change()`: pages leave memory without a copy, or may be touched again. `runs_of()`: from frames to pages."""

from __future__ import annotations

import sys
from array import array

from pyvmm._native import ffi, lib
from pyvmm.errors import check
from pyvmm.layout import PAGE_SIZE
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pyvmm.memory import GuestMemory

INFLATE, DEFLATE, FREE = lib.PV_BALLOON_INFLATE, lib.PV_BALLOON_DEFLATE, lib.PV_BALLOON_FREE
"""The guest gives them up; it may use them again; it keeps them, and has nothing in them now."""


class Changed(Record):
    """gone: pages that left; back: that may be touched again; stayed: that the host uses just then; blocks: of 2 MiB
    that went whole."""

    __slots__ = ("back", "blocks", "gone", "stayed")

    def __init__(self, gone: int, back: int, stayed: int, blocks: int) -> None:
        self.gone = gone
        self.back = back
        self.stayed = stayed
        self.blocks = blocks


def change(memory: GuestMemory, runs: Sequence[tuple[int, int]], how: int) -> Changed:
    """One of INFLATE, DEFLATE, FREE for runs (first page, pages) of RAM. What is so already stays so. Raises BadInput
    for hugetlb memory, HostError."""
    told = ffi.new("struct pv_balloon_told *")
    given = ffi.new("struct pv_run_pages[]", [{"first": first, "count": count} for first, count in runs])
    check(memory.engine.call(lib.pv_balloon, given, len(runs), how, told), "pv_balloon", runs=len(runs))
    if how != DEFLATE and (written := memory.on_write) is not None:  # looked up now: as for all that the host writes
        for first, count in runs:
            written(first, count)
    return Changed(int(told.gone), int(told.back), int(told.stayed), int(told.blocks))


def frames_in(data: bytes) -> array[int]:
    """Frames as a guest gives them, 32 bits each; what is left over is none."""
    frames = array("I")
    frames.frombytes(data[: len(data) // 4 * 4])
    if sys.byteorder == "big":
        frames.byteswap()
    return frames


def runs_of(memory: GuestMemory, frames: Iterable[int]) -> tuple[list[tuple[int, int]], int]:
    """(runs of those that are RAM, each once, in order; how many are not)."""
    runs: list[tuple[int, int]] = []
    regions = [(region.gpa.value // PAGE_SIZE, region.size // PAGE_SIZE, region.offset // PAGE_SIZE)
               for region in memory.regions]  # fmt: skip
    strange, start, end, shift, first, after = 0, 0, 0, 0, -1, -1
    for frame in sorted(set(frames)):
        if not start <= frame < end:
            region = next((each for each in regions if each[0] <= frame < each[0] + each[1]), None)
            if region is None:
                strange += 1
                continue
            start, end, shift = region[0], region[0] + region[1], region[2] - region[0]
        page = frame + shift
        if page != after:
            if first >= 0:
                runs.append((first, after - first))
            first = page
        after = page + 1
    if first >= 0:
        runs.append((first, after - first))
    return runs, strange
