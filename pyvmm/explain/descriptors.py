# descriptors.py: the guest's GDT, IDT and TSS, for finding out why they did not work. Linear addresses, bytes.
"""Segment descriptors, gates and the stacks that the TSS names, as the guest has them in memory.

Intel SDM vol. 3, "Segment Descriptors", "IDT Descriptors", "64-Bit Mode IDT", "Task-State Segment".
"""

from __future__ import annotations

from pyvmm.record import Record
from pyvmm.vcpu.registers import CR0_PE, EFER_LMA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.explain.scene import Scene

TASK_GATE, INTERRUPT_GATES = 0x5, (0x6, 0x7, 0xE, 0xF)
_IOMAP_AT = 102


class Descriptor(Record):
    """A segment descriptor. `problem`: a clause, why the CPU could not use the selector at all, or ""; only then does
    the rest mean anything. `absent`: the problem is that its present bit is 0."""

    __slots__ = ("absent", "code", "db", "dpl", "long", "problem")

    def __init__(self, raw: int, problem: str = "") -> None:
        self.problem = problem
        self.absent = bool(problem and raw)
        self.dpl = raw >> 45 & 3
        self.long = bool(raw >> 53 & 1)
        self.db = bool(raw >> 54 & 1)
        self.code = bool(raw >> 44 & 1 and raw >> 43 & 1)


class Gate(Record):
    """An entry of the IDT. `problem` as in Descriptor; `ist`: 1..7 where it names a stack of the TSS."""

    __slots__ = ("dpl", "handler", "ist", "present", "problem", "raw", "selector", "type")

    def __init__(self, raw: int, problem: str = "") -> None:
        self.problem = problem
        self.raw = raw
        self.handler = raw & 0xFFFF | raw >> 32 & 0xFFFF_0000 | raw >> 32 & 0xFFFF_FFFF_0000_0000
        self.selector = raw >> 16 & 0xFFFF
        self.ist = raw >> 32 & 7
        self.type = raw >> 40 & 0xF
        self.dpl = raw >> 45 & 3
        self.present = bool(raw >> 47 & 1)


def is_long(scene: Scene) -> bool:
    """Is the CPU in long mode (64-bit or compatibility), where gates and the TSS have their 64-bit form?"""
    return bool(scene.registers.efer & EFER_LMA)


def is_real(scene: Scene) -> bool:
    """Is the CPU in real mode, without descriptors?"""
    return not scene.registers.cr0 & CR0_PE


def descriptor(scene: Scene, selector: int) -> Descriptor:
    """What a selector names in the GDT or LDT."""
    registers = scene.registers
    local = selector & 4
    base, limit = (registers.ldt.base, registers.ldt.limit) if local else (registers.gdt_base, registers.gdt_limit)
    table = "LDT" if local else "GDT"
    if not selector & ~3:
        return Descriptor(0, "is null")
    if (selector | 7) > limit:
        return Descriptor(0, f"lies outside the {table} (limit {limit:#x})")
    raw = scene.space.number(base + (selector & ~7), 8)
    if raw is None:
        return Descriptor(0, f"cannot be looked up, since {unreadable(scene, base + (selector & ~7), f'the {table}')}")
    if not raw >> 47 & 1:
        return Descriptor(raw or 1, f"names an entry of the {table} that is not present")
    return Descriptor(raw)


def gate(scene: Scene, vector: int) -> Gate:
    """The IDT's entry for a vector."""
    registers, size = scene.registers, 16 if is_long(scene) else 8
    if registers.idt_limit == 0:
        return Gate(0, "the IDT is empty (limit 0)")
    if registers.idt_limit < (vector + 1) * size - 1:
        return Gate(0, f"the IDT ends before its entry {vector} (limit {registers.idt_limit:#x})")
    at = registers.idt_base + vector * size
    raw = scene.space.number(at, size)
    if raw is None:
        return Gate(0, unreadable(scene, at, "the IDT"))
    return Gate(raw)


def inner_stack(scene: Scene, ist: int, ring: int) -> tuple[str, int | None]:
    """The stack that the CPU switches to: what to call it, and its top; None where the TSS cannot be read."""
    if is_long(scene):
        name, at = (f"IST{ist}", 36 + 8 * (ist - 1)) if ist else (f"RSP{ring}", 4 + 8 * ring)
        return name, scene.space.number(scene.registers.tr.base + at, 8)
    return f"ESP{ring}", scene.space.number(scene.registers.tr.base + 4 + 8 * ring, 4)


def port_is_open(scene: Scene, port: int, size: int) -> bool:
    """Does the TSS's I/O bitmap let ring 3 use `size` ports from `port` on? SDM vol. 1, "I/O Permission Bit Map"."""
    tr = scene.registers.tr
    bitmap = scene.space.number(tr.base + _IOMAP_AT, 2)
    if bitmap is None or bitmap + port // 8 + 1 > tr.limit:
        return False
    bits = scene.space.number(tr.base + bitmap + port // 8, 2)
    return bits is not None and not bits >> port % 8 & (1 << size) - 1


def unreadable(scene: Scene, linear: int, what: str) -> str:
    """Says that a table of the CPU's cannot be read, and why."""
    walk = scene.space.walk(linear)
    if walk.gpa is None:
        return f"{what}, at {linear:#x}, is not mapped ({walk.reason})"
    return f"{what}, at physical {walk.gpa.value:#x}, lies outside RAM"
