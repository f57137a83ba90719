# layout.py: addresses and where things lie in guest-physical space, for every layer. Units: bytes, or as named.
"""Guest-physical addresses, page sizes, the RAM map with its hole below 4 GiB, and sizes as people write them."""

from __future__ import annotations

from pyvmm.errors import BadInput
from pyvmm.record import Record

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_SIZE = 4 * KIB
"""A small page: 4 KiB."""
BLOCK_SIZE = 2 * MIB
"""A large page, and the unit of the memory system: 2 MiB, 512 small pages."""

HOLE_START = 3 * GIB
"""RAM above this continues at 4 GiB: the hole holds LAPIC, IOAPIC, virtio-mmio and KVM's own pages."""
HOLE_END = 4 * GIB
MIN_MEMORY = 2 * MIB
MMIO_BASE = 0xD000_0000
"""First address given to MMIO devices."""


class Address:
    """A 64-bit address of one address space. Not an `int`, so that address spaces cannot be mixed by mistake.

    Adding an integer moves it; the difference of two of one kind is an integer (bytes).
    """

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        if not 0 <= value < 1 << 64:
            raise BadInput(f"{type(self).__name__} {value:#x} is not a 64-bit address")
        self.value = value

    def __add__(self, distance: int) -> Address:
        return type(self)(self.value + distance)

    def __index__(self) -> int:
        return self.value

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Address) and other.value == self.value

    def __hash__(self) -> int:
        return hash((type(self), self.value))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value:#x})"


class Gpa(Address):
    """Guest-physical address, bytes."""

    __slots__ = ()

    def __add__(self, distance: int) -> Gpa:
        return Gpa(self.value + distance)

    def __sub__(self, other: Gpa) -> int:
        return self.value - other.value

    def __lt__(self, other: Gpa) -> bool:
        return self.value < other.value

    def __le__(self, other: Gpa) -> bool:
        return self.value <= other.value

    @property
    def gfn(self) -> Gfn:
        """The number of the small page that holds this byte."""
        return Gfn(self.value // PAGE_SIZE)


class Gfn(Address):
    """Guest frame number: a guest-physical address in units of 4 KiB."""

    __slots__ = ()

    def __add__(self, distance: int) -> Gfn:
        return Gfn(self.value + distance)

    @property
    def gpa(self) -> Gpa:
        """The address of the page's first byte."""
        return Gpa(self.value * PAGE_SIZE)


class Hva(Address):
    """Host-virtual address: where a guest byte lies in our own process."""

    __slots__ = ()

    def __add__(self, distance: int) -> Hva:
        return Hva(self.value + distance)


class Region(Record):
    """One contiguous piece of guest RAM. `offset` is its place in the one mapping that backs all RAM (bytes)."""

    __slots__ = ("gpa", "offset", "size")

    def __init__(self, gpa: Gpa, size: int, offset: int) -> None:
        self.gpa = gpa
        self.size = size
        self.offset = offset

    @property
    def end(self) -> Gpa:
        """First address behind the region."""
        return self.gpa + self.size


def ram_regions(size: int) -> tuple[Region, ...]:
    """Where `size` bytes of RAM lie: all below 3 GiB, what is more from 4 GiB on."""
    low = min(size, HOLE_START)
    regions = [Region(Gpa(0), low, 0)]
    if size > low:
        regions.append(Region(Gpa(HOLE_END), size - low, low))
    return tuple(regions)


_UNITS = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes from `"256M"`, `"2GiB"`, `"4096"` or a number of bytes. Units are powers of 1024.

    Raises BadInput where the text is not a size.
    """
    if isinstance(text, int):
        return text
    digits = text.strip().lower()
    for suffix in ("ib", "b"):
        if digits.endswith(suffix):
            digits = digits.removesuffix(suffix)
            break
    unit = digits[-1:] if digits[-1:] in _UNITS else ""
    digits = digits.removesuffix(unit).rstrip()
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 20:
        raise BadInput(f"{text!r} is not a size: give bytes, or a number with K, M, G or T, such as 256M")
    return int(digits) * _UNITS[unit]


def format_size(size: int) -> str:
    """The shortest exact form of a number of bytes: 268435456 -> '256M'."""
    for unit, scale in (("G", GIB), ("M", MIB), ("K", KIB)):
        if size and size % scale == 0:
            return f"{size // scale}{unit}"
    return str(size)


def rough_size(size: float) -> str:
    """A number of bytes for people: 2411724 -> '2.3 MiB'."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"
