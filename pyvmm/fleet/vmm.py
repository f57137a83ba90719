# vmm.py: the process of one VM: `pyvmm run`, begun here or found running. Seconds.
"""`Vmm`."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.fleet.config import Guest
    from pyvmm.fleet.folder import Folder


class Vmm:
    """pid and pidfd: None as long as they are not known, of one that was found and does not answer yet.

    It is in a session of its own: what ends us or our terminal does not reach it.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder = folder
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self.pid: int | None = None
        self.pidfd: int | None = None

    def start(self, guest: Guest, limit: int, lock: int) -> None:
        """Has it begin, with the lock of its name, which is its own from then on. Raises HostError."""
        command = [
            sys.executable, "-m", "pyvmm", "run", guest.guest, "--mem", str(guest.memory), "--cpus", str(guest.cpus),
            "--append", guest.append, "--control", self._folder.of(guest.name, "sock"), "--limit", str(limit),
            *["--balloon"] * guest.balloon, *guest.options,
        ]  # fmt: skip
        try:
            with open(self._folder.of(guest.name, "log"), "ab") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=(lock,)
                )
        except OSError as error:
            raise HostError(f"{guest.name}: cannot be started: {error.strerror}") from None
        finally:
            os.close(lock)
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)  # not waited for yet: it is no other process

    def found(self, pid: int) -> bool:
        """Is it this process? Its control socket says so, and the lock says that it still runs."""
        if self.pidfd is not None:
            return pid == self.pid
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return False
        if not self.locked():
            os.close(pidfd)
            return False
        self.pid, self.pidfd = pid, pidfd
        return True

    def claim(self) -> int | None:
        """The lock of the name, for start(); None where a process has it."""
        return self._folder.lock(self._name)

    def locked(self) -> bool:
        """Does a process run that has the lock of the name?"""
        lock = self.claim()
        if lock is None:
            return True
        os.close(lock)
        return False

    def running(self) -> bool:
        """Does it run?"""
        if self.pidfd is None:
            return self.locked()
        return not select.select([self.pidfd], [], [], 0)[0]

    def signal(self, number: signal.Signals) -> None:
        """Sends it, to no other process."""
        if self.pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def status(self) -> int | None:
        """Of the process that has ended, as Popen has it; None where that was not our child."""
        return None if self._process is None else self._process.wait()

    def close(self) -> None:
        """It may run on."""
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
        if self._process is not None and self._process.poll() is None:
            self._process.returncode = 0  # left to run: Popen is not to warn of it
