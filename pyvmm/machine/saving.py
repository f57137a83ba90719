# saving.py: a VM into a snapshot file (pyvmm.snapshot has the file). Units: bytes, pages of 4 KiB.
"""`save`: RAM, states and which blocks were large, together. `Saved`: what that took."""

from __future__ import annotations

import time

from pyvmm._native import lib
from pyvmm.errors import BadInput
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, parse_size
from pyvmm.record import Record
from pyvmm.snapshot.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, TypedDict

    from pyvmm.machine.machine import VM
    from pyvmm.memory import GuestMemory
    from pyvmm.snapshot.reader import Progress

    class SaveOptions(TypedDict, total=False):
        """Of VM.snapshot(); what they mean is said at save()."""

        block_size: int | str
        codec: str
        mode: Literal["stop", "live"]
        progress: Progress | None


_HOLDS, _LARGE = lib.PV_HOLDS, lib.PV_HOLDS_LARGE
MODES = ("stop", "live")
_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
_BLOCKS = 32
"""Blocks that are copied at a time: 64 MiB."""


class Saved(Record):
    """A snapshot that was saved. seconds: until the file was on the disk; pause_seconds: for which a running guest
    stood still; pages: of RAM; copied_blocks: in mode live, 2 MiB blocks that were copied because something was about
    to change them; stored_bytes: size of the file."""

    __slots__ = ("copied_blocks", "pages", "pause_seconds", "seconds", "stored_bytes")

    def __init__(self, seconds: float, pause_seconds: float, pages: int, copied_blocks: int, stored_bytes: int) -> None:
        self.seconds = seconds
        self.pause_seconds = pause_seconds
        self.pages = pages
        self.copied_blocks = copied_blocks
        self.stored_bytes = stored_bytes


def save(
    vm: VM,
    path: str,
    *,
    block_size: int | str = "64K",
    codec: str = "raw",
    mode: Literal["stop", "live"] = "stop",
    progress: Progress | None = None,
) -> Saved:
    """Writes all of a VM into a file: as it was at one instant, from which a guest that runs goes on.

    block_size: bytes stored together, 16K to 2M; codec: raw, lz4 or zstd; progress: told (bytes of RAM done, of how
    many). mode, for a VM that runs: "stop" pauses it meanwhile; "live" pauses it for some milliseconds and saves while
    it runs on, what it writes being copied before.

    Raises BadInput, HostError (such as for a full disk: what had the name before is then still there), FetchError.
    """
    if mode not in MODES:
        raise BadInput(f"mode={mode!r}: choose stop or live")
    begin = time.perf_counter()
    with Writer(path, vm.memory.size, parse_size(block_size), codec) as writer:
        runs = vm.started and not vm.paused and not vm.ended
        if mode == "live" and runs:
            pause, copied = _save_live(vm, writer, path, progress)
        else:
            pause, copied = _save_still(vm, writer, runs, progress), 0
    return Saved(time.perf_counter() - begin, pause, vm.memory.size // PAGE_SIZE, copied, writer.stored)


def _save_live(vm: VM, writer: Writer, path: str, progress: Progress | None) -> tuple[float, int]:
    from pyvmm.machine import live

    live.require_host()
    taken = live.stream(vm, writer, path, progress)
    writer.finish(taken.state, taken.large)
    return taken.pause_seconds, taken.copied


def _save_still(vm: VM, writer: Writer, runs: bool, progress: Progress | None) -> float:
    """The seconds for which a VM that runs was paused."""
    begin = time.perf_counter()
    try:
        if runs:
            vm.pause()
        state = vm.save_state()
        large = _add_all(writer, vm.memory, progress)
        writer.finish(state, large)
    finally:
        if runs and vm.paused:  # it may have come to its end instead
            vm.resume()
    return time.perf_counter() - begin if runs else 0.0


def _add_all(writer: Writer, memory: GuestMemory, progress: Progress | None) -> list[int]:
    """All RAM of a VM that stands still, by address. Which blocks are large."""
    blocks = -(-memory.size // BLOCK_SIZE)
    holds = bytes([_HOLDS | _LARGE]) * blocks if memory.hugetlb else memory.engine.holds()
    for first in range(0, blocks, _BLOCKS):
        for block in range(first, min(first + _BLOCKS, blocks)):
            if holds[block] & _HOLDS:
                _add(writer, memory, block)
        if progress is not None:
            progress(min((first + _BLOCKS) * BLOCK_SIZE, memory.size), memory.size)
    return [block for block, held in enumerate(holds) if held & _LARGE]


def _add(writer: Writer, memory: GuestMemory, block: int) -> None:
    first = block * _BLOCK_PAGES
    size = min(BLOCK_SIZE, memory.size - block * BLOCK_SIZE)
    with memory.view(memory.gpa_of(first), size) as view:
        writer.add_pages([(first, size // PAGE_SIZE)], view)
