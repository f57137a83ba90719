# start.py: how long until a guest's first byte (measure P1). Unit: milliseconds.
"""From process start, beside QEMU where it is installed; and from `VM()` in this process."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

from pyvmm.bench import Result, alternate
from pyvmm.layout import MIB
from pyvmm.machine import VM
from pyvmm.machine.loader import guest_path

_QEMU = "qemu-system-x86_64"
_ROUNDS = 15
_MEMORY = 64 * MIB
"""RAM of each guest, of which it uses little."""
_OPTIONS = (
    "-M microvm,rtc=off -nodefaults -accel kvm -m 64 -display none -serial stdio -no-reboot "
    "-device isa-debug-exit,iobase=0xf4,iosize=4 -kernel"
)


def _process(command: list[str]) -> float:
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        process.stdout.read()
    if not first:
        raise RuntimeError(f"{command[0]} printed nothing")
    return seconds * 1e3


def _in_process() -> float:
    first: list[float] = []
    begin = time.perf_counter()
    with VM(output=lambda data: first.append(time.perf_counter())) as vm:
        vm.load("hello")
        vm.run(timeout=10)
    return (first[0] - begin) * 1e3


def measure(quick: bool = False) -> list[Result]:
    """Milliseconds to the first byte: `pyvmm run hello`, QEMU's microvm with the same guest, and in-process."""
    ours = [sys.executable, "-c", "import sys; from pyvmm.cli import main; sys.exit(main())", "run", "hello"]
    sides = {"pyvmm run hello": lambda: _process(ours)}
    if shutil.which(_QEMU):
        qemu = [_QEMU, *_OPTIONS.split(), guest_path("hello")]
        sides["QEMU microvm"] = lambda: _process(qemu)
    sides["in-process"] = _in_process
    return alternate(sides, "ms", 1 if quick else _ROUNDS, warm=_MEMORY)
