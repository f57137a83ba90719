# incremental.py: saving only what changed since an earlier snapshot of the same VM. Unit: RAM pages.
"""`Base`: the snapshot since which a VM's writes are traced. `increment`: what is to be written on top of it."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

from pyvmm.errors import BadInput, LifecycleError
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory.pageset import PageSet
from pyvmm.record import Record
from pyvmm.snapshot import Snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.machine.machine import VM
    from pyvmm.memory.trace import Runs, Trace


class Base(Record):
    """id: of the snapshot; trace: what was written since, by `tracker`, or None; restored: of the snapshot that the VM
    was lazily restored from, whose pages it may still have in the home FILE."""

    __slots__ = ("id", "restored", "trace", "tracker")

    def __init__(self, id: bytes, trace: Trace | None, tracker: str, restored: bytes = b"") -> None:
        self.id = id
        self.trace = trace
        self.tracker = tracker
        self.restored = restored


class Increment:
    """What a save is to write. parent: the open snapshot, or None; changed: the pages, all where None. Who has saved
    says so by saved()."""

    def __init__(self, parent: Snapshot | None, changed: Runs | None) -> None:
        self.parent = parent
        self.changed = changed
        self.id: bytes | None = None

    def saved(self, id: bytes) -> None:
        """The file is there, whole."""
        self.id = id


def start(vm: VM, id: bytes, tracker: str, restored: bytes = b"") -> None:
    """Traces what is written since the snapshot `id`. Raises BadInput, HostError, LifecycleError."""
    trace = vm.trace(tracker)
    _start(trace)
    vm.base = Base(id, trace, tracker, restored)


def _start(trace: Trace) -> None:
    try:
        trace.start()
    except LifecycleError as error:
        raise LifecycleError(f"cannot trace what changes from now on: {error}") from None


@contextmanager
def increment(vm: VM, parent: str | None, tracker: str | None) -> Iterator[Increment]:
    """What a snapshot of a paused VM writes. Where it is not saved() in the `with`, all is as before: the next one with
    the same parent is complete.

    Raises BadInput where the changes since `parent` are not known.
    """
    base = vm.base
    running = base is not None and base.trace is not None and base.trace.running
    goes_on = running and base is not None and base.tracker == tracker
    with ExitStack() as stack:
        file = changed = fresh = None
        if parent is not None:
            file = stack.enter_context(Snapshot.open(parent))
            if base is None or base.trace is None or not running:
                how = "save it with track='bitmap', or restore it with that"
                raise BadInput(f"{parent} cannot be the parent: no write trace has run since it was taken; {how}")
            if base.id != file.id:
                raise BadInput(f"{parent} is another snapshot than the one since which writes are traced")
        if tracker is not None and not goes_on:
            fresh = vm.trace(tracker)  # before all is written: it may be that it cannot be
            if not running:
                stack.callback(_stop_unless_used, vm, fresh)
                _start(fresh)
        if running and base is not None and base.trace is not None and (parent is not None or goes_on):
            runs = stack.enter_context(base.trace.collecting())
            changed = runs if parent is None else _known(vm, base, runs)
        result = Increment(file, changed if parent is not None else None)
        yield result
        if result.id is None:
            raise LifecycleError("the snapshot was not finished")
        if goes_on and base is not None:
            base.id = result.id
            return
        if running and base is not None and base.trace is not None and (parent is not None or fresh is not None):
            base.trace.stop()
            base.trace = None
            if fresh is not None:
                _start(fresh)  # the VM still stands: nothing was written in between
        if fresh is not None:
            vm.base = Base(result.id, fresh, tracker or "", base.restored if base is not None else b"")


def _stop_unless_used(vm: VM, trace: Trace) -> None:
    if vm.base is None or vm.base.trace is not trace:
        trace.stop()


def _known(vm: VM, base: Base, runs: Runs) -> Runs:
    """Less what the VM has not read yet from the parent."""
    if base.restored != base.id or vm.memory.hugetlb:
        return runs
    return PageSet(vm.memory.size // PAGE_SIZE, runs).remove(vm.memory.engine.at_home("file")).runs()
