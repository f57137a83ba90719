# connection.py: one connection of a migration: frames in and out with a deadline each, then perhaps pages. Seconds.
"""`Connection`."""

from __future__ import annotations

import select
import ssl
import threading
import time
from contextlib import suppress

from pyvmm.errors import LifecycleError, MigrationError, PeerGone, ProtocolError
from pyvmm.migration.frames import CONTROL, HEAD_SIZE, Decoder, Join, encode
from pyvmm.migration.tls import WITHOUT_TLS, told

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from types import TracebackType

    from pyvmm.migration.capture import Recorder
    from pyvmm.migration.frames import Frame

SILENCE = 15.0
"""After so long without anything a connection is broken."""


class Connection:
    """A socket that frames go through. peer: what people call the other side. One thread may send while another one
    receives; frames of several senders do not mix. `secure`: it is TLS. plain_witness: it is not, where others are, so
    that nothing but the JOIN of a witness may come. recorder: what goes and comes is captured, as of channel number
    `channel`."""

    def __init__(self, sock: socket.socket, peer: str, plain_witness: bool = False) -> None:
        sock.setblocking(False)
        self._socket = sock
        self.peer = peer
        self.secure = isinstance(sock, ssl.SSLSocket)
        self.recorder: Recorder | None = None
        self.channel = 0
        self.plain_witness = plain_witness
        self._decoder = Decoder((Join,) if plain_witness else CONTROL)
        self._sequence = 0
        self._sending = threading.Lock()
        self._io = threading.Lock()  # OpenSSL's connections are for one thread at a time; never held while waiting

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends it; twice is once. Whoever waits in another thread is to be woken by end() before."""
        self._socket.close()

    def end(self) -> None:
        """Has each call that waits here end with PeerGone, in any thread."""
        import socket

        with suppress(OSError):  # it has ended already
            # of the TCP connection beneath TLS: that of the SSLSocket would free what another thread uses
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def fileno(self) -> int:
        """The descriptor, to poll."""
        return self._socket.fileno()

    def peer_credentials(self) -> bytes:
        """Of a UNIX socket: struct ucred of who connected, or listens."""
        import socket

        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)

    @property
    def sequences(self) -> tuple[int, int]:
        """Of the next frame out, and in: where frames of pages go on counting."""
        return self._sequence, self._decoder.sequence

    def send(self, frame: Frame, timeout: float | None = None) -> None:
        """Sends all of it. timeout: None: SILENCE. Raises PeerGone where that takes longer, or the other side has
        gone."""
        deadline = time.monotonic() + (SILENCE if timeout is None else timeout)
        with self._sending:
            raw = encode(frame, self._sequence)
            view = memoryview(raw)
            while view:
                view = view[self._try(lambda view=view: self._socket.send(view), select.POLLOUT, deadline) :]
            self._sequence += 1
            if self.recorder is not None:
                self.recorder.note(True, self.channel, raw)

    def recv(self, timeout: float | None = None) -> Frame:
        """The next frame, all of which must come in time (None: SILENCE). Takes nothing of what follows it. Raises
        PeerGone; and ProtocolError for what is no frame of the protocol."""
        deadline = time.monotonic() + (SILENCE if timeout is None else timeout)
        raw = bytearray()
        while True:
            wants = min(self._decoder.wants, 1 << 16)
            data = self._try(lambda wants=wants: self._socket.recv(wants), select.POLLIN, deadline)
            if not data:
                raise PeerGone(
                    f"{self.peer} closed the connection{'' if self._decoder.between else ' in the midst of a frame'}"
                )
            if self.recorder is not None:
                raw += data
            try:
                frames = list(self._decoder.feed(data))
            except ProtocolError as error:
                self._record(raw)
                why = f" {WITHOUT_TLS}" if self.plain_witness else f": {error}"
                raise ProtocolError(f"{self.peer}{why}") from None
            if frames:
                self._record(raw)
                return frames[0]

    def ready(self, seconds: float) -> bool:
        """Has something come, or has the connection ended? Waits so long at most. Raises PeerGone once it is closed."""
        if isinstance(self._socket, ssl.SSLSocket):
            with self._io:
                if self._socket.pending():
                    return True
        return self._poll(select.POLLIN, seconds)

    def _record(self, raw: bytearray) -> None:
        if self.recorder is not None and len(raw) >= HEAD_SIZE:
            self.recorder.note(False, self.channel, bytes(raw))

    def plain(self) -> socket.socket:
        """The socket itself, for pages: with TLS one end of a pair, and a thread that encrypts (pyvmm.migration.pump).
        The connection is not to be used any more but for close()."""
        if not self.secure:
            return self._socket
        from pyvmm.migration.pump import start

        assert isinstance(self._socket, ssl.SSLSocket)
        pair = start(self._socket)
        self._socket, self.secure = pair, False
        return pair

    def detach(self) -> int:
        """The descriptor, for another process: the caller's from now on, and this connection is closed. What is sent
        next there is frame `sequences[0]`. Raises LifecycleError for TLS, whose keys are here."""
        if self.secure:
            raise LifecycleError(f"{self.peer}: a TLS connection cannot be handed to another process")
        return self._socket.detach()

    def _try(self, call, events: int, deadline: float):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """What call() returns, once it need not wait."""
        while True:
            try:
                with self._io:
                    return call()
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                wanted = events
                if isinstance(error, ssl.SSLWantReadError):
                    wanted = select.POLLIN
                elif isinstance(error, ssl.SSLWantWriteError):
                    wanted = select.POLLOUT
            except ssl.SSLZeroReturnError:
                return b""
            except OSError as error:
                raise self._told(error) from None
            left = deadline - time.monotonic()
            if left <= 0:
                raise PeerGone(f"{self.peer} stalled: nothing moved in time")
            self._poll(wanted, left)

    def _poll(self, events: int, seconds: float) -> bool:
        fd = self._socket.fileno()
        if fd < 0:
            raise PeerGone(f"{self.peer}: the connection is closed")
        poll = select.poll()
        poll.register(fd, events)
        return bool(poll.poll(seconds * 1000))

    def _told(self, error: OSError) -> MigrationError:
        if isinstance(error, ssl.SSLError):
            return told(error, self.peer)
        return PeerGone(f"{self.peer} broke the connection off: {error.strerror or error}")
