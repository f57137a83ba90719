# peer.py: post-copy: a guest runs at the destination while some of its pages are still with the source. The work is in
# cffi_build/peerhome.c and serve.c, without the GIL. Units: pages of 4 KiB, blocks of 2 MiB, by their place in RAM.
"""`PeerHome`: the destination's side, the home PEER of one VM. `Served`: the source's, whose VM stands still."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, KernelError, check
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.memory.pageset import PageSet
from pyvmm.memory.source import Source
from pyvmm.memory.trace.runs import words_for
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm._native import CData
    from pyvmm.errors import MigrationError
    from pyvmm.memory import GuestMemory
    from pyvmm.migration.pages import PageChannel

WORKERS = 2
"""Threads that answer faults: while one waits for the source, the other serves what is here."""
PIECE = 8
"""Blocks that are sent before it is looked where the guest has got to."""
_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
_STATES = {lib.PV_PEER_APART: "apart", lib.PV_PEER_CONNECTED: "connected", lib.PV_PEER_ENDED: "ended"}


class PeerCounts(Record):
    """What the destination has asked for. requests, pages: answered; ns: in all, and the longest, from first request to
    last answer of what was asked for at once; breaks: connections that broke. came: pages that came unasked; of these,
    dropped: they were here already; failed: blocks of them that could not be installed as they should be."""

    __slots__ = ("breaks", "came", "dropped", "failed", "longest_ns", "ns", "pages", "requests")

    def __init__(self, told: CData, inboxes: list[CData]) -> None:
        self.requests, self.pages = int(told.requests), int(told.pages)
        self.ns, self.longest_ns = int(told.nanoseconds), int(told.longest)
        self.breaks = int(told.breaks)
        self.came = sum(int(inbox.came) for inbox in inboxes)
        self.dropped = sum(int(inbox.dropped) for inbox in inboxes)
        self.failed = sum(int(inbox.failed) for inbox in inboxes)


class PeerHome:
    """The pages of `memory` that are still with the source: all of RAM, which nobody has touched, or those in `away`,
    whatever they hold, of a VM that does not run yet.

    large: a bitmap of blocks, as of frames LARGE: of one without its bit, with little to come, pages stay small if the
    VM's are "auto"; None: all are large. unit: how much a touch brings (pyvmm.memory.source.UNITS; "block" is up to 64
    KiB); workers: threads that answer faults. Raises BadInput, HostError.

    Who touches a page waits until it has come, also while there is no connection: that ends with connect() or end().
    All methods may be called from any thread, and raise MemoryAccessError once the memory is closed.
    """

    def __init__(
        self,
        memory: GuestMemory,
        large: bytes | None = None,
        unit: str = "adaptive",
        workers: int = WORKERS,
        away: PageSet | None = None,
    ) -> None:
        self._engine = memory.engine
        self._pages = memory.size // PAGE_SIZE
        self._urgent: PageChannel | None = None
        self._inboxes: dict[PageChannel, CData] = {}  # of channels that receive, or have received
        self._receiving: set[PageChannel] = set()
        self._over = False
        self._reason = ""
        words = words_for(-(-self._pages // _BLOCK_PAGES))
        self._large = ffi.NULL
        if large is not None and memory.backing == "auto":
            self._large = ffi.new("uint64_t[]", words)
            ffi.memmove(self._large, large[: words * 8], min(len(large), words * 8))
        out = ffi.new("struct pv_peer **")
        store = unit == "block"
        opened = self._engine.call(lambda native: lib.pv_peer_open(native, self._large, store, out), equip=False)
        check(opened, "pv_peer_open")
        self._peer = out[0]
        memory.keep(lambda: lib.pv_peer_close(self._peer))
        memory.before_end(lambda: self.end(errno.ECANCELED, "the VM is closed"))
        self.struct = ffi.new("struct pv_home *")
        lib.pv_peer_home(self._peer, self.struct)
        self._source = Source(self._engine, "peer", self, unit, workers, away, self._large)

    def _call(self, function: Callable[..., int], *arguments: CData) -> int:
        """While a call is under way the memory is not closed."""
        return self._engine.call(lambda _: function(self._peer, *arguments), equip=False)

    def explain(self, number: int) -> str:
        """What an errno of a failed fetch means."""
        return self._reason or f"the source of the migration is gone: {os.strerror(number)}"

    # ---- what the guest waits for ----

    def connect(self, channel: PageChannel) -> None:
        """From now on requests go there, also those that were open when the last connection broke. That is not used any
        more then: only now may it be closed, and a receive() that has not returned be waited for, since it may wait for
        the lock of a block that a request is open for. Raises HostError after end()."""
        if self._call(lib.pv_peer_connect, channel.stream) < 0:
            raise HostError(f"no page comes from the source any more: {self.explain(errno.ECANCELED)}")
        self._urgent = channel

    def break_off(self) -> None:
        """Requests wait for another connection; this one is shut down, and not used any more."""
        self._engine.tell(lambda _: lib.pv_peer_break(self._peer))

    def end(self, number: int = errno.EHOSTDOWN, reason: str = "") -> None:
        """No page comes any more: each touch of one that is away fails with FetchError. number: an errno; reason: a
        text that says why. The first end counts. Receivers are ended too."""
        self._reason = self._reason or reason
        self._over = True
        self._engine.tell(lambda _: lib.pv_peer_end(self._peer, number))
        for channel in list(self._receiving):
            channel.end()

    def wait(self, seconds: float) -> str:
        """Waits until there is no connection, for so long at most: "connected", "apart" or "ended"."""
        return _STATES[self._call(lib.pv_peer_wait, int(seconds * 1000))]

    def problem(self) -> MigrationError | None:
        """Why the last connection broke, or what it brought that breaks a rule (ProtocolError)."""
        told = self._look()
        if self._urgent is None or not told.error:
            return None
        return self._urgent.failure(-told.error, "waiting for pages", ffi.addressof(told, "frame"))

    def _look(self) -> CData:
        told = ffi.new("struct pv_peer_told *")
        self._engine.tell(lambda _: lib.pv_peer_look(self._peer, told))
        return told

    # ---- what comes ahead of that ----

    def receive(self, channel: PageChannel, limit: int) -> int | None:
        """Receives and installs what the source sends by itself: None when `limit` pages or more have come, else how
        many it says it has sent on this channel, when it has sent all. Raises PeerGone, ProtocolError."""
        end = ffi.new("struct pv_run_frame *")
        inbox = self._inboxes.setdefault(channel, ffi.new("struct pv_inbox *"))
        self._receiving.add(channel)
        try:
            if self._over:
                channel.end()
            result = self._call(lib.pv_peer_receive, inbox, channel.stream, limit, end)
        finally:
            self._receiving.discard(channel)
        channel.told(result, False, "receiving pages", end)
        return int(end.first) if result == lib.PV_RECV_END else None

    def have(self) -> PageSet:
        """The pages that are here. One that comes meanwhile may be missing."""
        return self._engine.at_home("peer").complement()

    @property
    def left(self) -> int:
        """Pages that are still with the source."""
        return self._engine.at_home("peer").runs().pages

    def fetch_rest(self) -> None:
        """Asks for all pages that are still with the source. What does not come is told as if it had been touched."""
        for first, count in self._engine.at_home("peer").runs():
            start = first // _BLOCK_PAGES * _BLOCK_PAGES  # whole blocks: they come as large pages
            end = min(-(-(first + count) // _BLOCK_PAGES) * _BLOCK_PAGES, self._pages)
            self._source.fill(start, end - start)

    def settle(self) -> None:
        """When all is here: makes blocks large that should be, and that touches have brought by small pages alone."""
        for block, look in enumerate(self._engine.looks()):
            if look == "small" and self._engine.is_for_large(block):
                with suppress(
                    HostError, KernelError
                ):  # in use, or the host has no large page: the guest runs all the same
                    self._engine.merge(block)

    def counts(self) -> PeerCounts:
        """What has been asked for, and what came."""
        return PeerCounts(self._look(), list(self._inboxes.values()))


class ServedCounts(Record):
    """What the source was asked for: requests, pages, and how many of these had never held anything; ns from a request
    to its answer here, in all and the longest. rest: pages sent unasked."""

    __slots__ = ("longest_ns", "ns", "pages", "requests", "rest", "zero_pages")

    def __init__(self, told: CData, rest: int) -> None:
        self.requests, self.pages, self.zero_pages = int(told.requests), int(told.pages), int(told.zero_pages)
        self.ns, self.longest_ns = int(told.nanoseconds), int(told.longest)
        self.rest = rest


class Served:
    """The pages of `memory`, of a VM that stands still for good, for a destination where it runs on. have: pages that
    the destination has; None: it has none.

    One thread serves the urgent channel, others send the rest, each on a channel of its own. All methods raise
    MemoryAccessError once the memory is closed, which ends them.
    """

    def __init__(self, memory: GuestMemory, have: PageSet | None = None) -> None:
        self._engine = memory.engine
        self._blocks = -(-memory.size // BLOCK_SIZE)
        self._pages = memory.size // PAGE_SIZE
        self._told = ffi.new("struct pv_served *")
        self._lock = threading.Lock()
        self._using: set[PageChannel] = set()
        self._over = False
        self._rest = 0
        memory.before_end(self.end)
        self.begin(have)

    def begin(self, have: PageSet | None = None) -> None:
        """Begins anew, after a break: all but what the destination has is to be sent, whatever has been. While nothing
        is being sent."""
        self._sent = PageSet(self._pages, () if have is None else have.runs())
        self._todo = bytearray(b"\1") * -(-self._blocks // PIECE)
        self._next, self._seen = 0, int(self._told.touched)

    def end(self) -> None:
        """Ends all connections that are in use here, now and later, so that each call returns."""
        self._over = True
        for channel in list(self._using):
            channel.end()

    def serve(self, channel: PageChannel) -> None:
        """Answers requests until the destination closes the connection. Raises PeerGone, ProtocolError, and
        MigrationError where a page of this VM cannot be brought."""
        frame = ffi.new("struct pv_run_frame *")
        self._use(channel, "answering requests", lib.pv_serve, self._sent.bits, self._told, frame, frame=frame)

    def send_rest(self, channel: PageChannel, block: int, blocks: int, zeros: bool = True) -> int:
        """Sends what has not been sent of these blocks; how many pages. zeros: those that hold nothing but zeros go as
        such. Raises as serve()."""
        sent = ffi.new("uint64_t *")
        try:
            self._use(channel, "sending pages", lib.pv_send_rest, self._sent.bits, block, blocks, zeros, sent)
        finally:
            with self._lock:
                self._rest += sent[0]
        return int(sent[0])

    def send_all(
        self,
        channel: PageChannel,
        zeros: bool = True,
        stop: Callable[[], bool] = lambda: False,
        pace: Callable[[int], object] | None = None,
    ) -> int:
        """Sends what nobody else sends of all the rest, and END: how many pages. What the guest touched last says what
        comes next. stop: asked now and then whether to give up, without END; pace: waits until so many more bytes may
        go, and then a block is sent at a time."""
        pages = 0
        while (piece := self._take_piece()) is not None:
            end, step = min((piece + 1) * PIECE, self._blocks), PIECE if pace is None else 1
            for block in range(piece * PIECE, end, step):
                if stop():
                    return pages
                sent = self.send_rest(channel, block, min(step, end - block), zeros)
                pages += sent
                if pace is not None:
                    pace(sent * PAGE_SIZE)
        channel.send_end(0, pages)
        return pages

    @property
    def touched(self) -> int | None:
        """The page that was asked for last."""
        return int(self._told.touched) - 1 if self._told.touched else None

    def counts(self) -> ServedCounts:
        """What has been asked for, and sent."""
        return ServedCounts(self._told, self._rest)

    def _take_piece(self) -> int | None:
        """The next piece that nobody has taken: from the last touch on, if another was, else from where we are."""
        with self._lock:
            if self._told.touched != self._seen:
                self._seen = int(self._told.touched)
                self._next = (self._seen - 1) // _BLOCK_PAGES // PIECE
            piece = found if (found := self._todo.find(1, self._next)) >= 0 else self._todo.find(1)
            if piece < 0:
                return None
            self._todo[piece], self._next = 0, piece + 1
            return piece

    def _use(
        self, channel: PageChannel, what: str, function: Callable[..., int], *arguments: CData, frame: CData = None
    ) -> None:
        self._using.add(channel)
        try:
            if self._over:
                channel.end()
            result = self._engine.call(function, channel.stream, *arguments, equip=False)
        finally:
            self._using.discard(channel)
        channel.told(result, True, what, frame)
