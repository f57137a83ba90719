# saved.py: the whole VM's state but RAM, gathered from its parts. The order of restoring is the point.
"""Save and restore of what lies outside the vCPUs, and the vCPUs with it."""

from __future__ import annotations

from pyvmm._native import ffi
from pyvmm.errors import KernelError, StateError
from pyvmm.kvm.vm import IRQCHIPS
from pyvmm.state import State
from pyvmm.vcpu.state import check_vcpu, restore_vcpu, save_vcpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm import VmFd
    from pyvmm.machine.board import Board
    from pyvmm.vcpu import Vcpu

KIND, VERSION = "vm", 1


def save(vm: VmFd, vcpus: list[Vcpu], board: Board, memory_size: int, msrs: list[int]) -> State:
    """The state of a VM whose vCPUs are all parked."""
    xsave_size = vm.check_extension("KVM_CAP_XSAVE2")
    return State(
        KIND,
        VERSION,
        {
            "memory_size": memory_size,
            "clock": vm.get_clock(),
            "vcpus": [save_vcpu(vcpu.fd, msrs, xsave_size) for vcpu in vcpus],
            "irqchips": [vm.get_irqchip(chip) for chip in IRQCHIPS],
            "pit": vm.get_pit2(),
            "devices": board.save(),
        },
    )


def restore(vm: VmFd, vcpus: list[Vcpu], board: Board, memory_size: int, state: State) -> None:
    """Puts a saved state into a VM of the same shape that has not run. Raises StateError where it does not fit."""
    state.require(KIND, VERSION)
    xsave_size = vm.check_extension("KVM_CAP_XSAVE2")
    if (size := state.integer("memory_size")) != memory_size:
        raise StateError(f"the state is of a VM with {size} bytes of memory, this one has {memory_size}")
    parts = state.parts("vcpus")
    if len(parts) != len(vcpus):
        raise StateError(f"the state is of a VM with {len(parts)} vCPUs, this one has {len(vcpus)}")
    for vcpu, part in zip(vcpus, parts, strict=True):
        check_vcpu(part, vcpu.index, xsave_size)
    chips = state.fields.get("irqchips")
    chip_size = ffi.sizeof("struct kvm_irqchip")
    if not isinstance(chips, list) or len(chips) != len(IRQCHIPS):
        raise StateError("the state lacks interrupt controllers")
    clock, pit = state.integer("clock"), state.blob("pit", ffi.sizeof("struct kvm_pit_state2"))
    blobs = [chip for chip in chips if isinstance(chip, bytes) and len(chip) == chip_size]
    if len(blobs) != len(IRQCHIPS):
        raise StateError("the state's interrupt controllers are damaged")

    try:
        for blob in blobs:  # before the devices, which raise their lines anew
            vm.set_irqchip(blob)
        vm.set_pit2(pit)
        for vcpu, part in zip(vcpus, parts, strict=True):
            restore_vcpu(vcpu.fd, part, xsave_size)
        vm.set_clock(clock)  # after the vCPUs' TSCs, to which KVM ties it
        board.restore(state.part("devices"))
    except KernelError as error:  # such as reserved bits that are set in a control register
        raise StateError(f"this host's KVM refuses the state: {error}") from error
