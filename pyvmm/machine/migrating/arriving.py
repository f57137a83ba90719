# arriving.py: what the destination still gets after the switch: what touches ask for, and the rest meanwhile.
"""`Arriving`: threads that receive for the home PEER."""

from __future__ import annotations

import errno
import threading
import time

from pyvmm.errors import MigrationError, PyvmmError
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
        self._threads: list[threading.Thread] = []
        self._failure: PyvmmError | None = None
        self._source: tuple[int, int] = (0, 0)
        self._wire = 0

    def join(self, pages: list[PageChannel], urgent: PageChannel, source: tuple[int, int]) -> None:
        """The connections. source: where the pages can be read (local): pid and address."""
        self._pages, self._urgent, self._source = pages, urgent, source
        for channel in (*pages, urgent):
            channel.stream.pull_pid, channel.stream.pull_ram = source

    def rejoin(self, acceptor: Acceptor) -> None:
        """After a break: those that the source opens anew. Raises PeerGone."""

        def channel(kind: str, index: int) -> PageChannel:
            return PageChannel(acceptor.joined(kind, index), self._memory.base, self._memory.size // PAGE_SIZE)

        pages = [channel("pages", index) for index in range(len(self._pages))]
        self.join(pages, channel("urgent", 0), self._source)

    def start(self) -> None:
        """Touches are answered, and the rest comes, in threads."""
        self._failure = None
        assert self._urgent is not None
        self._home.connect(self._urgent)
        for channel in self._pages:
            thread = threading.Thread(target=self._receive, args=(channel,), name="migration pages", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """What is connected is of no use any more: touches wait."""
        self._home.break_off()
        for channel in self._pages:
            channel.end()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for channel in (*self._pages, *([self._urgent] if self._urgent is not None else ())):
            self._wire += int(channel.stream.wire_bytes)
            channel.stream.wire_bytes = 0

    def wait(self, control: Control) -> None:
        """Until all pages are here. Raises what has gone wrong."""
        while any(thread.is_alive() for thread in self._threads):
            for thread in self._threads:
                thread.join(_TICK)
            self._check(control)
        self._check(control)
        self._home.fetch_rest()  # what was answered to a touch and did not get in
        while self._home.left:
            self._check(control)
            time.sleep(_TICK)
            self._home.fetch_rest()
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
        report.wire_bytes += self._wire
