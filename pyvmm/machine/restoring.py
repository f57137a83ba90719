# restoring.py: a VM out of a snapshot file (pyvmm.snapshot has the file).
"""`restore`: a VM of the shape that the file tells; its RAM read, or to be read when it is touched."""

from __future__ import annotations

from pyvmm.errors import SnapshotError, StateError
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.lazy import FileHome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypedDict

    from pyvmm.machine.machine import VM
    from pyvmm.memory.space import Pages
    from pyvmm.snapshot.reader import Progress

    class RestoreOptions(TypedDict, total=False):
        """Of VM.restore(); what they mean is said at restore()."""

        lazy: bool
        fill: bool
        pages: Pages
        output: Callable[[bytes], None] | None
        track: str | None
        progress: Progress | None


def restore(
    build: type[VM],
    path: str,
    *,
    lazy: bool = False,
    fill: bool = True,
    pages: Pages = "auto",
    output: Callable[[bytes], None] | None = None,
    track: str | None = None,
    progress: Progress | None = None,
) -> VM:
    """A new VM from a file, not started.

    lazy: RAM is read when it is touched, and the rest meanwhile unless `fill` is False; else all of it now.
    pages, output: as of VM(); track: traces with this tracker, such as "bitmap", what changes, so that a snapshot can
    have this one as its parent; progress: told (bytes read, of how many). Raises SnapshotError for a file that is
    damaged, foreign or of another version; where a block is found damaged only later, the VM is paused and wait()
    raises FetchError.
    """
    snapshot = Snapshot.open(path)
    try:
        vm = build(memory=snapshot.memory_size, cpus=_cpus(snapshot), pages=pages, output=output)
        try:
            if lazy:
                home = FileHome(snapshot, vm.memory)
                vm.memory.keep(home.close)
            else:
                snapshot.load_into(vm.memory, progress)
            vm.restore_state(snapshot.states)
            if track is not None:
                from pyvmm.machine.incremental import start

                start(vm, snapshot.id, track, snapshot.id if lazy else b"")
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
