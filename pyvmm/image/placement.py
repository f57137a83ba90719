# placement.py: whether segments fit into a VM's RAM, and where modules go in it. Pure arithmetic, in bytes.
"""`check_fits` and `place_modules`."""

from __future__ import annotations

from pyvmm.errors import BadInput, ImageError
from pyvmm.image.model import Module, span
from pyvmm.layout import BLOCK_SIZE, HOLE_END, HOLE_START, MIB, PAGE_SIZE, Gpa, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pyvmm.image.model import Segment
    from pyvmm.layout import Region


def check_fits(segments: Iterable[Segment], ram: Sequence[Region]) -> None:
    """Raises ImageError where a segment is not wholly in one region of `ram`, with the --mem that would do."""
    stray = [segment for segment in segments if not any(_within(segment, region) for region in ram)]
    if not stray:
        return
    for segment in stray:
        if segment.end.value > HOLE_START and segment.gpa.value < HOLE_END:
            raise ImageError(f"segment {span(segment)} reaches into the hole from 3 to 4 GiB, where a VM has no memory")
    end = max(segment.end.value for segment in stray)
    needed = end if end <= HOLE_START else end - (HOLE_END - HOLE_START)
    present = sum(region.size for region in ram)
    raise ImageError(
        f"needs memory up to {end:#x}, the VM has {format_size(present)}; "
        f"try --mem {format_size(_round_up(needed, BLOCK_SIZE))}"
    )


def place_modules(
    modules: Iterable[tuple[int, str]], ram: Sequence[Region], segments: Sequence[Segment]
) -> tuple[Module, ...]:
    """Gives each module, a (size in bytes, command line), a place: page-aligned, from the top of low RAM downwards.

    Modules lie below 3 GiB, beside the image's `segments`, and above 1 MiB, so clear of all boot structures.
    `ram` is as `pyvmm.layout.ram_regions` gives it. Raises ImageError where one does not fit.
    """
    low = min(ram[0].end.value, HOLE_START)
    downwards = sorted(segments, key=lambda segment: segment.gpa.value, reverse=True)
    placed = []
    ceiling = low
    for size, command_line in modules:
        start = _below(ceiling, size)
        for segment in downwards:
            if start < segment.end.value and segment.gpa.value < start + size:
                start = _below(segment.gpa.value, size)
        if start < MIB:
            limit = "below 3 GiB" if low == HOLE_START else "of memory; try a larger --mem"
            raise ImageError(
                f"module {command_line!r} of {format_size(size)} does not fit beside the image in the VM's "
                f"{format_size(low)} {limit}"
            )
        placed.append(Module(Gpa(start), size, command_line))
        ceiling = start
    return tuple(placed)


def refuse_address(at: Gpa | None, format: str) -> None:
    """Raises BadInput where an address is asked for an image whose format has its own."""
    if at is not None:
        raise BadInput(f"a {format} image says itself where it is loaded: only flat16 and flat64 take an address")


def _within(segment: Segment, region: Region) -> bool:
    return region.gpa <= segment.gpa and segment.end <= region.end


def _below(end: int, size: int) -> int:
    """The highest page boundary with `size` bytes below `end`; may be negative."""
    return (end - size) // PAGE_SIZE * PAGE_SIZE


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
