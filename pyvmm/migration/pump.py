# pump.py: between TLS and a plain socket, so that C sends and receives pages in one way. Bytes are copied once more
# than without TLS, which costs less than the encryption beside it.
"""`start()`."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from contextlib import suppress

PIECE = 256 << 10


def start(secure: ssl.SSLSocket) -> socket.socket:
    """One end of a pair of sockets whose other end is the TLS connection, which a thread serves from now on, alone.
    Where one side is closed the thread sends what it has, closes the other one, and ends."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    threading.Thread(target=_pump, args=(secure, theirs), name="pyvmm-tls", daemon=True).start()
    return ours


class _Way:
    """One direction: what was taken and not given on yet."""

    def __init__(self) -> None:
        self.held = memoryview(b"")
        self.ended = False
        """Nothing more will be taken."""
        self.wants = 0
        """What TLS needs before it goes on: POLLIN or POLLOUT."""


def _pump(secure: ssl.SSLSocket, plain: socket.socket) -> None:
    inward, outward = _Way(), _Way()
    with secure, plain, suppress(OSError):  # each end sees that the other one has gone
        while True:
            moved = _move(inward, secure, plain)
            moved |= _move(outward, plain, secure)
            if (inward.ended and not inward.held) or (outward.ended and not outward.held):
                break
            if not moved:
                _wait(secure, plain, inward, outward)
        with suppress(OSError):
            plain.shutdown(socket.SHUT_WR)
        with suppress(OSError, ValueError):
            secure.unwrap()  # sends our close_notify; what the other side still sends is dropped


def _move(way: _Way, source: socket.socket, target: socket.socket) -> bool:
    """As far as it goes without waiting: did anything move?"""
    moved = False
    way.wants = 0
    try:
        if not way.held and not way.ended:
            try:
                data = source.recv(PIECE)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                data = b""
            way.held, way.ended = memoryview(data), not data
            moved = True
        while way.held:
            way.held = way.held[target.send(way.held) :]
            moved = True
    except ssl.SSLWantReadError:
        way.wants = select.POLLIN
    except ssl.SSLWantWriteError:
        way.wants = select.POLLOUT
    except BlockingIOError:
        pass
    return moved


def _wait(secure: ssl.SSLSocket, plain: socket.socket, inward: _Way, outward: _Way) -> None:
    on_secure = inward.wants | outward.wants
    on_plain = (0 if outward.held else select.POLLIN) | (select.POLLOUT if inward.held else 0)
    poll = select.poll()
    for sock, events in ((secure, on_secure), (plain, on_plain)):
        if events:  # else a hang-up that is of no use yet would be told again and again
            poll.register(sock, events)
    poll.poll()
