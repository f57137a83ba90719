# saving.py: a VM into a snapshot file (pyvmm.snapshot has the file). Units: bytes, pages of 4 KiB.
"""`save`: RAM, states and which blocks were large, together. `Saved`: what that took."""

from __future__ import annotations

import time

from pyvmm._native import lib
from pyvmm.errors import BadInput
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, parse_size
from pyvmm.memory.pageset import PageSet
from pyvmm.record import Record
from pyvmm.snapshot.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Literal, TypedDict

    from pyvmm.machine.incremental import Increment
    from pyvmm.machine.machine import VM
    from pyvmm.memory import GuestMemory
    from pyvmm.snapshot.reader import Progress, Snapshot
    from pyvmm.state import State

    class SaveOptions(TypedDict, total=False):
        """Of VM.snapshot(); what they mean is said at save()."""

        block_size: int | str
        codec: str
        mode: Literal["stop", "live"]
        order: str
        parent: str | None
        track: str | None
        progress: Progress | None

    Open = Callable[[Snapshot | None], Writer]
    """Makes the writer, with a parent or without."""


MODES = ("stop", "live")
ORDERS = ("address", "accessed")
_HOLDS, _LARGE = lib.PV_HOLDS, lib.PV_HOLDS_LARGE
_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
_STEP = 32 * _BLOCK_PAGES
"""Pages that are handed over at a time: 64 MiB."""


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
    order: str = "address",
    parent: str | None = None,
    track: str | None = None,
    progress: Progress | None = None,
) -> Saved:
    """Writes all of a VM into a file: as it was at one instant, from which a guest that runs goes on.

    block_size: bytes stored together, 16K to 2M; codec: raw, lz4 or zstd; mode, for a VM that runs: "stop" pauses it
    meanwhile; "live" pauses it for some milliseconds and saves while it runs on, what it writes being copied before.
    With "stop": order: pages by "address", or those first whose accessed bits are set in the guest's page tables
    ("accessed"; while its paging is off, that is by address); parent: only what has changed since that snapshot is
    written, which `track` or VM.restore(track=) must have begun to trace; track: traces with this tracker, such as
    "bitmap", what changes from now on, for a snapshot with this one as its parent; without it a trace that led to
    `parent` ends. progress: told (bytes of RAM done, of how many).

    Raises BadInput, LifecycleError where another trace of the VM runs, HostError (such as for a full disk: what had the
    name before is then still there, and a second attempt writes as much), FetchError.
    """
    if mode not in MODES:
        raise BadInput(f"mode={mode!r}: choose stop or live")
    if order not in ORDERS:
        raise BadInput(f"no order {order!r}: choose one of {', '.join(ORDERS)}")
    if mode == "live" and (order != "address" or parent is not None or track is not None):
        raise BadInput("a live snapshot has all pages, by address: parent, track and order go with mode 'stop'")
    vm.require_lasting()
    begin, size = time.perf_counter(), parse_size(block_size)
    runs = vm.started and not vm.paused and not vm.ended

    def open_writer(parent: Snapshot | None) -> Writer:
        return Writer(path, vm.memory.size, size, codec, parent)

    if mode == "live" and runs:
        pause, copied, stored = _save_live(vm, path, open_writer, progress)
    else:
        pause, stored = _save_still(vm, open_writer, order, parent, track, runs, progress)
        copied = 0
    return Saved(time.perf_counter() - begin, pause, vm.memory.size // PAGE_SIZE, copied, stored)


def _save_live(vm: VM, path: str, open_writer: Open, progress: Progress | None) -> tuple[float, int, int]:
    """Seconds of the pause, blocks copied, bytes stored."""
    from pyvmm.machine import live

    live.require_host()
    with open_writer(None) as writer:
        taken = live.stream(vm, writer, path, progress)
        writer.finish(taken.state, taken.large)
        return taken.pause_seconds, taken.copied, writer.stored


def _save_still(
    vm: VM,
    open_writer: Open,
    order: str,
    parent: str | None,
    track: str | None,
    runs: bool,
    progress: Progress | None,
) -> tuple[float, int]:
    """Seconds for which a VM that runs was paused, bytes stored."""
    begin = time.perf_counter()
    try:
        if runs:
            vm.pause()
        state, hot = vm.save_state(), _hot(vm, order)
        if parent is None and track is None:
            stored = _write(vm.memory, state, open_writer, hot, None, progress)
        else:
            from pyvmm.machine.incremental import increment

            with increment(vm, parent, track) as what:
                stored = _write(vm.memory, state, open_writer, hot, what, progress)
    finally:
        if runs and vm.paused:  # it may have come to its end instead
            vm.resume()
    return time.perf_counter() - begin if runs else 0.0, stored


def _hot(vm: VM, order: str) -> list[tuple[int, int]]:
    if order == "address":
        return []
    from pyvmm.machine.locality import accessed

    return accessed(vm)


def _write(
    memory: GuestMemory,
    state: State,
    open_writer: Open,
    hot: list[tuple[int, int]],
    what: Increment | None,
    progress: Progress | None,
) -> int:
    """The pages of a VM that stands still, `hot` ones first, with the state that belongs to them. Bytes stored."""
    pages = memory.size // PAGE_SIZE
    holds = bytes([_HOLDS | _LARGE]) * -(-pages // _BLOCK_PAGES) if memory.hugetlb else memory.engine.holds()
    changed = None if what is None else what.changed
    left = PageSet(pages, _held(holds, pages) if changed is None else changed)
    blank = PageSet(pages) if memory.hugetlb else left.take_common(memory.engine.at_home("balloon"))
    first = [run for page, count in hot for run in left.take(page, count)]
    rest = left.runs()
    done, total = 0, (rest.pages + sum(count for _, count in first)) * PAGE_SIZE
    with open_writer(None if what is None else what.parent) as writer:
        for runs in (first, rest):
            for page, count in _steps(runs):
                with memory.reading(page, count) as data:
                    writer.add_pages([(page, count)], data)
                done += count * PAGE_SIZE
                if progress is not None:
                    progress(done, total)
            writer.end_block()
        for page, count in _steps(blank.runs() if what is not None else ()):
            # Zeros, which a parent may have otherwise. To read them would bring what the guest has given up.
            writer.add_pages([(page, count)], bytes(count * PAGE_SIZE))
        writer.finish(state, (block for block, held in enumerate(holds) if held & _LARGE))
        if what is not None:
            what.saved(writer.id)
        return writer.stored


def _held(holds: bytes, pages: int) -> Iterable[tuple[int, int]]:
    """The pages of the blocks that may hold anything."""
    firsts = (block * _BLOCK_PAGES for block, held in enumerate(holds) if held & _HOLDS)
    return ((first, min(_BLOCK_PAGES, pages - first)) for first in firsts)


def _steps(runs: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """The same pages, at most _STEP at a time."""
    for first, count in runs:
        for page in range(first, first + count, _STEP):
            yield page, min(_STEP, first + count - page)
