# checkpoint.py: a VM into a snapshot file and out of one (pyvmm.snapshot has the file). Units: bytes, pages of 4 KiB.
"""`write` and `read`: RAM, states and which blocks were large, together."""

from __future__ import annotations

from pyvmm.errors import SnapshotError, StateError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.lazy import FileHome
from pyvmm.snapshot.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.machine.machine import VM
    from pyvmm.memory import GuestMemory
    from pyvmm.memory.space import Pages
    from pyvmm.snapshot.reader import Progress
    from pyvmm.state import State

_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
_BLOCKS = 32
"""Blocks that are copied at a time: 64 MiB."""


def write(memory: GuestMemory, state: State, path: str, block_size: int, codec: str, progress: Progress | None) -> None:
    """All RAM of a VM that stands still, by address, with the state that belongs to it."""
    blocks = -(-memory.size // BLOCK_SIZE)
    holds = b"\1" * blocks if memory.hugetlb else memory.engine.holds()
    looks = ["large"] * blocks if memory.hugetlb else memory.engine.looks()
    with Writer(path, memory.size, block_size, codec) as writer:
        for first in range(0, blocks, _BLOCKS):
            for block in range(first, min(first + _BLOCKS, blocks)):
                if holds[block]:
                    _add(writer, memory, block)
            if progress is not None:
                progress(min((first + _BLOCKS) * BLOCK_SIZE, memory.size), memory.size)
        writer.finish(state, (block for block, look in enumerate(looks) if look == "large"))


def _add(writer: Writer, memory: GuestMemory, block: int) -> None:
    first = block * _BLOCK_PAGES
    size = min(BLOCK_SIZE, memory.size - block * BLOCK_SIZE)
    with memory.view(memory.gpa_of(first), size) as view:
        writer.add_pages([(first, size // PAGE_SIZE)], view)


def read(
    build: type[VM],
    path: str,
    lazy: bool,
    fill: bool,
    pages: Pages,
    output: Callable[[bytes], None] | None,
    progress: Progress | None,
) -> VM:
    """A VM of the shape that the file tells; its RAM read, or to be read when it is touched."""
    snapshot = Snapshot.open(path)
    try:
        cpus = _cpus(snapshot)
        vm = build(memory=snapshot.memory_size, cpus=cpus, pages=pages, output=output)
        try:
            if lazy:
                home = FileHome(snapshot, vm.memory)
                vm.memory.keep(home.close)
            else:
                snapshot.load_into(vm.memory, progress)
            vm.restore_state(snapshot.states)
            if lazy and fill:
                home.fill(vm.hold)
        except BaseException:
            vm.close()
            raise
    except BaseException:
        snapshot.close()
        raise
    if not lazy:
        snapshot.close()
    return vm


def _cpus(snapshot: Snapshot) -> int:
    try:
        snapshot.states.require("vm", 1)
        return len(snapshot.states.parts("vcpus"))
    except StateError as error:
        raise SnapshotError(f"{snapshot.name}: {error}") from None
