# rules.py: which exceptions an instruction raises by itself, whatever memory it touches. For fault.py.
"""One function a family of instructions, listed in `RULES`; each returns the fault that it sees, or None.

Intel SDM vol. 2, each instruction's list of exceptions; vol. 1, "I/O-Sensitive Instructions". These are the faults that
guests really run into, not all that the manual lists.
"""

from __future__ import annotations

import re

from pyvmm.explain.access import accesses, register_bits, register_value, stack_pointer
from pyvmm.explain.descriptors import descriptor, gate, is_real, port_is_open
from pyvmm.explain.exceptions import (
    BREAKPOINT,
    DEBUG,
    DIVIDE,
    FLOATING,
    INVALID_OPCODE,
    NO_DEVICE,
    NOT_PRESENT,
    PROTECTION,
    SIMD,
    STACK,
    Fault,
    exception_name,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.explain.instruction import Instruction
    from pyvmm.explain.scene import Scene

    Rule = Callable[[Scene, Instruction], Fault | None]

RFLAGS_TF = 1 << 8
CR0_MP, CR0_EM, CR0_TS = 1 << 1, 1 << 2, 1 << 3
CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_OSXSAVE = 1 << 9, 1 << 10, 1 << 18

_RING0 = {"hlt", "lgdt", "lidt", "lldt", "ltr", "lmsw", "clts", "invd", "wbinvd", "invlpg", "rdmsr", "wrmsr", "xsetbv",
          "sysexit", "sysret", "sysretq", "swapgs", "monitor", "mwait", "invpcid"}  # fmt: skip
_PORTS = ("in", "insb", "insw", "insd", "out", "outsb", "outsw", "outsd")


def _undefined(scene: Scene, instruction: Instruction) -> Fault | None:
    if instruction.operation.startswith("ud"):
        return Fault(
            INVALID_OPCODE,
            f"`{instruction}` is an invalid opcode on purpose: compilers put it where code must never arrive",
        )
    return None


def _software(scene: Scene, instruction: Instruction) -> Fault | None:
    """int N and int3: an exception of their own, or a protection fault where the gate is not for this ring."""
    if instruction.operation == "int3":
        vector, what = BREAKPOINT, "`int3` is a breakpoint"
    elif instruction.operation == "int":
        vector = int(instruction.operands[0], 0) & 0xFF
        what = f"`{instruction}` asked for {exception_name(vector)}"
    else:
        return None
    entry = None if is_real(scene) else gate(scene, vector)
    if entry is not None and not entry.problem and entry.present and entry.dpl < scene.registers.ring:
        allowed = f"entry {vector} of the IDT is for ring {entry.dpl} (DPL)"
        return Fault(PROTECTION, f"`{instruction}` in ring {scene.registers.ring} is not allowed: {allowed}")
    return Fault(vector, what)


def _privilege(scene: Scene, instruction: Instruction) -> Fault | None:
    registers, operation = scene.registers, instruction.operation
    iopl = registers.rflags >> 12 & 3
    special = any(re.fullmatch(r"[cd]r\d+", operand) for operand in instruction.operands)
    if registers.ring > 0 and (operation in _RING0 or special):
        return Fault(PROTECTION, f"`{instruction}` is for ring 0 only, and the code runs in ring {registers.ring}")
    if is_real(scene) or registers.ring <= iopl:
        return None
    if operation in ("cli", "sti"):
        why = f"RFLAGS.IOPL is {iopl}, and needs to be {registers.ring}"
        return Fault(PROTECTION, f"`{instruction}` in ring {registers.ring} is not allowed: {why}")
    if operation in _PORTS:
        # IOPL alone does not decide about ports: the TSS may open some.
        named = next((operand for operand in instruction.operands if operand[:1].isdigit()), None)
        port = int(named, 0) if named is not None else registers.rdx & 0xFFFF
        size = instruction.memory[0].size if instruction.memory else _data_size(instruction)
        if not port_is_open(scene, port, size):
            why = f"IOPL is {iopl}, and the TSS's I/O bitmap does not open port {port:#x}"
            return Fault(PROTECTION, f"`{instruction}` in ring {registers.ring} is not allowed: {why}")
    return None


def _data_size(instruction: Instruction) -> int:
    """Bytes that a plain in or out moves."""
    return next((size for name, size in (("al", 1), ("ax", 2), ("eax", 4)) if name in instruction.operands), 1)


def _units(scene: Scene, instruction: Instruction) -> Fault | None:
    """FPU, SSE and AVX, where the guest has not switched them on."""
    cr0, cr4 = scene.registers.cr0, scene.registers.cr4
    vector_registers = any(re.fullmatch(r"[xyz]mm\d+", operand) for operand in instruction.operands)
    fpu = "fpu" in instruction.sets
    if vector_registers and any(name.startswith("avx") for name in instruction.sets):
        if not cr4 & CR4_OSXSAVE:
            return Fault(
                INVALID_OPCODE, f"`{instruction}` uses AVX, which the guest has not enabled (CR4.OSXSAVE is 0)"
            )
    elif vector_registers:
        if not cr4 & CR4_OSFXSR:
            return Fault(INVALID_OPCODE, f"`{instruction}` uses SSE, which the guest has not enabled (CR4.OSFXSR is 0)")
        if cr0 & CR0_EM:
            return Fault(INVALID_OPCODE, f"`{instruction}` uses SSE while CR0.EM says that there is no FPU")
    waits = instruction.operation == "fwait"
    disabled = cr0 & (CR0_TS | CR0_EM) if not waits else cr0 & CR0_TS and cr0 & CR0_MP
    if (vector_registers or fpu) and disabled:
        flag = "TS" if cr0 & CR0_TS else "EM"
        return Fault(NO_DEVICE, f"`{instruction}` uses the FPU or vector registers while CR0.{flag} is 1")
    return None


def _divide(scene: Scene, instruction: Instruction) -> Fault | None:
    if instruction.operation not in ("div", "idiv"):
        return None
    registers = scene.registers
    if instruction.memory:
        access = accesses(instruction, registers)[0]
        size, divisor = access.size, scene.space.number(access.linear, access.size)
    else:
        divisor = register_value(registers, instruction.operands[0])
        size = register_bits(instruction.operands[0]) // 8
    if divisor is None:
        return None
    if divisor == 0:
        return Fault(DIVIDE, f"`{instruction}` divided by zero")
    bits = size * 8
    mask = (1 << bits) - 1
    low = registers.rax & 0xFFFF if size == 1 else registers.rax & mask | (registers.rdx & mask) << bits
    if instruction.operation == "div":
        fits = low // divisor <= mask
    else:
        dividend, signed = _signed(low, 2 * bits), _signed(divisor, bits)
        quotient = abs(dividend) // abs(signed) * (1 if (dividend < 0) == (signed < 0) else -1)
        fits = -(1 << bits - 1) <= quotient < 1 << bits - 1
    return None if fits else Fault(DIVIDE, f"the quotient of `{instruction}` does not fit into {bits} bits")


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def _selectors(scene: Scene, instruction: Instruction) -> Fault | None:
    """Loading a segment register, LDT, TSS, or CS and SS by a far return."""
    if is_real(scene):
        return None
    registers, operation = scene.registers, instruction.operation
    wanted: list[tuple[str, int | None]] = []
    if operation == "mov" and re.fullmatch("[d-gs]s", instruction.operands[0]):
        name, source = instruction.operands
        loaded = _operand_value(scene, instruction, source)
        if loaded is None or loaded & ~3 or name == "ss":
            wanted.append((name.upper(), loaded))
    elif operation in ("ltr", "lldt"):
        wanted.append((operation[1:].upper(), _operand_value(scene, instruction, instruction.operands[0])))
    elif operation.startswith(("iret", "retf")):
        word = {"q": 8, "d": 4}.get(operation[-1], 8 if operation == "iretq" else 4)
        top = stack_pointer(registers)
        wanted.append(("CS", scene.space.number(top + word, 2)))
        if operation == "iretq":
            wanted.append(("SS", scene.space.number(top + 4 * word, 2)))
    for name, selector in wanted:
        if selector is None or (name in ("SS", "LDT") and not selector & ~3):
            continue
        found = descriptor(scene, selector)
        if found.problem:
            absent = STACK if name == "SS" else NOT_PRESENT
            vector = absent if found.absent else PROTECTION
            return Fault(vector, f"`{instruction}` loads {name} with {selector:#x}, which {found.problem}")
    return None


def _operand_value(scene: Scene, instruction: Instruction, operand: str) -> int | None:
    if instruction.memory:
        return scene.space.number(accesses(instruction, scene.registers)[0].linear, 2)
    value = register_value(scene.registers, operand)
    return value & 0xFFFF if value is not None else None


def _refused(scene: Scene, instruction: Instruction) -> Fault | None:
    """What the CPU checks by rules of its own model, in ring 0."""
    registers, operation = scene.registers, instruction.operation
    if operation in ("rdmsr", "wrmsr"):
        also = " or does not take the value" if operation == "wrmsr" else ""
        why = f"the CPU does not have MSR {registers.rcx & 0xFFFF_FFFF:#x}{also}"
        return Fault(PROTECTION, f"`{instruction}` was refused, most likely because {why}")
    if operation == "mov" and re.fullmatch(r"cr\d+", instruction.operands[0]):
        value = register_value(registers, instruction.operands[1]) or 0
        why = f"the CPU does not take {value:#x} there: a reserved bit, or bits that exclude each other"
        return Fault(PROTECTION, f"`{instruction}` was refused, most likely because {why}")
    return None


def _trap_before(scene: Scene, instruction: Instruction) -> Fault | None:
    """int3 and int N are traps: some hosts leave rip behind them."""
    before = scene.code.before(instruction.address)
    fault = _software(scene, before) if before is not None else None
    return Fault(fault.vector, f"just before, {fault.what}") if fault is not None else None


def _single_step(scene: Scene, instruction: Instruction) -> Fault | None:
    if scene.registers.rflags & RFLAGS_TF:
        return Fault(DEBUG, "RFLAGS.TF is set, so that every instruction ends in a debug exception")
    return None


def _floating(scene: Scene, instruction: Instruction) -> Fault | None:
    """Exceptions of numbers. Whether they are unmasked is in MXCSR and the x87 control word, which we do not see."""
    if instruction.operation == "fwait":
        return Fault(FLOATING, "`fwait` most likely reported the error of an x87 instruction before it")
    if re.fullmatch(r"v?(add|sub|mul|div|sqrt|cvt\w*|u?comi)[sp][sd]", instruction.operation):
        vector = SIMD if scene.registers.cr4 & CR4_OSXMMEXCPT else INVALID_OPCODE
        return Fault(vector, f"`{instruction}` most likely met numbers whose exception MXCSR does not mask")
    return None


RULES: tuple[Rule, ...] = (
    _undefined,
    _software,
    _privilege,
    _units,
    _divide,
    _selectors,
)
GUESSES: tuple[Rule, ...] = (_refused, _trap_before, _single_step, _floating)
"""Only for an instruction without any other fault: what it did cannot be seen from outside."""
