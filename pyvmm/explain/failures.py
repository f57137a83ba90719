# failures.py: sentences for the ends that KVM declares itself: internal errors, failed entries, exits of no use to us.
"""What KVM means by its numbers, and what to do about it.

linux/kvm.h (KVM_INTERNAL_ERROR_*), arch/x86/kvm (what `data` holds), Intel SDM vol. 3, "VM Entries" and "VM
Instruction Error Numbers", AMD APM vol. 2, "VMRUN Instruction" (VMEXIT_INVALID).
"""

from __future__ import annotations

from pyvmm.explain.access import accesses
from pyvmm.explain.descriptors import is_long
from pyvmm.explain.exceptions import exception_name
from pyvmm.explain.instruction import decode
from pyvmm.vcpu.registers import CR0_PE, CR0_PG, CR4_PAE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.explain.facts import ExitFacts
    from pyvmm.explain.scene import Scene
    from pyvmm.layout import Gpa

EMULATION, SIMULTANEOUS, DELIVERY, UNEXPECTED = 1, 2, 3, 4
_HAS_BYTES = 1  # KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
_HLT = 5
_EXITS = {
    0: "UNKNOWN", 1: "EXCEPTION", 2: "IO", 3: "HYPERCALL", 4: "DEBUG", _HLT: "HLT", 6: "MMIO", 7: "IRQ_WINDOW_OPEN",
    8: "SHUTDOWN", 9: "FAIL_ENTRY", 10: "INTR", 11: "SET_TPR", 12: "TPR_ACCESS", 16: "NMI", 17: "INTERNAL_ERROR",
    24: "SYSTEM_EVENT", 26: "IOAPIC_EOI", 27: "HYPERV", 29: "X86_RDMSR", 30: "X86_WRMSR", 31: "DIRTY_RING_FULL",
    33: "X86_BUS_LOCK", 34: "XEN", 37: "NOTIFY", 39: "MEMORY_FAULT",
}  # fmt: skip
_HARDWARE_EXITS = {48: "EPT violation", 49: "EPT misconfiguration", 0x400: "nested page fault", 9: "task switch"}
_ENTRY_FAILURES = {
    0x8000_0021: "the CPU calls the guest's state invalid",
    0x8000_0022: "the CPU could not load the guest's MSRs",
    0x8000_0029: "a machine check came in between",
    7: "the CPU calls KVM's control fields invalid",
    8: "the CPU calls KVM's host state invalid",
    0xFFFF_FFFF: "the CPU calls the guest's state or KVM's control fields invalid",
    0xFFFF_FFFF_FFFF_FFFF: "the CPU calls the guest's state or KVM's control fields invalid",
}


def internal_error(facts: ExitFacts, scene: Scene) -> str:
    """The sentence for KVM_EXIT_INTERNAL_ERROR."""
    data = (*facts.data, 0, 0, 0)
    if facts.suberror == EMULATION:
        return f"KVM gave up at {scene.place}: {_emulation(facts, scene)}."
    if facts.suberror == SIMULTANEOUS:
        what = "two exceptions came at once and KVM could not merge them (suberror 2)"
    elif facts.suberror == DELIVERY:
        while_doing = (
            f"{exception_name(data[0] & 0xFF)} was being delivered" if data[0] else "an event was being delivered"
        )
        name = _HARDWARE_EXITS.get(data[1], f"exit {data[1]:#x}")
        what = f"while {while_doing}, the CPU left the guest ({name}), which KVM cannot handle at that moment"
        what += "; most often IDT, GDT, TSS or the handler's stack lies outside RAM"
    elif facts.suberror == UNEXPECTED:
        what = f"the CPU left the guest for a reason that this kernel does not know ({data[0]:#x}): a fault of the host"
    else:
        what = f"an internal error of a kind that pyvmm does not know (suberror {facts.suberror})"
    return f"KVM gave up at {scene.place}: {what}."


