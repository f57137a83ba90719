# flat.py: flat binaries, bytes without any header: a boot sector, or the output of `objcopy -O binary`.
"""Two formats that no file proclaims, so both must be asked for by name. The first byte is the entry.

flat16: real mode, CS base 0, loaded at 0x7c00 as a PC's firmware does; gets no command line.
flat64: long mode, loaded at 1 MiB; RDI is the guest-physical address of a zero-terminated command line, RSI its
length in bytes without the zero. The guest sets its own stack.
"""

from __future__ import annotations

from pyvmm.errors import BadInput, ImageError
from pyvmm.image import bootinfo, elf
from pyvmm.image.model import Boot, Entry, Image, Module, Segment
from pyvmm.layout import MIB, Gpa

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.layout import Region

FLAT16_START = Gpa(0x7C00)
FLAT64_START = Gpa(0x100000)


def probe(data: bytes) -> bool:
    """Never true: any bytes may be a flat binary."""
    return False


def parse16(data: bytes, at: Gpa | None = None) -> Image:
    """A real-mode image at `at` or 0x7c00.

    Raises ImageError where it is empty, is an ELF file, begins beyond 64 KiB or ends beyond 1 MiB.
    """
    image = _parse("flat16", "real16", data, FLAT16_START if at is None else at)
    if image.segments[0].end.value > MIB:
        raise ImageError(f"flat16 image ends at {image.segments[0].end.value:#x}, real mode ends at 1 MiB")
    return image


def parse64(data: bytes, at: Gpa | None = None) -> Image:
    """A long-mode image at `at` or 1 MiB. Raises ImageError where it is empty or is an ELF file."""
    return _parse("flat64", "long64", data, FLAT64_START if at is None else at)


def boot16(image: Image, ram: tuple[Region, ...], command_line: str, modules: tuple[Module, ...]) -> Boot:
    """Adds nothing. Raises BadInput for a command line or modules, ImageError where the image does not fit."""
    if command_line:
        raise BadInput("a flat16 image takes no command line")
    _refuse_modules(image, modules)
    return bootinfo.finish(image, ram, (), {})


def boot64(image: Image, ram: tuple[Region, ...], command_line: str, modules: tuple[Module, ...]) -> Boot:
    """Adds the command line. Raises BadInput for a bad one or for modules, ImageError where the image does not fit."""
    _refuse_modules(image, modules)
    text = bootinfo.command_line_segment(command_line)
    return bootinfo.finish(image, ram, (text,), {"rdi": text.gpa.value, "rsi": text.memory_size - 1})


def _parse(format: str, mode: str, data: bytes, at: Gpa) -> Image:
    if not data:
        raise ImageError("empty file")
    if elf.is_elf(data):
        raise ImageError("an ELF file, not a flat binary: make one with `objcopy -O binary`")
    return Image(format, (Segment(at, data, len(data)),), Entry(mode, at))


def _refuse_modules(image: Image, modules: tuple[Module, ...]) -> None:
    if modules:
        raise BadInput(f"a {image.format} image takes no modules")
