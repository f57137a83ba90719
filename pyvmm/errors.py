# errors.py: every exception that pyvmm raises on purpose, for all layers: one clear line each, and an exit code.
"""Exceptions. `str(error)` is one line that names what is wrong and, where there is one, what would help."""

from __future__ import annotations

import errno as _errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

EXIT_FAILED = 1
"""What was asked for came to nothing, though it could have been done."""
EXIT_BAD_INPUT = 2
"""Bad input, or a host that lacks what was asked for."""
EXIT_TIMEOUT = 124
"""The guest did not end within --timeout (the status of timeout(1))."""
EXIT_CRASH = 125
"""The guest crashed, or KVM could not run it on."""
EXIT_SIGNAL = 128
"""Plus the signal's number, where a signal ended the run."""


class PyvmmError(Exception):
    """Base of all of pyvmm's own exceptions."""

    exit_code = EXIT_BAD_INPUT


class BadInput(PyvmmError, ValueError):
    """An argument, option or file that cannot be used as it is."""


class ImageError(BadInput):
    """A guest image that is damaged, of another kind than asked for, or does not fit the VM."""


class StateError(BadInput):
    """A saved state of another kind, version or shape than the part it is to be restored into."""


class SnapshotError(BadInput):
    """A snapshot file that is damaged, truncated, foreign, of another version, or lacks its parent."""


class MemoryAccessError(PyvmmError, IndexError):
    """A guest-physical range that is not (wholly) RAM."""


class LifecycleError(PyvmmError, RuntimeError):
    """A call that the VM's present state does not allow, such as resume() before start()."""


class HostError(PyvmmError):
    """The host lacks something, or did not let us have it."""


class FetchError(HostError):
    """A page of the guest that cannot be brought back: disk, peer or memory failed. `page`: its number; `errno`.

    The VM is paused, and all else of it is intact: resume() tries again.
    """

    def __init__(self, text: str, page: int, errno: int) -> None:
        self.page = page
        self.errno = errno
        super().__init__(text)


class MigrationError(PyvmmError):
    """A migration that did not come about: the peer is gone, stalled, refused it, or is none."""

    exit_code = EXIT_FAILED


class PeerGone(MigrationError):
    """A connection of a migration that is broken: closed, reset, or nothing has moved on it for too long."""


class ProtocolError(MigrationError):
    """What came from the other side breaks a rule of docs/migration-protocol.md."""


class ControlError(PyvmmError):
    """What was asked for on a control socket was not done: the VM says why, or has gone."""

    exit_code = EXIT_FAILED


class KernelError(PyvmmError, OSError):
    """A system call or ioctl that failed: names it, its arguments and the errno.

    `errno` is the positive error number, `call` the kernel's name of the call.
    """

    def __init__(self, errno: int, call: str, arguments: Mapping[str, object] | None = None) -> None:
        self.call = call
        self.arguments = dict(arguments or {})
        shown = ", ".join(f"{name}={_show(value)}" for name, value in self.arguments.items())
        super().__init__(errno, f"{call}({shown}): {_errno.errorcode.get(errno, errno)}, {os.strerror(errno)}")

    def __str__(self) -> str:
        return str(self.strerror)


class GuestCrash(PyvmmError):
    """The guest ended in a way that it cannot have meant: triple fault, internal error, unhandled exit.

    `str()` is one sentence; `report` is the long text (registers, disassembly, page walk).
    """

    exit_code = EXIT_CRASH

    def __init__(self, sentence: str, report: str = "") -> None:
        super().__init__(sentence)
        self.report = report


def _show(value: object) -> str:
    return hex(value) if isinstance(value, int) and not isinstance(value, bool) and value > 9 else str(value)


def check(result: int, call: str, /, **arguments: object) -> int:
    """Returns `result` unless it is a negative errno, which becomes a `KernelError` naming the call."""
    if result < 0:
        raise KernelError(-result, call, arguments)
    return result
