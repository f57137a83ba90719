# local.py: both sides on one host: the destination reads pages out of the source (process_vm_readv(2)).
"""What the source says of itself, and how the destination checks that it is who it has a connection with."""

from __future__ import annotations

import os
import struct

from pyvmm._native import ffi, lib
from pyvmm.errors import MigrationError, ProtocolError
from pyvmm.migration.frames import Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm._native import CData
    from pyvmm.migration.connection import Connection
    from pyvmm.migration.pages import PageChannel

_STARTED = 19
"""Field 22 of /proc/PID/stat, counted from the one behind the name."""


def offer(connection: Connection, ram: CData, channels: Sequence[PageChannel]) -> Source:
    """At the source: runs are for the destination to read, which is let do so. Returns the frame that says where."""
    lib.pv_allow_reader(_peer(connection))  # what it cannot read it says
    for channel in channels:
        channel.stream.pulled = 1
    return Source(os.getpid(), _started(os.getpid()), int(ffi.cast("uintptr_t", ram)))


def accept(connection: Connection, source: Source, channels: Sequence[PageChannel]) -> None:
    """At the destination. Raises ProtocolError where that is another process than the one at the connection's other
    end: whoever may connect is not let have us read somebody else's memory."""
    pid = _peer(connection)
    if source.pid != pid or source.started != _started(pid):
        raise ProtocolError(f"{connection.peer} is process {pid}, and says that it is {source.pid}")
    for channel in channels:
        channel.stream.pull_pid, channel.stream.pull_ram = pid, source.ram


def disallow() -> None:
    """Nobody reads our memory any more."""
    lib.pv_allow_reader(0)


def _peer(connection: Connection) -> int:
    """Which process is at the other end, by the kernel's word."""
    pid, _, _ = struct.unpack("iII", connection.peer_credentials())
    return int(pid)


def _started(pid: int) -> int:
    """When it began, in ticks since the host did: with the pid, a name that is not given again."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[_STARTED])
    except (OSError, IndexError, ValueError):
        raise MigrationError(f"process {pid} cannot be looked at in /proc: both sides must see each other") from None
