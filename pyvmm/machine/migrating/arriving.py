# arriving.py: what the destination still gets after the switch: what touches ask for, and the rest meanwhile.
"""`Arriving`: threads that receive for the home PEER."""

from __future__ import annotations

import errno
import threading
from contextlib import ExitStack, suppress

from pyvmm.errors import MemoryAccessError, MigrationError, PyvmmError
from pyvmm.layout import PAGE_SIZE
from pyvmm.migration.pages import PageChannel
from pyvmm.migration.peer import PeerHome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory import GuestMemory
    from pyvmm.memory.pageset import PageSet
    from pyvmm.migration.accepting import Acceptor
    from pyvmm.migration.control import Control
    from pyvmm.migration.events import Report

_STEP = 1 << 14
"""Pages between two looks at whether it is to end."""
_TICK = 0.05


class Arriving:
    """The pages of a guest that runs here, and that are with its source. large: the source's large blocks, as frames
    LARGE have them; away: the pages that are there, None: all."""

    def __init__(self, memory: GuestMemory, large: bytes | None, unit: str, away: PageSet | None) -> None:
        self._memory = memory
        self._home = PeerHome(memory, large, unit, away=away)
        self._pages: list[PageChannel] = []
        self._urgent: PageChannel | None = None
        self._old: list[PageChannel] = []
        """Of a connection that broke: threads may still be about to leave them."""
        self._threads: list[threading.Thread] = []
        self._asking: threading.Thread | None = None
        self._failure: PyvmmError | None = None
        self._source: tuple[int, int] = (0, 0)
        self._wire = 0

    def join(self, pages: list[PageChannel], urgent: PageChannel, source: tuple[int, int]) -> None:
        """The connections, which it closes. source: where the pages can be read (local): pid and address."""
        self._old += self._channels
        self._pages, self._urgent, self._source = pages, urgent, source
        self._wire -= sum(int(channel.stream.wire_bytes) for channel in self._channels)  # of rounds
        for channel in (*pages, urgent):
            channel.stream.pull_pid, channel.stream.pull_ram = source

    @property
    def _channels(self) -> list[PageChannel]:
        return [*self._pages, *([self._urgent] if self._urgent is not None else ())]

    def rejoin(self, acceptor: Acceptor, control: Control) -> None:
        """After a break: those that the source opens anew. Raises PeerGone."""
        with ExitStack() as made:

            def channel(kind: str, index: int) -> PageChannel:
                connection = made.enter_context(acceptor.joined(kind, index, check=control.check))
                return PageChannel(connection, self._memory.base, self._memory.size // PAGE_SIZE)

            pages = [channel("pages", index) for index in range(len(self._pages))]
            self.join(pages, channel("urgent", 0), self._source)
            made.pop_all()

    def start(self) -> None:
        """Touches are answered, and the rest comes, in threads."""
        assert self._urgent is not None
        self._home.connect(self._urgent)
        self._leave()
        self._failure = None
        for channel in self._pages:
            thread = threading.Thread(target=self._receive, args=(channel,), name="migration pages", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """What is connected is of no use any more: touches wait. Threads are not waited for: one that is about to
        install pages may wait for a block that somebody holds who waits for the next connection."""
        self._home.break_off()
        for channel in self._pages:
            channel.end()

    def _leave(self) -> None:
        """Threads and connections from before; there is a new connection, or there will be none."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for channel in self._old:
            self._wire += int(channel.stream.wire_bytes)
            channel.close()
        self._old.clear()

    def close(self) -> None:
        """Ends it; twice is once. What is not here by now never comes."""
        with suppress(MemoryAccessError):  # the VM is closed, and the home was ended with it
            self.stop()
            if self._home.left:
                self._home.end(errno.ECANCELED, "the migration has ended")
        if self._asking is not None:
            self._asking.join()
        self._old += self._channels
        self._pages, self._urgent = [], None
        self._leave()

    def wait(self, control: Control) -> None:
        """Until all pages are here. Raises what has gone wrong."""
        while any(thread.is_alive() for thread in self._threads):
            for thread in self._threads:
                thread.join(_TICK)
            self._check(control)
        self._check(control)
        while self._home.left:  # what was answered to a touch and did not get in
            if self._asking is None or not self._asking.is_alive():
                self._asking = threading.Thread(target=self._home.fetch_rest, name="migration rest", daemon=True)
                self._asking.start()
            self._asking.join(_TICK)
            self._check(control)
        self._home.settle()

    def _check(self, control: Control) -> None:
        control.check()
        if self._failure is not None:
            raise self._failure
        if self._home.wait(0) != "connected":
            raise self._home.problem() or MigrationError("the connection for touched pages broke")

    def _receive(self, channel: PageChannel) -> None:
        try:
            while self._home.receive(channel, _STEP) is None:
                pass
        except PyvmmError as error:
            self._failure = error

    def have(self) -> PageSet:
        """The pages that are here."""
        return self._home.have()

    def lose(self, reason: str) -> None:
        """No page comes any more."""
        self._home.end(errno.EHOSTDOWN, reason)

    def fill_in(self, report: Report) -> None:
        """What was asked for, and came."""
        counts = self._home.counts()
        report.faults, report.fault_seconds = counts.requests, counts.ns / 1e9
        report.wire_bytes += self._wire + sum(int(channel.stream.wire_bytes) for channel in self._channels)
