# disassembly.py: guest code around an address, with names, for people. Addresses are linear, sizes bytes.
"""`Disassembler` reads what the vCPU would run through the guest's page tables and lists it."""

from __future__ import annotations

import re

from pyvmm.explain.instruction import LONGEST, decode, starts
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.explain.instruction import Instruction
    from pyvmm.explain.pagewalk import AddressSpace
    from pyvmm.image.symbols import Symbols

_LOOK_BACK = 32
_SYMBOL_REACH = 1024
_CALL_SIZES = (5, 2, 3, 6, 7, 4, 8)  # bytes, frequent ones first


class Line(Record):
    """One line of a listing. `label`: the symbol that starts here, or what the listing begins within; else ""."""

    __slots__ = ("address", "comment", "current", "label", "raw", "text")

    def __init__(self, address: int, raw: bytes, text: str, label: str, comment: str, current: bool) -> None:
        self.address = address
        self.raw = raw
        self.text = text
        self.label = label
        self.comment = comment
        self.current = current


class Disassembler:
    """Decodes code of one vCPU, in the `mode` (16, 32 or 64 bits) that it is in. Raises nothing, whatever the bytes."""

    def __init__(self, mode: int, space: AddressSpace, symbols: Symbols | None = None) -> None:
        self._mode = mode
        self._space = space
        self._symbols = symbols

    def symbol(self, address: int) -> str | None:
        """The code at an address as "name+0x12", or None where nothing is known of it."""
        return self._symbols.lookup(address) if self._symbols is not None else None

    def place(self, address: int) -> str:
        """The same, or else the number."""
        return self.symbol(address) or f"{address:#x}"

    def decode(self, address: int) -> Instruction | None:
        """The instruction at an address; None where there is none, or not all of it is mapped."""
        return decode(self._space.read(address, LONGEST), address, self._mode)

    def before(self, address: int) -> Instruction | None:
        """The instruction that ends at an address, as far as one can tell."""
        previous = self._previous(address)
        return decode(previous[-1][1], previous[-1][0], self._mode) if previous else None

    def around(self, address: int, before: int = 4, after: int = 5) -> tuple[Line, ...]:
        """The instruction at `address` and its neighbours; empty where the address is not mapped."""
        previous = self._previous(address)
        lines = [self._line(at, raw, False) for at, raw in previous[max(len(previous) - before, 0) :]]
        at = address
        while len(lines) < min(len(previous), before) + 1 + after and (raw := self._space.read(at, LONGEST)):
            lines.append(self._line(at, raw, at == address))
            at += len(lines[-1].raw)
        if at == address:
            return ()
        lines[0].label = self.symbol(lines[0].address) or ""
        return tuple(lines)

    def call_before(self, return_address: int) -> int | None:
        """Where the call instruction is that ends at an address, or None where there is none."""
        for size in _CALL_SIZES:
            found = self.decode(return_address - size) if return_address >= size else None
            if found is not None and "call" in found.sets and found.end == return_address:
                return found.address
        return None

    def _previous(self, address: int) -> list[tuple[int, bytes]]:
        """The instructions that end exactly at `address`: (address, bytes). x86 cannot be decoded backwards: only the
        symbol's start is sure to be one; without it, the farthest start from which decoding arrives is a guess."""
        name = self.symbol(address - 1)
        into = _distance(name) + 1 if name else 0
        nearby = range(min(into or _LOOK_BACK, _LOOK_BACK, address), 0, -1)
        for back in [into, *nearby] if 0 < into <= _SYMBOL_REACH else nearby:
            code = self._space.read(address - back, back)
            found = starts(code, address - back, self._mode) if len(code) == back else []
            if found:
                ends = [*found[1:], address]
                return [(at, code[at - found[0] : end - found[0]]) for at, end in zip(found, ends, strict=True)]
        return []

    def _line(self, address: int, code: bytes, current: bool) -> Line:
        symbol = self.symbol(address) or ""
        label = "" if _distance(symbol) else symbol
        found = decode(code, address, self._mode)
        if found is None:
            return Line(address, code[:1], f".byte   {code[0]:#04x}", label, "", current)
        comment = (self.symbol(found.target) or "") if found.target is not None else ""
        for operand in found.memory:
            if operand.base == "rip":
                comment = f"{found.end + operand.displacement & 0xFFFF_FFFF_FFFF_FFFF:#x}"
        text = f"{found.mnemonic:<7} {', '.join(found.operands)}".rstrip()
        return Line(address, found.raw, text, label, comment, current)


def _distance(name: str) -> int:
    """Bytes from the symbol's start: 0x12 of "main+0x12"."""
    match = re.search(r"\+0x([0-9a-f]+)$", name)
    return int(match[1], 16) if match else 0


def listing(lines: tuple[Line, ...]) -> list[str]:
    """A listing as text: symbols on lines of their own, the current instruction marked with =>."""
    shown: list[str] = []
    width = 3 * max((len(line.raw) for line in lines), default=0)
    for line in lines:
        if line.label:
            shown.append(f"{line.label}:")
        mark = "=>" if line.current else "  "
        comment = f"  # {line.comment}" if line.comment else ""
        shown.append(f"{mark} {line.address:>8x}  {line.raw.hex(' '):<{width}} {line.text}{comment}")
    return shown
