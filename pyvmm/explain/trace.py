# trace.py: one line a step for `pyvmm run --trace N`, and what a stepper must know of the next instruction.
"""`TraceFormatter` shows steps; `leaves_ring0()` sees a return to ring 3 coming. The machine does the stepping."""

from __future__ import annotations

from pyvmm.explain.access import stack_pointer, word_size
from pyvmm.explain.registers import changes, flags
from pyvmm.explain.scene import Scene

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.explain.pagewalk import Read
    from pyvmm.image.symbols import Symbols
    from pyvmm.vcpu import Registers

_RESUME_AND_TRAP = 1 << 16 | 1 << 8  # what single-stepping itself changes in RFLAGS


class TraceFormatter:
    """Lines of a trace, numbered from 0 in the order in which they are asked for."""

    def __init__(self, read: Read, symbols: Symbols | None = None) -> None:
        self._read = read
        self._symbols = symbols
        self._index = 0

    def line(self, before: Registers, after: Registers) -> str:
        """One step: its number, ring, place, the instruction, and the registers that it changed.

        The code is read now, after the step: an instruction that overwrote itself is shown as it is since then.
        """
        scene = Scene(before, self._read, self._symbols)
        text = str(scene.instruction) if scene.instruction is not None else "?"
        effects = " ".join(_effect(name, value, before) for name, value in changes(before, after).items())
        line = f"{self._index:>6}  r{before.ring}  {scene.place:<28} {text:<36} {effects}".rstrip()
        self._index += 1
        return line


def _effect(name: str, value: int, before: Registers) -> str:
    if name != "rflags":
        return f"{name}={value:#x}"
    return f"[{flags(value & ~_RESUME_AND_TRAP) or '-'}]" if (value ^ before.rflags) & ~_RESUME_AND_TRAP else ""


def leaves_ring0(registers: Registers, read: Read) -> bool:
    """Is the next instruction one that goes from ring 0 to ring 3: sysret, sysexit, or an iret or far return whose CS
    on the stack is ring 3's? For hosts whose single-step works in ring 0 only."""
    if registers.ring == 3:
        return False
    scene = Scene(registers, read)
    if scene.instruction is None:
        return False
    operation = scene.instruction.operation
    if operation.startswith(("sysret", "sysexit")):
        return True
    if not operation.startswith(("iret", "retf")):
        return False
    word = {"iretq": 8, "retfq": 8, "iretd": 4}.get(
        operation, 2 if operation == "iret" else min(word_size(registers), 4)
    )
    selector = scene.space.number(stack_pointer(registers) + word, 2)
    return selector is not None and selector & 3 == 3
