# link.py: the source's connections to its destination, all together, and how they are made anew after a break. Seconds.
"""`Link`; `PeerDied`: the other side was killed, having decided something."""

from __future__ import annotations

from contextlib import ExitStack, suppress

from pyvmm.errors import MigrationError, PeerGone
from pyvmm.layout import PAGE_SIZE
from pyvmm.migration.control import Abandoned, Control
from pyvmm.migration.decision import Watch
from pyvmm.migration.frames import DECISIONS, Refuse, Resume, Resumed
from pyvmm.migration.order import DESTINATION
from pyvmm.migration.pages import PageChannel
from pyvmm.migration.transport import HANDSHAKE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading

    from pyvmm.memory import GuestMemory
    from pyvmm.migration.decision import Decision
    from pyvmm.migration.opening import Terms, Ways

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0
_LOOK = 0.1
"""From one look at the other side's witness to the next, while nothing can be reached."""
_NAMES = {number: name for name, number in DECISIONS.items()}


class PeerDied(PeerGone):
    """decision: of frames.DECISIONS, what the other side had decided when it was killed."""

    def __init__(self, side: str, decision: str) -> None:
        self.decision = decision
        super().__init__(f"the {side} was killed (it had decided: {decision})")


class Link:
    """Of a source. control: the connection for frames; pages: those for pages; urgent: that for requests, in post-copy
    and hybrid. What breaks is closed by again(), or close()."""

    def __init__(self, ways: Ways, terms: Terms, control: Control, decision: Decision, memory: GuestMemory) -> None:
        self.terms = terms
        self.control = control
        self.pages: list[PageChannel] = []
        self.urgent: PageChannel | None = None
        self._memory = memory
        self._ways = ways
        self._decision = decision
        self._watch: Watch | None = None
        self._stack = ExitStack()
        self._epoch = 0
        self._wait = 0.0
        """Before the next attempt to connect anew."""
        self.breaks = 0
        """Connections made anew."""

    def join(self, pages: bool = True) -> None:
        """Opens the witnesses' connections; and with `pages` those for pages. Raises MigrationError."""
        terms, ways = self.terms, self._ways
        if pages:
            self.pages = [self._channel("pages", index) for index in range(terms.channels)]
            self.urgent = self._channel("urgent", 0) if terms.mode != "precopy" else None
        own = ways.join(terms, "source-witness", 0, self._stack)
        self._decision.start_witness(own, terms.token)
        watch = Watch(ways.join(terms, "destination-witness", 0, self._stack), DESTINATION, terms.token)
        self._stack.callback(watch.close)
        self._watch = watch
        self._wait = 0.0

    def _channel(self, kind: str, index: int) -> PageChannel:
        connection = self._ways.join(self.terms, kind, index, self._stack)
        channel = PageChannel(connection, self._memory.base, self._memory.size // PAGE_SIZE)
        channel.stream.pulled = self.local
        self._stack.callback(channel.close)
        return channel

    @property
    def local(self) -> bool:
        """Pages are read out of the source."""
        return "local" in self.terms.features

    def close(self) -> None:
        """Closes all; twice is once."""
        self.control.close()
        self._stack.close()

    def again(self, stop: threading.Event) -> str:
        """After a break: connects until the destination answers. Returns its decision; the control connection is new,
        and the order is the caller's to set, and join() to call. Raises PeerDied, and Abandoned at `stop`."""
        self.control.close()
        while True:
            left, self._wait = self._wait, min(max(2 * self._wait, _FIRST_WAIT), _LONGEST_WAIT)
            while left > 0:
                self.check_witness(0)
                if stop.wait(min(left, _LOOK)):
                    raise Abandoned("nobody waits for the destination any more")
                left -= _LOOK
            self._epoch += 1
            try:
                theirs = self._resume()
            except MigrationError:
                continue
            self.breaks += 1
            return theirs

    def check_witness(self, seconds: float) -> None:
        """Raises PeerDied if the destination was killed, waiting so long at most for its witness to say so."""
        died = self._watch.died(seconds) if self._watch is not None else None
        if died is not None:
            raise PeerDied(DESTINATION, died)

    def _resume(self) -> str:
        connection = self._ways.connect()
        try:
            terms, decision = self.terms, DECISIONS[self._decision.value]
            connection.send(Resume(terms.id, terms.resume, self._epoch, decision), HANDSHAKE)
            answer = connection.recv(HANDSHAKE)
            if isinstance(answer, Refuse):
                raise MigrationError(f"{connection.peer} refuses to go on: {answer.reason}")
            if not isinstance(answer, Resumed) or answer.epoch != self._epoch:
                raise MigrationError(f"{connection.peer} answers RESUME by {answer.name()}")
        except BaseException:
            connection.close()
            raise
        self._stack.close()  # all of the broken ones
        self.control = Control(connection, self.control.order)
        return _NAMES[answer.decision]

    def say_held(self) -> None:
        """The guest goes on here: a destination that still is ready for it is told so."""
        with suppress(MigrationError):
            self.control.order.resumed("ready")
            self.control.start()
            self.control.cancel("the guest runs on at the source")
            self.control.linger()
