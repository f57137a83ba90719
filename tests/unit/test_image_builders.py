# test_image_builders.py: makes small guest files for the image tests, and checks them by an independent ELF reader.
"""`build_elf`, `build_aout`: files with just what a test needs, each field as it says."""

import io
import struct

import pytest
from elftools.elf.elffile import ELFFile

PVH_ENTRY_NOTE = 18
MULTIBOOT_MAGIC = 0x1BADB002
CODE = b"\xf4" * 64


def note(name: bytes, type: int, descriptor: bytes) -> bytes:
    padded = [part + bytes(-len(part) % 4) for part in (name + b"\0", descriptor)]
    return struct.pack("<III", len(name) + 1, len(descriptor), type) + b"".join(padded)


def pvh_note(entry: int, size: int = 4) -> bytes:
    return note(b"Xen", PVH_ENTRY_NOTE, entry.to_bytes(size, "little"))


def program_header(bits: int, type: int, offset: int, vaddr: int, paddr: int, filesz: int, memsz: int, align: int):
    if bits == 64:
        return struct.pack("<IIQQQQQQ", type, 5, offset, vaddr, paddr, filesz, memsz, align)
    return struct.pack("<IIIIIIII", type, offset, vaddr, paddr, filesz, memsz, 5, align)


def build_elf(bits=64, loads=((0x100000, CODE, 0x1000),), notes=b"", entry=0x100000, higher_half=0, align=4, **fields):
    """An ELF executable. loads: (paddr, data, memsz); higher_half: what virtual addresses are above physical ones.

    fields: header fields to be other than right: type, machine, phoff, phentsize, phnum.
    """
    header_size, entry_size = (64, 56) if bits == 64 else (52, 32)
    count = len(loads) + bool(notes)
    offset = header_size + count * entry_size
    table, contents = b"", b""
    if notes:
        table += program_header(bits, 4, offset, 0, 0, len(notes), len(notes), align)
        contents += notes
    for paddr, data, memsz in loads:
        place = offset + len(contents)
        table += program_header(bits, 1, place, paddr + higher_half, paddr, len(data), memsz, 1)
        contents += data
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    word = "Q" if bits == 64 else "I"
    header = struct.pack(
        f"<HHI3{word}I6H",
        fields.get("type", 2),
        fields.get("machine", 62 if bits == 64 else 3),
        1,
        entry,
        fields.get("phoff", header_size),
        0,
        0,
        header_size,
        fields.get("phentsize", entry_size),
        fields.get("phnum", count),
        0,
        0,
        0,
    )
    return ident + header + table + contents


def build_pvh(entry=0x100000, size=4, **options):
    return build_elf(notes=pvh_note(entry, size), **options)


def multiboot_header(flags=3, *addresses, magic=MULTIBOOT_MAGIC, checksum=None):
    checksum = -(magic + flags) % (1 << 32) if checksum is None else checksum
    return struct.pack(f"<{3 + len(addresses)}I", magic, flags, checksum, *addresses)


def build_multiboot(bits=32, flags=3, entry=0x100010, **options):
    code = multiboot_header(flags) + bytes(4) + CODE
    return build_elf(bits, loads=((0x100000, code, 0x1000),), entry=entry, **options)


def build_aout(load=0x100000, before=16, load_end=0, bss_end=0, entry=0x100040, flags=0x10003):
    """A file that is no ELF: `before` bytes, the header with its address fields, code."""
    header = multiboot_header(flags, load + before, load, load_end, bss_end, entry)
    return bytes(before) + header + CODE


@pytest.mark.parametrize("bits", [32, 64])
def test_built_elf_is_what_another_reader_sees(bits):
    data = build_elf(bits, loads=((0x200000, b"abc", 9),), notes=pvh_note(0x200001), entry=0x200001, higher_half=0x1000)
    elf = ELFFile(io.BytesIO(data))
    notes, load = elf.iter_segments()
    assert (elf.elfclass, elf["e_entry"], elf["e_machine"]) == (bits, 0x200001, "EM_X86_64" if bits == 64 else "EM_386")
    assert (load["p_vaddr"], load["p_paddr"], load["p_memsz"], load.data()) == (0x201000, 0x200000, 9, b"abc")
    (found,) = notes.iter_notes()
    assert (found["n_name"], found["n_descdata"]) == ("Xen", (0x200001).to_bytes(4, "little"))
