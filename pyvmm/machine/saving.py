# saving.py: a VM into a snapshot file (pyvmm.snapshot has the file). Units: bytes, pages of 4 KiB.
"""`save`: RAM, states and which blocks were large, together."""

from __future__ import annotations

from pyvmm.errors import BadInput
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, parse_size
from pyvmm.memory.pageset import PageSet
from pyvmm.snapshot.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypedDict

    from pyvmm.machine.incremental import Increment
    from pyvmm.machine.machine import VM
    from pyvmm.memory import GuestMemory
    from pyvmm.snapshot.reader import Progress
    from pyvmm.state import State

    class SaveOptions(TypedDict, total=False):
        """Of VM.snapshot(); what they mean is said at save()."""

        block_size: int | str
        codec: str
        order: str
        parent: str | None
        track: str | None
        progress: Progress | None


ORDERS = ("address", "accessed")
_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
_STEP = 32 * _BLOCK_PAGES
"""Pages that are handed over at a time: 64 MiB."""


def save(
    vm: VM,
    path: str,
    *,
    block_size: int | str = "64K",
    codec: str = "raw",
    order: str = "address",
    parent: str | None = None,
    track: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes all of a VM into a file. One that runs is paused meanwhile.

    block_size: bytes stored together, 16K to 2M; codec: raw, lz4 or zstd; order: pages by "address", or those first
    whose accessed bits are set in the guest's page tables ("accessed"; while its paging is off, that is by address);
    parent: only what has changed since that snapshot is written, which `track` or VM.restore(track=) must have begun to
    trace; track: traces with this tracker, such as "bitmap", what changes from now on, for a snapshot with this one as
    its parent; without it a trace that led to `parent` ends; progress: told (bytes of RAM done, of how many).
    Raises BadInput, LifecycleError where another trace of the VM runs, HostError (such as for a full disk: what had the
    name before is then still there, and a second attempt writes as much), FetchError.
    """
    if order not in ORDERS:
        raise BadInput(f"no order {order!r}: choose one of {', '.join(ORDERS)}")
    was_running = vm.started and not vm.paused and not vm.ended
    if was_running:
        vm.pause()
    try:
        state, hot = vm.save_state(), _hot(vm, order)
        if parent is None and track is None:
            _write(vm.memory, state, path, parse_size(block_size), codec, hot, None, progress)
        else:
            from pyvmm.machine.incremental import increment

            with increment(vm, parent, track) as what:
                _write(vm.memory, state, path, parse_size(block_size), codec, hot, what, progress)
    finally:
        if was_running:
            vm.resume()


def _hot(vm: VM, order: str) -> list[tuple[int, int]]:
    if order == "address":
        return []
    from pyvmm.machine.locality import accessed

    return accessed(vm)


def _write(
    memory: GuestMemory,
    state: State,
    path: str,
    block_size: int,
    codec: str,
    hot: list[tuple[int, int]],
    what: Increment | None,
    progress: Progress | None,
) -> None:
    """The pages of a VM that stands still, `hot` ones first, with the state that belongs to them."""
    blocks = -(-memory.size // BLOCK_SIZE)
    looks = ["large"] * blocks if memory.hugetlb else memory.engine.looks()
    changed = None if what is None else what.changed
    left = _held(memory) if changed is None else PageSet(memory.size // PAGE_SIZE, changed)
    first = [run for page, count in hot for run in left.take(page, count)]
    rest = left.runs()
    done, total = 0, (rest.pages + sum(count for _, count in first)) * PAGE_SIZE
    with Writer(path, memory.size, block_size, codec, None if what is None else what.parent) as writer:
        for runs in (first, rest):
            for page, count in _steps(runs):
                with memory.reading(page, count) as data:
                    writer.add_pages([(page, count)], data)
                done += count * PAGE_SIZE
                if progress is not None:
                    progress(done, total)
            writer.end_block()
        writer.finish(state, (block for block, look in enumerate(looks) if look == "large"))
        if what is not None:
            what.saved(writer.id)


def _held(memory: GuestMemory) -> PageSet:
    """The pages of the blocks that may hold anything."""
    pages = memory.size // PAGE_SIZE
    if memory.hugetlb:
        return PageSet(pages, [(0, pages)])
    firsts = (block * _BLOCK_PAGES for block, held in enumerate(memory.engine.holds()) if held)
    return PageSet(pages, ((first, min(_BLOCK_PAGES, pages - first)) for first in firsts))


def _steps(runs: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """The same pages, at most _STEP at a time."""
    for first, count in runs:
        for page in range(first, first + count, _STEP):
            yield page, min(_STEP, first + count - page)
