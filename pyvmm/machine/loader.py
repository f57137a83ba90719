# loader.py: finds a guest, places its image and boot structures in memory, and points the first vCPU at it.
"""From a guest's name or file to a VM that can start."""

from __future__ import annotations

import os

from pyvmm._native import lib
from pyvmm.errors import BadInput, ImageError
from pyvmm.image import boot_image, check_fits, encode_command_line, place_modules, read_file, read_image
from pyvmm.layout import BLOCK_SIZE, GIB, PAGE_SIZE, Gpa
from pyvmm.machine import generation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.image import Entry, Image, Segment
    from pyvmm.memory import GuestMemory

GUESTS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "guests")
PAGE_TABLE = Gpa(lib.PV_TRAMPOLINE_GPA + 2 * PAGE_SIZE)
"""Of images that start in long mode: PML4, PDPT, and page directories for the first 4 GiB."""
MAX_MODULE = 4 * GIB


def guest_path(guest: str) -> str:
    """The file of a guest: one of pyvmm's own by name, or a path. Raises BadInput where there is neither."""
    own = os.path.join(GUESTS, f"{guest}.elf")
    if "/" not in guest and os.path.exists(own):
        return own
    if "/" in guest or os.path.exists(guest):
        return guest
    names = ", ".join(sorted(guest_names())) or "none: run 'make build'"
    raise BadInput(f"no guest {guest!r}, and no such file; pyvmm's own guests: {names}")


def guest_names() -> list[str]:
    """The names of the guests that pyvmm brings."""
    try:
        return sorted(entry.removesuffix(".elf") for entry in os.listdir(GUESTS) if entry.endswith(".elf"))
    except FileNotFoundError:
        return []


def load(memory: GuestMemory, image: Image, command_line: str, initrd: str | None) -> Entry:
    """Writes all that the image's boot protocol wants into `memory`, and says where the first vCPU starts.

    Raises ImageError where something does not fit, BadInput for a command line that cannot be passed.
    """
    encode_command_line(command_line)
    check_fits(image.segments, memory.regions)
    contents = [_read_module(initrd)] if initrd is not None else []
    named = [(len(data), os.path.basename(initrd or "")) for data in contents]
    modules = place_modules(named, memory.regions, image.segments)
    boot = boot_image(image, memory.regions, command_line, modules)
    fresh = memory.untouched
    if image.keeps_progress:
        generation.seed(memory)
    for segment in (*image.segments, *boot.segments):
        _place(memory, segment, fresh)
    for module, data in zip(modules, contents, strict=True):
        memory.write(module.gpa, data)
    if boot.entry.mode == "long64":
        memory.write(PAGE_TABLE, _identity_map())
    return boot.entry


def read_guest(guest: str, format: str | None = None, at: int | None = None) -> Image:
    """The parsed image of a guest by name or path."""
    return read_image(guest_path(guest), format, None if at is None else Gpa(at))


def _place(memory: GuestMemory, segment: Segment, fresh: bool) -> None:
    memory.write(segment.gpa, segment.data)
    rest = segment.memory_size - len(segment.data)
    if rest and not fresh:  # untouched memory reads as zeros, and is better not populated
        memory.zero(segment.gpa + len(segment.data), rest)


def _read_module(path: str) -> bytes:
    try:
        return read_file(path, MAX_MODULE)
    except ImageError as error:
        raise ImageError(f"initrd {path}: {error}") from None


def _identity_map() -> bytes:
    """Long-mode tables for the first 4 GiB in 2 MiB pages (Intel SDM vol. 3, 4.5)."""
    present_writable, large = 0x3, 0x80

    def table(entries: list[int]) -> bytes:
        return b"".join(entry.to_bytes(8, "little") for entry in entries).ljust(PAGE_SIZE, b"\0")

    base = PAGE_TABLE.value
    directories = [base + (2 + i) * PAGE_SIZE for i in range(4)]
    pml4 = table([base + PAGE_SIZE | present_writable])
    pdpt = table([directory | present_writable for directory in directories])
    return (
        pml4
        + pdpt
        + table([i * BLOCK_SIZE | present_writable | large for i in range(512)])
        + b"".join(
            table([(i * 512 + j) * BLOCK_SIZE | present_writable | large for j in range(512)]) for i in range(1, 4)
        )
    )
