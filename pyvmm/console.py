# console.py: the host's terminal, pipe or file as the guest's serial console, for the CLI. Unit: bytes.
"""`Console`: a thread that feeds what arrives on stdin to a `Serial`, and `output()` for what the guest sends.

Pipes and files pass through as they are. A terminal is left alone until the guest first listens, so that a guest which
only prints can be ended by Ctrl-C; from then on it is raw, all keys being the guest's but Ctrl-].

stdin and stdout are usually one open file that the shell shares, so they are never made non-blocking: poll(2) says
what can be read. A process in the background neither reads nor sets its terminal, which would stop it
(SIGTTIN, SIGTTOU; see termios(3)); it looks again every RETRY_MS.
"""

from __future__ import annotations

import atexit
import os
import select
import termios
import threading
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self

    from pyvmm.devices.serial import Serial
    from pyvmm.devices.virtio.console import VirtioConsole

ESCAPE = b"\x1d"
"""Ctrl-]: leaves the guest's console."""
END_OF_FILE = b"\x04"
"""Ctrl-D, which a terminal that is not raw yet reports as an empty read."""
HINT = b"console: Ctrl-] leaves\n"
RETRY_MS = 50
"""How often to look again for what nothing signals: room in the guest's queue, a turn in the foreground."""
JOIN_SECONDS = 1.0
"""How long to wait for the input thread: read(2) may hold it, if another process took the bytes that poll(2) saw."""
CHUNK = 4096
_IFLAG, _LFLAG, _CC = 0, 3, 6
"""Places in the list that tcgetattr returns."""


def _nothing() -> None:
    pass


class Console:
    """A context manager: input flows within it. `output` may be used before, within and after.

    on_leave: called once, by the input thread, when Ctrl-] was typed; the terminal is then as it was and no more input
    is read. on_broken: called once when stdout is gone (EPIPE, EIO, ...); output is swallowed from then on.
    """

    def __init__(self, serial: Serial | VirtioConsole, stdin_fd: int = 0, stdout_fd: int = 1) -> None:
        self.on_leave: Callable[[], None] = _nothing
        self.on_broken: Callable[[], None] = _nothing
        self._serial = serial
        self._stdin = stdin_fd
        self._stdout = stdout_fd
        self._terminal = os.isatty(stdin_fd)
        self._found: list[Any] | None = None
        """The terminal's settings as we found them, while ours are in force."""
        self._closed = False
        self._broken = False
        self._writing = threading.Lock()
        self._writable = select.poll()
        self._writable.register(stdout_fd, select.POLLOUT)
        self._event = -1
        self._thread = threading.Thread(target=self._pump, name="console", daemon=True)

    def __enter__(self) -> Self:
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        atexit.register(self.close)
        self._serial.on_listen = self._wake
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._serial.on_listen = _nothing
        self.close()
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)
        atexit.unregister(self.close)
        if not self._thread.is_alive():
            event, self._event = self._event, -1
            os.close(event)

    def close(self) -> None:
        """Ends input and gives the terminal its settings back. Waits for nothing and takes no lock, so that a signal
        handler may call it at any point; may be called again."""
        self._closed = True
        found = self._found
        if found is not None and self._foreground():
            self._restore(found)
            self._found = None
        self._wake()

    def output(self, data: bytes) -> None:
        """Writes all of `data` to stdout, waiting for a slow reader, but not after abandon()."""
        rest = memoryview(data)
        with self._writing:
            while rest and not self._broken:
                try:
                    # What poll(2) finds writable takes a page at once (pipe(7)): write(2) does not hold us.
                    if self._writable.poll(RETRY_MS):
                        rest = rest[os.write(self._stdout, rest[:CHUNK]) :]
                except BlockingIOError:
                    continue  # another writer of the same file was faster
                except OSError:
                    self._broken = True
                    self.on_broken()

    def abandon(self) -> None:
        """Whoever is in output(), waiting for a reader, comes back soon; all further output is swallowed."""
        self._broken = True

    def _pump(self) -> None:
        while not self._closed:
            ours = self._foreground()
            if ours and self._serial.listening:
                self._make_raw()
            # A terminal's keys are read even if the queue is full, lest Ctrl-] go unseen: what does not fit is dropped,
            # as the kernel's own line discipline drops it.
            room = CHUNK if self._terminal else min(self._serial.room(), CHUNK)
            events = self._wait(stdin=bool(ours and room))
            if not events or self._closed or not self._foreground():
                continue
            try:
                data = os.read(self._stdin, room)
            except BlockingIOError:
                continue  # another reader of the same file was faster
            except OSError:
                return
            if not data and self._terminal and not events & select.POLLHUP:
                data = END_OF_FILE
            if not data or not self._take(data):
                return

    def _wait(self, stdin: bool) -> int:
        """Waits for input, if `stdin`, else for RETRY_MS; `_wake()` ends both. Returns poll's events on stdin."""
        poller = select.poll()
        poller.register(self._event, select.POLLIN)
        if stdin:
            poller.register(self._stdin, select.POLLIN)
        ready = dict(poller.poll(None if stdin else RETRY_MS))
        if ready.pop(self._event, 0):
            os.eventfd_read(self._event)
        return ready.get(self._stdin, 0)

    def _wake(self) -> None:
        if self._event >= 0:
            with suppress(OSError):
                os.eventfd_write(self._event, 1)

    def _take(self, data: bytes) -> bool:
        """Gives `data` to the guest. Returns whether to read on."""
        if self._terminal:
            data, escape, _ = data.partition(ESCAPE)
            self._serial.feed(data)
            if escape:
                self.close()
                self.on_leave()
            return not escape
        while data and not self._closed:
            data = data[self._serial.feed(data) :]
            if data:
                self._wait(stdin=False)
        return True

    def _foreground(self) -> bool:
        """Whether we may use stdin: it is no terminal, or not the one that controls us, or we are in its foreground."""
        if not self._terminal:
            return True
        try:
            return os.tcgetpgrp(self._stdin) == os.getpgrp()
        except OSError:
            return True

    def _make_raw(self) -> None:
        """All keys to the guest, one by one. OPOST stays on, so that messages of the host keep their line ends."""
        if not self._terminal or self._found is not None:
            return
        try:
            found = termios.tcgetattr(self._stdin)
        except termios.error:
            return
        raw = [*found[:6], [*found[6]]]
        raw[_IFLAG] &= ~(
            termios.BRKINT
            | termios.ICRNL
            | termios.IGNCR
            | termios.INLCR
            | termios.INPCK
            | termios.ISTRIP
            | termios.IXON
        )
        raw[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
        raw[_CC][termios.VMIN], raw[_CC][termios.VTIME] = 1, 0
        self._found = found
        self._set_terminal(raw)
        if self._closed:  # by a signal handler in between, which came too early to undo this
            self._restore(found)
            return
        with suppress(OSError):
            os.write(2, HINT)

    def _restore(self, found: list[Any]) -> None:
        """Also drops keys not read yet: they were for the guest, and must not become commands of the host's shell."""
        self._set_terminal(found)
        with suppress(termios.error):
            termios.tcflush(self._stdin, termios.TCIFLUSH)

    def _set_terminal(self, settings: list[Any]) -> None:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(self._stdin, termios.TCSANOW, settings)
