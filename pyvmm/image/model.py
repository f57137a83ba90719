# model.py: what every image parser returns. Pure data that checks itself, so that a parser cannot return nonsense.
"""`Image` and its parts: the outcome of parsing a guest file, whatever its format."""

from __future__ import annotations

import itertools

from pyvmm.errors import ImageError
from pyvmm.layout import Gpa
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MODE_REACH = {"real16": 1 << 16, "protected32": 1 << 32, "long64": 1 << 64}
"""The entry modes, and the first address (bytes) that an instruction pointer cannot hold in each."""


class Segment(Record):
    """Bytes to be placed at `gpa`, then zeros up to `memory_size` bytes in all.

    Raises ImageError where the bytes exceed `memory_size` or the end is no 64-bit address.
    """

    __slots__ = ("data", "gpa", "memory_size")

    def __init__(self, gpa: Gpa, data: bytes, memory_size: int) -> None:
        if len(data) > memory_size:
            raise ImageError(
                f"segment at {gpa.value:#x} has {len(data):#x} bytes of data in {memory_size:#x} of memory"
            )
        if gpa.value + memory_size >= 1 << 64:
            raise ImageError(f"segment at {gpa.value:#x} of {memory_size:#x} bytes overflows the address space")
        self.gpa = gpa
        self.data = data
        self.memory_size = memory_size

    @property
    def end(self) -> Gpa:
        """First address behind the segment."""
        return self.gpa + self.memory_size

    def __contains__(self, gpa: Gpa) -> bool:
        return self.gpa <= gpa < self.end


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
    """A parsed guest file. `format` is its name in the table of formats; segments are in order and do not overlap.
    `keeps_progress`: it is made with the library in guest/lib, and so has a progress page (guest/abi.h).

    Raises ImageError where there is no segment, where two overlap, and where the entry lies in none of them or
    beyond what its mode can address.
    """

    __slots__ = ("entry", "format", "keeps_progress", "segments")

    def __init__(self, format: str, segments: tuple[Segment, ...], entry: Entry, keeps_progress: bool = False) -> None:
        if not segments:
            raise ImageError("no loadable segment")
        check_apart(("segment", segment) for segment in segments)
        if not any(entry.rip in segment for segment in segments):
            raise ImageError(f"entry {entry.rip.value:#x} is outside the image's segments")
        if entry.rip.value >= MODE_REACH[entry.mode]:
            raise ImageError(f"entry {entry.rip.value:#x} is beyond what {entry.mode} mode can address")
        self.format = format
        self.segments = tuple(sorted(segments, key=lambda segment: segment.gpa.value))
        self.entry = entry
        self.keeps_progress = keeps_progress

    __hash__ = None  # type: ignore[assignment]


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

    __hash__ = None  # type: ignore[assignment]


def check_apart(named: Iterable[tuple[str, Segment]]) -> None:
    """Raises ImageError, naming both, where two of the (name, segment) pairs overlap."""
    ordered = sorted(named, key=lambda pair: (pair[1].gpa.value, pair[1].end.value))
    for (name, segment), (next_name, following) in itertools.pairwise(ordered):
        if following.gpa < segment.end:
            raise ImageError(f"{name} {span(segment)} overlaps {next_name} {span(following)}")


def span(segment: Segment) -> str:
    """The segment's addresses for people, first and last byte: 0x1000..0x1fff."""
    return f"{segment.gpa.value:#x}..{segment.gpa.value + max(segment.memory_size, 1) - 1:#x}"
