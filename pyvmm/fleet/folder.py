# folder.py: where a fleet's sockets, locks and logs are while it runs: for this user alone.
"""`Folder`."""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress

from pyvmm.errors import BadInput, HostError
from pyvmm.fleet.config import check_name

SOCKET = "daemon.sock"
_TAIL = 300


def above() -> str:
    """Where run folders are."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "pyvmm") if runtime else f"/tmp/pyvmm-{os.getuid()}"


def default(name: str) -> str:
    """The folder of the fleet `name`. Raises BadInput for what is no name."""
    return os.path.join(above(), check_name(name, "a fleet's name"))


def only() -> str:
    """The folder of the one fleet whose daemon's socket is there. Raises BadInput where there are none, or more."""
    try:
        names = [name for name in sorted(os.listdir(above())) if os.path.exists(os.path.join(above(), name, SOCKET))]
    except OSError:
        names = []
    if not names:
        raise BadInput(f"no fleet runs in {above()}: `pyvmm host up FILE` starts one")
    if len(names) > 1:
        raise BadInput(f"say which fleet: {', '.join(names)}")
    return default(names[0])


class Folder:
    """`path`; made where it is not there yet. Raises BadInput where it is somebody else's, HostError where it cannot be
    made."""

    def __init__(self, path: str, make: bool = True) -> None:
        self.path = os.path.abspath(path)
        try:
            for folder in (os.path.dirname(self.path), self.path) if make else ():
                with suppress(FileExistsError):
                    os.mkdir(folder, 0o700)
            outer, found = os.stat(os.path.dirname(self.path)), os.lstat(self.path)
        except OSError as error:
            raise HostError(f"run folder {self.path}: {error.strerror}") from None
        ours = outer.st_uid in (0, os.getuid()) and not outer.st_mode & 0o022
        if not ours and not outer.st_mode & stat.S_ISVTX:  # who may rename it has all that is in it
            raise BadInput(f"run folder {self.path}: others may write to the folder above it")
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise BadInput(f"run folder {self.path}: it is not this user's alone (a folder with mode 0700): remove it")

    @property
    def socket(self) -> str:
        """The daemon's own control socket."""
        return os.path.join(self.path, SOCKET)

    @property
    def log(self) -> str:
        """Decisions, a JSON object a line."""
        return os.path.join(self.path, "decisions.log")

    def names(self) -> list[str]:
        """Of VMs that have ever been started here."""
        end = ".vm.lock"
        return sorted(entry.removesuffix(end) for entry in os.listdir(self.path) if entry.endswith(end))

    def of(self, name: str, kind: str) -> str:
        """A file of the VM `name`: its "sock", "lock", "log"."""
        return os.path.join(self.path, f"{name}.vm.{kind}")

    def last_line(self, name: str) -> str:
        """Of what the VM's process has printed, as far as it can be shown."""
        try:
            with open(self.of(name, "log"), "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return ""
        said = [line for line in lines if line.strip()]
        return "".join(letter for letter in said[-1] if letter.isprintable()) if said else ""

    def lock(self, name: str) -> int | None:
        """A descriptor that holds the lock of the VM `name`; None where somebody holds it, and so runs.

        The VM's process inherits it, and the kernel lets go of it when that has ended, however that was: no number of
        a process has to be believed.
        """
        fd = os.open(self.of(name, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd
