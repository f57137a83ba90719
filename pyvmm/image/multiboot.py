# multiboot.py: the Multiboot 1 protocol, in which many teaching kernels are written. ELF32, ELF64 or a.out kludge.
"""Multiboot images, and the multiboot_info that they get in EBX.

As QEMU and GRUB do, an ELF64 with a Multiboot header is taken too: it is entered in 32-bit mode.
Source: Multiboot Specification version 0.6.96.
"""

from __future__ import annotations

import struct

from pyvmm.errors import ImageError
from pyvmm.image import bootinfo, elf
from pyvmm.image.model import Boot, Entry, Image, Module, Segment
from pyvmm.image.placement import refuse_address
from pyvmm.layout import GIB, KIB, MIB, Gpa

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.layout import Region

HEADER_MAGIC = 0x1BADB002
BOOTLOADER_MAGIC = 0x2BADB002
SEARCH_SIZE = 8192
"""The header lies wholly in this many first bytes of the file, 4-byte aligned."""

PAGE_ALIGN, MEMORY_INFO, VIDEO_MODE, AOUT_KLUDGE = 1 << 0, 1 << 1, 1 << 2, 1 << 16
_MANDATORY = 0xFFFF

_INFO_MEMORY, _INFO_CMDLINE, _INFO_MODS, _INFO_MEM_MAP, _INFO_LOADER_NAME = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9

_MAGIC_BYTES = HEADER_MAGIC.to_bytes(4, "little")
_HEADER = struct.Struct("<3I")  # magic, flags, checksum
_ADDRESSES = struct.Struct("<5I")  # header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr
_INFO_SIZE = 116
_INFO = struct.Struct("<7I16x2I12xI")  # flags .. mods_addr, (syms), mmap_length, mmap_addr, (..), boot_loader_name
_MODULE = struct.Struct("<4I")  # mod_start, mod_end, string, reserved
_MMAP_ENTRY = struct.Struct("<I2QI")  # size of the rest, addr, len, type


def probe(data: bytes) -> bool:
    """True where a Multiboot header with a right checksum is found."""
    return _find(data)[0] is not None


def parse(data: bytes, at: Gpa | None = None) -> Image:
    """The image of a Multiboot file.

    Raises ImageError for any other or damaged file and for one that demands what pyvmm has not, such as a video mode
    (the specification asks loaders to fail there); BadInput where `at` is given.
    """
    refuse_address(at, "multiboot")
    offset, near_miss = _find(data)
    if offset is None:
        raise ImageError(
            "no multiboot header" if near_miss is None else f"multiboot header at {near_miss:#x}: wrong checksum"
        )
    flags = _HEADER.unpack_from(data, offset)[1]
    if flags & VIDEO_MODE:
        raise ImageError("multiboot header demands a video mode (flag bit 2), and the VM has no display")
    unknown = flags & _MANDATORY & ~(PAGE_ALIGN | MEMORY_INFO)
    if unknown:
        raise ImageError(f"multiboot header demands unknown features: mandatory flag bits {unknown:#x}")
    if flags & AOUT_KLUDGE:
        return _parse_addresses(data, offset)
    if not elf.is_elf(data):
        raise ImageError("multiboot header without load addresses (flag bit 16) in a file that is not ELF")
    read = elf.read(data)
    return _image(read.segments, read.physical(read.entry))


def boot(image: Image, ram: tuple[Region, ...], command_line: str, modules: tuple[Module, ...]) -> Boot:
    """Adds multiboot_info, memory map, module list and command line; EAX holds the magic, EBX points at the info.

    Raises BadInput for a bad command line, ImageError where something does not fit.
    """
    text = bootinfo.command_line_segment(command_line)
    area = bootinfo.InfoArea(_INFO_SIZE)
    memory_map = b"".join(_MMAP_ENTRY.pack(_MMAP_ENTRY.size - 4, *entry) for entry in bootinfo.memory_map(ram))
    mmap_addr = area.put(memory_map)
    mods_addr = area.put(b"".join(_module(module, area) for module in modules))
    header = _INFO.pack(
        _INFO_MEMORY | _INFO_CMDLINE | _INFO_MODS | _INFO_MEM_MAP | _INFO_LOADER_NAME,
        bootinfo.LOW_RAM_SIZE // KIB,  # mem_lower
        (ram[0].end.value - MIB) // KIB,  # mem_upper: up to the first hole
        0,  # boot_device: not given
        text.gpa.value,
        len(modules),
        mods_addr,
        len(memory_map),
        mmap_addr,
        area.put_text("pyvmm"),
    )
    registers = {"rax": BOOTLOADER_MAGIC, "rbx": bootinfo.INFO_START.value}
    return bootinfo.finish(image, ram, (area.segment(header), text), registers, modules)


def _find(data: bytes) -> tuple[int | None, int | None]:
    """The offset of the first header, and that of the last magic before it whose checksum was wrong."""
    near_miss = None
    offset = data.find(_MAGIC_BYTES, 0, SEARCH_SIZE)
    while offset >= 0:
        if offset % 4 == 0 and offset + _HEADER.size <= min(len(data), SEARCH_SIZE):
            if sum(_HEADER.unpack_from(data, offset)) % (1 << 32) == 0:
                return offset, near_miss
            near_miss = offset
        offset = data.find(_MAGIC_BYTES, offset + 1, SEARCH_SIZE)
    return None, near_miss


def _parse_addresses(data: bytes, offset: int) -> Image:
    """The image that the header's own address fields describe: one run of the file, then bss."""
    place = offset + _HEADER.size
    if place + _ADDRESSES.size > min(len(data), SEARCH_SIZE):
        raise ImageError(f"truncated: multiboot header at {offset:#x} without its address fields")
    header_addr, load_addr, load_end, bss_end, entry = _ADDRESSES.unpack_from(data, place)
    start = offset - (header_addr - load_addr)
    if not 0 <= start <= offset:
        raise ImageError(
            f"multiboot header at {offset:#x}: load_addr {load_addr:#x}, header_addr {header_addr:#x} contradict it"
        )
    load_end = load_end or load_addr + len(data) - start
    if load_end < load_addr or load_end - load_addr > len(data) - start:
        raise ImageError(f"truncated: multiboot load_end_addr {load_end:#x} is not within the file")
    bss_end = bss_end or load_end
    if bss_end < load_end:
        raise ImageError(f"multiboot bss_end_addr {bss_end:#x} is below load_end_addr {load_end:#x}")
    run = data[start : start + load_end - load_addr]
    return _image((Segment(Gpa(load_addr), run, bss_end - load_addr),), Gpa(entry))


def _image(segments: tuple[Segment, ...], entry: Gpa) -> Image:
    return Image("multiboot", segments, Entry("protected32", entry))


def _module(module: Module, area: bootinfo.InfoArea) -> bytes:
    end = module.gpa + module.size
    if end.value >= 4 * GIB:
        raise ImageError(f"module at {module.gpa.value:#x} is beyond the 32-bit addresses of multiboot")
    return _MODULE.pack(module.gpa.value, end.value, area.put_text(module.command_line), 0)
