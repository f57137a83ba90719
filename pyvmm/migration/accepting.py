# accepting.py: how a destination gets its connections: whoever connects says first what he is. Seconds.
"""`Acceptor`: one HELLO at a time, the JOINs that belong to it, and RESUMEs."""

from __future__ import annotations

import hmac
import threading
import time
from contextlib import suppress

from pyvmm.errors import MigrationError, PeerGone, ProtocolError, PyvmmError
from pyvmm.migration.frames import CHANNELS, Hello, Join, Joined, Refuse, Resume
from pyvmm.migration.proof import wrong_join
from pyvmm.migration.transport import HANDSHAKE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.migration.capture import Recorder
    from pyvmm.migration.connection import Connection
    from pyvmm.migration.frames import Frame
    from pyvmm.migration.opening import Terms
    from pyvmm.migration.transport import Caller, Listener

_MOST = 32
"""Connections that have not said yet what they are: more are closed at once."""
_LOOK = 0.1
"""Between two looks at whether the source is still there, while its connections do not come."""
_NAMES = {number: name for name, number in CHANNELS.items()}


class Acceptor:
    """Takes connections in a thread of its own, each in one more until it has said what it is."""

    def __init__(self, listener: Listener, recorder: Recorder | None = None) -> None:
        self._listener = listener
        self._recorder = recorder
        self._news = threading.Condition()
        self._hello: tuple[Connection, Hello] | None = None
        self._resume: tuple[Connection, Resume] | None = None
        self._busy = False
        self._terms: Terms | None = None
        self._places: dict[tuple[str, int], Connection | None] = {}
        self._new: dict[int, Caller | Connection] = {}
        self._numbers = 0
        self._closed = False
        self.troubles: list[str] = []
        """What came to nothing lately, for people."""
        self._thread = threading.Thread(target=self._accept, name="migration listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody is accepted any more; who has not been asked for is closed."""
        with self._news:
            self._closed = True
            self._news.notify_all()
            waiting = [*self._new.values(), *(place for place in self._places.values() if place is not None)]
        for connection in waiting:
            connection.end()
        self._thread.join()
        with self._news:
            self._news.wait_for(lambda: not self._new)
        for pair in (self._hello, self._resume):
            if pair is not None:
                pair[0].close()
        for place in self._places.values():
            if place is not None:
                place.close()
        self._listener.close()

    def hello(self, timeout: float) -> tuple[Connection, Hello] | None:
        """The next one who wants to migrate here; until refused() nobody else is let in."""
        with self._news:
            self._news.wait_for(lambda: self._hello is not None or self._closed, timeout)
            found, self._hello = self._hello, None
            return found

    def refused(self, why: str) -> None:
        """Whoever said HELLO cannot migrate here: another one may."""
        self._note(why)
        with self._news:
            self._busy = False

    def expect(self, terms: Terms, places: list[tuple[str, int]]) -> None:
        """From now on JOINs for these places (kind and index) are taken; those that nobody asked for are closed."""
        with self._news:
            self._terms = terms
            left, self._places = [place for place in self._places.values() if place is not None], dict.fromkeys(places)
        for connection in left:
            connection.close()

    def joined(
        self, kind: str, index: int, timeout: float = HANDSHAKE, check: Callable[[], None] = lambda: None
    ) -> Connection:
        """The connection for a place, which is the caller's then. check: called while it does not come, and raises
        where it never will. Raises PeerGone."""
        place, deadline = (kind, index), time.monotonic() + timeout
        with self._news:
            while self._places.get(place) is None:
                check()
                left = deadline - time.monotonic()
                if self._closed or left <= 0:
                    raise PeerGone(f"the source has not opened its connection for {kind} in time")
                self._news.wait(min(left, _LOOK))
            connection = self._places.pop(place)
            assert connection is not None
            return connection

    def resume(self, timeout: float) -> tuple[Connection, Resume] | None:
        """Who wants to go on with the migration, by its id and the key of WELCOME."""
        with self._news:
            self._news.wait_for(lambda: self._resume is not None or self._closed, timeout)
            found, self._resume = self._resume, None
            return found

    # ---- the threads ----

    def _accept(self) -> None:
        while not self._closed:
            try:
                caller = self._listener.call(0.2)
            except PyvmmError as error:
                self._note(str(error))
                continue
            if caller is None:
                continue
            number = self._numbers = self._numbers + 1
            with self._news:
                full = len(self._new) >= _MOST or self._closed
                if not full:
                    self._new[number] = caller
            if full:
                caller.close()
                continue
            thread = threading.Thread(target=self._first, args=(number, caller), name="migration caller", daemon=True)
            thread.start()

    def _first(self, number: int, caller: Caller) -> None:
        """Whoever stalls here is in nobody's way."""
        connection, kept = None, False
        try:
            connection = caller.greet()
            connection.recorder, connection.channel = self._recorder, number - 1
            with self._news:
                self._new[number] = connection
                if self._closed:
                    connection.end()
            kept = self._place(connection, connection.recv(HANDSHAKE))
        except PeerGone:
            pass  # somebody looked whether anybody listens
        except MigrationError as error:
            self._note(str(error))
        finally:
            if connection is not None and not kept:
                connection.close()
            with self._news:
                del self._new[number]
                self._news.notify_all()

    def _place(self, connection: Connection, frame: Frame) -> bool:
        """Is the connection of use?"""
        if isinstance(frame, Hello):
            with self._news:
                if self._busy or self._closed:
                    refusal = "another guest moves here"
                else:
                    self._busy, self._hello, refusal = True, (connection, frame), ""
                    self._news.notify_all()
        elif isinstance(frame, Join):
            refusal = self._join(connection, frame)
        elif isinstance(frame, Resume):
            refusal = self._again(connection, frame)
        else:
            raise ProtocolError(f"{connection.peer} begins with {frame.name()}")
        if refusal:
            self._note(f"{connection.peer}: {frame.name()}: {refusal}")
            with suppress(MigrationError):
                connection.send(Refuse(refusal), 1.0)
        return not refusal

    def _join(self, connection: Connection, frame: Join) -> str:
        place = (_NAMES[frame.kind], frame.index)
        with self._news:
            terms = self._terms
            if terms is None:
                return "no guest moves here"
            if wrong := wrong_join(frame, connection, terms.id, terms.token):
                return wrong
            if place not in self._places or self._places[place] is not None:
                return "there is no such place, or it is taken"
            connection.send(Joined(frame.kind, frame.index), 1.0)
            self._places[place] = connection
            self._news.notify_all()
        return ""

    def _again(self, connection: Connection, frame: Resume) -> str:
        with self._news:
            terms = self._terms
            if terms is None or not _same(frame.id, terms.id) or not _same(frame.resume, terms.resume):
                return "no such migration was begun here"
            before, self._resume = self._resume, (connection, frame)
            self._news.notify_all()
        if before is not None:
            before[0].close()
        return ""

    def _note(self, text: str) -> None:
        self.troubles = [*self.troubles[-9:], f"{time.strftime('%H:%M:%S')} {text}"]


def _same(theirs: bytes, ours: bytes) -> bool:
    return hmac.compare_digest(theirs, ours)
