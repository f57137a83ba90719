# pending.py: a file that takes its name when it is whole. What a killed process leaves is removed by the next one.
"""`Pending`."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress

from pyvmm.errors import BadInput, HostError
from pyvmm.snapshot.results import write_check

_PREFIX, _SUFFIX = ".pyvmm-", ".partial"


class Pending:
    """A new file beside `path`, under a name that says what it is. `fd`: to write to; -1 once it has ended.

    path: without symbolic links; name: for messages. Raises BadInput where `path` is there and no file, HostError.
    The file is locked: the lock goes with whoever holds it, however that ends, which says more than a process number.
    """

    def __init__(self, path: str, name: str) -> None:
        self._path = path
        self._name = name
        self._folder = os.path.dirname(path)
        self._temporary = ""
        self.fd = -1
        try:
            if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
                raise BadInput(f"cannot write snapshot {name}: that is there, and no file")
            _remove_leftovers(self._folder)
            self._create()
        except OSError as error:
            self.abandon()
            write_check(_result(error), name)
        except BaseException:
            self.abandon()
            raise

    def _create(self) -> None:
        while True:
            self._temporary = os.path.join(self._folder, f"{_PREFIX}{os.urandom(8).hex()}{_SUFFIX}")
            self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            if _lock(self.fd) and os.fstat(self.fd).st_nlink:
                return
            self._close()  # someone who looked for leftovers just then has taken it

    def commit(self) -> None:
        """The file is whole: puts it on the disk and gives it its name. Raises HostError."""
        try:
            os.fsync(self.fd)
            os.rename(self._temporary, self._path)
            self._temporary = ""
        except OSError as error:
            write_check(_result(error), self._name)
        self._close()
        try:
            _sync_folder(self._folder)
        except OSError as error:
            text = f"snapshot {self._name} is there, but may not outlive a power failure: {error.strerror}"
            raise HostError(text) from None

    def abandon(self) -> None:
        """Removes the file, unless it has its name by now."""
        if self._temporary:
            with suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = ""
        self._close()

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _result(error: OSError) -> int:
    return -(error.errno or errno.EIO)


def _lock(fd: int) -> bool:
    """Is the file ours now?"""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_leftovers(folder: str) -> None:
    """Files of ours with such a name that nobody holds."""
    for name in os.listdir(folder):
        if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
            continue
        path = os.path.join(folder, name)
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = os.fstat(fd)
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and _lock(fd):
                    os.unlink(path)
            finally:
                os.close(fd)


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
