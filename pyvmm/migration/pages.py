# pages.py: a connection that carries pages: runs out of and into guest memory, by C without the GIL. Numbers of pages.
"""`PageChannel` and `Arrivals`; cffi_build/stream.h says what holds of the memory."""

from __future__ import annotations

import errno
import os

from pyvmm._native import ffi, lib
from pyvmm.errors import MigrationError, PeerGone, ProtocolError, check
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.migration.connection import SILENCE
from pyvmm.migration.frames import BY_TYPE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm._native import CData
    from pyvmm.migration.connection import Connection

_FAULTS = {
    lib.PV_FAULT_MAGIC: "what came is not a frame of pyvmm's migration",
    lib.PV_FAULT_VERSION: "another protocol version",
    lib.PV_FAULT_TYPE: "it cannot come here",
    lib.PV_FAULT_FLAGS: "its flags are not known",
    lib.PV_FAULT_LENGTH: "its length is wrong",
    lib.PV_FAULT_SEQUENCE: "it comes out of sequence",
    lib.PV_FAULT_CHECKSUM: "its checksum is wrong",
    lib.PV_FAULT_RANGE: "these pages cannot be",
    lib.PV_FAULT_ROUND: "it is of another round",
    lib.PV_FAULT_TWICE: "a page comes twice in this round",
}
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNABORTED, errno.EHOSTUNREACH)
_NOTES = 4096
"""Frames of pages that are noted between two looks of a recorder."""


class Arrivals:
    """What a destination knows of `pages` pages while they come in rounds, on one or more channels at once. large: a
    bitmap of the source's large blocks, in words of 64 bits; None: all, so that each zero is stored."""

    def __init__(self, pages: int, large: bytes | None = None) -> None:
        words = -(-pages // 64)
        blocks = -(-pages // (BLOCK_SIZE // PAGE_SIZE) // 64)
        self.pages = pages
        self.came = ffi.new("uint64_t[]", words)
        self.held = ffi.new("uint64_t[]", words)
        self._large = ffi.new("uint64_t[]", blocks)
        ffi.memmove(self._large, (large or b"\xff" * (blocks * 8)).ljust(blocks * 8, b"\0"), blocks * 8)
        self.cdata: CData = ffi.new("struct pv_arrivals *")
        self.cdata.came, self.cdata.held, self.cdata.large = self.came, self.held, self._large

    def begin(self, round: int) -> None:
        """No page of this round has come. While no channel receives."""
        ffi.memmove(self.came, bytes(ffi.sizeof(self.came)), ffi.sizeof(self.came))
        self.cdata.round = round

    def count(self) -> int:
        """Pages that have come in this round."""
        return lib.pv_bits_count(self.came, self.pages)


class PageChannels:
    """Those of one side, for what they do together."""

    def __init__(self, channels: Sequence[PageChannel]) -> None:
        self._channels = channels

    @property
    def wire_bytes(self) -> int:
        """All that went or came over them."""
        return sum(int(channel.stream.wire_bytes) for channel in self._channels)

    @property
    def page_bytes(self) -> int:
        """Of pages in full."""
        return sum(int(channel.stream.bytes_pages) for channel in self._channels) * PAGE_SIZE

    @property
    def zero_pages(self) -> int:
        """Pages that went or came as metadata."""
        return sum(int(channel.stream.zero_pages) for channel in self._channels)

    def end(self) -> None:
        """Ends what waits in them, in any thread."""
        for channel in self._channels:
            channel.end()


class PageChannel:
    """Pages of RAM over a connection that has been joined, which it takes over: close it here. ram: where page 0 lies,
    or would lie in a staging area. timeout: seconds in which something must move. One thread at a time sends, one
    receives. All raise PeerGone, ProtocolError, or MigrationError for what the system refuses."""

    def __init__(self, connection: Connection, ram: CData, pages: int, timeout: float = SILENCE) -> None:
        self._connection = connection
        self._ram = ram
        self._pages = pages
        self.stream: CData = ffi.new("struct pv_stream *")
        self.stream.sending, self.stream.receiving = connection.sequences
        self.stream.fd = connection.plain().fileno()
        self.stream.timeout_ns = int(timeout * 1e9)
        check(lib.pv_stream_wait(self.stream), "setsockopt", fd=self.stream.fd)
        if connection.recorder is not None:
            self._notes = ffi.new("struct pv_noted[]", _NOTES)
            self.stream.notes, self.stream.notes_room = self._notes, _NOTES

    def close(self) -> None:
        """Ends the connection, and gives RAM free; twice is once. While no other thread is in a call: end() has it
        return."""
        self._connection.close()
        self.stream.fd = -1
        self._ram = ffi.NULL  # else the memory of a closed VM would stay as long as this

    def end(self) -> None:
        """Has each call that waits here end with PeerGone, in any thread."""
        self._connection.end()

    def send(self, runs: Sequence[tuple[int, int]], round: int, zeros: bool = True) -> None:
        """Runs (first page, pages) of RAM, which are present and pinned. zeros: those that hold nothing but zeros go
        as such."""
        self.send_table(ffi.new("struct pv_run_pages[]", list(runs)), len(runs), round, zeros)

    def send_table(self, table: CData, count: int, round: int, zeros: bool = True) -> None:
        """The same, of a table in C: struct pv_run_pages[count]."""
        self.told(
            lib.pv_send_runs(self.stream, self._ram, self._pages, table, count, round, zeros), True, "sending pages"
        )

    def send_zeros(self, first: int, count: int, round: int) -> None:
        """Pages that hold nothing, and are not looked at."""
        self.told(lib.pv_send_frame(self.stream, lib.PV_FRAME_ZEROS, first, count, round), True, "sending pages")

    def send_end(self, round: int, pages: int) -> None:
        """This channel has sent all its pages of the round, so many."""
        self.told(lib.pv_send_frame(self.stream, lib.PV_FRAME_END, pages, 0, round), True, "sending pages")

    def receive(self, arrivals: Arrivals, limit: int) -> int | None:
        """Stores pages where they belong: None when `limit` pages or more have come, else how many the other side says
        it sent on this channel in this round, which it has ended."""
        end = ffi.new("struct pv_run_frame *")
        result = lib.pv_recv_runs(self.stream, self._ram, self._pages, arrivals.cdata, limit, end)
        self.told(result, False, "receiving pages", end)
        return int(end.first) if result == lib.PV_RECV_END else None

    def told(self, result: int, out: bool, what: str, frame: CData = None) -> None:
        """Of a call of C on this stream: records its frames, and raises what it ended with."""
        connection = self._connection
        if connection.recorder is not None:
            connection.recorder.note_runs(out, connection.channel, self.stream)
        if result < 0:
            raise self.failure(result, what, frame)

    def failure(self, result: int, what: str, frame: CData = None) -> MigrationError:
        """What to say of a call of C on this stream that returned -errno; frame: the last that came."""
        peer = self._connection.peer
        if result == -errno.EBADMSG:
            kind = BY_TYPE.get(frame.type)
            name = kind.name() if kind else f"type {frame.type}"
            pages = f"{frame.count} pages from {frame.first} on, round {frame.round}"
            return ProtocolError(f"{peer}: a frame {name} ({pages}): {_FAULTS[self.stream.fault]}")
        if -result in _GONE:
            how = "stalled" if result == -errno.ETIMEDOUT else "broke the connection off"
            return PeerGone(f"{peer} {how} while {what}")
        return MigrationError(f"{peer}: {what}: {os.strerror(-result)}")
