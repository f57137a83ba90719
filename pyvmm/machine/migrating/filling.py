# filling.py: the destination's side of the rounds: RAM and states of a VM that does not run yet. Pages of 4 KiB.
"""`Filling`."""

from __future__ import annotations

from pyvmm.errors import ProtocolError, StateError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.machine.migrating.populating import Ahead
from pyvmm.memory.pageset import PageSet
from pyvmm.migration.frames import Away, Large, Prepare, Round, RoundDone, Source, States
from pyvmm.migration.local import accept
from pyvmm.migration.pages import Arrivals, PageChannel
from pyvmm.migration.receiving import Receiver
from pyvmm.snapshot.format import checksum
from pyvmm.snapshot.states import decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import ExitStack

    from pyvmm.machine.machine import VM
    from pyvmm.migration.accepting import Acceptor
    from pyvmm.migration.control import Control
    from pyvmm.migration.events import Report
    from pyvmm.migration.frames import Frame
    from pyvmm.migration.opening import Terms
    from pyvmm.state import State


class Filling:
    """From WELCOME to PREPARE. large: the bitmap of the source's large blocks, None: it said nothing; away: pages that
    come after the switch, None: all, or none; seen: those that came, hot: of them, those that the guest wrote to
    meanwhile; state: of the VM; source: pid and address where pages can be read."""

    def __init__(self, vm: VM, control: Control, terms: Terms) -> None:
        self._vm = vm
        self._control = control
        self._terms = terms
        self._total = vm.memory.size // PAGE_SIZE
        self.pages: list[PageChannel] = []
        self.urgent: PageChannel | None = None
        self.large: bytes | None = None
        self.away: PageSet | None = None
        self.source = (0, 0)
        self.seen = PageSet(self._total)
        self.hot = PageSet(self._total)
        self.state: State

    def join(self, acceptor: Acceptor, stack: ExitStack) -> None:
        """The connections for pages, as soon as the source has opened them; `stack` closes them."""
        for index in range(self._terms.channels):
            self.pages.append(self._channel(acceptor, "pages", index, stack))
        if self._terms.mode != "precopy":
            self.urgent = self._channel(acceptor, "urgent", 0, stack)

    def _channel(self, acceptor: Acceptor, kind: str, index: int, stack: ExitStack) -> PageChannel:
        connection = acceptor.joined(kind, index, check=self._control.check)
        channel = PageChannel(connection, self._vm.memory.base, self._total)
        stack.callback(channel.close)
        return channel

    def receive(self, report: Report) -> int | None:
        """All of it. Returns how many pages are away, None where the guest will not miss any. Raises MigrationError."""
        control = self._control
        receiver = Receiver(self.pages)
        control.on_end = receiver.end
        frame = control.next()
        if isinstance(frame, Source):
            if "local" not in self._terms.features:
                raise ProtocolError(f"{control.peer} sent SOURCE, and that was not agreed on")
            self.source = accept(control.connection, frame, self.pages)
            frame = control.next()
        large = bytearray()
        while isinstance(frame, Large):
            if frame.first != len(large) * 8:
                raise ProtocolError(f"{control.peer}: LARGE begins with block {frame.first} after {len(large) * 8}")
            large += frame.bits
            frame = control.next()
        if len(large) * 8 >= -(-self._vm.memory.size // BLOCK_SIZE):
            self.large = bytes(large)
        frame = self._rounds(frame, receiver, report)
        prepare = self._states(frame)
        report.wire_bytes, report.page_bytes = receiver.wire_bytes, receiver.page_bytes
        report.zero_pages = receiver.zero_pages
        control.on_end = lambda: None
        return self._check(prepare, self.seen)

    def _rounds(self, frame: Frame, receiver: Receiver, report: Report) -> Frame:
        """All of them. Returns the frame that follows."""
        if type(frame) is not Round:
            return frame
        memory, ahead = self._vm.memory, None
        if self.large is not None and memory.backing != "4k" and not memory.hugetlb:
            ahead = Ahead(memory, self.large)
        arrivals = Arrivals(self._total, self.large)
        try:
            while type(frame) is Round:
                self._control.send(RoundDone(frame.round, receiver.round(arrivals, frame.round, frame.pages)))
                self.seen.add_bits(arrivals.came)
                if frame.round > 1:
                    self.hot.add_bits(arrivals.came)
                frame = self._control.next()
        finally:
            if ahead is not None:
                ahead.end()
                report.populate_seconds += ahead.seconds
        return frame

    def _states(self, frame: object) -> Prepare:
        states, away, told = bytearray(), PageSet(self._total), 0
        while True:
            if isinstance(frame, States):
                states += frame.data
            elif isinstance(frame, Away):
                if frame.first % 8 or frame.first + frame.count > self._total:
                    raise ProtocolError(f"{self._control.peer}: AWAY of pages that are not RAM, or within a byte")
                away.put(frame.first, frame.count, frame.bits)
                told += frame.count
            else:
                break
            frame = self._control.next()
        if not isinstance(frame, Prepare):
            raise ProtocolError(f"{self._control.peer} sent something else where PREPARE was to come")
        if checksum(states) != frame.checksum:
            raise ProtocolError(f"{self._control.peer}: the states came damaged")
        if self._terms.mode == "hybrid":
            if told != self._total:
                raise ProtocolError(f"{self._control.peer}: AWAY tells of {told} pages of {self._total}")
            self.away = away
        try:
            self.state = decode(bytes(states))
        except StateError as error:
            raise ProtocolError(f"{self._control.peer}: {error}") from None
        return frame

    def _check(self, prepare: Prepare, seen: PageSet) -> int | None:
        """Each page of RAM has come or is away."""
        peer, mode = self._control.peer, self._terms.mode
        away = self._total if mode == "postcopy" else self.away.count() if self.away is not None else 0
        if prepare.away != away:
            raise ProtocolError(f"{peer}: PREPARE has {prepare.away} pages away, and {away} were told")
        missing = seen.complement()
        if mode == "postcopy":
            return away
        if self.away is not None:
            missing.remove(self.away)
        if missing.count():
            raise ProtocolError(f"{peer}: {missing.count()} pages of RAM have never come")
        return away or None
