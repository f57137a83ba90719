# spans.py: which parts of a request to a disk are whole pages that become whole blocks. Units: bytes; pages of 4 KiB.
"""`spans()`, `whole()`."""

from __future__ import annotations

from pyvmm.layout import PAGE_SIZE, Gpa

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.virtio.queue import Buffers

MOST = 512
"""Pages that are given together."""


def spans(source: Buffers, offset: int) -> list[tuple[int, int, int | None]]:
    """A request to byte `offset` of a disk, in pieces (at, bytes, page): pages from number `page` on, which
    are to become whole blocks; None: bytes to be copied."""
    found: list[tuple[int, int, int | None]] = []

    def add(at: int, size: int, page: int | None = None) -> None:
        if page is None and found and found[-1][2] is None:
            at, size = found[-1][0], found.pop()[1] + size
        if size:
            found.append((at, size, page))

    at = 0
    for start, size in source.parts:
        head = -start % PAGE_SIZE
        pages = (size - head) // PAGE_SIZE * PAGE_SIZE
        if (offset + at - start) % PAGE_SIZE or pages <= 0:
            add(at, size)
        else:
            add(at, head)
            for done in range(0, pages, MOST * PAGE_SIZE):
                page = source.memory.page_of(Gpa(start + head + done))
                add(at + head + done, min(pages - done, MOST * PAGE_SIZE), page)
            add(at + head + pages, size - head - pages)
        at += size
    return found


def whole(start: int, end: int) -> tuple[int, int]:
    """The blocks that lie wholly in bytes `start` to `end`: first, and behind the last one."""
    return -(-start // PAGE_SIZE), end // PAGE_SIZE
