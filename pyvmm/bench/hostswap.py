# hostswap.py: Linux's own swap, to compare ours with: a swap file of the host's that is there while a benchmark runs.
# Units: bytes.
"""`host_swap()`: a swap file, if the host allows one. What it holds is the benchmark's alone, by MADV_PAGEOUT."""

from __future__ import annotations

import mmap
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyvmm._native import ffi, lib
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_TOOLS = ("mkswap", "swapon", "swapoff")
_PAGEOUT = 21
"""MADV_PAGEOUT (asm-generic/mman-common.h)."""
_PATIENCE = 5.0
_SHARE = 0.95
"""Of the pages that MADV_PAGEOUT is to take: some it may pass over, so that a round counts from there on."""


class Refused(str):
    """Why the host has no swap file of ours."""

    __slots__ = ()


class Swappable:
    """Memory whose pages MADV_PAGEOUT takes out."""

    def __init__(self, size: int, data: bytes) -> None:
        self._size = size
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, BLOCK_SIZE):
            self._map[at : at + BLOCK_SIZE] = at.to_bytes(8, "little") + data[8:]

    def out(self) -> None:
        """Has all go out. Raises RuntimeError where the kernel leaves much of it."""
        before = _status("VmSwap")
        self._map.madvise(_PAGEOUT)
        if (gone := _status("VmSwap") - before) < _SHARE * self._size:
            raise RuntimeError(f"MADV_PAGEOUT took {gone} of {self._size} bytes")

    def touch(self) -> None:
        """Touches one page after the other."""
        with memoryview(self._map) as view:
            lib.pv_touch(ffi.from_buffer(view), self._size // PAGE_SIZE, PAGE_SIZE)

    def close(self) -> None:
        """Gives it all back."""
        self._map.close()


class HostSwap:
    """The host has a swap file of ours."""

    @contextmanager
    def filled(self, size: int, data: bytes) -> Iterator[Swappable]:
        """Memory that is `data` over and over. At the end waits until the disk is quiet: what comes next is to have it
        for itself."""
        memory = Swappable(size, data)
        try:
            yield memory
        finally:
            memory.close()
        end = time.monotonic() + _PATIENCE
        while _vmstat("nr_writeback") and time.monotonic() < end:
            time.sleep(0.01)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:")), 0)


def _vmstat(name: str) -> int:
    with open("/proc/vmstat") as file:
        return next((int(line.split()[1]) for line in file if line.startswith(f"{name} ")), 0)


def _refusal(command: list[str]) -> str:
    """Runs a tool; what it says if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stderr.strip().split("\n")[-1].split(": ")[-1] or "failed" if done.returncode else ""


def _ended(_number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signal.SIGTERM)


@contextmanager
def host_swap(folder: str, size: int, wanted: bool = True) -> Iterator[HostSwap | Refused]:
    """A swap file of `size` bytes in `folder`, or why there is none. Gone at the end, also by Ctrl-C, SIGTERM."""
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if not wanted or missing or os.geteuid():
        yield Refused("not wanted" if not wanted else f"no {missing[0]}" if missing else "needs root")
        return
    path = os.path.join(folder, f"pyvmm-bench-swap-{secrets.token_hex(8)}")
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _ended) if main else None
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, size + PAGE_SIZE)  # the header's page
        finally:
            os.close(fd)
        refusal = _refusal(["mkswap", path]) or _refusal(["swapon", path])
        yield Refused(refusal) if refusal else HostSwap()
    finally:
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # this is done to the end
        _refusal(["swapoff", path])
        if os.path.exists(path):
            os.unlink(path)
        if main:
            signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
