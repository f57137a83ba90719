# access.py: which memory an instruction is about to touch, for finding its fault. Addresses are linear, sizes bytes.
"""`accesses()` computes the linear addresses of an instruction's operands, explicit and on the stack, from registers.

Intel SDM vol. 1, "Specifying an Offset"; vol. 3, "Logical and Linear Addresses".
"""

from __future__ import annotations

import functools

from pyvmm.record import Record
from pyvmm.vcpu.registers import CR0_PE, GENERAL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.explain.instruction import Instruction, MemoryOperand
    from pyvmm.explain.pagewalk import Kind
    from pyvmm.vcpu import Registers

_EXPAND_DOWN = 0x4
_STRINGS = ("movs", "stos", "lods", "cmps", "scas", "ins", "outs")


class Access(Record):
    """One access: `linear` is its first byte. `stack`: relative to rsp or rbp, so that a bad address is #SS, not #GP.

    `within`: does the segment's limit allow it? Always so in 64-bit code.
    """

    __slots__ = ("kind", "linear", "size", "stack", "within")

    def __init__(self, kind: Kind, linear: int, size: int, stack: bool, within: bool) -> None:
        self.kind = kind
        self.linear = linear
        self.size = size
        self.stack = stack
        self.within = within


def accesses(instruction: Instruction, registers: Registers) -> tuple[Access, ...]:
    """All accesses but the fetch and those of descriptor tables, in about the order that the CPU makes them."""
    if "rep" in instruction.mnemonic and instruction.operation.startswith(_STRINGS) and not registers.rcx:
        return ()
    found = [_explicit(operand, instruction, registers) for operand in instruction.memory]
    return (*found, *_implicit(instruction, registers))


def register_value(registers: Registers, name: str) -> int | None:
    """A general register or a part of one ("rax", "eax", "ax", "ah", "r8d"), or None for another name."""
    whole, shift, bits = _parts().get(name, ("", 0, 0))
    return getattr(registers, whole) >> shift & (1 << bits) - 1 if whole else None


def register_bits(name: str) -> int:
    """The width of a general register or part of one; 0 for another name."""
    return _parts().get(name, ("", 0, 0))[2]


def stack_pointer(registers: Registers) -> int:
    """The linear address that the next pop would read."""
    return _linear(registers, "ss", _narrow(registers, registers.rsp))


def word_size(registers: Registers) -> int:
    """Bytes of a word on the stack: 2, 4 or 8."""
    return registers.mode // 8


def _explicit(operand: MemoryOperand, instruction: Instruction, registers: Registers) -> Access:
    offset = operand.displacement + operand.scale * (register_value(registers, operand.index) or 0)
    if operand.base in ("rip", "eip"):
        offset += instruction.end
    else:
        offset += register_value(registers, operand.base) or 0
    # The address size is that of the registers named; with none, of the code.
    bits = register_bits(operand.base or operand.index) or registers.mode
    on_stack = operand.base in ("rsp", "rbp", "esp", "ebp", "bp") and not operand.segment
    segment = operand.segment or ("ss" if on_stack else "ds")
    kind: Kind = "write" if operand.writes else "read"
    return _access(registers, kind, segment, offset & (1 << bits) - 1, operand.size, on_stack)


def _implicit(instruction: Instruction, registers: Registers) -> tuple[Access, ...]:
    operation, size = instruction.operation, word_size(registers)
    if operation.startswith(("push", "enter")) or "call" in instruction.sets:
        top = _narrow(registers, registers.rsp - size)
        return (_access(registers, "write", "ss", top, size, True),)
    if operation.startswith(("pop", "ret", "iret")):
        return (_access(registers, "read", "ss", _narrow(registers, registers.rsp), size, True),)
    if operation == "leave":
        return (_access(registers, "read", "ss", _narrow(registers, registers.rbp), size, True),)
    return ()


def _access(registers: Registers, kind: Kind, name: str, offset: int, size: int, stack: bool) -> Access:
    within = True
    if registers.mode != 64:
        segment = getattr(registers, name)
        last = offset + max(size, 1) - 1
        down = bool(registers.cr0 & CR0_PE) and name != "cs" and segment.type & 0xC == _EXPAND_DOWN
        within = offset > segment.limit if down else last <= segment.limit
    return Access(kind, _linear(registers, name, offset), size, stack or name == "ss", within)


def _linear(registers: Registers, name: str, offset: int) -> int:
    if registers.mode == 64:
        base = getattr(registers, name).base if name in ("fs", "gs") else 0
        return int(base + offset & 0xFFFF_FFFF_FFFF_FFFF)
    return int(getattr(registers, name).base + offset & 0xFFFF_FFFF)


def _narrow(registers: Registers, pointer: int) -> int:
    """The part of a stack pointer that counts."""
    bits = 64 if registers.mode == 64 else 32 if registers.ss.db else 16
    return pointer & (1 << bits) - 1


@functools.cache
def _parts() -> dict[str, tuple[str, int, int]]:
    """Every name of a general register or part of one -> (the whole, shift, bits)."""
    parts = {"eip": ("rip", 0, 32)}
    for name in GENERAL:
        short = name[1:]
        if short[0].isdigit():
            parts |= {
                name: (name, 0, 64),
                f"{name}d": (name, 0, 32),
                f"{name}w": (name, 0, 16),
                f"{name}b": (name, 0, 8),
            }
            continue
        parts |= {name: (name, 0, 64), f"e{short}": (name, 0, 32), short: (name, 0, 16)}
        if short.endswith("x"):
            parts |= {f"{short[0]}l": (name, 0, 8), f"{short[0]}h": (name, 8, 8)}
        else:
            parts[f"{short}l"] = (name, 0, 8)
    return parts
