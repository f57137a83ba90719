# pump.py: between TLS and a plain socket, so that C sends and receives pages in one way. Bytes are copied once more
# than without TLS, which costs less than the encryption beside it.
"""`start()`."""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from contextlib import suppress

PIECE = 256 << 10
LINGER = 5.0
"""Seconds in which a side that stalls is still given what was sent before we closed."""


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
    closed: float | None = None
    """When our end was found closed with something still to be sent."""
    with secure, plain, suppress(OSError):  # each end sees that the other one has gone
        while True:
            moved = _move(inward, secure, plain)
            moved |= _move(outward, plain, secure)
            if (inward.ended and not inward.held) or (outward.ended and not outward.held):
                break
            if moved:
                continue
            if closed is None:
                if _wait(secure, plain, inward, outward):
                    closed = time.monotonic()
            elif time.monotonic() - closed > LINGER:
                break
            else:
                _wait_for(secure, outward.wants, LINGER)
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


def _wait(secure: ssl.SSLSocket, plain: socket.socket, inward: _Way, outward: _Way) -> bool:
    """Has our end been closed, with something left to be sent?"""
    on_secure = inward.wants | outward.wants
    on_plain = (0 if outward.held else select.POLLIN) | (select.POLLOUT if inward.held else 0)
    poll = select.poll()
    if on_secure:  # else a hang-up that is of no use yet would be told again and again
        poll.register(secure, on_secure)
    poll.register(plain, on_plain)
    hung_up = any(fd == plain.fileno() and events & select.POLLHUP for fd, events in poll.poll())
    return hung_up and bool(outward.held)


def _wait_for(sock: socket.socket, events: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(sock, events)
    poll.poll(seconds * 1000)
