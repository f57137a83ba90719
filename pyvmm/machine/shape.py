# shape.py: what another process must build to take this VM over, and a VM built to such a shape.
"""`shape_of()`; `build()`."""

from __future__ import annotations

from pyvmm.errors import MigrationError, PyvmmError
from pyvmm.migration.shape import Shape, differences, refusal
from pyvmm.snapshot.format import CODECS
from pyvmm.vcpu.state import KIND, VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.kvm import VmFd
    from pyvmm.machine.board import Board
    from pyvmm.machine.machine import VM
    from pyvmm.memory import GuestMemory
    from pyvmm.state import State
    from pyvmm.vcpu import Vcpu


def shape_of(fd: VmFd, vcpus: list[Vcpu], board: Board, memory: GuestMemory) -> Shape:
    """The shape of a VM made of these."""
    from pyvmm.machine import saved

    states = {saved.KIND: saved.VERSION, KIND: VERSION}
    _note(board.save(), states)
    return Shape(
        memory.size,
        len(vcpus),
        states,
        vcpus[0].tsc_khz,
        max(fd.check_extension("KVM_CAP_XSAVE2"), 4096),
        memory.backing,
        memory.hugetlb,
        CODECS,
        tuple((region.gpa.value, region.size) for region in memory.regions),
    )


def _note(state: State, states: dict[str, int]) -> None:
    states[state.kind] = state.version
    for value in state.fields.values():
        if hasattr(value, "fields"):
            _note(value, states)  # type: ignore[arg-type]


def build(
    kind: type[VM], shape: Shape, output: Callable[[bytes], None] | None = None, devices: Sequence[str] = ()
) -> VM:
    """A VM of that shape, with these devices (as VM() takes them).

    Raises MigrationError, in words for the other side, where this host has none such."""
    try:
        vm = kind(
            memory=shape.memory,
            cpus=shape.cpus,
            pages=shape.backing,  # type: ignore[arg-type]
            hugetlb=shape.hugetlb,
            output=output,
            devices=devices,
        )
    except PyvmmError as error:
        raise MigrationError(f"a VM of that shape cannot be made here: {error}") from None
    found = differences(shape, vm.shape())
    if found:
        vm.close()
        raise MigrationError(refusal(found))
    return vm
