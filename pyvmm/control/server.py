# server.py: a UNIX socket on which a few clients ask, line by line. Knows no VM. Whoever asks may be slow, mad or gone.
"""`Server` and `Reply`. Sizes in bytes, times in seconds."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from contextlib import suppress
from queue import SimpleQueue

from pyvmm.control import wire
from pyvmm.errors import BadInput, PyvmmError
from pyvmm.sockets import PathListener

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.control.wire import Request

MAX_CLIENTS = 8
MAX_OPEN = 16
"""Requests of one client that are not answered yet; no more are read meanwhile."""
MAX_UNREAD = 1 << 20
"""Answers that wait for one client: with more of them it is dropped."""
STALL = 10.0
"""So long without reading any of what waits for it, and a client is dropped."""
_CLOSING = 2.0
"""For what is still being answered, and read, when the server closes."""
_PIECE = 16 << 10
_TICK = 0.1


class Server:
    """Listens at `path`; serve(request, reply) is called for each request, those of a client one after the other, on a
    thread of that client's. One thread does all reading and writing, and waits for no client.

    Raises BadInput, HostError where it cannot listen there.
    """

    def __init__(self, path: str, serve: Callable[[Request, Reply], None]) -> None:
        self._serve = serve
        self._listener = PathListener(path, f"control socket {path}")
        self._listener.socket.setblocking(False)
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._clients: list[_Client] = []
        self._left: list[_Client] = []  # gone, and something that they asked for is still being done
        self._deaf = False  # accept() failed: not again before the next tick
        self._closing = float("inf")
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody can connect any more; what is being answered may be, for a while. The socket's file goes."""
        if self._closing != float("inf"):
            return
        self._closing = time.monotonic() + _CLOSING
        self._wake()
        self._thread.join()
        for client in self._clients:
            client.abandoned = True
            client.drop()
        self._listener.close()
        for client in (*self._clients, *self._left):
            client.join(_CLOSING)
        if not any(client.alive for client in (*self._clients, *self._left)):  # else somebody may still write to it
            event, self._event = self._event, -1
            os.close(event)

    def _wake(self) -> None:
        with suppress(OSError):  # closed: nothing is sent any more
            os.eventfd_write(self._event, 1)

    # ---- the thread ----

    def _run(self) -> None:
        while self._going():
            poll = select.poll()
            poll.register(self._event, select.POLLIN)
            if not self._deaf and self._closing == float("inf"):
                poll.register(self._listener.socket, select.POLLIN)
            for client in self._clients:
                poll.register(client.socket, client.wanted(self._closing == float("inf")))
            self._deaf = False
            ready = dict(poll.poll(_TICK * 1000))
            if ready.pop(self._event, 0):
                os.eventfd_read(self._event)
            if ready.pop(self._listener.socket.fileno(), 0):
                self._accept()
            for client in list(self._clients):
                client.work(ready.get(client.socket.fileno(), 0))
                if client.finished():
                    self._clients.remove(client)
                    client.drop()
                    self._left = [each for each in (*self._left, client) if each.alive]

    def _going(self) -> bool:
        if self._closing == float("inf"):
            return True
        return time.monotonic() < self._closing and any(client.busy() for client in self._clients)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.socket.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptors, perhaps: it stays ready
            self._deaf = True
            return
        sock.setblocking(False)
        if len(self._clients) == MAX_CLIENTS:
            with sock, suppress(OSError):
                sock.send(wire.answer_error(None, BadInput(f"{MAX_CLIENTS} clients are here already: try later")))
            return
        self._clients.append(_Client(sock, self._serve, self._wake))


class Reply:
    """Where the answers to one request go. Any thread; none of it waits. After result() or error() nothing comes."""

    def __init__(self, client: _Client, number: int | str | None) -> None:
        self._client = client
        self._number = number
        self._ended = False

    def event(self, fields: dict[str, object]) -> None:
        """One of several things that are told before the result."""
        self._client.send(wire.encode({"id": self._number, "event": fields}))

    def result(self, fields: dict[str, object]) -> None:
        """It is done."""
        self._end(wire.encode({"id": self._number, "result": fields}))

    def error(self, error: BaseException) -> None:
        """It came to nothing."""
        self._end(wire.answer_error(self._number, error))

    def _end(self, line: bytes) -> None:
        if not self._ended:
            self._ended = True
            self._client.send(line, last=True)


