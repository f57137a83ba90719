# saving.py: a VM into a snapshot file (pyvmm.snapshot has the file). Units: bytes, pages of 4 KiB.
"""`save`: RAM, states and which blocks were large, together."""

from __future__ import annotations

from pyvmm._native import lib
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, parse_size
from pyvmm.snapshot.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypedDict

    from pyvmm.machine.machine import VM
    from pyvmm.memory import GuestMemory
    from pyvmm.snapshot.reader import Progress
    from pyvmm.state import State

    class SaveOptions(TypedDict, total=False):
        """Of VM.snapshot(); what they mean is said at save()."""

        block_size: int | str
        codec: str
        progress: Progress | None


_HOLDS, _LARGE = lib.PV_HOLDS, lib.PV_HOLDS_LARGE
_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
_BLOCKS = 32
"""Blocks that are copied at a time: 64 MiB."""


def save(
    vm: VM, path: str, *, block_size: int | str = "64K", codec: str = "raw", progress: Progress | None = None
) -> None:
    """Writes all of a VM into a file. One that runs is paused meanwhile.

    block_size: bytes stored together, 16K to 2M; codec: raw, lz4 or zstd; progress: told (bytes of RAM done, of how
    many). Raises BadInput, HostError (such as for a full disk: what had the name before is then still there),
    FetchError.
    """
    was_running = vm.started and not vm.paused and not vm.ended
    if was_running:
        vm.pause()
    try:
        _write(vm.memory, vm.save_state(), path, parse_size(block_size), codec, progress)
    finally:
        if was_running:
            vm.resume()


def _write(
    memory: GuestMemory, state: State, path: str, block_size: int, codec: str, progress: Progress | None
) -> None:
    """All RAM of a VM that stands still, by address, with the state that belongs to it."""
    blocks = -(-memory.size // BLOCK_SIZE)
    holds = bytes([_HOLDS | _LARGE]) * blocks if memory.hugetlb else memory.engine.holds()
    with Writer(path, memory.size, block_size, codec) as writer:
        for first in range(0, blocks, _BLOCKS):
            for block in range(first, min(first + _BLOCKS, blocks)):
                if holds[block] & _HOLDS:
                    _add(writer, memory, block)
            if progress is not None:
                progress(min((first + _BLOCKS) * BLOCK_SIZE, memory.size), memory.size)
        writer.finish(state, (block for block, held in enumerate(holds) if held & _LARGE))


def _add(writer: Writer, memory: GuestMemory, block: int) -> None:
    first = block * _BLOCK_PAGES
    size = min(BLOCK_SIZE, memory.size - block * BLOCK_SIZE)
    with memory.view(memory.gpa_of(first), size) as view:
        writer.add_pages([(first, size // PAGE_SIZE)], view)
