# test_reclaim_faults.py: a guest with a limit whose swap file fails at a hundred random moments: its disk is full, does
# not write, does not read, or reads something else. Nothing is lost, and no byte is wrong.
from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from engine_help import judge, passes, until, working

from pyvmm.errors import FetchError
from pyvmm.layout import MIB
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "uffd_guest")

FAULTS = int(os.environ.get("PYVMM_FAULTS", "100"))
SECONDS = 20
"""For a loaded host, on which a disk that fails for some milliseconds may see no write."""


def swap_fd(folder):
    """The descriptor of the swap file, which has no name any more."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            path = os.readlink(f"/proc/self/fd/{fd}")
            found += [int(fd)] if path.startswith(str(folder)) and path.endswith("(deleted)") else []
    assert len(found) == 1
    return found[0]


class Disk:
    """What the swap has for a file, from moment to moment. "EIO": the memory of a process, where it has none."""

    def __init__(self, fd, other):
        self._fd = fd
        self._whole = os.dup(fd)
        self._broken = {
            "EIO": os.open(f"/proc/{other}/mem", os.O_RDWR | os.O_CLOEXEC),
            "ENOSPC": os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC),  # and reads zeros, which are not what was written
        }

    @contextmanager
    def failing(self, how):
        os.dup2(self._broken[how], self._fd, inheritable=False)
        try:
            yield
        finally:
            os.dup2(self._whole, self._fd, inheritable=False)

    def close(self):
        for fd in (self._whole, *self._broken.values()):
            os.close(fd)


@pytest.fixture
def other():
    """A process whose first 4 MiB are no memory."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    until(lambda: Path(f"/proc/{process.pid}/maps").read_text(), "its memory")
    yield process.pid
    process.kill()
    process.communicate(timeout=20)


def quiet_of_memory(pid, size):
    """Is nothing of a process at offsets below `size`? Else it could be overwritten."""
    first = Path(f"/proc/{pid}/maps").read_text().partition("-")[0]
    return int(first, 16) >= size


@pytest.mark.parametrize("compress", [None, "lz4"])
def test_a_disk_that_fails_again_and_again(vm, tmp_path, other, compress):
    machine = working(vm, "32M", "order=random zeros=100", cpus=2)
    reclaimer = machine.memory.reclaim(str(tmp_path), compress=compress, policy="clock")
    machine.memory.limit = 8 * MIB
    assert reclaimer.settled()
    if not quiet_of_memory(other, 64 * MIB):
        pytest.fail("a process has memory where the test wants none")
    disk, rng, failed = Disk(swap_fd(tmp_path), other), random.Random(1), 0

    def goes_on(seconds):
        """Lets the guest run; how often it had to be helped on."""
        helped, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                assert machine.wait(max(end - time.monotonic(), 0)).reason == "timeout", machine.printed
            except FetchError as error:
                assert error.errno in (errno.EIO, errno.EBADMSG)  # noqa: PT017 (it need not come)
                helped += 1
                machine.resume()
        return helped

    end, tries = time.monotonic() + SECONDS, 0
    try:
        while tries < FAULTS // 2 or (time.monotonic() < end and not (failed and reclaimer.swap.stats().errors)):
            tries += 1
            with disk.failing(rng.choice(("EIO", "ENOSPC"))):
                failed += goes_on(rng.uniform(0.001, 0.01))
            failed += goes_on(rng.uniform(0.001, 0.005))
    finally:
        disk.close()
    assert failed > 0, "no page was read while the disk failed"
    assert reclaimer.swap.stats().errors > 0, "none was written"
    if machine.paused:
        machine.resume()
    passes(machine, 1)
    until(lambda: reclaimer.swap.stats().behind == 0, "what could not be written")
    judge(machine)
