# qemu.py: the same guests under QEMU, moved from one QEMU process to another: the peer that migration is compared with.
# Units: bytes, seconds.
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
    from typing import Self

QEMU = shutil.which("qemu-system-x86_64")
MISSING = "QEMU (qemu-system-x86)"
"""What to call it where it is not here."""
_MACHINE = "-M microvm,rtc=off -nodefaults -accel kvm -display none -serial null -no-reboot"
_PATIENCE = 60.0
_LOOK = 0.005
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
    """A process. path: of a folder for its sockets; ram: a file with what RAM holds from 2 MiB on; incoming: it waits
    for a guest. A context manager. Raises HostError."""

    _count = 0

    def __init__(self, path: str, memory: int, guest: str, append: str, ram: str = "", incoming: bool = False) -> None:
        Qemu._count += 1
        self._path = os.path.join(path, f"qemu{Qemu._count}")
        self._memory = memory
        self._what = (path, memory, guest, append)
        command = [QEMU or "", *_MACHINE.split(), "-m", f"{memory // MIB}M", "-kernel", guest_path(guest)]
        command += ["-append", append, "-qmp", f"unix:{self._path},server=on,wait=off"]
        command += ["-device", f"loader,file={ram},addr={BLOCK_SIZE:#x},force-raw=on"] if ram else []
        command += ["-incoming", "defer"] if incoming else []
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            self._qmp = self._connect()
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

    def command(self, execute: str, **arguments: object) -> Any:  # noqa: ANN401 - what JSON has
        """One of QMP's, whose names have "-" where these have "_". Raises HostError with QEMU's reason."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._qmp.write(json.dumps({"execute": execute, "arguments": named}).encode())
        self._qmp.flush()
        while "event" in (told := self._read()):
            pass
        if "error" in told:
            raise HostError(f"QEMU: {execute}: {told['error']['desc']}")
        return told["return"]

    def _connect(self) -> Any:  # noqa: ANN401 - a file of a socket
        end = time.monotonic() + _PATIENCE
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(_PATIENCE)
        while True:
            try:
                sock.connect(self._path)
                return sock.makefile("rwb")
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    _, said = self._process.communicate()
                    raise HostError(f"QEMU does not start: {said.decode(errors='replace').strip()}") from None
                time.sleep(_LOOK)

    def _read(self) -> dict[str, Any]:
        line = self._qmp.readline()
        if not line:
            raise HostError("QEMU has ended by itself")
        told: dict[str, Any] = json.loads(line)
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
        target = Qemu(*self._what, incoming=True)
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
        end = time.monotonic() + _PATIENCE
        while (told := self.command("query-migrate"))["status"] != "completed":
            if told["status"] in ("failed", "cancelled"):
                raise HostError(f"QEMU: the migration failed: {told.get('error-desc', '')}")
            if time.monotonic() > end:
                raise HostError(f"QEMU: the migration has not ended in {_PATIENCE:g} s")
            time.sleep(_LOOK)
        while target.command("query-status")["status"] != "running":
            if time.monotonic() > end:
                raise HostError("QEMU: the guest does not run where it moved to")
            time.sleep(_LOOK)
        found: dict[str, Any] = told
        return found


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def write_ram(path: str, size: int, content: str) -> None:
    """A file for `ram`: what checkpoints.fill() writes."""
    with open(path, "wb") as file:
        for _, data in blocks(size, content):
            file.write(data)
