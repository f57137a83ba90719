# writer.py: makes a snapshot file, under another name until it is whole. Units: bytes, pages of RAM.
"""`Writer`. What had the file's name before stays whole until the new one is, whatever happens."""

from __future__ import annotations

import errno
import os
from array import array

from pyvmm import __version__
from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, LifecycleError
from pyvmm.layout import BLOCK_SIZE, KIB, MIN_MEMORY, PAGE_SIZE, format_size
from pyvmm.snapshot import format
from pyvmm.snapshot import states as state_codec
from pyvmm.snapshot.format import CHUNK, HEADER_SIZE, NO_ID, ROW_SIZE, Header, Section, room
from pyvmm.snapshot.pending import Pending
from pyvmm.snapshot.results import require_codec, write_check

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterable
    from typing import TypeVar

    from pyvmm._native import CData
    from pyvmm.memory.space import Buffer
    from pyvmm.snapshot.reader import Snapshot
    from pyvmm.state import State

    Result = TypeVar("Result")

DEFAULT_BLOCK = 64 * KIB
ZSTD_LEVEL = 1
"""Of the levels, the one that saving does not wait for."""
_STEP = 16384
"""Pages that C is given at once: 64 MiB, so that Ctrl-C does not wait long."""


class Writer:
    """A snapshot that is being written. Use it in a `with`: unless `finish()` was reached, nothing of it stays.

    path: of the file, which is replaced when all is done; block_size: bytes of pages in a storage block, a power of
    two from 16 KiB to 2 MiB; codec: raw, lz4 or zstd; parent: an open snapshot, whose are all pages that are not given
    here. Without a parent they are zeros. id: of a snapshot of the same states and pages (pyvmm.snapshot.rewrite).
    Raises BadInput, HostError, SnapshotError.
    """

    def __init__(
        self,
        path: str,
        memory_size: int,
        block_size: int = DEFAULT_BLOCK,
        codec: str = "raw",
        parent: Snapshot | None = None,
        id: bytes | None = None,
    ) -> None:
        _check_shape(memory_size, block_size)
        number = require_codec(codec)
        self.path = os.path.realpath(path)  # a symbolic link stays one
        self.id = id or os.urandom(format.ID_SIZE)
        self._name = path
        self._codec = codec
        self._memory_size = memory_size
        self._block_size = block_size
        self._parent = (NO_ID, "", 0) if parent is None else self._adopt(parent)
        self._broken = False
        pages = memory_size // PAGE_SIZE
        self._index = room(pages * 8)
        if parent is not None:
            _fill(self._index, int(lib.PV_INDEX_PARENT))
        self._back = room(pages * 8)
        self._table = room(pages * ROW_SIZE)
        # SAFETY: C's threads use these until pv_pack_close(), which is called at the latest when the pack goes.
        held = [ffi.from_buffer("uint64_t[]", words) for words in (self._index, self._back)]
        held += [ffi.from_buffer("struct pv_stored[]", self._table), ffi.new("uint64_t[]", pages // 64 + 1)]
        bare = ffi.new("struct pv_pack *")

        def close(pack: CData, _held: object = (held, bare)) -> None:
            lib.pv_pack_close(pack)

        self._pack = pack = ffi.gc(bare, close)
        pack.codec, pack.level = number, ZSTD_LEVEL
        pack.slots, pack.pages, pack.offset = block_size // PAGE_SIZE, pages, HEADER_SIZE
        pack.index, pack.back, pack.table, pack.given = held
        self._file = Pending(self.path, self._name)  # last: what fails before has no file to remove
        pack.fd = self._file.fd

    def _adopt(self, parent: Snapshot) -> tuple[bytes, str, int]:
        """What the header says of the parent. Raises BadInput where it cannot be one."""
        if parent.memory_size != self._memory_size:
            sizes = f"{format_size(parent.memory_size)}, not {format_size(self._memory_size)}"
            raise BadInput(f"{parent.name} cannot be the parent: it is of a VM with {sizes} of memory")
        if parent.depth >= format.MAX_DEPTH:
            raise BadInput(f"{parent.name} has {parent.depth} ancestors, the most there can be: save without a parent")
        ancestor: Snapshot | None = parent
        while ancestor is not None:
            if os.path.realpath(ancestor.path) == self.path:
                raise BadInput(f"{self._name} is an ancestor of what is to replace it: save under another name")
            ancestor = ancestor.parent
        folder, name = os.path.split(os.path.realpath(parent.path))
        where = name if folder == os.path.dirname(self.path) else os.path.join(folder, name)
        if len(os.fsencode(where)) > format.MAX_PATH:
            raise BadInput(f"the path of {parent.name} is longer than {format.MAX_PATH} bytes: move the parent")
        return parent.id, where, parent.depth + 1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def add_pages(self, runs: Iterable[tuple[int, int]], data: Buffer) -> None:
        """Adds pages: runs of (first page, pages), and their bytes in the same order. They fill storage blocks in
        that order, so that pages which are given together are read together; zeros take no room.

        Raises BadInput for a page given twice or beyond RAM, HostError where the file cannot be written: then, the
        writer is of no use any more.
        """
        with ffi.from_buffer("uint8_t[]", data) as source:  # an error's traceback must not hold `data`, a view perhaps
            self._add_runs(runs, source)

    def _add_runs(self, runs: Iterable[tuple[int, int]], source: CData) -> None:
        left, at = ffi.sizeof(source), 0
        self._begin_change()
        for first, count in runs:
            if first < 0 or count < 0 or count * PAGE_SIZE > left:
                raise BadInput(f"a run of {count} pages from page {first}, and {left} bytes for it")
            left -= count * PAGE_SIZE
            for page in range(first, first + count, _STEP):
                step = min(first + count - page, _STEP)
                self._add(page, step, source + at)
                at += step * PAGE_SIZE
        if left:
            raise BadInput(f"{left} bytes more than the runs have pages")
        self._broken = False

    def _add(self, page: int, count: int, source: object) -> None:
        result = lib.pv_pack_add(self._pack, page, count, source)
        if result == -errno.EEXIST:
            raise BadInput(f"page {self._pack.page} is given twice")
        if result == -errno.EINVAL:
            raise BadInput(f"page {page + count - 1} is beyond the VM's RAM of {self._pack.pages} pages")
        write_check(result, self._name)

    def fill(self, add: Callable[[CData], Result]) -> Result:
        """Has C add pages: calls add(struct pv_pack *), and returns what that returns. Where it raises, the writer is
        of no use any more. Nothing else may be called meanwhile."""
        self._begin_change()
        result = add(self._pack)
        self._broken = False
        return result

    @property
    def stored(self) -> int:
        """Bytes of the file so far; after finish(), all of it."""
        return int(self._pack.offset)

    def end_block(self) -> None:
        """Has the next page begin a new storage block. Raises HostError."""
        self._begin_change()
        write_check(lib.pv_pack_flush(self._pack), self._name)
        self._broken = False

    def _begin_change(self) -> None:
        """Until the change is whole, the writer is broken: also if an exception comes out of nowhere."""
        if self._file.fd < 0 or self._broken:
            raise LifecycleError(f"writing {self._name} has ended" + (" by an error" if self._broken else ""))
        self._broken = True

    def finish(self, states: State, large: Iterable[int] = (), wset: Iterable[int] | None = None) -> None:
        """Writes the rest, and puts the file in its place: whole, and on the disk, when this returns.

        large: numbers of the 2 MiB blocks that were large pages; wset: pages in the order of their first touch, none
        twice. Raises BadInput, StateError, HostError; what had the name before is then still there.
        """
        pages = self._memory_size // PAGE_SIZE
        bits = bytearray(format.large_size(self._memory_size))
        for block in large:
            if not 0 <= block < -(-self._memory_size // BLOCK_SIZE):
                raise BadInput(f"block {block} is beyond the VM's RAM")
            bits[block // 8] |= 1 << block % 8
        order = wset_bytes(() if wset is None else wset, pages)
        raw_states = state_codec.encode(states)
        self.end_block()
        self._begin_change()
        pack = self._pack
        write_check(lib.pv_pack_write(pack), self._name)
        lib.pv_pack_close(pack)
        data: dict[str, Buffer] = {
            "states": raw_states,
            "index": memoryview(self._index)[: pages * 8],
            "blocks": memoryview(self._table)[: pack.blocks * ROW_SIZE],
            "back": memoryview(self._back)[: pack.backs * 8],
            "large": bits,
            "wset": order,
        }
        sections = {name: self._section(data[name]) for name in format.SECTIONS}
        parent_id, parent_path, depth = self._parent
        header = Header(
            f"pyvmm {__version__}", self.id, parent_id, parent_path, depth, self._memory_size, self._block_size,
            self._codec, pack.blocks, pack.backs, sections, pack.offset,
        )  # fmt: skip
        put(self._file.fd, self._name, header.encode(), 0)
        self._file.commit()

    def _section(self, data: Buffer) -> Section:
        """Appends a section and its checksums."""
        section = put_section(self._file.fd, self._name, data, self._pack.offset)
        self._pack.offset = section.end
        return section

    def abandon(self) -> None:
        """Ends writing, if it has not ended: nothing of the new file stays, what was there before does."""
        try:
            lib.pv_pack_close(self._pack)  # before the file's descriptor may be another file's
        finally:
            self._file.abandon()


def wset_bytes(pages: Iterable[int], of: int) -> bytes:
    """The section WSET of a VM with `of` pages. Raises BadInput."""
    order = array("q", pages)
    if len(set(order)) != len(order) or min(order, default=0) < 0 or max(order, default=0) >= of:
        raise BadInput("the working set names a page twice, or one beyond the VM's RAM")
    if len(order) > format.MAX_WSET:
        raise BadInput(f"a working set of {len(order)} pages: a snapshot keeps {format.MAX_WSET} at most")
    return order.tobytes()


def put(fd: int, name: str, data: Buffer, offset: int) -> None:
    """Writes into the file of the snapshot `name`. Raises HostError."""
    write_check(lib.pv_write_whole(fd, ffi.from_buffer(data), len(data), offset), name)


def put_section(fd: int, name: str, data: Buffer, offset: int) -> Section:
    """Writes a section and its checksums. Raises HostError."""
    length = len(data)
    whole = memoryview(data if length % 8 == 0 else bytes(data).ljust(format.align(length), b"\0"))
    parts = (whole[at : at + CHUNK] for at in range(0, len(whole), CHUNK))
    sums = array("Q", (format.checksum(part) for part in parts)).tobytes()
    put(fd, name, whole, offset)
    put(fd, name, sums, offset + len(whole))
    return Section(offset, length, format.checksum(sums))


def _check_shape(memory_size: int, block_size: int) -> None:
    if not MIN_MEMORY <= memory_size <= format.MAX_MEMORY or memory_size % PAGE_SIZE:
        limits = f"{format_size(MIN_MEMORY)} to {format_size(format.MAX_MEMORY)}"
        raise BadInput(f"memory of {memory_size} bytes: a snapshot holds {limits}, in pages of 4 KiB")
    if not lib.PV_STORE_MIN <= block_size <= lib.PV_STORE_MAX or block_size & (block_size - 1):
        raise BadInput(f"storage blocks of {format_size(block_size)}: give 16K to 2M, a power of two")


def _fill(room: mmap.mmap, word: int) -> None:
    piece = word.to_bytes(8, "little") * (CHUNK // 8)
    for at in range(0, len(room), CHUNK):
        size = min(CHUNK, len(room) - at)
        room[at : at + size] = piece[:size]
