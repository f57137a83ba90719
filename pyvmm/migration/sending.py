# sending.py: the source's side of a round: sets of pages dealt out to the channels, at a pace. Units: pages of 4 KiB,
# seconds, bytes.
"""`Sender`: a thread a channel. `Pace`: no more than so many bytes a second."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

from pyvmm._native import ffi, lib
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.memory.pageset import PageSet
from pyvmm.memory.trace import Runs
from pyvmm.migration.pages import PageChannels

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.memory import GuestMemory
    from pyvmm.migration.pages import PageChannel

_STEP = 1024
"""Pages in one call of C: 4 MiB, about 2 ms, after which a cancel is heeded."""
_AT_ONCE = 32
"""Pages that are sent without a thread, which takes longer to start: they fit into any socket's buffer."""
_BLOCK_BYTES = BLOCK_SIZE // PAGE_SIZE // 8
"""Of a bitmap, for a block of 2 MiB."""


class Pace:
    """Bytes a second that all channels together may send; 0: as fast as it goes."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._due = 0.0

    @property
    def bound(self) -> bool:
        """Is there a limit?"""
        return self._rate > 0

    def wait(self, size: int, stop: threading.Event) -> None:
        """Before `size` bytes: returns when they may go, or at `stop`."""
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            self._due = max(self._due, now - 0.01)  # what was not used is not saved up
            due, self._due = self._due, self._due + size / self._rate
        if due > now:
            stop.wait(due - now)


class Sender(PageChannels):
    """Rounds over channels, whose closing is the caller's. pulled: the other side reads the pages out of our memory."""

    def __init__(
        self, memory: GuestMemory, channels: Sequence[PageChannel], rate: float = 0, pulled: bool = False
    ) -> None:
        self._memory = memory
        super().__init__(channels)
        self._pages = memory.size // PAGE_SIZE
        self.pace = Pace(rate)
        """Of all that this side sends: also of what goes after the switch."""
        self._pulled = pulled
        self._pins = ExitStack()
        self._stop = threading.Event()
        self._beginning = threading.Lock()  # none of the threads is joined before it runs
        self._tables = [ffi.new("struct pv_run_pages[]", _STEP) for _ in channels]
        self._sent = [0] * len(channels)
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    @property
    def sent(self) -> int:
        """Pages of this round that have gone."""
        return sum(self._sent)

    def begin(self, round: int, pages: PageSet, zeros: PageSet | None = None) -> None:
        """Sends these pages, each channel its blocks, and END; zeros: pages that hold nothing, told as such. After
        end() nothing."""
        assert not self._threads
        shares = self._deal(pages)
        with self._beginning:
            for index, channel in enumerate(self._channels if not self._stop.is_set() else ()):
                empty = zeros.runs() if zeros is not None and index == 0 else Runs()
                self._sent[index] = 0
                if len(self._channels) == 1 and not empty and shares[0].pages <= _AT_ONCE:
                    self._channel(index, channel, round, shares[index], empty)
                    return
                thread = threading.Thread(
                    target=self._channel, args=(index, channel, round, shares[index], empty), name="migration pages"
                )
                self._threads.append(thread)
                thread.start()

    def done(self, seconds: float) -> bool:
        """Waits so long at most: has all of the round gone? Raises what a channel met with."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        self._threads.clear()
        if self._errors:
            raise self._errors.pop(0)
        return True

    def round_done(self) -> None:
        """The other side has all of the round: pulled pages may go away again."""
        self._pins.close()

    def end(self) -> None:
        """No more is sent: ends what waits in the channels, and the threads."""
        self._stop.set()
        super().end()
        with self._beginning:
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._pins.close()

    # ---- inside ----

    def _deal(self, pages: PageSet) -> list[Runs]:
        """Block by block in turn, so that no two channels send of one large page."""
        count = len(self._channels)
        if count == 1:
            return [pages.runs()]
        bits = ffi.buffer(pages.bits)
        shares = []
        for index in range(count):
            others = bytearray(b"\xff" * _BLOCK_BYTES * count)
            others[index * _BLOCK_BYTES : (index + 1) * _BLOCK_BYTES] = bytes(_BLOCK_BYTES)
            mask = (bytes(others) * (len(bits) // len(others) + 1))[: len(bits)]
            share = ffi.new("uint64_t[]", len(bits) // 8)
            ffi.memmove(share, bits, len(bits))
            lib.pv_bits_and_not(share, ffi.from_buffer("uint64_t[]", mask), len(bits) // 8)
            shares.append(Runs.from_bits(share, self._pages))
        return shares

    def _channel(self, index: int, channel: PageChannel, round: int, runs: Runs, zeros: Runs) -> None:
        try:
            for first, count in zeros:
                channel.send_zeros(first, count, round)
                self._sent[index] += count
            self._send(index, channel, round, runs)
            if not self._stop.is_set():
                channel.send_end(round, self._sent[index])
        except BaseException as error:  # whatever it is, it is the session's to deal with
            self._errors.append(error)

    def _send(self, index: int, channel: PageChannel, round: int, runs: Runs) -> None:
        if self._pulled and not self._stop.is_set():
            self._pins.enter_context(self._memory.pinned(runs.native, len(runs)))
        run, done, left = ffi.new("uint64_t *"), ffi.new("uint64_t *"), ffi.new("uint64_t *")
        table = self._tables[index]
        while not self._stop.is_set():
            left[0] = _STEP
            used = lib.pv_runs_cut(runs.native, len(runs), run, done, left, table, _STEP)
            if not used:
                return
            pages = _STEP - int(left[0])
            self.pace.wait(pages * PAGE_SIZE, self._stop)
            with self._memory.pinned(table, used):
                channel.send_table(table, used, round)
            self._sent[index] += pages
