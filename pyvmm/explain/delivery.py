# delivery.py: why the CPU could not start a handler, for triple faults.
"""`undeliverable()` goes the CPU's way from a vector through IDT, GDT and TSS to a stack, and names the first obstacle.

Intel SDM vol. 3, "Interrupt and Exception Handling": what the CPU checks; that a fault on this way becomes a double
fault, and a fault on the double fault's way the shutdown that is called a triple fault.
"""

from __future__ import annotations

from pyvmm.explain.access import stack_pointer
from pyvmm.explain.descriptors import INTERRUPT_GATES, TASK_GATE, descriptor, gate, inner_stack, is_long, is_real

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.explain.descriptors import Gate
    from pyvmm.explain.scene import Scene

_RESET_LIMIT = 0xFFFF


def undeliverable(scene: Scene, vector: int) -> str | None:
    """Why an exception could not reach its handler, as a clause after "because"; None where nothing stands in its way
    (or where we cannot tell: task gates)."""
    if is_real(scene):
        limit = scene.registers.idt_limit
        return (
            f"the interrupt table ends before its entry {vector} (limit {limit:#x})" if limit < vector * 4 + 3 else None
        )
    entry = gate(scene, vector)
    if entry.problem:
        return entry.problem
    problem = _gate_problem(scene, vector, entry)
    if problem or entry.type == TASK_GATE:
        return problem
    target = descriptor(scene, entry.selector)
    if target.problem:
        return f"entry {vector} of the IDT has the code selector {entry.selector:#x}, which {target.problem}"
    if not target.code or (is_long(scene) and (not target.long or target.db)):
        kind = "64-bit code" if is_long(scene) else "code"
        return f"entry {vector} of the IDT has the code selector {entry.selector:#x}, which is not {kind}"
    if target.dpl > scene.registers.ring:
        return f"entry {vector} of the IDT leads to ring {target.dpl}, and nothing may lead outwards"
    return _stack_problem(scene, entry.ist if is_long(scene) else 0, target.dpl)


def _gate_problem(scene: Scene, vector: int, entry: Gate) -> str | None:
    registers = scene.registers
    if not entry.raw and not registers.idt_base and registers.idt_limit == _RESET_LIMIT:
        return "the guest has not loaded an IDT (base 0, limit 0xffff, as after a reset)"
    if not entry.present:
        return f"entry {vector} of the IDT is not present"
    if is_long(scene):
        if entry.type not in INTERRUPT_GATES[2:]:
            return f"entry {vector} of the IDT is no 64-bit interrupt or trap gate (type {entry.type:#x})"
    elif entry.type not in (TASK_GATE, *INTERRUPT_GATES):
        return f"entry {vector} of the IDT is no interrupt, trap or task gate (type {entry.type:#x})"
    return None


def _stack_problem(scene: Scene, ist: int, ring: int) -> str | None:
    """Can the CPU push its frame (SS, SP, FLAGS, CS, IP and an error code)?"""
    registers = scene.registers
    word = 8 if is_long(scene) else 4
    if ist or ring < registers.ring:
        name, top = inner_stack(scene, ist, ring)
        if top is None:
            return f"the TSS, at {registers.tr.base:#x}, which names the ring-{ring} stack, cannot be read"
        words = 6
    else:
        name, top, words = "the stack pointer", stack_pointer(registers), 6 if is_long(scene) else 4
    if is_long(scene):
        top &= ~15
    for at in (top - word, top - word * words):
        where = at & (0xFFFF_FFFF_FFFF_FFFF if is_long(scene) else 0xFFFF_FFFF)
        if not scene.space.is_canonical(where):
            return f"{name} is {top:#x}, which is not canonical"
        refusal = scene.space.refusal(where, "write", ring)
        if refusal:
            no_tss = ", since the guest has not loaded a TSS" if ist or ring < registers.ring else ""
            return f"{name} is {top:#x}, and the page below it {refusal}{no_tss if not registers.tr.selector else ''}"
    return None
