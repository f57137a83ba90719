# streams.py: how fast pages go from one process to another: as page runs of a migration, and beside it the least that a
# system call can do (of measures P3 and P4 the limits). Unit: GB/s.
"""Random data, from warm memory to warm memory, over connections of each kind; and copied within one process."""

from __future__ import annotations

import ctypes
import os
import socket
import tempfile
import time
from contextlib import ExitStack
from mmap import mmap
from typing import TYPE_CHECKING

from pyvmm._native import ffi, lib
from pyvmm.bench import Result, alternate
from pyvmm.errors import HostError
from pyvmm.layout import BLOCK_SIZE, GIB, MIB, PAGE_SIZE
from pyvmm.migration.address import parse_address
from pyvmm.migration.pages import Arrivals, PageChannel
from pyvmm.migration.transport import connect, listen

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm._native import CData
    from pyvmm.bench.mover import Side
    from pyvmm.migration.connection import Connection
    from pyvmm.migration.transport import Listener

_STEP = 1024
"""Pages in one call of C, as a migration sends them."""
_PIECE = 4 * MIB
_PATIENCE = 20.0

# name -> transport, how
LIMITS = {
    "send() and recv(), TCP": ("tcp", "raw"),
    "send() and recv(), UNIX": ("unix", "raw"),
    "process_vm_readv()": ("unix", "read"),
}
RUNS = {
    "page runs, TCP": ("tcp", "runs"),
    "page runs, UNIX": ("unix", "runs"),
    "page runs read out of the source": ("unix", "pulled"),
}


class Ends:
    """What a side can do with memory that no guest has."""

    def __init__(self) -> None:
        self._memory: mmap | None = None
        self._listener: Listener | None = None
        self._connection: Connection | None = None
        self._at = 0
        self._base: CData = ffi.NULL

    def close(self) -> None:
        """Ends the connection."""
        if self._connection is not None:
            self._connection.close()
        if self._listener is not None:
            self._listener.close()

    def hold(self, size: int, random: bool) -> None:
        """Memory, warm."""
        if self._memory is None or len(self._memory) != size:
            self._memory = mmap(-1, size)
            noise = os.urandom(BLOCK_SIZE) if random else b"\1" * BLOCK_SIZE
            for at in range(0, size, BLOCK_SIZE):
                self._memory[at : at + BLOCK_SIZE] = noise
            self._base = ffi.from_buffer("uint8_t[]", self._memory)
            self._at = int(ffi.cast("uintptr_t", self._base))

    def wait_for_connection(self, at: str) -> str:
        """Where it may come."""
        self.close()
        self._listener = listen(parse_address(at, listening=True))
        return str(self._listener.address)

    def connect_to(self, address: str) -> tuple[int, int]:
        """Connects; who may read its memory then, and where that is."""
        self.close()
        self._connection = connect(parse_address(address))
        return os.getpid(), self._at

    def receive(self, how: str, pid: int, at: int) -> None:
        """Takes all of it."""
        assert self._memory is not None
        assert self._listener is not None
        connection = self._connection = self._listener.accept(_PATIENCE)
        if connection is None:
            raise HostError("nobody connected")
        if how == "raw":
            _receive(connection.plain(), self._memory)
        elif how == "read":
            _read(pid, at, self._at, len(self._memory))
        else:
            pages = len(self._memory) // PAGE_SIZE
            channel = PageChannel(connection, self._base, pages)
            if how == "pulled":
                channel.stream.pull_pid, channel.stream.pull_ram = pid, at
            arrivals = Arrivals(pages)
            arrivals.begin(1)
            while channel.receive(arrivals, 1 << 14) is None:
                pass
        connection.plain().setblocking(True)
        connection.plain().sendall(b"!")

    def send(self, how: str) -> float:
        """Sends all of it. Returns the seconds until the other side had it all."""
        assert self._memory is not None
        assert self._connection is not None
        connection = self._connection
        connection.plain().setblocking(True)
        lib.pv_allow_reader(-1)  # any process of this user may read it: a limit has no handshake
        begin = time.perf_counter()
        if how == "raw":
            with memoryview(self._memory) as view:
                for first in range(0, len(view), _PIECE):
                    connection.plain().sendall(view[first : first + _PIECE])
        elif how != "read":
            pages = len(self._memory) // PAGE_SIZE
            connection.plain().setblocking(False)
            channel = PageChannel(connection, self._base, pages)
            channel.stream.pulled = how == "pulled"
            for first in range(0, pages, _STEP):
                channel.send([(first, min(_STEP, pages - first))], 1)
            channel.send_end(1, pages)
        connection.plain().setblocking(True)
        if connection.plain().recv(1) != b"!":
            raise HostError("the other side ended before it had it all")
        return time.perf_counter() - begin


