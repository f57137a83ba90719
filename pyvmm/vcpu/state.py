# state.py: all architectural state of one vCPU, as plain data; the order in which it goes back in matters.
"""Save and restore of a vCPU (KVM api.rst; the order is explained where it matters)."""

from __future__ import annotations

from pyvmm._native import ffi
from pyvmm.errors import StateError
from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm import VcpuFd

KIND, VERSION = "vcpu", 1

# field -> ioctl suffix, struct
_BEFORE_MSRS = {
    "sregs": ("SREGS", "struct kvm_sregs"),  # first: apic_base decides how the LAPIC is read
    "regs": ("REGS", "struct kvm_regs"),
    "xcrs": ("XCRS", "struct kvm_xcrs"),  # before xsave, which may only set what XCR0 allows
}
_AFTER_MSRS = {
    "lapic": ("LAPIC", "struct kvm_lapic_state"),
    "debugregs": ("DEBUGREGS", "struct kvm_debugregs"),
    "events": ("VCPU_EVENTS", "struct kvm_vcpu_events"),  # late: setting sregs and the LAPIC may queue or drop events
}
MSR_TSC = 0x10
MSR_TSC_DEADLINE = 0x6E0


def save_vcpu(fd: VcpuFd, msr_indices: list[int], xsave_size: int) -> State:
    """The state of a parked vCPU. `xsave_size`: bytes, as KVM_CAP_XSAVE2 of the VM says."""
    # MP state first: asking for it makes KVM work off a pending INIT or SIPI, which changes the rest.
    fields: dict[str, int | bytes | dict[str, int]] = {"mp_state": fd.get_mp_state(), "id": fd.index}
    for name, (ioctl, struct) in {**_BEFORE_MSRS, **_AFTER_MSRS}.items():
        fields[name] = fd.get_struct(f"KVM_GET_{ioctl}", struct)
    fields["xsave"] = fd.get_xsave(xsave_size)
    fields["msrs"] = {f"{index:#x}": value for index, value in fd.get_msrs(msr_indices).items()}
    return State(KIND, VERSION, fields)  # type: ignore[arg-type]


def check_vcpu(state: State, index: int, xsave_size: int) -> list[tuple[int, int]]:
    """Raises StateError unless the state is whole and of this shape; returns its MSRs in the order to set them."""
    fields = state.require(KIND, VERSION)
    if (saved := state.integer("id")) != index:
        raise StateError(f"the state of vCPU {saved} cannot go into vCPU {index}")
    state.integer("mp_state", 0, 9)
    for name, (_, struct) in {**_BEFORE_MSRS, **_AFTER_MSRS}.items():
        state.blob(name, ffi.sizeof(struct))
    if len(state.blob("xsave")) != max(xsave_size, 4096):
        raise StateError(f"vCPU {index}: xsave area of another size: the hosts' CPUs differ")
    table = fields.get("msrs")
    if not isinstance(table, dict) or len(table) > 4096:
        raise StateError(f"vCPU {index}: its MSRs are not a table")
    msrs: list[tuple[int, int]] = []
    for name, value in table.items():
        try:
            number = int(name, 16)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < 1 << 32 or not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise StateError(f"vCPU {index}: MSR {name!r} is damaged")
        msrs.append((number, value))
    return msrs


def restore_vcpu(fd: VcpuFd, state: State, xsave_size: int) -> None:
    """Puts a saved state into a fresh vCPU. Raises StateError, before anything is changed, if it does not fit; or
    if the host refuses one of the MSRs."""
    msrs = check_vcpu(state, fd.index, xsave_size)
    # The MP state comes before all else, as KVM resets parts of a vCPU that leaves the wait for a SIPI.
    fd.set_mp_state(state.integer("mp_state"))
    for name, (ioctl, struct) in _BEFORE_MSRS.items():
        fd.set_struct(f"KVM_SET_{ioctl}", struct, state.blob(name))
    fd.set_xsave(state.blob("xsave"))
    deadline = [(index, value) for index, value in msrs if index == MSR_TSC_DEADLINE]
    refused = fd.set_msrs([(index, value) for index, value in msrs if index != MSR_TSC_DEADLINE])
    for name, (ioctl, struct) in _AFTER_MSRS.items():
        fd.set_struct(f"KVM_SET_{ioctl}", struct, state.blob(name))
    # A deadline is armed against the TSC and the LAPIC's timer mode: both must be in place.
    refused += fd.set_msrs(deadline)
    if refused:
        raise StateError(f"this host refuses MSR {', '.join(map(hex, refused))} of vCPU {fd.index}'s saved state")
