# swap.py: pages of a guest in a file of our own. The work is in cffi_build/swap.h and what belongs to it, without the
# GIL. Units: bytes; pages of 4 KiB, numbered by their place in RAM.
"""`Swap`: the home SWAP of one VM. `SwapCounts`: what it has done."""

from __future__ import annotations

import errno
import os
import secrets

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, HostError, check
from pyvmm.layout import GIB, PAGE_SIZE, format_size
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyvmm._native import CData
    from pyvmm.memory import GuestMemory

FOLDER = "/var/tmp"
"""Where the file is if nobody says so: not /tmp, which is often in RAM."""
QUEUE = 32
"""Blocks of 2 MiB that may wait to be written; who has more go out waits."""
_WAIT_MS = 100
_LOOK = 64
"""Blocks that shrink() has go out between two looks at how much is left."""


CODECS = {"lz4": (lib.PV_CODEC_LZ4, "liblz4.so.1", "liblz4-1"), "zstd": (lib.PV_CODEC_ZSTD, "libzstd.so.1", "libzstd1")}
"""How pages can be compressed: number, library, and the package that has it."""


class SwapCounts(Record):
    """slots: of slot_bytes each, that the file has; free: of these, no page's. live: pages that are there; kept: that
    have come back, and may go out again unchanged; stored: bytes of both. queued, behind: blocks to be written; of
    which something could not be.

    Pages, since the beginning. out: of these, zeros, which take no slot, and saved: not written, since the file had
    them; late: came back before they were written. came: back; ahead: read with one that was touched; refaults: came
    back before as many others had gone out as were in RAM. writes, reads: calls, and bytes_*; given_up: slots that
    were kept, until the file was full; given_back: bytes of disk space that no page took any more. errors: times that
    something could not be written, `error`: the last errno.
    """

    __slots__ = (
        "ahead",
        "behind",
        "bytes_read",
        "bytes_written",
        "came",
        "error",
        "errors",
        "free",
        "given_back",
        "given_up",
        "held",
        "kept",
        "late",
        "live",
        "out",
        "queued",
        "reads",
        "ref_bytes_read",
        "ref_reads",
        "refaults",
        "references",
        "referred",
        "saved",
        "slot_bytes",
        "slots",
        "stored",
        "writes",
        "zeros",
    )  # fmt: skip

    def __init__(self, told: CData) -> None:
        self.slots, self.free, self.slot_bytes = int(told.slots), int(told.free), int(told.slot_bytes)
        self.live, self.kept, self.stored = int(told.live), int(told.kept), int(told.stored)
        self.queued, self.behind = int(told.queued), int(told.behind)
        self.out, self.zeros = int(told.out), int(told.zeros)
        self.saved, self.late = int(told.saved), int(told.late)
        self.came, self.ahead = int(told.came), int(told.ahead)
        self.refaults, self.given_up = int(told.refaults), int(told.given_up)
        self.writes, self.bytes_written = int(told.writes), int(told.bytes_written)
        self.reads, self.bytes_read = int(told.reads), int(told.bytes_read)
        self.given_back = int(told.given_back)
        self.references, self.referred, self.held = int(told.references), int(told.referred), int(told.held)
        self.ref_reads, self.ref_bytes_read = int(told.ref_reads), int(told.ref_bytes_read)
        self.errors, self.error = int(told.errors), int(told.error)

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def ratio(self) -> float:
        """How many times as many bytes the pages in the file have as are stored for them; 1.0 for none."""
        return (self.live + self.kept) * PAGE_SIZE / self.stored if self.stored else 1.0


