# control.py: the control connection of a migration: frames in order, one thread that reads, signs of life. Seconds.
"""`Control`."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress

from pyvmm.errors import MigrationError, PeerGone, PyvmmError
from pyvmm.migration.connection import SILENCE
from pyvmm.migration.frames import Cancel, Ping, Pong, Refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from pyvmm.migration.connection import Connection
    from pyvmm.migration.frames import Frame
    from pyvmm.migration.order import Order

    Kind = TypeVar("Kind", bound=Frame)

_PING = 5.0
"""After so long without a frame of ours one is sent."""
_CANCELLING = 1.0
"""For the other side to say that it has heard of our CANCEL."""


class Cancelled(MigrationError):
    """One side has called the migration off: what it said is the text."""


class Abandoned(MigrationError):
    """This side does not wait any more: not for the other one to come back, nor for what it decides."""


class Control:
    """Sends and receives what `order` allows; PING and PONG are its own. on_end: called once, in whichever thread, when
    the connection is of no use any more, so that others end what waits.

    One thread at a time waits for frames; any may send. Both raise PeerGone for a connection that is broken,
    ProtocolError for a peer that breaks the rules, Cancelled where either side has cancelled.
    """

    def __init__(self, connection: Connection, order: Order, on_end: Callable[[], None] = lambda: None) -> None:
        self.connection = connection
        self.order = order
        self.on_end = on_end
        self.failure: MigrationError | None = None
        """Why there is nothing more to come."""
        self._lock = threading.Lock()  # a frame is checked against the order and sent as one
        self._came: deque[Frame] = deque()
        self._news = threading.Condition()
        self._last_sent = self._last_came = time.monotonic()
        self._pings = 0
        self._closing = self._heard = False
        self._thread = threading.Thread(target=self._read, name="migration control", daemon=True)

    def start(self) -> None:
        """Begins to read: the order must stand as the other side's does by then."""
        self._thread.start()

    @property
    def peer(self) -> str:
        """What people call the other side."""
        return self.connection.peer

    def send(self, frame: Frame) -> None:
        """Sends one."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            self.order.sent(frame)
            self._send(frame)

    def _send(self, frame: Frame) -> None:
        self._last_sent = time.monotonic()
        self.connection.send(frame)

    def expect(self, kind: type[Kind], timeout: float | None = None) -> Kind:
        """The next frame, which must be of this kind. timeout: None waits for as long as the peer shows signs of
        life; else raises PeerGone."""
        frame = self.next(timeout)
        if type(frame) is not kind:
            raise MigrationError(f"{self.peer} sent {frame.name()}, and {kind.name()} was to come")
        return frame

    def next(self, timeout: float | None = None) -> Frame:
        """The next frame, whatever it is."""
        with self._news:
            if not self._news.wait_for(lambda: self._came or self.failure is not None, timeout):
                raise PeerGone(f"{self.peer} does not answer")
            if self._came:
                return self._came.popleft()
            assert self.failure is not None
            raise self.failure

    def check(self) -> None:
        """Raises what has gone wrong, if anything has."""
        if self.failure is not None:
            raise self.failure

    def why(self, error: PyvmmError) -> PyvmmError:
        """Of an error that another connection met with: what the other side says of it, if that comes soon."""
        if isinstance(error, PeerGone) and error is not self.failure:
            with self._news:
                self._news.wait_for(lambda: self.failure is not None, _CANCELLING)
        return self.failure if isinstance(self.failure, Cancelled) else error

    def refuse(self, reason: str) -> None:
        """Says REFUSE instead of WELCOME."""
        with suppress(MigrationError):
            self.send(Refuse(line(reason)))

    def cancel(self, reason: str) -> None:
        """Says CANCEL, if that can still be said, and has everything that waits here end. The caller has changed the
        decision before."""
        with suppress(MigrationError), self._lock:
            cancel = Cancel(line(reason))
            self.order.sent(cancel)
            self._send(cancel)
        self._end(Cancelled(reason))

    def fail(self, failure: MigrationError) -> None:
        """Has everything that waits here, or will, raise this."""
        self._end(failure)

    def linger(self) -> bool:
        """After cancel(): until the other side has heard of it, or a second at most. Has it?"""
        self._thread.join(_CANCELLING)
        return self._heard

    def close(self) -> None:
        """Ends the connection; twice is once."""
        self._closing = True
        self._end(PeerGone("the connection is closed"))
        self.connection.end()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()
        self.connection.close()

    # ---- the thread ----

    def _read(self) -> None:
        try:
            while not self._closing:
                if not self.connection.ready(1.0):
                    self._keep_alive()
                    continue
                frame = self.connection.recv()
                self._last_came = time.monotonic()
                if not self._take(frame):
                    return
        except MigrationError as error:
            self._end(error)
        except Exception as error:  # a bug of ours must not leave the session waiting
            self._end(MigrationError(f"{self.peer}: {type(error).__name__}: {error}"))
            raise

    def _take(self, frame: Frame) -> bool:
        """False after the last one."""
        with self._lock:
            heeded = self.order.came(frame)
            if type(frame) is Ping and heeded:
                self._send(Pong(frame.number))
        if isinstance(frame, Ping):  # or Pong
            return True
        if isinstance(frame, Cancel):
            self._heard = True
            with suppress(MigrationError), self._lock:
                if not self.order.cancelled:
                    self._send(Cancel("heard"))  # beside the order, which has ended
            self._end(Cancelled(f"{self.peer} says: {frame.reason}"))
            return False
        if heeded:
            with self._news:
                self._came.append(frame)
                self._news.notify_all()
        return True

    def _keep_alive(self) -> None:
        now = time.monotonic()
        if now - self._last_came > SILENCE:
            raise PeerGone(f"{self.peer} has said nothing for {SILENCE:g} s")
        if now - self._last_sent > _PING and self.order.phase not in ("new", "asked", "ended"):
            with self._lock:
                self._pings += 1
                ping = Ping(self._pings)
                self.order.sent(ping)
                self._send(ping)

    def _end(self, failure: MigrationError) -> None:
        with self._news:
            first = self.failure is None
            if first:
                self.failure = failure
            self._news.notify_all()
        if first:
            self.on_end()


def line(text: str) -> str:
    """As a frame takes it."""
    return "".join(c if c.isprintable() else " " for c in text)[:250]
