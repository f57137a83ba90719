# rest.py: what the source still sends after the switch: answers to touches first, the rest meanwhile. Pages of 4 KiB.
"""`Rest`: threads that serve the destination of a post-copy."""

from __future__ import annotations

import threading

from pyvmm.errors import PyvmmError
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory.pageset import PageSet
from pyvmm.migration.peer import Served

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory import GuestMemory
    from pyvmm.migration.events import Report
    from pyvmm.migration.link import Link
    from pyvmm.migration.pages import PageChannel
    from pyvmm.migration.sending import Pace


class Rest:
    """The pages of a VM that stands still for good. What its threads meet with ends the link's control connection: who
    waits there makes all anew, and start() goes on with what the destination has not got."""

    def __init__(self, memory: GuestMemory, link: Link, away: PageSet | None, pace: Pace) -> None:
        """away: pages that come after the switch; None: all. pace: of what nobody has asked for."""
        self._memory = memory
        self._link = link
        self._pace = pace
        self._have = away.complement() if away is not None else None
        self._told = PageSet(memory.size // PAGE_SIZE)
        self._served = Served(memory, self._have)
        self._threads: list[threading.Thread] = []
        self._channels: list[PageChannel] = []
        self._stopping = threading.Event()
        self._wire = 0

    @property
    def missing(self) -> int:
        """Pages that the destination has not got, by its own word, or at the switch."""
        pages = self._memory.size // PAGE_SIZE
        return pages - (self._have.count() if self._have is not None else 0)

    def start(self) -> None:
        """Serves, in threads: one for what touches ask for, one for each pages channel."""
        assert self._link.urgent is not None
        self._channels = [self._link.urgent, *self._link.pages]
        self._stopping.clear()
        self._run("migration urgent", self._served.serve, self._link.urgent)
        for channel in self._link.pages:
            self._run("migration pages", self._send, channel)

    def stop(self) -> None:
        """Ends the threads; their connections are of no use any more."""
        self._stopping.set()
        for channel in self._channels:
            channel.end()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._wire += sum(int(channel.stream.wire_bytes) for channel in self._channels)
        self._channels.clear()

    def note(self, first: int, count: int, bits: bytes) -> bool:
        """A piece of what the destination says that it has, after a break. True when that was the last one: then what
        it has not got is sent."""
        self._told.put(first, count, bits)
        if first + count < self._told.pages:
            return False
        self._have, self._told = self._told, PageSet(self._told.pages)
        self._served.begin(self._have)
        self.start()
        return True

    def fill_in(self, report: Report) -> None:
        """What was asked for and sent."""
        counts = self._served.counts()
        report.faults, report.fault_seconds = counts.requests, counts.ns / 1e9
        report.wire_bytes += self._wire

    def _send(self, channel: PageChannel) -> None:
        def pace(size: int) -> None:
            self._pace.wait(size, self._stopping)

        self._served.send_all(channel, stop=self._stopping.is_set, pace=pace if self._pace.bound else None)

    def _run(self, name: str, work, channel: PageChannel) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        def run() -> None:
            try:
                work(channel)
            except PyvmmError as error:
                if not self._stopping.is_set():
                    self._link.control.fail(error)  # type: ignore[arg-type]

        self._threads.append(threading.Thread(target=run, name=name, daemon=True))
        self._threads[-1].start()
