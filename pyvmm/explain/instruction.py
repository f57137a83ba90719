# instruction.py: machine code to `Instruction` records, for all of explain: the one place that knows capstone.
"""Decoding. Addresses are linear, sizes bytes; the syntax is Intel's."""

from __future__ import annotations

import functools

from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Capstone: TypeAlias = Any  # capstone has no types: the module, its decoders and its instructions

LONGEST = 15
"""Bytes of the longest instruction that there is."""
_ADDRESS_ALONE = ("lea", "nop", "invlpg", "prefetch", "bnd")
_WRITES = ("cmpxchg", "xadd", "xchg", "insb", "insw", "insd")  # capstone does not say so


class MemoryOperand(Record):
    """A memory operand as it is encoded; registers by name, "" where there is none. `size`: bytes accessed."""

    __slots__ = ("base", "displacement", "index", "scale", "segment", "size", "writes")

    def __init__(self, insn: Capstone, operand: Capstone, writes: bool) -> None:
        self.segment: str = insn.reg_name(operand.mem.segment) or ""
        self.base: str = insn.reg_name(operand.mem.base) or ""
        self.index: str = insn.reg_name(operand.mem.index) or ""
        self.scale: int = operand.mem.scale
        self.displacement: int = operand.mem.disp
        self.size: int = operand.size
        self.writes = writes


class Instruction(Record):
    """One decoded instruction. `memory`: the operands that it reads or writes; `operands`: all of them, as text.

    `target`: where a direct jump or call goes, or None. `sets`: capstone's groups: "call", "jump", "sse2", ...
    """

    __slots__ = ("address", "memory", "mnemonic", "operands", "raw", "sets", "target")

    def __init__(self, insn: Capstone) -> None:
        self.address: int = insn.address
        self.raw = bytes(insn.bytes)
        self.mnemonic: str = "fwait" if insn.mnemonic == "wait" else insn.mnemonic
        self.operands: tuple[str, ...] = tuple(insn.op_str.split(", ")) if insn.op_str else ()
        self.sets: frozenset[str] = frozenset(insn.group_name(group) for group in insn.groups)
        x86 = _capstone().x86
        branches = bool(self.sets & {"jump", "call"}) and insn.operands[0].type == x86.X86_OP_IMM
        self.target: int | None = insn.operands[0].imm & 0xFFFF_FFFF_FFFF_FFFF if branches else None
        writes = self.operation.startswith(_WRITES)
        accesses = not self.operation.startswith(_ADDRESS_ALONE)
        self.memory: tuple[MemoryOperand, ...] = tuple(
            MemoryOperand(insn, operand, writes or bool(operand.access & _capstone().CS_AC_WRITE))
            for operand in insn.operands
            if accesses and operand.type == x86.X86_OP_MEM
        )

    @property
    def operation(self) -> str:
        """The mnemonic without its prefixes: "movsq" of "rep movsq"."""
        return self.mnemonic.rpartition(" ")[2]

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + len(self.raw)

    def __str__(self) -> str:
        return f"{self.mnemonic} {', '.join(self.operands)}".rstrip()


def decode(code: bytes, address: int, mode: int) -> Instruction | None:
    """The instruction that `code` starts with, were it at `address`; None where there is none. `mode`: 16, 32 or 64."""
    insn = next(_decoder(mode).disasm(code[:LONGEST], address, 1), None)
    return Instruction(insn) if insn is not None else None


def starts(code: bytes, address: int, mode: int) -> list[int]:
    """The addresses of the instructions in `code`, were it at `address`, if they fill it exactly; else none."""
    found, end = [], address
    for at, size, _, _ in _decoder(mode).disasm_lite(code, address):
        found.append(at)
        end = at + size
    return found if end == address + len(code) else []


def _capstone() -> Capstone:
    import capstone.x86

    return capstone


@functools.cache
def _decoder(mode: int) -> Capstone:
    capstone = _capstone()
    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    decoder = capstone.Cs(capstone.CS_ARCH_X86, modes[mode])
    decoder.detail = True
    return decoder
