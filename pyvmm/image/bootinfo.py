# bootinfo.py: what all boot protocols hand to a guest: command line, memory map, info structures, for the formats.
"""The low memory in which a guest finds what its boot protocol promises it.

0x006000  info area: the protocol's header (its address goes to the guest in a register), its tables and strings
0x010000  kept free of all images: pyvmm's own start-up structures (page tables, descriptor tables)
0x020000  command line, zero-terminated
0x09fc00  end of low RAM in the guest's memory map
0x100000  where images, then modules, usually lie
"""

from __future__ import annotations

from pyvmm.errors import BadInput, ImageError
from pyvmm.image.model import Boot, Entry, Image, Module, Segment, check_apart
from pyvmm.image.placement import check_fits
from pyvmm.layout import MIB, Gpa

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.layout import Region

INFO_START = Gpa(0x6000)
INFO_SIZE = 0xA000
OWN_START = Gpa(0x10000)
OWN_SIZE = 0x10000
COMMAND_LINE_START = Gpa(0x20000)
LOW_RAM_SIZE = 0x9FC00
MAX_COMMAND_LINE = 4096
"""Bytes of UTF-8, without the terminating zero."""

E820_RAM = 1
E820_RESERVED = 2


def encode_command_line(text: str) -> bytes:
    """The command line as UTF-8, not terminated. Raises BadInput: longer than 4096 bytes, has a NUL, not encodable."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"command line: {text[error.start]!a} cannot be encoded as UTF-8") from None
    if b"\0" in encoded:
        raise BadInput("command line: has a NUL character, where it would end for the guest")
    if len(encoded) > MAX_COMMAND_LINE:
        raise BadInput(f"command line: {len(encoded)} bytes, at most {MAX_COMMAND_LINE} can be passed")
    return encoded


def command_line_segment(text: str) -> Segment:
    """The zero-terminated command line at its place. Raises as `encode_command_line` does."""
    data = encode_command_line(text) + b"\0"
    return Segment(COMMAND_LINE_START, data, len(data))


def memory_map(ram: Sequence[Region]) -> list[tuple[int, int, int]]:
    """(address, bytes, E820_RAM or E820_RESERVED) of each range, ascending, as a PC's firmware would describe `ram`.

    `ram` is as `pyvmm.layout.ram_regions` gives it. Source: ACPI 6.5, 15 "System Address Map Interfaces".
    """
    low, *high = ram
    return [
        (0, LOW_RAM_SIZE, E820_RAM),
        (LOW_RAM_SIZE, MIB - LOW_RAM_SIZE, E820_RESERVED),
        (MIB, low.end.value - MIB, E820_RAM),
        *((region.gpa.value, region.size, E820_RAM) for region in high),
    ]


class InfoArea:
    """Collects tables and strings behind a header of `header_size` bytes at INFO_START."""

    def __init__(self, header_size: int) -> None:
        self._header_size = header_size
        self._tables = bytearray()

    def put(self, table: bytes) -> int:
        """Appends `table`, aligned to 8 bytes; returns its guest-physical address. Raises ImageError if full."""
        end = self._header_size + len(self._tables)
        padding = -end % 8
        if end + padding + len(table) > INFO_SIZE:
            raise ImageError(
                f"too many modules: their descriptions exceed the {INFO_SIZE // 1024} KiB for boot information"
            )
        self._tables += bytes(padding) + table
        return INFO_START.value + end + padding

    def put_text(self, text: str) -> int:
        """Appends `text` as a zero-terminated string. Raises as `put` and `encode_command_line` do."""
        return self.put(encode_command_line(text) + b"\0")

    def segment(self, header: bytes) -> Segment:
        """The whole area, beginning with `header`."""
        data = header.ljust(self._header_size, b"\0") + self._tables
        return Segment(INFO_START, data, len(data))


def finish(
    image: Image,
    ram: Sequence[Region],
    segments: tuple[Segment, ...],
    registers: dict[str, int],
    modules: Sequence[Module] = (),
) -> Boot:
    """The Boot of `image` with the protocol's `segments` and entry registers.

    Raises ImageError where image, info structures, modules and pyvmm's own area overlap or leave the RAM.
    """
    placed = [
        *(("image segment", segment) for segment in image.segments),
        *(("boot information", segment) for segment in segments),
        *(("module", Segment(module.gpa, b"", module.size)) for module in modules),
    ]
    check_fits([segment for _, segment in placed], ram)
    check_apart([*placed, ("pyvmm's own area", Segment(OWN_START, b"", OWN_SIZE))])
    return Boot(segments, Entry(image.entry.mode, image.entry.rip, image.entry.registers | registers))
