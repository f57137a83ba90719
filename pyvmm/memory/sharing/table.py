# table.py: one 64-bit hash for each small page of a VM, and how a table of them goes to another process. Units: pages.
"""`scan()`: a table, or a part of one. `encode()`, `decode()`: pieces of it as text."""

from __future__ import annotations

import binascii

from pyvmm._native import ffi, lib
from pyvmm.errors import ControlError, MemoryAccessError, check
from pyvmm.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    from pyvmm.memory import GuestMemory

    Table: TypeAlias = NDArray[np.uint64]

UNKNOWN: int = lib.PV_SCAN_UNKNOWN
"""Of a page that would have to be fetched from its home, or was not looked at yet."""
ZERO: int = lib.PV_SCAN_ZERO
"""Of a page of zeros that takes memory."""
NOTHING: int = lib.PV_SCAN_NOTHING
"""Of zeros that take none: never touched, or given up."""
CONTENT: int = lib.PV_SCAN_CONTENT
"""Hashes are from here on."""
PIECE = 4096
"""Pages of a table that go in one answer, as 43 KiB of text."""


def scan(memory: GuestMemory, first: int = 0, count: int | None = None) -> Table:
    """Hashes of pages as they are now; the guest may run. Nothing is fetched, broken, or counts as touched.

    What the kernel itself has swapped out is read. Raises MemoryAccessError for pages that are not there.
    """
    import numpy as np

    pages = memory.size // PAGE_SIZE
    count = pages - first if count is None else count
    if first < 0 or count < 0 or first + count > pages:
        raise MemoryAccessError(f"pages {first}+{count}: the VM has {pages}")
    table = np.zeros(count, np.uint64)
    hashes = ffi.from_buffer("uint64_t[]", table, require_writable=True)
    check(memory.engine.call(lib.pv_scan, first, count, hashes, equip=False), "PAGEMAP_SCAN", page=first, pages=count)
    return table


def encode(table: Table) -> str:
    """Little-endian, in base64."""
    return binascii.b2a_base64(table.astype("<u8").tobytes(), newline=False).decode()


def decode(text: object, count: int) -> Table:
    """What encode() was given, of so many pages. Raises ControlError for anything else."""
    import numpy as np

    if not isinstance(text, str) or len(text) != -(-count * 8 // 3) * 4:
        raise ControlError(f"a piece of a table of hashes is not the text of {count} pages")
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        data = b""
    if len(data) != count * 8:
        raise ControlError(f"a piece of a table of hashes is not the base64 of {count} pages")
    return np.frombuffer(data, "<u8").astype(np.uint64)
