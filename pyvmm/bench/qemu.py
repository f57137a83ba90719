# qemu.py: the same guests under QEMU, moved from one QEMU process to another, saved and restored: the peer to compare
# ours with. Units: bytes, seconds.
"""`Qemu`: a microvm, told what to do by QMP."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

from pyvmm._native import lib
from pyvmm.bench.checkpoints import blocks
from pyvmm.errors import HostError
from pyvmm.layout import BLOCK_SIZE, MIB
from pyvmm.machine.loader import guest_path
from pyvmm.machine.outcome import PROGRESS_SIZE, Progress

if TYPE_CHECKING:
    from types import TracebackType
    from typing import IO, Self

QEMU = shutil.which("qemu-system-x86_64")
MISSING = "QEMU (qemu-system-x86)"
"""What to call it where it is not here."""
_MACHINE = "-M microvm,rtc=off -nodefaults -accel kvm -display none -no-reboot"
_PATIENCE = 60.0
_LOOK, _SHORT = 0.005, 0.001
_FAST = 1 << 40
"""Bytes a second that a migration may take; QEMU's own default is 128 MiB."""

_CAPABILITIES = ("multifd", "postcopy-ram")

# name -> transport, capabilities, connections for pages
WAYS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "QEMU, tcp": ("tcp", (), 0),
    "QEMU, tcp, multifd 2": ("tcp", ("multifd",), 2),
    "QEMU, unix": ("unix", (), 0),
    "QEMU, tcp, post-copy": ("tcp", ("postcopy-ram",), 0),
}


