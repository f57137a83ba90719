# rewrite.py: the same VM in another file: pages in another order, blocks of another size or codec, a chain in one file,
# another working set. Units: pages of RAM, bytes.
"""`pack()`, `set_wset()`. What had the name before stays whole until the new file is, whatever happens.

But for `flat`, the new file has the id of the old one: an id stands for states and pages, which are the same, and a
child finds its parent by it. What is open meanwhile goes on with the old file.
"""

from __future__ import annotations

import errno
import os

from pyvmm._native import ffi
from pyvmm.errors import BadInput, SnapshotError
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory import GuestMemory
from pyvmm.memory.pageset import PageSet
from pyvmm.snapshot.format import Header
from pyvmm.snapshot.load import load
from pyvmm.snapshot.pending import Pending
from pyvmm.snapshot.reader import Snapshot
from pyvmm.snapshot.results import write_check
from pyvmm.snapshot.writer import Writer, put, put_section, wset_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.snapshot.reader import Progress

ORDERS = ("address", "touch")
_PIECE = 1 << 20
_CANNOT = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def pack(
    path: str,
    out: str | None = None,
    *,
    order: str = "address",
    block_size: int | None = None,
    codec: str | None = None,
    flat: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a snapshot anew, in place of itself or to `out`.

    order: "address", or "touch": the working set first, in the order of its first touches, the rest by address;
    block_size, codec: as they were where None; flat: all that it builds on goes into the one file, which has a new id
    and no parent. It needs memory for what the file holds. Raises BadInput, SnapshotError, HostError.
    """
    if order not in ORDERS:
        raise BadInput(f"no order {order!r}: choose one of {', '.join(ORDERS)}")
    with Snapshot.open(path) as old:
        first = old.wset if order == "touch" else ()
        if order == "touch" and not first:
            raise BadInput(f"{path} keeps no working set: record one in a lazy restore, or pack it by address")
        parent = None if flat else old.parent
        memory = GuestMemory(old.memory_size, "4k")
        try:
            above, held = (PageSet(old.pages, bits=bits) for bits in load(old, memory, progress, chain=flat))
            size, name = block_size or old.header.block_size, codec or old.header.codec
            with Writer(out or path, old.memory_size, size, name, parent, None if flat else old.id) as writer:
                # With a parent, zeros too: it may have other bytes there.
                _add(writer, memory, held if parent is None else above.complement(), first)
                writer.finish(old.states, old.large, old.wset)
        finally:
            memory.close()


def _add(writer: Writer, memory: GuestMemory, pages: PageSet, first: Iterable[int]) -> None:
    """All pages of the set; `first` before the others, which begin a new storage block."""
    low = memory.view(memory.regions[0].gpa, memory.regions[0].size)
    # SAFETY: the regions follow each other in one mapping, which `low` keeps.
    ram = memoryview(ffi.buffer(ffi.from_buffer("uint8_t[]", low) + 0, memory.size))
    hot = [page for page in first if pages.take(page, 1)]
    for page, count in neighbours(hot):
        writer.add_pages([(page, count)], ram[page * PAGE_SIZE : (page + count) * PAGE_SIZE])
    if hot:
        writer.end_block()
    for page, count in pages.runs():
        writer.add_pages([(page, count)], ram[page * PAGE_SIZE : (page + count) * PAGE_SIZE])
    ram.release()
    low.release()


def neighbours(pages: Iterable[int]) -> Iterable[tuple[int, int]]:
    """(first, count) of pages that follow each other in this order."""
    first = count = 0
    for page in pages:
        if count and page == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = page, 1
    if count:
        yield first, count


def set_wset(path: str, pages: Iterable[int]) -> None:
    """Has a snapshot keep another working set: pages in the order of their first touch, none twice; none: keeps none.

    The rest of the file is copied as it is, not read. Raises BadInput, SnapshotError, HostError.
    """
    with Snapshot.open(path, parents=False) as old:
        header = old.header
        data = wset_bytes(pages, old.pages)
        file = Pending(old.path, path)
        try:
            _copy(old, file.fd, header.sections["wset"].offset)
            section = put_section(file.fd, path, data, header.sections["wset"].offset)
            new = Header(
                header.producer, header.id, header.parent_id, header.parent_path, header.depth, header.memory_size,
                header.block_size, header.codec, header.blocks, header.backs, {**header.sections, "wset": section},
                section.end,
            )  # fmt: skip
            put(file.fd, path, new.encode(), 0)
            file.commit()
        finally:
            file.abandon()


def _copy(old: Snapshot, to: int, size: int) -> None:
    """The first `size` bytes of its file, shared on the disk where the file system can. Raises HostError."""
    at, share = 0, True
    try:
        while at < size:
            if share:
                try:
                    done = os.copy_file_range(old.fd, to, size - at, at, at)
                except OSError as error:
                    if error.errno not in _CANNOT:
                        raise
                    share = False
                    continue
            else:
                part = os.pread(old.fd, min(size - at, _PIECE), at)
                put(to, old.name, part, at)
                done = len(part)
            if not done:
                raise SnapshotError(f"{old.name}: truncated: it ends at byte {at}")
            at += done
    except OSError as error:
        write_check(-(error.errno or errno.EIO), old.name)
