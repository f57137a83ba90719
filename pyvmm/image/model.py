# model.py: what every image parser returns. Pure data.
"""`Image` and its parts: the outcome of parsing a guest file, whatever its format."""

from __future__ import annotations

from pyvmm.layout import Gpa
from pyvmm.record import Record


class Segment(Record):
    """Bytes to be placed at `gpa`, then zeros up to `memory_size` bytes in all."""

    __slots__ = ("data", "gpa", "memory_size")

    def __init__(self, gpa: Gpa, data: bytes, memory_size: int) -> None:
        self.gpa = gpa
        self.data = data
        self.memory_size = memory_size


class Entry(Record):
    """How the first vCPU starts.

    mode: "real16" (CS base 0), "protected32" (flat, paging off) or "long64" (flat, identity-mapped 2 MiB pages);
    rip: first instruction; registers: general registers with a value other than 0, by name ("rbx": 0x6000).
    """

    __slots__ = ("mode", "registers", "rip")

    def __init__(self, mode: str, rip: Gpa, registers: dict[str, int] | None = None) -> None:
        self.mode = mode
        self.rip = rip
        self.registers = registers or {}

    __hash__ = None  # type: ignore[assignment]


class Image(Record):
    """A parsed guest file. `format` is its name in the table of formats; segments do not overlap."""

    __slots__ = ("entry", "format", "segments")

    def __init__(self, format: str, segments: tuple[Segment, ...], entry: Entry) -> None:
        self.format = format
        self.segments = segments
        self.entry = entry


class Module(Record):
    """A file handed to the guest beside its image, such as an initrd: where it was placed and its command line."""

    __slots__ = ("command_line", "gpa", "size")

    def __init__(self, gpa: Gpa, size: int, command_line: str = "") -> None:
        self.gpa = gpa
        self.size = size
        self.command_line = command_line


class Boot(Record):
    """What a boot protocol adds to the image: more segments (its info structures) and the final entry."""

    __slots__ = ("entry", "segments")

    def __init__(self, segments: tuple[Segment, ...], entry: Entry) -> None:
        self.segments = segments
        self.entry = entry