class Swap:
    """Gives pages of `memory` a place in a file of at most `size` bytes, which has no name: it is gone with this
    process, however that ends.

    path: a folder, or a name where nothing is yet; None: FOLDER. compress: None, "lz4" or "zstd", each page by itself,
    where that makes it smaller. Raises BadInput, HostError.
    All methods may be called from any thread, and raise MemoryAccessError once the memory is closed. A page that cannot
    be read back is told as of any other home: the VM is paused, FetchError, and resume() tries again.
    """

    def __init__(self, memory: GuestMemory, path: str | None, size: int, compress: str | None = None) -> None:
        codec = _codec(compress)
        per_page = PAGE_SIZE // lib.pv_swap_slot(codec)
        slots, most = size // PAGE_SIZE * per_page, lib.PV_SWAP_SLOTS // per_page
        if not 0 < slots <= most * per_page:
            raise BadInput(
                f"a swap of {format_size(size)}: give from 4K to {format_size(most * PAGE_SIZE // GIB * GIB)}"
            )
        self._memory, self._engine = memory, memory.engine
        if self._engine.serves("swap"):
            raise BadInput("this VM has a home 'swap' already: close that first")
        self.path = path or FOLDER
        self._told = self._last = 0  # errors that have been seen; the errno that was raised last
        self._leaving: list[Callable[[], None]] = []
        self._closed = self._over = False  # nothing goes out any more; so does nothing come back: the VM's end
        out = ffi.new("struct pv_swap **")
        fd = open_nameless(self.path)
        try:
            os.ftruncate(fd, slots // per_page * PAGE_SIZE)
        except OSError as error:
            os.close(fd)
            raise BadInput(
                f"a swap file of {format_size(size)} in {self.path}: {os.strerror(error.errno or 0)}"
            ) from None
        opened = self._engine.call(lambda native: lib.pv_swap_open(native, fd, slots, codec, out))
        check(opened, "pv_swap_open", slots=slots)
        self._swap = out[0]
        self.struct = ffi.new("struct pv_home *")
        lib.pv_swap_home(self._swap, self.struct)
        memory.keep(lambda: lib.pv_swap_close(self._swap))
        memory.before_end(self._end)
        self._engine.set_native_home("swap", self)
        check(self._call(lib.pv_swap_start), "pthread_create")
        memory.swap = self

    def _call(self, function: Callable[..., int], *arguments: CData | int) -> int:
        """While a call is under way the memory is not closed."""
        return self._engine.call(lambda _: function(self._swap, *arguments), equip=False)

    def explain(self, number: int) -> str:
        """What an errno of a failed fetch means."""
        if number == errno.EBADMSG:
            return f"the swap file in {self.path} is damaged: it has other bytes than were written"
        if number == errno.ENODATA:
            return f"the swap file in {self.path} has become shorter"
        return f"the swap file in {self.path}: {errno.errorcode.get(number, number)}, {os.strerror(number)}"

    # ---- out ----

    def out(self, pages: Iterable[tuple[int, int]]) -> int:
        """Has pages go out, runs of (first page, count). Returns how many have left the guest: they will be written
        soon. Pages in use stay. Waits while QUEUE blocks wait to be written.

        Raises HostError, once until retry(), after something could not be written (the disk or the file is full, or
        damaged): such pages are aside still, in RAM, and none is lost.
        """
        gone = 0
        for page, count in pages:
            for first, part in self._engine.parts(page, count):
                self._require_open()
                result = self._call(lib.pv_swap_out, first, part)
                if result != -errno.EBUSY:
                    gone += check(result, "UFFDIO_MOVE", page=first, pages=part)
                self._wait(QUEUE)
        self._tell()
        return gone

    def write(self, block: int) -> None:
        """Has all of a block that is aside written soon; takes nothing out of the guest. Waits as out() does."""
        self._require_open()
        self._engine.tell(lambda _: lib.pv_swap_put(self._swap, block))
        self._wait(QUEUE)

    def drain(self) -> None:
        """Waits until all that goes out has been written, or cannot be. Raises HostError as out() does."""
        self._wait(0)
        self._tell()

    def retry(self) -> None:
        """Has what could not be written tried again."""
        self._require_open()
        self._last = 0
        self._engine.tell(lambda _: lib.pv_swap_retry(self._swap))

    def shrink(self, target: int, victims: Iterable[tuple[int, int]]) -> int:
        """Has victims, runs of (first page, count), go out until at most `target` bytes of RAM are resident, or there
        are no more of them. Returns how many bytes are; the guest may bring some back meanwhile. Raises HostError as
        out() does.
        """
        resident, gone = self.resident, 0
        for page, count in victims:
            if resident - gone * PAGE_SIZE <= target or gone >= _LOOK * 512:
                self.drain()
                resident, gone = self.resident, 0
                if resident <= target:
                    return resident
            gone += self.out([(page, count)])
        self.drain()
        return self.resident

    @property
    def resident(self) -> int:
        """Bytes of the guest's RAM that take some of the host's: in the guest, or aside."""
        pages = self._memory.pages()
        return pages.bytes_populated + pages.homes["aside"] * PAGE_SIZE

    def _wait(self, most: int) -> None:
        while not self._call(lib.pv_swap_wait, most, _WAIT_MS):
            self._require_open()

    def _tell(self) -> None:
        counts = self.stats()
        told, self._told = self._told, counts.errors
        if counts.behind == 0:
            self._last = 0
        if counts.errors == told or counts.error == self._last:
            return
        self._last = counts.error
        if counts.error == lib.PV_SWAP_FULL:
            size = format_size(counts.slots * counts.slot_bytes)
            raise HostError(f"the swap file is full, all {size} of it: pages that did not fit stay in memory")
        name, text = errno.errorcode.get(counts.error, counts.error), os.strerror(counts.error)
        raise HostError(f"the swap file in {self.path} cannot be written: {name}, {text}: its pages stay in memory")

    # ---- what others than pages keep there ----

    def before_close(self, leave: Callable[[], None]) -> None:
        """Has something called by close() before the file goes: from then on it is to hold no reference. What it raises
        ends the close(), which may be called again."""
        self._leaving.append(leave)

    def refer(self, page: int, count: int, refs: CData, look: bool = False) -> bytes:
        """Makes references (struct pv_swap_ref[count]) to what these pages have, where that is in the file or
        zeros, and reads nothing: see pv_swap_refer. PV_REFER_* of each; of a swap that is closed, BYTES of all."""
        became = ffi.new("uint8_t[]", count)
        if not self._closed:
            check(self._call(lib.pv_swap_refer, page, count, refs, became, look), "pv_swap_refer", page=page)
        return bytes(ffi.buffer(became))

    def hold(self, refs: CData, count: int) -> None:
        """These are copies of others, and refer to the same."""
        self._engine.tell(lambda _: lib.pv_swap_hold(self._swap, refs, count))

    def unrefer(self, refs: CData, count: int) -> None:
        """They refer to nothing any more."""
        self._engine.tell(lambda _: lib.pv_swap_unrefer(self._swap, refs, count))

    def read_refs(self, refs: CData, count: int, into: bytearray) -> int:
        """Puts what they refer to into its place in `into`, a page each; where they refer to nothing, that stays. How
        many reads it took. Raises OSError, in words, where the file cannot be read or is damaged."""
        reads = self._call(lib.pv_swap_read_refs, refs, count, ffi.from_buffer(into))
        if reads < 0:
            raise OSError(-reads, self.explain(-reads))
        return reads

    # ---- what is known, and its end ----

    def stats(self) -> SwapCounts:
        """What it has done so far."""
        told = ffi.new("struct pv_swap_told *")
        self._engine.tell(lambda _: lib.pv_swap_look(self._swap, told))
        return SwapCounts(told)

    def _require_open(self) -> None:
        if self._closed:
            raise BadInput("this swap is closed")

    def _end(self) -> None:
        self._closed = self._over = True
        lib.pv_swap_end(self._swap)

    def close(self) -> None:
        """Brings all pages back from the file, and gives it up; what was not written yet is aside, and comes when it is
        touched. Who refers to its slots is asked first to do so no more. Raises FetchError, HostError, with the file
        still there; then this may be called again. Twice is once."""
        if self._closed and (self._over or not self._engine.serves("swap")):
            return
        self._closed = True
        for leave in self._leaving:
            leave()
        self._engine.tell(lambda _: lib.pv_swap_end(self._swap))
        for first, count in self._engine.at_home("swap").take(0, self._memory.size // PAGE_SIZE):
            self._engine.install(first, count)
        self._engine.drop_home("swap")
        self._engine.tell(lambda _: lib.pv_swap_drop(self._swap))
        self._memory.swap = None


def _codec(name: str | None) -> int:
    if name is None:
        return int(lib.PV_CODEC_RAW)
    if name not in CODECS:
        raise BadInput(f"no codec {name!r} for a swap: choose one of {', '.join(CODECS)}, or none")
    number, library, package = CODECS[name]
    if lib.pv_codec_available(number) < 0:
        raise HostError(f"compressing by {name} needs {library}: run 'sudo apt-get install -y {package}'")
    return int(number)


def open_nameless(path: str) -> int:
    """A file with no name, or with one that is gone at once: in a folder, or where nothing is yet. Raises BadInput."""
    try:
        if not os.path.isdir(path):
            return _named(path)
        try:
            return os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
            return _named(os.path.join(path, f".pyvmm-swap-{secrets.token_hex(8)}"))
    except FileExistsError:
        raise BadInput(f"{path} is there already: give a swap a folder, or a name where nothing is") from None
    except OSError as error:
        raise BadInput(f"no swap file can be made in {path}: {os.strerror(error.errno or 0)}") from None


def _named(path: str) -> int:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.unlink(path)
    return fd
