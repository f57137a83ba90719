# __init__.py: guest images for the machine and the tools: which formats there are, and how a file becomes an Image.
"""Guest files: `read_image` a file or `parse_image` its bytes, then `boot_image` it into a VM's RAM.

Pure but for `read_image`. A format is one row of `FORMATS`; symbols are in `pyvmm.image.symbols`.
"""

from __future__ import annotations

import os
import stat

from pyvmm.errors import BadInput, ImageError
from pyvmm.image import elf, flat, multiboot, pvh
from pyvmm.image.bootinfo import MAX_COMMAND_LINE, OWN_SIZE, OWN_START, encode_command_line
from pyvmm.image.model import Boot, Entry, Image, Module, Segment
from pyvmm.image.placement import check_fits, place_modules
from pyvmm.layout import GIB, format_size
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.layout import Gpa, Region

    Probe = Callable[[bytes], bool]
    Parse = Callable[[bytes, "Gpa | None"], Image]
    BootProtocol = Callable[[Image, tuple[Region, ...], str, tuple[Module, ...]], Boot]

__all__ = [
    "FORMATS",
    "MAX_COMMAND_LINE",
    "MAX_FILE_SIZE",
    "OWN_SIZE",
    "OWN_START",
    "Boot",
    "Entry",
    "Format",
    "Image",
    "Module",
    "Segment",
    "boot_image",
    "check_fits",
    "encode_command_line",
    "parse_image",
    "place_modules",
    "read_file",
    "read_image",
]

MAX_FILE_SIZE = GIB
"""Bytes. A larger file is no guest image."""


class Format(Record):
    """One kind of guest file.

    probe(data): whether these bytes proclaim to be of this format, never raises; parse(data, at): the Image;
    boot(image, ram, command_line, modules): what the format's boot protocol adds to it. The last two raise
    ImageError and BadInput.
    """

    __slots__ = ("boot", "description", "name", "parse", "probe")

    def __init__(self, name: str, description: str, probe: Probe, parse: Parse, boot: BootProtocol) -> None:
        self.name = name
        self.description = description
        self.probe = probe
        self.parse = parse
        self.boot = boot


# In the order in which an image without a named format is tried.
FORMATS = {
    format.name: format
    for format in (
        Format("pvh", "ELF64 with a Xen PVH entry note, such as vmlinux", pvh.probe, pvh.parse, pvh.boot),
        Format(
            "multiboot",
            "Multiboot 1 kernel: ELF or with load addresses in its header",
            multiboot.probe,
            multiboot.parse,
            multiboot.boot,
        ),
        Format("flat16", "bare bytes entered in real mode at 0x7c00", flat.probe, flat.parse16, flat.boot16),
        Format("flat64", "bare bytes entered in long mode at 1 MiB", flat.probe, flat.parse64, flat.boot64),
    )
}


def parse_image(data: bytes, format: str | None = None, at: Gpa | None = None) -> Image:
    """The Image in `data`, of the named format or of the first that recognises itself.

    at: where a flat image is loaded, instead of its format's usual address. Raises ImageError for bytes that are
    damaged or of no known kind, BadInput for an unknown format and for `at` with a format that has its own addresses.
    """
    if format is not None:
        if format not in FORMATS:
            raise BadInput(f"no image format {format!r}: choose from {', '.join(FORMATS)}")
        return FORMATS[format].parse(data, at)
    for known in FORMATS.values():
        if known.probe(data):
            return known.parse(data, at)
    raise ImageError(_why_unknown(data))


def read_image(path: str | os.PathLike[str], format: str | None = None, at: Gpa | None = None) -> Image:
    """`parse_image` of a regular file of at most 1 GiB.

    Raises ImageError, naming the file, where it cannot be read or parsed; BadInput as `parse_image` does.
    """
    name = os.fspath(path)
    try:
        return parse_image(read_file(name, MAX_FILE_SIZE), format, at)
    except ImageError as error:
        raise ImageError(f"{name if name.isprintable() else repr(name)}: {error}") from None


def boot_image(image: Image, ram: tuple[Region, ...], command_line: str = "", modules: tuple[Module, ...] = ()) -> Boot:
    """What `image` needs beside its own segments to start in `ram`: info structures and the final entry.

    Raises BadInput for a command line or modules that cannot be passed, and ImageError where image, modules and
    boot structures do not fit in `ram` beside each other.
    """
    return FORMATS[image.format].boot(image, ram, command_line, modules)


def read_file(name: str, limit: int) -> bytes:
    """The bytes of a regular file, at most `limit`. Raises ImageError, without the name, where they cannot be had."""
    try:
        # O_NONBLOCK: a FIFO would hold us here until someone writes to it.
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: the name has a NUL or cannot be encoded
        raise ImageError(getattr(error, "strerror", None) or str(error)) from None
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError("a directory, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        if status.st_size > limit:
            raise ImageError(f"{status.st_size} bytes: at most {format_size(limit)} can be loaded")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except OSError as error:
        raise ImageError(error.strerror) from None
    finally:
        os.close(descriptor)


def _why_unknown(data: bytes) -> str:
    """Why no format recognised `data`. Raises ImageError itself where it is a damaged ELF file."""
    if not data:
        return "empty file"
    if data[0x202:0x206] == b"HdrS":
        return "a Linux bzImage: pass the vmlinux that it was made from"
    if not elf.is_elf(data):
        return "not an ELF file and no multiboot header; for bare bytes pass --format flat64 or flat16"
    elf.read(data)
    return (
        "no PVH note (XEN_ELFNOTE_PHYS32_ENTRY) and no multiboot header; "
        "link one in, or `objcopy -O binary` it and pass --format flat64"
    )