def _receive(sock: socket.socket, memory: mmap) -> None:
    sock.setblocking(True)
    with memoryview(memory) as view:
        done = 0
        while done < len(view):
            got = sock.recv_into(view[done : done + _PIECE])
            if not got:
                raise HostError("the other side ended before it had sent it all")
            done += got


class _Piece(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _read(pid: int, there: int, here: int, size: int) -> None:
    """The system call itself, which pyvmm has nowhere but in the midst of what is to be compared with it."""
    call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    call.restype = ctypes.c_ssize_t
    for at in range(0, size, BLOCK_SIZE):
        count = min(BLOCK_SIZE, size - at)
        to, of = _Piece(here + at, count), _Piece(there + at, count)
        if call(pid, ctypes.byref(to), 1, ctypes.byref(of), 1, 0) != count:
            raise HostError(f"process_vm_readv: {os.strerror(ctypes.get_errno())}")


class Pair:
    """Two processes, and a folder for their sockets."""

    def __init__(self, stack: ExitStack, size: int) -> None:
        from pyvmm.bench.mover import Side

        self._size = size
        self._folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pyvmm-bench-"))
        self._from: Side = stack.enter_context(Side())
        self._to: Side = stack.enter_context(Side())
        self._from.ask("hold", size=size, random=True)
        self._to.ask("hold", size=size, random=False)

    def speed(self, transport: str, how: str) -> float:
        """GB/s of all that memory."""
        where = "tcp:0" if transport == "tcp" else f"unix:{self._folder}/s"
        address = self._to.ask("wait_for_connection", at=where)
        pid, at = self._from.ask("connect_to", address=address)
        self._to.tell("receive", how=how, pid=pid, at=at)
        seconds = self._from.ask("send", how=how)
        self._to.answer()
        return self._size / 1e9 / float(seconds)


def copying(size: int) -> Callable[[], float]:
    """GB/s of memcpy(): what no way from here to there can be faster than."""
    source, target = mmap(-1, size), mmap(-1, size)
    noise = os.urandom(BLOCK_SIZE)
    for at in range(0, size, BLOCK_SIZE):
        source[at : at + BLOCK_SIZE] = target[at : at + BLOCK_SIZE] = noise
    to, of = ffi.from_buffer(target), ffi.from_buffer(source)

    def speed() -> float:
        begin = time.perf_counter()
        ffi.memmove(to, of, size)
        return size / 1e9 / (time.perf_counter() - begin)

    return speed


def measure(quick: bool = False) -> list[Result]:
    """GB/s between two processes: raw system calls, and page runs as a migration sends them."""
    size, rounds = (8 * MIB, 1) if quick else (GIB, 7)
    with ExitStack() as stack:
        pair = Pair(stack, size)
        sides: dict[str, Callable[[], float]] = {
            name: lambda way=way: pair.speed(*way) for name, way in (LIMITS | RUNS).items()
        } | {"memcpy()": copying(size)}
        return alternate(sides, "GB/s", rounds)
