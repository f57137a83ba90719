# reader.py: an open snapshot file. Checks what it uses when it first uses it. Units: pages of RAM, bytes.
"""`Snapshot`: opens in a time that does not grow with RAM, reads states, pages, storage blocks, and all of it."""

from __future__ import annotations

import os
import stat
from array import array
from functools import cached_property

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, SnapshotError, StateError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.record import Record
from pyvmm.snapshot import states as state_codec
from pyvmm.snapshot.format import CODECS, HEADER_SIZE, SECTIONS, Header, Section, align, checksum, decode, room
from pyvmm.snapshot.results import read_check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm._native import CData
    from pyvmm.memory import GuestMemory
    from pyvmm.snapshot.inspect import Info
    from pyvmm.state import State

    Progress = Callable[[int, int], None]
    """Is told bytes of pages done, and of how many."""


class Place(Record):
    """Where a page is: kind "zero", "block" (then, block and slot), or "parent"."""

    __slots__ = ("block", "kind", "slot")

    def __init__(self, kind: str, block: int = 0, slot: int = 0) -> None:
        self.kind = kind
        self.block = block
        self.slot = slot


class Snapshot:
    """An open snapshot. Made by `Snapshot.open()`; a context manager.

    name: the path as it was given, for messages; path: without symbolic links; parent: the snapshot that it builds
    on, or None; header: what it says of itself.
    All methods raise SnapshotError where the file is found damaged, and HostError where it cannot be read; they may be
    called from any thread.
    """

    def __init__(self, name: str, fd: int) -> None:
        """Takes the descriptor, also if this fails. Opens no parent: open() does."""
        self.name = name if name.isprintable() else repr(name)  # a parent's comes from a file that may be hostile
        self.path = os.path.realpath(name)
        self.parent: Snapshot | None = None
        self.fd = fd
        try:
            raw = _read(fd, 0, HEADER_SIZE)
            self.header: Header = decode(raw, os.fstat(fd).st_size, self.name)
            self._sections = {kind: _Chunked(fd, self.header.sections[kind], self.name, kind) for kind in SECTIONS}
            self.native = self._make_native()
            self._raw_states = bytes(self._bytes("states", 0, self.header.sections["states"].length))
        except BaseException:
            self._close_one()
            raise

    @classmethod
    def open(cls, path: str, parents: bool = True) -> Snapshot:
        """Opens a snapshot and, unless told otherwise, all that it builds on.

        Raises SnapshotError, in one line that names the file and what is wrong, for a file that is foreign, of another
        version, truncated or damaged as far as can be seen without reading all of it (`check()` does), and for a
        parent that is missing or is not the one that it was.
        """
        snapshot = cls(path, _open(path))
        try:
            child = snapshot
            while parents and child.depth:
                child.parent = _find_parent(child)
                child = child.parent
        except BaseException:
            snapshot.close()
            raise
        return snapshot

    def close(self) -> None:
        """Closes this file and its ancestors'. Nothing of it can be read any more."""
        snapshot: Snapshot | None = self
        while snapshot is not None:
            snapshot._close_one()
            snapshot = snapshot.parent

    def _close_one(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what it says of itself ----

    @property
    def id(self) -> bytes:
        """16 random bytes, its own."""
        return self.header.id

    @property
    def depth(self) -> int:
        """How many ancestors it has."""
        return self.header.depth

    @property
    def memory_size(self) -> int:
        """Bytes of RAM."""
        return self.header.memory_size

    @property
    def pages(self) -> int:
        """Pages of RAM."""
        return self.header.pages

    @property
    def blocks(self) -> int:
        """Storage blocks in this file."""
        return self.header.blocks

    @cached_property
    def states(self) -> State:
        """The tree of states that it was written with."""
        try:
            return state_codec.decode(self._raw_states)
        except StateError as error:
            raise SnapshotError(f"{self.name}: {error}") from None

    @cached_property
    def large(self) -> tuple[int, ...]:
        """Numbers of the 2 MiB blocks that were large pages, ascending."""
        raw = self._bytes("large", 0, self.header.sections["large"].length)
        found = tuple(8 * at + bit for at, byte in enumerate(raw) if byte for bit in range(8) if byte >> bit & 1)
        if found and found[-1] >= -(-self.memory_size // BLOCK_SIZE):
            raise SnapshotError(f"{self.name}: damaged: it has large pages beyond its RAM")
        return found

    @property
    def wset(self) -> tuple[int, ...]:
        """The working set: pages in the order of their first touch; empty where none is kept."""
        return tuple(self.wset_words[0])

    @cached_property
    def wset_words(self) -> tuple[array[int], CData]:
        """The same for C: uint64_t each, and a bit a page of RAM."""
        order = array("Q", bytes(self._bytes("wset", 0, self.header.sections["wset"].length)))
        bits = ffi.new("uint64_t[]", self.pages // 64 + 1)
        if lib.pv_bits_mark(bits, ffi.from_buffer("uint64_t[]", order), len(order), self.pages):
            raise SnapshotError(f"{self.name}: damaged: its working set names a page twice, or one beyond its RAM")
        return order, bits

    # ---- pages ----

    def page_home(self, page: int) -> Place:
        """Where a page is, as this file says. Raises BadInput beyond RAM."""
        self._require_page(page)
        word = ffi.new("uint64_t *")
        self._check(lib.pv_snapshot_page(self._live(), page, word), f"the index of page {page}")
        kind = word[0] & lib.PV_INDEX_KIND
        if kind == lib.PV_INDEX_BLOCK:
            slot = word[0] >> lib.PV_INDEX_SLOT_SHIFT & (lib.PV_STORE_SLOTS - 1)
            return Place("block", word[0] >> lib.PV_INDEX_BLOCK_SHIFT, slot)
        return Place("parent" if kind == lib.PV_INDEX_PARENT else "zero")

    def read_block(self, block: int) -> list[tuple[int, bytes]]:
        """(page, its 4096 bytes) of each page in a storage block, verified. Raises BadInput where there is none."""
        if not 0 <= block < self.blocks:
            raise BadInput(f"{self.name} has no storage block {block}: it has {self.blocks}")
        row, pages = ffi.new("struct pv_stored *"), ffi.new("uint64_t[]", int(lib.PV_STORE_SLOTS))
        out = bytearray(self.header.block_size)
        result = lib.pv_snapshot_read(self._live(), block, row, pages, ffi.from_buffer(out))
        self._check(result, f"storage block {block}")
        return [(pages[i], bytes(out[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])) for i in range(row.slots)]

    def read_page(self, page: int) -> bytes:
        """The bytes of a page, wherever in the chain of parents they are. Raises BadInput beyond RAM."""
        snapshot = self
        while (home := snapshot.page_home(page)).kind == "parent":
            snapshot = snapshot.require_parent()
        if home.kind == "zero":
            return bytes(PAGE_SIZE)
        found = snapshot.read_block(home.block)
        if home.slot >= len(found) or found[home.slot][0] != page:
            raise SnapshotError(f"{snapshot.name}: damaged: storage block {home.block} does not hold page {page}")
        return found[home.slot][1]

    def load_into(self, memory: GuestMemory, progress: Progress | None = None, readers: int | None = None) -> None:
        """Reads all pages into RAM that nobody has used yet, by `readers` threads (default: one for each CPU).

        Raises BadInput where it has been used, or is of another size; after another error the RAM holds anything.
        """
        from pyvmm.snapshot.load import load

        load(self, memory, progress, readers)

    def require_parent(self) -> Snapshot:
        """The parent. Raises LifecycleError where this was opened without."""
        if self.parent is None:
            raise SnapshotError(f"{self.name}: it was opened without its parent {self.header.parent_path!r}")
        return self.parent

    # ---- for people and proof ----

    def info(self) -> Info:
        """What is in the file, counted."""
        from pyvmm.snapshot.inspect import info

        return info(self)

    def check(self, progress: Progress | None = None) -> None:
        """Reads all of the file and of its ancestors, and raises SnapshotError unless each checksum is right and all
        maps agree. `progress` is told bytes read, and of how many."""
        from pyvmm.snapshot.inspect import check

        check(self, progress)

    def _require_page(self, page: int) -> None:
        if not 0 <= page < self.pages:
            raise BadInput(f"page {page} is beyond the VM's RAM of {self.pages} pages")

    def _check(self, result: int, what: str) -> None:
        read_check(result, self.name, what, self.header.codec)

    def _live(self) -> CData:
        """The native side of an open file."""
        if self.fd < 0:
            raise BadInput(f"{self.name} is closed")
        return self.native

    def _bytes(self, kind: str, at: int, size: int) -> memoryview:
        """Bytes of a section, verified."""
        section = self._sections[kind]
        result = lib.pv_section_need(self._live(), section.native, at, align(size))
        self._check(result, f"section {kind}")
        return section.view[at : at + size]

    def _make_native(self) -> CData:
        native = ffi.new("struct pv_snapshot *")
        header = self.header
        native.fd, native.codec, native.slots = self.fd, CODECS.index(header.codec), header.block_size // PAGE_SIZE
        native.has_parent, native.pages = int(header.depth > 0), header.pages
        native.blocks, native.backs = header.blocks, header.backs
        native.begin, native.end = HEADER_SIZE, header.sections["states"].offset
        native.index = self._sections["index"].native[0]
        native.table = self._sections["blocks"].native[0]
        native.back = self._sections["back"].native[0]
        native.large = self._sections["large"].native[0]
        return native


class _Chunked:
    """A section: room for its bytes, which takes memory only where chunks have been read, and their checksums."""

    def __init__(self, fd: int, section: Section, name: str, kind: str) -> None:
        size = align(section.length)
        sums = _read(fd, section.offset + size, 8 * section.chunks)
        if checksum(sums) != section.checksum:
            raise SnapshotError(f"{name}: damaged: the checksums of section {kind} are wrong")
        try:
            data = room(size)
        except OSError as error:
            raise SnapshotError(f"{name}: no memory for its section {kind} of {size} bytes: {error.strerror}") from None
        self.view = memoryview(data)
        self.native = ffi.new("struct pv_section *")
        self.native.offset, self.native.length = section.offset, size
        # SAFETY: these three are ours as long as the native side is, and do not move.
        self._held = (
            ffi.from_buffer("uint8_t[]", data),
            ffi.from_buffer("uint64_t[]", sums),
            ffi.new("uint8_t[]", section.chunks + 1),
        )
        self.native.data, self.native.sums, self.native.ready = self._held


def _read(fd: int, offset: int, size: int) -> bytes:
    """So many bytes, or as many as there are."""
    parts = []
    while size > 0 and (part := os.pread(fd, size, offset)):
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def _open(path: str) -> int:
    """A descriptor. Raises SnapshotError; looks before it opens, as some devices do things when they are opened."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SnapshotError(f"{path}: not a file, and so no snapshot")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise SnapshotError(f"{path}: {error.strerror}") from None


def _find_parent(child: Snapshot) -> Snapshot:
    """Beside the child, or where it was. Depths go down by one, so that a chain ends and never comes back to itself."""
    recorded = child.header.parent_path
    places = [os.path.join(os.path.dirname(child.path), os.path.basename(recorded))]
    if os.path.isabs(recorded) and recorded not in places:
        places.append(recorded)
    others = []
    for place in places:
        if not os.path.isfile(place):
            continue
        try:
            parent = Snapshot(place, _open(place))
        except SnapshotError as error:
            raise SnapshotError(f"{child.name}: its parent cannot be used: {error}") from None
        header = parent.header
        if (header.id, header.depth, header.memory_size) == (
            child.header.parent_id, child.depth - 1, child.memory_size,
        ):  # fmt: skip
            return parent
        parent.close()
        others.append(place)
    if others:
        raise SnapshotError(f"{child.name}: {others[0]!r} is another snapshot than the parent that it was saved with")
    where = " or ".join(repr(place) for place in places)
    raise SnapshotError(f"{child.name}: its parent is missing: looked for {where}")
