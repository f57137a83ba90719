# sockets.py: sockets that have a path: for this user alone, made at once, and gone with whoever listens. Bytes.
"""`check_path()`, and `PathListener`."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import tempfile
from contextlib import suppress

from pyvmm.errors import BadInput, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

MAX_PATH = 107
"""Bytes: what sockaddr_un takes."""
_BACKLOG = 16


def check_path(path: str, named: str) -> str:
    """The path, if a socket can have it. Raises BadInput that begins with `named`."""
    if not path or "\0" in path:
        raise BadInput(f"{named}: give the path of a socket")
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise BadInput(f"{named}: no path on this host can be that") from None
    if size > MAX_PATH:
        raise BadInput(f"{named}: the path of a socket has {MAX_PATH} bytes at most, and this one {size}")
    return path


class PathListener:
    """`socket` listens at a path, with mode 0600. close() removes its file, if it is still its own.

    The file of a process that has gone is replaced; it is never one that somebody listens on. `named`: what people
    call it. Raises BadInput, HostError; one line each.
    """

    def __init__(self, path: str, named: str) -> None:
        self._path = os.path.abspath(path)  # whoever closes it may be in another folder
        try:
            with _Locked(self._path):
                _check_stale(path, named)
                self.socket, self._inode = _listen(self._path)
        except OSError as error:
            raise HostError(f"{named}: cannot listen there: {error.strerror or error}") from None

    def close(self) -> None:
        """Nobody can connect any more; twice is once."""
        if self.socket.fileno() >= 0:
            with suppress(OSError), _Locked(self._path):
                if os.stat(self._path).st_ino == self._inode:
                    os.unlink(self._path)
        self.socket.close()


class _Locked:
    """The folder of a socket's file is locked against other listeners of ours, as long as this is entered."""

    def __init__(self, path: str) -> None:
        self._folder = os.path.dirname(path)
        self._fd = -1

    def __enter__(self) -> None:
        self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def _check_stale(path: str, named: str) -> None:
    """Raises BadInput unless nothing is there, or a socket that nobody listens on."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BadInput(f"{named}: something that is no socket is there")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a full backlog is somebody too
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return
        except OSError:
            pass
    raise BadInput(f"{named}: somebody listens there already")


def _listen(path: str) -> tuple[socket.socket, int]:
    """And its file's inode. Made in a folder that nobody else may enter: it is never there with another mode, or
    without a listener."""
    with tempfile.TemporaryDirectory(prefix=".pv", dir=os.path.dirname(path)) as folder:
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(f"/proc/self/fd/{descriptor}/s")  # however long the folder's path is
            made = os.path.join(folder, "s")
            os.chmod(made, 0o600)
            sock.listen(_BACKLOG)
            inode = os.stat(made).st_ino
            os.rename(made, path)
            return sock, inode
        except BaseException:
            sock.close()
            raise
        finally:
            os.close(descriptor)
