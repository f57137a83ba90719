# autopsy.py: from a crash and the image that crashed to what people read of it.
"""`explained`: the exception that wait() raises. `symbols`: of the guest's image, where it has some."""

from __future__ import annotations

from pyvmm.errors import GuestCrash
from pyvmm.explain import explain
from pyvmm.image.symbols import Symbols
from pyvmm.vcpu.registers import read_registers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.lifecycle import Crash
    from pyvmm.memory import GuestMemory


def symbols(image_path: str) -> Symbols | None:
    """None where the image cannot be read any more."""
    try:
        with open(image_path, "rb") as file:
            return Symbols.from_elf(file.read())
    except OSError:
        return None


def explained(crash: Crash, memory: GuestMemory, image_path: str) -> GuestCrash:
    """With the whole report. Nothing may run in the guest."""
    vcpu = crash.vcpu
    found = explain(crash.facts, read_registers(vcpu.fd), memory.read, symbols(image_path), vcpu.index)
    return GuestCrash(found.sentence, found.text)