def _emulation(facts: ExitFacts, scene: Scene) -> str:
    registers, space = scene.registers, scene.space
    gpa = space.translate(registers.pc)
    if gpa is not None and space.read_gpa(gpa, 1) is None:
        return f"the guest runs on at physical {gpa.value:#x}, where there is no RAM to hold code"
    code = _instruction_bytes(facts)
    instruction = scene.instruction or decode(code, registers.pc, registers.mode)
    if instruction is None:
        shown = f" ({code.hex(' ')})" if code else ""
        return f"it had to emulate an instruction that it could not read or decode{shown}"
    named = f"`{instruction}` ({instruction.raw.hex(' ')})"
    device = _outside_ram(scene)
    if device is not None:
        where = f"{named} accesses physical {device.value:#x}, which is not RAM"
        return f"{where}, and KVM cannot emulate this instruction on a device: use a plain mov there"
    if registers.ring == 0:
        why = "on a host whose CPU does not run ring 0 itself, KVM interprets ring 0 and knows common instructions only"
        return f"it cannot emulate {named}; {why}: move this one to ring 3, or replace it"
    return f"it cannot emulate {named}, and it only tries to where the hardware cannot run the guest by itself"


def _instruction_bytes(facts: ExitFacts) -> bytes:
    """What KVM fetched: after the flags a byte with the length, then up to 15 bytes."""
    if len(facts.data) < 3 or not facts.data[0] & _HAS_BYTES:
        return b""
    packed = b"".join(word.to_bytes(8, "little") for word in facts.data[1:3])
    return packed[1 : 1 + min(packed[0], 15)]


def _outside_ram(scene: Scene) -> Gpa | None:
    """The first operand of the instruction that is mapped, but not to RAM."""
    if scene.instruction is not None:
        for access in accesses(scene.instruction, scene.registers):
            gpa = scene.space.translate(access.linear)
            if gpa is not None and scene.space.read_gpa(gpa, 1) is None:
                return gpa
    return None


def fail_entry(facts: ExitFacts, scene: Scene) -> str:
    """The sentence for KVM_EXIT_FAIL_ENTRY."""
    reason = facts.hardware_reason
    known = _ENTRY_FAILURES.get(reason, "the CPU gave a reason that pyvmm does not know")
    wrong = invalid_state(scene)
    suspects = f": {' and '.join(wrong)}" if wrong else ""
    return f"The CPU refused to enter the guest at {scene.place} (hardware reason {reason:#x}): {known}{suspects}."


def invalid_state(scene: Scene) -> list[str]:
    """What in the registers a CPU may not accept at a VM entry: some of SDM's "Checks on the Guest State Area"."""
    registers, long = scene.registers, is_long(scene)
    checks = (
        (registers.cr0 & CR0_PG and not registers.cr0 & CR0_PE, "CR0.PG is set without CR0.PE"),
        (long and not registers.cr4 & CR4_PAE, "long mode is on without CR4.PAE"),
        (long and not registers.cr0 & CR0_PG, "long mode is on without CR0.PG"),
        (registers.cs.l and registers.cs.db, "CS is both 64-bit (L) and 32-bit (D)"),
        (not registers.rflags & 2, "bit 1 of RFLAGS is 0"),
        (registers.mode == 64 and not scene.space.is_canonical(registers.rip), "rip is not canonical"),
        (registers.mode != 64 and registers.rip >> 32, "rip has more than 32 bits outside 64-bit code"),
        (not registers.tr.present or registers.tr.type not in (3, 11), "TR holds no busy TSS"),
    )
    return [what for wrong, what in checks if wrong]


def unhandled(facts: ExitFacts, scene: Scene) -> str:
    """The sentence for an exit that nobody handles."""
    if facts.reason == _HLT:
        return f"The vCPU halted at {scene.place}, and nothing can wake it: this VM has no interrupt controller."
    name = _EXITS.get(facts.reason)
    shown = f"KVM_EXIT_{name}" if name else f"exit {facts.reason}"
    return f"The guest stopped at {scene.place} with {shown}, which pyvmm has no use for."
