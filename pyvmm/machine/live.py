# live.py: RAM and states of a VM as they are at one instant, into a snapshot, while the guest runs on. The work is in
# cffi_build/live.c: a thread of its own writes, and whoever is about to change a block copies that first.
"""`stream`: one live save. It pauses the VM once, for as long as it takes to get hold of its state."""

from __future__ import annotations

import errno
import time

from pyvmm import host
from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, FetchError, HostError, LifecycleError, check
from pyvmm.layout import BLOCK_SIZE
from pyvmm.record import Record
from pyvmm.snapshot.results import write_check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import CData
    from pyvmm.machine.machine import VM
    from pyvmm.memory.engine import Engine
    from pyvmm.snapshot.reader import Progress
    from pyvmm.snapshot.writer import Writer
    from pyvmm.state import State

BUFFERS = 32
"""Blocks of 2 MiB that the guest may be ahead of the disk: copies of what it wrote to before that was saved. Where they
are used up, whoever writes next waits for the disk."""
_LOOK_MS = 50
"""From one look at the progress, and at signals, to the next."""
_OPENING = {
    errno.EBUSY: (BadInput, "a coarse trace runs, which uses the same protection: stop it, or save with mode 'stop'"),
    errno.EALREADY: (LifecycleError, "another live snapshot of this VM is being saved: wait until it is done"),
    errno.ECANCELED: (LifecycleError, "the VM is closed"),
}


class Taken(Record):
    """What a live save gave: the State that belongs to the RAM; large: the blocks that were large pages; copied: blocks
    that were copied because something was about to change them, and waits: how many of these waited for a buffer;
    pause_seconds: for which the vCPUs stood still."""

    __slots__ = ("copied", "large", "pause_seconds", "state", "waits")

    def __init__(self, state: State, large: list[int], copied: int, waits: int, pause_seconds: float) -> None:
        self.state = state
        self.large = large
        self.copied = copied
        self.waits = waits
        self.pause_seconds = pause_seconds

    __hash__ = None  # type: ignore[assignment]


def require_host() -> None:
    """Raises HostError where a running guest's writes cannot be held up."""
    for feature in ("uffd_wp", "uffd_guest"):
        found = host.finding(feature)
        if not found.ok:
            text = f"no live snapshot here: {found.title}: {found.value}; {found.remedy}"
            raise HostError(f"{text}; or save with mode 'stop'")


def stream(vm: VM, writer: Writer, name: str, progress: Progress | None) -> Taken:
    """Gives all RAM of a running VM to the writer, as it was when the VM was paused for a moment; the rest of the file
    is the caller's. name: the file's, for messages. Whatever is raised, the guest runs on, and nothing stays protected.

    Raises BadInput, HostError, FetchError for a page that cannot be brought, LifecycleError where the VM is closed.
    """
    engine = vm.memory.engine
    with engine.using() as native:
        return writer.fill(lambda pack: _Session(vm, engine, native, pack, name).run(progress))


class _Session:
    def __init__(self, vm: VM, engine: Engine, native: CData, pack: CData, name: str) -> None:
        self._vm = vm
        self._engine = engine
        self._native = native
        self._pack = pack
        self._name = name
        self._told = ffi.new("struct pv_live_progress *")

    def run(self, progress: Progress | None) -> Taken:
        blocks = bytearray(-(-self._vm.memory.size // BLOCK_SIZE))
        buffers = min(BUFFERS, len(blocks))
        result = lib.pv_live_begin(self._native, self._pack, buffers, self._engine.has_python_homes)
        if -result in _OPENING:
            kind, text = _OPENING[-result]
            raise kind(text)
        check(result, "UFFDIO_WRITEPROTECT", size=self._vm.memory.size)
        try:
            state, pause = self._instant()
            while lib.pv_live_wait(self._native, _LOOK_MS, self._told) == lib.PV_LIVE_SAVING:
                if progress is not None:
                    progress(self._done(), self._vm.memory.size)
        finally:
            lib.pv_live_end(self._native, ffi.from_buffer("uint8_t[]", blocks), self._told)
        self._require_whole()
        if progress is not None:
            progress(self._done(), self._vm.memory.size)
        large = [block for block, seen in enumerate(blocks) if seen]
        return Taken(state, large, int(self._told.copied), int(self._told.waits), pause)

    def _instant(self) -> tuple[State, float]:
        """The pause: the state and the RAM that belong together. Returns the state and the seconds."""
        vm, begin = self._vm, time.perf_counter()
        try:
            vm.pause()
            state = vm.save_state()
            with vm.memory.views_settled() as python_homes:
                lib.pv_live_freeze(self._native, python_homes)  # an error is in what pv_live_wait tells
        finally:
            if vm.paused:
                vm.resume()
        return state, time.perf_counter() - begin

    def _done(self) -> int:
        return min(int(self._told.saved) * BLOCK_SIZE, self._vm.memory.size)

    def _require_whole(self) -> None:
        told = self._told
        number, cause = int(told.error), int(told.cause)
        if not number:
            return
        if cause == lib.PV_LIVE_CANCELLED:
            raise LifecycleError(f"snapshot {self._name} is not saved: the VM was closed meanwhile")
        if cause == lib.PV_LIVE_FETCH:
            failed = self._engine.fetch_error(int(told.page), int(told.home), number)
            raise FetchError(f"snapshot {self._name} is not saved: {failed}", failed.page, failed.errno)
        if cause == lib.PV_LIVE_WRITE:
            write_check(-number, self._name)
        check(-number, "UFFDIO_WRITEPROTECT" if cause == lib.PV_LIVE_PROTECT else "PAGEMAP_SCAN", of=self._name)
