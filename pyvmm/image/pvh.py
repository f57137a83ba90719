# pvh.py: the PVH boot protocol: an ELF64 whose Xen note names a 32-bit entry. pyvmm's own guests and Linux's vmlinux.
"""PVH images, and the hvm_start_info that they get in EBX.

Source: Xen docs/misc/pvh.pandoc; xen/include/public/elfnote.h, public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import struct

from pyvmm.errors import ImageError
from pyvmm.image import bootinfo, elf
from pyvmm.image.model import Boot, Entry, Image, Module
from pyvmm.image.placement import refuse_address
from pyvmm.layout import Gpa

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.layout import Region

XEN_ELFNOTE_PHYS32_ENTRY = 18
XEN_HVM_START_MAGIC_VALUE = 0x336EC578
START_INFO_VERSION = 1

_START_INFO = struct.Struct("<4I4Q2I")
_MODLIST_ENTRY = struct.Struct("<4Q")  # paddr, size, cmdline_paddr, reserved
_MEMMAP_ENTRY = struct.Struct("<2Q2I")  # addr, size, type, reserved


def probe(data: bytes) -> bool:
    """True for a sound ELF64 with a PVH note."""
    try:
        read = elf.read(data)
    except ImageError:
        return False
    return read.bits == 64 and _note(read) is not None


def parse(data: bytes, at: Gpa | None = None) -> Image:
    """The image of a PVH ELF64. Raises ImageError for any other or damaged file, BadInput where `at` is given."""
    refuse_address(at, "pvh")
    read = elf.read(data)
    if read.bits != 64:
        raise ImageError(f"{read.bits}-bit ELF, where 64-bit is needed for PVH")
    note = _note(read)
    if note is None:
        raise ImageError("no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)")
    if len(note.descriptor) not in (4, 8):
        raise ImageError(f"PVH note: entry of {len(note.descriptor)} bytes, where 4 or 8 are needed")
    entry = Gpa(int.from_bytes(note.descriptor, "little"))
    ours = any(note.name == b"pyvmm" for note in read.notes)
    return Image("pvh", read.segments, Entry("protected32", entry), keeps_progress=ours)


def boot(image: Image, ram: tuple[Region, ...], command_line: str, modules: tuple[Module, ...]) -> Boot:
    """Adds hvm_start_info version 1, memory map, module list and command line; EBX points at the first.

    Raises BadInput for a bad command line, ImageError where something does not fit.
    """
    text = bootinfo.command_line_segment(command_line)
    area = bootinfo.InfoArea(_START_INFO.size)
    memory_map = bootinfo.memory_map(ram)
    memmap = area.put(b"".join(_MEMMAP_ENTRY.pack(*entry, 0) for entry in memory_map))
    modlist = area.put(
        b"".join(_MODLIST_ENTRY.pack(m.gpa.value, m.size, area.put_text(m.command_line), 0) for m in modules)
    )
    header = _START_INFO.pack(
        XEN_HVM_START_MAGIC_VALUE,
        START_INFO_VERSION,
        0,  # flags
        len(modules),
        modlist if modules else 0,
        text.gpa.value,
        0,  # rsdp_paddr: no ACPI tables
        memmap,
        len(memory_map),
        0,
    )
    return bootinfo.finish(image, ram, (area.segment(header), text), {"rbx": bootinfo.INFO_START.value}, modules)


def _note(read: elf.Elf) -> elf.Note | None:
    """The first note that names a physical 32-bit entry."""
    return next((note for note in read.notes if (note.name, note.type) == (b"Xen", XEN_ELFNOTE_PHYS32_ENTRY)), None)
