# scene.py: all that an explanation looks at, for the modules that look for causes.
"""`Scene`: a stopped vCPU's registers, its memory and code as it sees them, and the instruction that it stopped at."""

from __future__ import annotations

from pyvmm.explain.disassembly import Disassembler
from pyvmm.explain.pagewalk import AddressSpace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.explain.pagewalk import Read
    from pyvmm.image.symbols import Symbols
    from pyvmm.vcpu import Registers


class Scene:
    """`instruction` is None where rip is not mapped or there is no instruction."""

    def __init__(self, registers: Registers, read: Read, symbols: Symbols | None = None) -> None:
        self.registers = registers
        self.space = AddressSpace(registers, read)
        self.code = Disassembler(registers.mode, self.space, symbols)
        self.instruction = self.code.decode(registers.pc)

    @property
    def place(self) -> str:
        """Where the vCPU stopped, as people say it: "main+0x12" or a number."""
        return self.code.place(self.registers.pc)
