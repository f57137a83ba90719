# scale.py: 100 tiny guests at once, and guests of 1 to 16 GiB (measure P18). Units: seconds, MiB.
"""Guests `echo` of 10 MiB, which send back a byte and then wait for more: as VMM processes, begun without waiting for
each other, and as VMs of one process.

Memory is proportional (Pss): what processes share counts for each of them in part. "Anonymous" is what Python and the C
library hold, and the few pages of its RAM that the guest has used; "files" is code and data of libraries. "Alone": of
one process, with which no other shares anything.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from contextlib import ExitStack

from pyvmm.bench import Collected, Result, growth
from pyvmm.bench.growth import GUEST, begin
from pyvmm.bench.running import memory_of
from pyvmm.errors import HostError
from pyvmm.layout import MIB
from pyvmm.machine import VM

_VMS, _QUICK_VMS = 100, 6
_MEMORY = 10 * MIB
_BYTE = b"x"
_STARTING = 50.0
_WARM_UP = 2
"""VMs that one process has before those that are measured: what comes once is not a VM's."""


def _command() -> list[str]:
    return [sys.executable, "-m", "pyvmm", "run", GUEST, "--mem", str(_MEMORY)]


def _processes(found: Collected, count: int) -> None:
    """A guest of each is there when its first byte is."""
    children: list[subprocess.Popen[bytes]] = []
    try:
        begin = time.perf_counter()
        for _ in range(count):
            child = subprocess.Popen(
                _command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
            children.append(child)
            assert child.stdin is not None
            child.stdin.write(_BYTE)
        started = time.perf_counter() - begin
        ready = _ready(children, begin)
        found.add("start, VMM processes", f"all {count} processes begun", "s", started)
        found.add("start, VMM processes", f"all {count} guests are there", "s", ready)
        found.add("guests started a second", "VMM processes", "VMs/s", count / ready)
        for name in ("all", "anonymous", "files"):
            each = [memory_of(str(child.pid))[name] for child in children]
            found.add("a VMM process, of many", name, "MiB", sum(each) / count)
    finally:
        _end(children)


def _ready(children: list[subprocess.Popen[bytes]], begin: float) -> float:
    """Seconds until all have printed something. Raises HostError where one does not."""
    with selectors.DefaultSelector() as selector:
        for child in children:
            assert child.stdout is not None
            selector.register(child.stdout, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(_STARTING)
            if not ready:
                raise HostError(f"{len(selector.get_map())} guests have not begun after {_STARTING:g} s")
            for key, _ in ready:
                if not os.read(key.fd, 1):
                    raise HostError("a guest has ended before it began")
                selector.unregister(key.fileobj)
    return time.perf_counter() - begin


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.kill()
    for child in children:
        child.communicate()


def _in_process(found: Collected, count: int) -> None:
    with ExitStack() as stack:
        for _ in range(_WARM_UP):
            _begin(stack)
        before, begin = memory_of("self"), time.perf_counter()
        for _ in range(count):
            _begin(stack)
        seconds, after = time.perf_counter() - begin, memory_of("self")
    found.add("guests started a second", "VMs of one process", "VMs/s", count / seconds)
    for name, value in after.items():
        found.add("a VM of one process", name, "MiB", (value - before[name]) / count)


def _begin(stack: ExitStack) -> None:
    begin(stack.enter_context(VM(_MEMORY)))


def measure(quick: bool = False) -> list[Result]:
    """One round of many guests: there are enough of them in it. Then what grows with a guest's RAM: see growth.py."""
    found, count = Collected(), _QUICK_VMS if quick else _VMS
    _processes(found, 1)
    alone = [result for result in found.results() if result.group == "a VMM process, of many"]
    found = Collected()
    for result in alone:
        found.add("a VMM process, alone", result.name, "MiB", *result.values)
    _processes(found, count)
    _in_process(found, count)
    growth.measure_growth(found, growth.QUICK if quick else growth.FULL)
    return found.results()
