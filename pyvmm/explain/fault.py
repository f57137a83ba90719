# fault.py: which exception the instruction at rip would raise, and why, for crash reports.
"""`find_fault()` checks an instruction as the CPU does: fetch, decoding, privilege, operands, memory accesses.

Intel SDM vol. 3, "Exception and Interrupt Reference", and vol. 2, each instruction's list of exceptions.
"""

from __future__ import annotations

from pyvmm.explain.access import accesses
from pyvmm.explain.calls import caller
from pyvmm.explain.descriptors import gate, is_real
from pyvmm.explain.exceptions import (
    ALIGNMENT,
    EXCEPTIONS,
    INVALID_OPCODE,
    PAGE,
    PROTECTION,
    STACK,
    Fault,
    exception_name,
)
from pyvmm.explain.instruction import LONGEST
from pyvmm.explain.pagewalk import RFLAGS_AC
from pyvmm.explain.rules import GUESSES, RULES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.explain.access import Access
    from pyvmm.explain.instruction import Instruction
    from pyvmm.explain.scene import Scene

CR0_AM = 1 << 18
_ALIGNED = {"movaps": 16, "movapd": 16, "movdqa": 16, "movntps": 16, "movntpd": 16, "movntdq": 16, "movntdqa": 16,
            "cmpxchg16b": 16, "fxsave": 16, "fxsave64": 16, "fxrstor": 16, "fxrstor64": 16,
            "xsave": 64, "xsave64": 64, "xrstor": 64, "xrstor64": 64}  # fmt: skip
_ALIGNED |= {f"v{name}": 0 for name in ("movaps", "movapd", "movdqa", "movntps", "movntpd", "movntdq", "movntdqa")}
_VERBS = {"read": "read from", "write": "wrote to"}


def find_fault(scene: Scene) -> Fault | None:
    """The first exception that the instruction at rip raises, or None where we see no reason for one."""
    fault = _fetch(scene)
    if fault is not None or scene.instruction is None:
        return fault
    for rule in (*RULES, _memory, *GUESSES):
        fault = rule(scene, scene.instruction)
        if fault is not None:
            return fault
    return None


def _fetch(scene: Scene) -> Fault | None:
    """rip itself: is there code, and is it an instruction?"""
    space, pc = scene.space, scene.registers.pc
    came = f"the CPU went to {pc:#x}{_origin(scene)}"
    if not space.is_canonical(pc):
        return Fault(PROTECTION, f"{came}, which is not canonical")
    code = space.read(pc, LONGEST)
    last = scene.instruction.end - 1 if scene.instruction else pc + min(len(code), LONGEST - 1)
    for at in (pc, last):
        refusal = space.refusal(at, "execute", scene.registers.ring)
        if refusal:
            where = came if at == pc else f"the instruction at {pc:#x} goes on at {at:#x}"
            return Fault(PAGE, f"{where}, which {refusal}", at)
    if scene.instruction is None and len(code) == LONGEST:
        return Fault(INVALID_OPCODE, f"the bytes {code[:8].hex(' ')} are not an instruction")
    return None


def _origin(scene: Scene) -> str:
    """How the CPU may have come to rip: as a handler, or by the call that the top of the stack tells of."""
    registers = scene.registers
    handled = [vector for vector in EXCEPTIONS if not is_real(scene) and _handler(scene, vector) == registers.rip]
    if len(handled) == 1:
        return f" to handle a {exception_name(handled[0])}"
    call = caller(scene)
    return f" (called from {scene.code.place(call)})" if call is not None else ""


def _handler(scene: Scene, vector: int) -> int | None:
    entry = gate(scene, vector)
    return entry.handler if entry.present and not entry.problem else None


def _memory(scene: Scene, instruction: Instruction) -> Fault | None:
    for access in accesses(instruction, scene.registers):
        fault = _access(scene, instruction, access)
        if fault is not None:
            return fault
    return None


def _access(scene: Scene, instruction: Instruction, access: Access) -> Fault | None:
    registers, space = scene.registers, scene.space
    did = f"`{instruction}` {_VERBS[access.kind]} {access.linear:#x}"
    vector = STACK if access.stack else PROTECTION
    last = access.linear + max(access.size, 1) - 1 & 0xFFFF_FFFF_FFFF_FFFF
    if not space.is_canonical(access.linear) or not space.is_canonical(last):
        return Fault(vector, f"{did}, which is not canonical (bits 63 to {space.width - 1} differ)")
    if not access.within:
        return Fault(vector, f"{did}, which is beyond its segment's limit")
    unit = _ALIGNED.get(instruction.operation)
    unit = access.size if unit == 0 else unit
    if unit and access.linear % unit:
        return Fault(PROTECTION, f"{did}, which is not aligned to {unit} bytes, as this instruction needs it")
    for at in (access.linear, last):
        refusal = space.refusal(at, access.kind, registers.ring)
        if refusal:
            reached = did if at == access.linear else f"{did} and on to {at:#x}"
            return Fault(PAGE, f"{reached}, which {refusal}", at if at == access.linear else at & ~0xFFF)
    checked = registers.ring == 3 and registers.cr0 & CR0_AM and registers.rflags & RFLAGS_AC
    if checked and access.size in (2, 4, 8) and access.linear % access.size:
        return Fault(ALIGNMENT, f"{did}, not a multiple of {access.size}, while CR0.AM and RFLAGS.AC forbid that")
    return None
