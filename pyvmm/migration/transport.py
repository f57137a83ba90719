# transport.py: connections of a migration made: who listens, who connects. Seconds.
"""`listen()` and `connect()`."""

from __future__ import annotations

import errno
import select
import socket
import struct
import time
from contextlib import suppress

from pyvmm.errors import BadInput, HostError, MigrationError, PeerGone
from pyvmm.migration.address import Address
from pyvmm.migration.connection import Connection
from pyvmm.migration.frames import MAGIC
from pyvmm.migration.tls import told
from pyvmm.sockets import PathListener

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from pyvmm.migration.tls import Tls

HANDSHAKE = 10.0
"""For connecting, and for TLS, each."""
_BACKLOG = 16


class Listener:
    """Where a destination waits for its source. `address`: with the port that was chosen. Closing it removes the
    socket's file, if it is still its own."""

    def __init__(self, listening: socket.socket | PathListener, address: Address, tls: Tls | None) -> None:
        self._listening = listening
        self._socket = listening.socket if isinstance(listening, PathListener) else listening
        self._tls = tls
        self.address = address
        self._socket.setblocking(False)

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, to poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Nobody can connect any more; twice is once."""
        self._listening.close()

    def call(self, timeout: float) -> Caller | None:
        """The next one who connects, or None in time: not a word has been exchanged. Raises HostError."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(max(0.0, timeout) * 1000):
            return None
        try:
            sock, peer = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):  # gone again
            return None
        except OSError as error:
            raise HostError(f"{self.address}: cannot accept a connection: {error.strerror}") from None
        name = "the source"
        if self.address.kind == "tcp":
            name += f" at {peer[0]}:{peer[1]}"
            _tune(sock)
        return Caller(sock, name, self._tls)

    def accept(self, timeout: float, handshake: float = HANDSHAKE) -> Connection | None:
        """The next one who connects, greeted, or None in time. Raises HostError, and what greet() does: others may
        come."""
        caller = self.call(timeout)
        return caller.greet(handshake) if caller is not None else None


class Caller:
    """Somebody who has connected. Either greet() or close() is to be called."""

    def __init__(self, sock: socket.socket, name: str, tls: Tls | None) -> None:
        self._socket = sock
        self._same = sock.dup()  # TLS takes the other one over
        self._name = name
        self._tls = tls

    def greet(self, handshake: float = HANDSHAKE) -> Connection:
        """The TLS handshake, where that is to be. One may come without it: it is a `plain_witness`. Raises
        MigrationError for one who fails at it."""
        with self._same:
            return self._greet(self._socket, self._name, handshake)

    def _greet(self, sock: socket.socket, name: str, handshake: float) -> Connection:
        if self._tls is None:
            return Connection(sock, name)
        deadline = time.monotonic() + handshake
        if _begins(sock, name, handshake) == MAGIC[:1]:
            return Connection(sock, name, plain_witness=True)
        return Connection(self._tls.wrap(sock, name, None, max(0.0, deadline - time.monotonic())), name)

    def end(self) -> None:
        """Has greet() fail, in any thread."""
        with suppress(OSError):  # it is done
            self._same.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nobody wants them."""
        self._same.close()
        self._socket.close()


def _begins(sock: socket.socket, peer: str, timeout: float) -> bytes:
    """The first byte that comes, which stays there; nothing: the other side has closed it. Closes it where none comes.
    Raises PeerGone."""
    sock.setblocking(False)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    try:
        if not poll.poll(timeout * 1000):
            raise PeerGone(f"{peer} stalled in the TLS handshake")
        return sock.recv(1, socket.MSG_PEEK)
    except OSError as error:
        sock.close()
        raise told(error, peer) from None
    except BaseException:
        sock.close()
        raise


def listen(address: Address, tls: Tls | None = None) -> Listener:
    """Listens there. Raises BadInput, HostError."""
    if address.kind == "tcp":
        return _listen_tcp(address, tls)
    _no_tls(address, tls)
    return Listener(PathListener(address.path, str(address)), address, None)


def _no_tls(address: Address, tls: Tls | None) -> None:
    if tls is not None:
        raise BadInput(f"{address}: TLS is for tcp: nobody but this user gets at a socket with a path")


def _listen_tcp(address: Address, tls: Tls | None) -> Listener:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise HostError(f"{address}: {error.strerror or error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(_BACKLOG)
        return Listener(sock, Address("tcp", address.host, sock.getsockname()[1]), tls)
    except OSError as error:
        sock.close()
        raise HostError(f"{address}: cannot listen there: {error.strerror or error}") from None


def connect(address: Address, tls: Tls | None = None, timeout: float = HANDSHAKE, witness: bool = False) -> Connection:
    """Connects. witness: for one, and so without TLS, which could not be handed to it. Raises MigrationError where
    nobody is there, or TLS fails; PeerGone where it takes too long."""
    deadline = time.monotonic() + timeout
    name = f"the destination at {address}"
    if address.kind != "tcp":
        _no_tls(address, tls)
    try:
        if address.kind == "tcp":
            sock = socket.create_connection((address.host, address.port), timeout)
            _tune(sock)
        else:
            sock = _connect_path(address.path, timeout)
    except (TimeoutError, BlockingIOError):
        raise PeerGone(f"{name} does not answer") from None
    except OSError as error:
        if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
            raise MigrationError(
                f"nobody listens at {address}: start 'pyvmm receive --listen {address}' first"
            ) from None
        raise MigrationError(f"{name} cannot be reached: {error.strerror or error}") from None
    if tls is not None and not witness:
        sock = tls.wrap(sock, name, address.host, max(0.0, deadline - time.monotonic()))
    return Connection(sock, name)


def _connect_path(path: str, timeout: float) -> socket.socket:
    """Waits where others connect at the moment: without blocking that would fail at once."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout))
        sock.connect(path)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(0))
    except BaseException:
        sock.close()
        raise
    return sock


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _tune(sock: socket.socket) -> None:
    """Frames go at once, and a host that vanished is noticed some day even where nobody sends."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
