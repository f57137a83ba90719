# restoring.py: a VM out of a snapshot file (pyvmm.snapshot has the file).
"""`restore`: a VM of the shape that the file tells; its RAM read, or to be read when it is touched."""

from __future__ import annotations

from contextlib import suppress

from pyvmm.errors import BadInput, FetchError, MemoryAccessError, SnapshotError, StateError
from pyvmm.layout import PAGE_SIZE, Gpa
from pyvmm.machine.generation import renew
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.lazy import FileHome
from pyvmm.vcpu.registers import saved_registers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypedDict

    from pyvmm.machine.machine import VM
    from pyvmm.memory.mapping import Pages
    from pyvmm.snapshot.reader import Progress

    class RestoreOptions(TypedDict, total=False):
        """Of VM.restore(); what they mean is said at restore()."""

        lazy: bool
        fill: bool
        fill_rate: float | None
        unit: str
        prefetch: bool
        populate: bool
        record: bool
        generation: bool
        pages: Pages
        output: Callable[[bytes], None] | None
        track: str | None
        devices: Sequence[str]
        progress: Progress | None


_PAGE_ADDRESS = (1 << 64) - PAGE_SIZE


def restore(
    build: type[VM],
    path: str,
    *,
    lazy: bool = False,
    fill: bool = True,
    fill_rate: float | None = None,
    unit: str = "adaptive",
    prefetch: bool = False,
    populate: bool = False,
    record: bool = False,
    generation: bool = True,
    pages: Pages = "auto",
    output: Callable[[bytes], None] | None = None,
    track: str | None = None,
    devices: Sequence[str] = (),
    progress: Progress | None = None,
) -> VM:
    """A new VM from a file, not started.

    lazy: RAM is read when it is touched; else all of it now. With lazy: fill: the rest comes meanwhile, at most
    fill_rate bytes a second of it; unit: how much a touch brings (pyvmm.memory.source.UNITS); prefetch: the file's
    working set comes ahead of the guest, in one pass; populate: before its first instruction; record: the order of
    first touches is kept for vm.restored.working_set() (then there is no fill).
    generation: tell the guest that it is another one now, and give it a new seed (pyvmm.machine.generation); else RAM
    is exactly as it was.
    pages, output, devices: as of VM(), and devices as the VM had that was saved;
    with pages="auto" a block that was small at the source and holds little stays so.
    track: traces with this tracker, such as "bitmap", what changes, so that a snapshot can have this one as its parent.
    progress: told (bytes read, of how many). Raises SnapshotError for a file that is damaged, foreign or of another
    version, FetchError where the block with the progress page is; where another one is found damaged only later, the
    VM is paused and wait() raises FetchError.
    """
    if not lazy and (prefetch or populate or record or fill_rate is not None or unit != "adaptive"):
        raise BadInput("prefetch, populate, record, unit and fill_rate say how memory comes lazily: restore with lazy")
    if record and (prefetch or populate):
        raise BadInput("a working set is recorded of a guest that touches it: record goes without prefetch or populate")
    if fill_rate is not None and not 0 < fill_rate < 1e15:
        raise BadInput(f"fill_rate={fill_rate}: give bytes a second above 0")
    snapshot = Snapshot.open(path)
    try:
        if (prefetch or populate) and not snapshot.header.sections["wset"].length:
            raise BadInput(f"{path} has no working set: restore it once with record")
        vm = build(memory=snapshot.memory_size, cpus=_cpus(snapshot), pages=pages, output=output, devices=devices)
    except BaseException:
        snapshot.close()
        raise
    try:
        if not lazy:
            with snapshot:
                snapshot.load_into(vm.memory, progress)
                _take_over(vm, snapshot, track, b"", generation)
            return vm
        vm.memory.keep(snapshot.close)
        home = vm.restored = FileHome(snapshot, vm.memory, unit)
        vm.memory.keep(home.close)
        vm.memory.before_end(home.end)
        _take_over(vm, snapshot, track, snapshot.id, generation)
        if record:
            home.record()
        elif populate:
            home.prefetch()
        else:
            _bring_entry(vm, snapshot)
        if prefetch or (fill and not record):
            home.run_ahead(prefetch, fill and not record, fill_rate)
    except BaseException:
        vm.close()
        raise
    return vm


def _take_over(vm: VM, snapshot: Snapshot, track: str | None, restored: bytes, generation: bool) -> None:
    """The states; what is written from here on has changed since the snapshot."""
    vm.restore_state(snapshot.states)
    if track is not None:
        from pyvmm.machine.incremental import start

        start(vm, snapshot.id, track, restored)
    if generation:
        renew(vm.memory)


def _cpus(snapshot: Snapshot) -> int:
    try:
        snapshot.states.require("vm", 1)
        return len(snapshot.states.parts("vcpus"))
    except StateError as error:
        raise SnapshotError(f"{snapshot.name}: {error}") from None


def _bring_entry(vm: VM, snapshot: Snapshot) -> None:
    """What the vCPUs will touch with their first instruction, since each of these faults would wait for a thread: page
    tables, code and stack. Where these are is a guess, right for guests that run where they are loaded; a wrong one
    costs a page, and a page that cannot be brought is for whoever touches it."""
    with suppress(FetchError, StateError):
        for part in snapshot.states.parts("vcpus"):
            registers = saved_registers(part)
            for address in (registers.cr3, registers.rip, registers.rsp - 8, registers.gdt_base, registers.idt_base):
                with suppress(MemoryAccessError):
                    vm.memory.engine.install(vm.memory.page_of(Gpa(address & _PAGE_ADDRESS)))