class Moved:
    """What QEMU says of a migration: seconds in all, and of the guest's standing still."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.seconds = told["total-time"] / 1e3
        self.downtime = told["downtime"] / 1e3


class Qemu:
    """A process. path: of a folder for its sockets; ram: a file with what RAM holds from 2 MiB on; incoming: where a
    guest comes from, "defer": that is told later; inherited: descriptors that it gets; console: the guest's serial port
    is `console`, else nowhere. A context manager. Raises HostError."""

    _count = 0

    def __init__(
        self,
        path: str,
        memory: int,
        guest: str,
        append: str,
        ram: str = "",
        incoming: str = "",
        inherited: tuple[int, ...] = (),
        console: bool = False,
    ) -> None:
        Qemu._count += 1
        self._path = os.path.join(path, f"qemu{Qemu._count}")
        self._memory = memory
        self._resumed = False
        self._what = (path, memory, guest, append)
        command = [QEMU or "", *_MACHINE.split(), "-m", f"{memory // MIB}M", "-kernel", guest_path(guest)]
        command += ["-append", append, "-qmp", f"unix:{self._path},server=on,wait=off"]
        command += ["-device", f"loader,file={ram},addr={BLOCK_SIZE:#x},force-raw=on"] if ram else []
        command += ["-incoming", incoming] if incoming else []
        command += ["-serial", "stdio" if console else "null"]
        end = subprocess.PIPE if console else subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=end, stdout=end, stderr=subprocess.PIPE, pass_fds=inherited, bufsize=0
        )
        try:
            self._socket, self._qmp = self._connect()
            self._read()  # its greeting
            self.command("qmp_capabilities")
            if not incoming:
                while self.progress().status != "running":
                    time.sleep(_LOOK)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends it; twice is once."""
        self._process.kill()
        self._process.communicate()

    @property
    def console(self) -> tuple[IO[bytes], IO[bytes]]:
        """Where to type, and what the guest prints."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def command(self, execute: str, **arguments: object) -> Any:  # noqa: ANN401 - what JSON has
        """One of QMP's, whose names have "-" where these have "_". Raises HostError with QEMU's reason."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._send({"execute": execute, "arguments": named})
        if "error" in (told := self._answer()):
            raise HostError(f"QEMU: {execute}: {told['error']['desc']}")
        return told["return"]

    def _answer(self) -> dict[str, Any]:
        while "event" in (told := self._read()):
            pass
        return told

    def _send(self, what: dict[str, object], *passed: int) -> None:
        """passed: descriptors that go with it."""
        data = json.dumps(what).encode()
        if socket.send_fds(self._socket, [data], passed) != len(data):
            raise HostError("QEMU does not read what it is told")

    def _connect(self) -> tuple[socket.socket, Any]:
        end = time.monotonic() + _PATIENCE
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(_PATIENCE)
        while True:
            try:
                sock.connect(self._path)
                return sock, sock.makefile("rb")
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    sock.close()
                    _, said = self._process.communicate()
                    raise HostError(f"QEMU does not start: {said.decode(errors='replace').strip()}") from None
                time.sleep(_LOOK)

    def _read(self) -> dict[str, Any]:
        line = self._qmp.readline()
        if not line:
            raise HostError("QEMU has ended by itself")
        told: dict[str, Any] = json.loads(line)
        self._resumed = self._resumed or told.get("event") == "RESUME"
        return told

    def progress(self) -> Progress:
        """The guest's progress page."""
        path = f"{self._path}.page"
        self.command("pmemsave", val=lib.PV_PROGRESS_GPA, size=PROGRESS_SIZE, filename=path)
        with open(path, "rb") as file:
            return Progress(file.read())

    def large(self, passes: int) -> int:
        """KVM's 2 MiB mappings, when the guest has gone over its memory so often more."""
        end = self.progress().passes + passes
        while self.progress().passes < end:
            time.sleep(_LOOK)
        told = self.command("query-stats", target="vm", providers=[{"provider": "kvm", "names": ["pages_2m"]}])
        return int(told[0]["stats"][0]["value"])

    def move(self, way: str, downtime: float) -> tuple[Qemu, Moved]:
        """Moves the guest to another process, which is the caller's, and ends this one. way: of WAYS; downtime:
        seconds that it may be."""
        transport, capabilities, channels = WAYS[way]
        target = Qemu(*self._what, incoming="defer")
        try:
            told = self._move(target, transport, capabilities, channels, downtime)
        except BaseException:
            target.close()
            raise
        self.close()
        return target, Moved(told)

    def _move(
        self, target: Qemu, transport: str, capabilities: tuple[str, ...], channels: int, downtime: float
    ) -> dict[str, Any]:
        wanted = [{"capability": name, "state": name in capabilities} for name in _CAPABILITIES]
        for side in (self, target):  # this one may have those of the migration by which it came
            side.command("migrate-set-capabilities", capabilities=wanted)
            if channels:
                side.command("migrate-set-parameters", multifd_channels=channels)
        self.command("migrate-set-parameters", max_bandwidth=_FAST, downtime_limit=max(1, round(downtime * 1e3)))
        uri = f"unix:{target._path}.in" if transport == "unix" else f"tcp:127.0.0.1:{_free_port()}"
        target.command("migrate-incoming", uri=uri)
        self.command("migrate", uri=uri)
        if "postcopy-ram" in capabilities:
            self.command("migrate-start-postcopy")
        told = self._migrated()
        end = time.monotonic() + _PATIENCE
        while target.command("query-status")["status"] != "running":
            if time.monotonic() > end:
                raise HostError("QEMU: the guest does not run where it moved to")
            time.sleep(_LOOK)
        return told

    def _migrated(self) -> dict[str, Any]:
        """Waits until its migration is over. Returns what QEMU says of it."""
        end = time.monotonic() + _PATIENCE
        while (told := self.command("query-migrate"))["status"] != "completed":
            if told["status"] in ("failed", "cancelled"):
                raise HostError(f"QEMU: the migration failed: {told.get('error-desc', '')}")
            if time.monotonic() > end:
                raise HostError(f"QEMU: the migration has not ended in {_PATIENCE:g} s")
            time.sleep(_LOOK)
        found: dict[str, Any] = told
        return found

    # ---- to a file, and from it ----

    def save(self, path: str) -> None:
        """Its guest into a new file, whole on the disk before it takes the place of the one before; the guest stands
        afterwards. QEMU writes to the file itself, and not to a program that does."""
        fd = os.open(f"{path}.new", os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
        try:
            self._send({"execute": "getfd", "arguments": {"fdname": "file"}}, fd)
            if "error" in (told := self._answer()):
                raise HostError(f"QEMU: getfd: {told['error']['desc']}")
            self.command("migrate-set-parameters", max_bandwidth=_FAST)
            self.command("migrate", uri="fd:file")
            self._migrated()
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(f"{path}.new", path)
        self.command("cont")  # else it would not be saved another time
        self.command("stop")

    def await_running(self) -> None:
        """Waits until the guest that came runs, as it did when it was saved."""
        end = time.monotonic() + _PATIENCE
        while self.command("query-status")["status"] != "running" and not self._resumed:  # its event may come first
            if time.monotonic() > end:
                raise HostError(f"QEMU: the guest does not run after {_PATIENCE:g} s")
            time.sleep(_SHORT)


def restore_to_first_byte(path: str, memory: int, guest: str, append: str, file: str) -> float:
    """Seconds from exec to the first byte of a guest that was saved to `file`, and waits for one. path: as of Qemu."""
    fd = os.open(file, os.O_RDONLY)
    try:
        begin = time.perf_counter()
        with Qemu(path, memory, guest, append, incoming=f"fd:{fd}", inherited=(fd,), console=True) as qemu:
            typed, printed = qemu.console
            qemu.await_running()
            typed.write(b"g")  # before that it could be lost: QEMU's UART takes it, and then becomes the saved one
            first = printed.read(1)
            seconds = time.perf_counter() - begin
    finally:
        os.close(fd)
    if not first:
        raise HostError("QEMU: the restored guest printed nothing")
    return seconds


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def write_ram(path: str, size: int, content: str) -> None:
    """A file for `ram`: what checkpoints.fill() writes."""
    with open(path, "wb") as file:
        for _, data in blocks(size, content):
            file.write(data)
