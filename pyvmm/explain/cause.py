# cause.py: what happened and most likely why, in one sentence, for every way in which a vCPU can end badly.
"""`sentence()` and `notes()` for what KVM told us when a vCPU could not go on.

Intel SDM vol. 3, "Interrupt 8: Double Fault": a triple fault is an exception that could not be delivered, then a double
fault that could not either. rip is still at the instruction then, so that the way can be gone once more.
"""

from __future__ import annotations

from pyvmm.explain.delivery import undeliverable
from pyvmm.explain.exceptions import DOUBLE_FAULT, exception_name
from pyvmm.explain.failures import fail_entry, internal_error, unhandled
from pyvmm.explain.fault import find_fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.explain.exceptions import Fault
    from pyvmm.explain.facts import ExitFacts
    from pyvmm.explain.scene import Scene

RFLAGS_IF = 1 << 9
_FIRST_INTERRUPT = 32


def sentence(facts: ExitFacts, scene: Scene) -> str:
    """What happened and why, as one sentence with its full stop."""
    return _SENTENCES[facts.kind](facts, scene)


def notes(facts: ExitFacts, scene: Scene) -> list[str]:
    """What else a student should know about it: evidence, and how to look further. Sentences."""
    found = [_MEANING[facts.kind]]
    if facts.kind == "shutdown" and not is_reset(scene):
        found += _cr2_notes(scene, find_fault(scene))
    return found


def is_reset(scene: Scene) -> bool:
    """Are these the registers of a vCPU just after reset or INIT? KVM on AMD's CPUs puts it there at a shutdown."""
    return scene.registers.cs.base == 0xFFFF_0000 and scene.registers.rip == 0xFFF0


def _shutdown(facts: ExitFacts, scene: Scene) -> str:
    if is_reset(scene):
        return (
            "Triple fault, place unknown: this host's KVM has already put the vCPU into its reset state; "
            "run the guest with --trace to see the way there."
        )
    fault = find_fault(scene)
    if fault is None:
        return f"Triple fault at {scene.place}: {_without_fault(scene)}."
    return f"Triple fault at {scene.place}: {fault.what}; {_delivery(scene, fault.vector)}."


def _delivery(scene: Scene, vector: int) -> str:
    """Why neither the exception nor the double fault after it was delivered."""
    first, second = undeliverable(scene, vector), undeliverable(scene, DOUBLE_FAULT)
    name = f"the {exception_name(vector)}"
    if first is None:
        return f"why {name} could not be delivered is not to be seen in the guest's tables"
    if second is None:
        return f"{name} could not be delivered because {first} (why the double fault could not be is not to be seen)"
    return f"{name} could not be delivered because {first}"


def _without_fault(scene: Scene) -> str:
    """The next best guess, where the instruction itself is innocent."""
    registers, space = scene.registers, scene.space
    gpa = space.translate(registers.pc)
    if gpa is not None and space.read_gpa(gpa, 1) is None:
        return f"the guest runs on at physical {gpa.value:#x}, where there is no RAM to hold code"
    obstacle = undeliverable(scene, _FIRST_INTERRUPT)
    if registers.rflags & RFLAGS_IF and obstacle:
        before = scene.code.before(registers.pc)
        halted = before is not None and before.operation == "hlt"
        came = "an interrupt came while the CPU was halted" if halted else "most likely an interrupt came"
        return f"{came}, and could not be delivered because {obstacle}"
    refusal = space.refusal(registers.cr2, "read", registers.ring) if registers.cr2 else None
    if refusal:
        return f"most likely a page fault, since CR2 holds {registers.cr2:#x}, which {refusal}"
    return f"`{scene.instruction}` gives no reason for an exception that can be seen from outside"


def _cr2_notes(scene: Scene, fault: Fault | None) -> list[str]:
    cr2 = scene.registers.cr2
    if fault is None or fault.address is None:
        return []
    if cr2 == fault.address:
        return [f"CR2, where the CPU leaves the address of a page fault, agrees: {cr2:#x}."]
    return [f"CR2 holds {cr2:#x}: the address of an earlier page fault, or of one during the delivery."]


_SENTENCES: dict[str, Callable[[ExitFacts, Scene], str]] = {
    "shutdown": _shutdown,
    "internal_error": internal_error,
    "fail_entry": fail_entry,
    "unhandled": unhandled,
}
_MEANING = {
    "shutdown": "A triple fault is three steps: an exception whose handler the CPU could not start, then a double "
    "fault (vector 8) whose handler it could not start either, then shutdown.",
    "internal_error": "KVM_EXIT_INTERNAL_ERROR is KVM's own end, not the CPU's: the guest may be right, and may run on "
    "another host.",
    "fail_entry": "KVM_EXIT_FAIL_ENTRY: the CPU checks all of a guest's state when it enters it, and refused. Look for "
    "registers that exclude each other below.",
    "unhandled": "Every return of KVM_RUN has a reason, KVM_EXIT_*; nothing in this VM handles this one.",
}
