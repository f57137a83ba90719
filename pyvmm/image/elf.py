# elf.py: the part of an ELF file that a loader needs, for the pvh and multiboot parsers. Pure: bytes in, Elf out.
"""A small bounds-checked ELF reader: header, PT_LOAD and PT_NOTE, for x86-64 and i386, little-endian.

The input may be hostile: each offset and size is checked before use, each count is capped. Our own and not
pyelftools, whose import alone takes longer than a small guest's whole run; `symbols.py`, off the fast path, uses that.
Source: System V ABI, "Object Files"; elf(5).
"""

from __future__ import annotations

import struct

from pyvmm.errors import ImageError
from pyvmm.image.model import Segment
from pyvmm.layout import Gpa
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"\x7fELF"
ELFDATA2LSB = 1
ET_EXEC, ET_DYN = 2, 3
PT_LOAD, PT_NOTE = 1, 4

MAX_PROGRAM_HEADERS = 128
MAX_NOTES = 1024

_IDENT_SIZE = 16
_NOTE = struct.Struct("<III")  # namesz, descsz, type
_NOT_LOADABLE = {1: "a relocatable object: link it first", 4: "a core dump"}


class _Class(Record):
    """What differs between 32- and 64-bit files. `fields` gives the place of each field in a program header."""

    __slots__ = ("bits", "fields", "header", "machine", "machine_name", "program_header")

    def __init__(self, bits: int, machine: int, machine_name: str, word: str, program: str, fields: str) -> None:
        self.bits = bits
        self.machine = machine
        self.machine_name = machine_name
        self.header = struct.Struct(f"<HHI3{word}I6H")
        self.program_header = struct.Struct(program)
        self.fields = fields.split()


_CLASSES = {
    1: _Class(32, 3, "i386", "I", "<8I", "type offset vaddr paddr filesz memsz flags align"),
    2: _Class(64, 62, "x86-64", "Q", "<2I6Q", "type flags offset vaddr paddr filesz memsz align"),
}


class Note(Record):
    """One entry of a PT_NOTE segment."""

    __slots__ = ("descriptor", "name", "type")

    def __init__(self, name: bytes, type: int, descriptor: bytes) -> None:
        self.name = name
        self.type = type
        self.descriptor = descriptor


class Elf(Record):
    """What `read` found. bits: 32 or 64; entry: e_entry as the file gives it, mostly a virtual address;
    loads: (virtual address, segment at its physical address) of each PT_LOAD; notes: of all PT_NOTE, in order.
    """

    __slots__ = ("bits", "entry", "loads", "notes")

    def __init__(self, bits: int, entry: int, loads: tuple[tuple[int, Segment], ...], notes: tuple[Note, ...]) -> None:
        self.bits = bits
        self.entry = entry
        self.loads = loads
        self.notes = notes

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The PT_LOAD segments at their physical addresses, as the file orders them; they may still overlap."""
        return tuple(segment for _, segment in self.loads)

    def physical(self, address: int) -> Gpa:
        """Where the byte with this virtual address is loaded; an address of no segment is taken as physical."""
        for virtual, segment in self.loads:
            if virtual <= address < virtual + segment.memory_size:
                return segment.gpa + (address - virtual)
        return Gpa(address)


def is_elf(data: bytes) -> bool:
    """True where the bytes start as each ELF file does."""
    return data.startswith(MAGIC)


def read(data: bytes) -> Elf:
    """The loader's view of an ELF executable. Raises ImageError naming the first thing that is wrong with it."""
    if not data:
        raise ImageError("empty file")
    if not is_elf(data):
        raise ImageError("not an ELF file")
    _need(data, 0, _IDENT_SIZE, "ELF identification")
    kind = _CLASSES.get(data[4])
    if kind is None or data[5] != ELFDATA2LSB or data[6] != 1:
        raise ImageError(f"not a little-endian 32- or 64-bit ELF file (e_ident {data[4:7].hex(' ')})")
    loads: list[tuple[int, Segment]] = []
    notes: list[Note] = []
    in_file = 0
    entry, headers = _headers(data, kind)
    for number, header in enumerate(headers):
        offset, size = header["offset"], header["filesz"]
        if header["type"] == PT_LOAD and header["memsz"]:
            _need(data, offset, size, f"segment {number}")
            in_file += size
            if in_file > len(data):
                raise ImageError("segments share bytes of the file: together they are larger than it")
            segment = Segment(Gpa(header["paddr"]), data[offset : offset + size], header["memsz"])
            loads.append((header["vaddr"], segment))
        elif header["type"] == PT_NOTE:
            _need(data, offset, size, f"note segment {number}")
            for note in _notes(data, offset, offset + size, 8 if header["align"] == 8 else 4):
                if len(notes) == MAX_NOTES:
                    raise ImageError(f"more than {MAX_NOTES} notes")
                notes.append(note)
    return Elf(kind.bits, entry, tuple(loads), tuple(notes))


def _headers(data: bytes, kind: _Class) -> tuple[int, list[dict[str, int]]]:
    """e_entry, and the program headers as dicts by field name."""
    _need(data, _IDENT_SIZE, kind.header.size, "ELF header")
    type, machine, _, entry, offset, _, _, _, entry_size, count, *_ = kind.header.unpack_from(data, _IDENT_SIZE)
    if machine != kind.machine:
        raise ImageError(
            f"{kind.bits}-bit ELF for machine {machine}, where {kind.machine} ({kind.machine_name}) is needed"
        )
    if type not in (ET_EXEC, ET_DYN):
        raise ImageError(f"not an executable: ELF type {type}, {_NOT_LOADABLE.get(type, 'which cannot be loaded')}")
    if not count:
        raise ImageError("no loadable segment: no program headers")
    if count > MAX_PROGRAM_HEADERS:
        raise ImageError(f"{count} program headers, more than {MAX_PROGRAM_HEADERS}")
    size = kind.program_header.size
    if entry_size != size:
        raise ImageError(f"program headers of {entry_size} bytes, where {size} are needed")
    _need(data, offset, count * size, "program headers")
    table = kind.program_header.iter_unpack(data[offset : offset + count * size])
    return entry, [dict(zip(kind.fields, row, strict=True)) for row in table]


def _notes(data: bytes, position: int, end: int, alignment: int) -> Iterator[Note]:
    """The notes in data[position:end]; less than a note's header at the end is padding."""

    def take(size: int) -> bytes:
        nonlocal position
        if size > end - position:
            raise ImageError(
                f"truncated: note at {start:#x} needs {size:#x} bytes at {position:#x}, its segment ends at {end:#x}"
            )
        taken = data[position : position + size]
        position = min(end, start + -(-(position + size - start) // alignment) * alignment)
        return taken

    while end - position >= _NOTE.size:
        start = position
        name_size, descriptor_size, type = _NOTE.unpack_from(data, position)
        position += _NOTE.size
        name = take(name_size)
        yield Note(name.rstrip(b"\0"), type, take(descriptor_size))


def _need(data: bytes, offset: int, size: int, what: str) -> None:
    if size > max(0, len(data) - offset):
        raise ImageError(f"truncated: {what} at {offset:#x} needs {size:#x} bytes, the file has {len(data):#x}")