class _Client:
    """One connection. `work`, `wanted` and `finished` are the server's thread's alone."""

    def __init__(self, sock: socket.socket, serve: Callable[[Request, Reply], None], wake: Callable[[], None]) -> None:
        self.socket = sock
        self._serve = serve
        self._wake = wake
        self.abandoned = False
        """What it asked for, and nobody has begun with, is not to be done."""
        self._in = bytearray()
        self._ended = False  # nothing more comes
        self._lock = threading.Lock()  # of what follows
        self._out = bytearray()
        self._open = 0  # requests that are not answered
        self._gone = False
        self._moved = time.monotonic()  # when it last read, or had nothing to read
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    # ---- any thread ----

    def send(self, line: bytes, last: bool = False) -> None:
        """Has it sent. last: of a request."""
        with self._lock:
            if len(self._out) > MAX_UNREAD:  # so that one line may be longer than that
                self._gone = True
            if not self._gone:
                if not self._out:
                    self._moved = time.monotonic()
                self._out += line
            self._open -= last
        self._wake()

    def busy(self) -> bool:
        """Is anything of it not answered, or the answer not read?"""
        with self._lock:
            return not self._gone and bool(self._open or self._out)

    def drop(self) -> None:
        """Ends the connection; what is being answered goes nowhere."""
        with self._lock:
            self._gone = True
            self._out.clear()
        self._lines.put(None)
        self.socket.close()

    def join(self, timeout: float) -> None:
        """Waits for its thread."""
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Is its thread at work?"""
        return self._thread is not None and self._thread.is_alive()

    # ---- the server's thread ----

    def wanted(self, listening: bool) -> int:
        """What to poll for."""
        with self._lock:
            reads = listening and not self._ended and self._open < MAX_OPEN
            return (select.POLLIN if reads else 0) | (select.POLLOUT if self._out else 0)

    def work(self, events: int) -> None:
        """Reads and writes what can be, after poll() said so. POLLIN comes with the end of the stream too, POLLHUP when
        nobody is there to answer."""
        with suppress(BlockingIOError):
            try:
                if events & select.POLLOUT:
                    self._write()
                if events & select.POLLIN:
                    self._read()
                elif events & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                    self._gone = True
            except BlockingIOError:
                raise
            except OSError:
                self._gone = True
        with self._lock:
            if self._out and time.monotonic() - self._moved > STALL:
                self._gone = True

    def finished(self) -> bool:
        """Is there nothing more to do for it?"""
        with self._lock:
            return self._gone or (self._ended and not self._open and not self._out)

    def _write(self) -> None:
        with self._lock:
            del self._out[: self.socket.send(memoryview(self._out)[:_PIECE].tobytes())]
            self._moved = time.monotonic()

    def _read(self) -> None:
        data = self.socket.recv(_PIECE)
        *lines, self._in = (self._in + data).split(b"\n")
        if not data:
            self._ended = True
            lines, self._in = [*lines, self._in], bytearray()
        for line in lines:
            if len(line) >= wire.MAX_LINE:
                self._refuse_long()
                return
            if line.strip():
                self._take(bytes(line))
        if len(self._in) >= wire.MAX_LINE:
            self._refuse_long()

    def _refuse_long(self) -> None:
        self._ended = True  # where the next line begins is not known
        self._in.clear()
        self._begin()
        Reply(self, None).error(BadInput(f"a line of more than {wire.MAX_LINE} bytes: requests are shorter"))

    def _begin(self) -> None:
        with self._lock:
            self._open += 1

    def _take(self, line: bytes) -> None:
        self._begin()
        if self._thread is None:
            self._thread = threading.Thread(target=self._answer_all, name="control client", daemon=True)
            self._thread.start()
        self._lines.put(line)

    # ---- its own thread ----

    def _answer_all(self) -> None:
        while (line := self._lines.get()) is not None:
            if not self.abandoned:
                self._answer(line)

    def _answer(self, line: bytes) -> None:
        reply = Reply(self, None)
        try:
            found = wire.decode(line)
            reply = Reply(self, wire.id_of(found))
            self._serve(wire.Request(found), reply)
        except PyvmmError as error:
            reply.error(error)
        except Exception as error:  # a fault of ours must not end the thread
            reply.error(error)
