# save.py: how fast a VM is saved, and for how long its guest stands still meanwhile (measure P10). Units: GB/s of RAM,
# seconds.
"""vm.snapshot() with each codec, beside plain writing of the bytes that it has to write: what is not zeros; and beside
QEMU, which saves the same guest with the same bytes."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pyvmm._native import lib
from pyvmm.bench import Collected, Result
from pyvmm.bench.checkpoints import folder, waiting
from pyvmm.bench.qemu import MISSING, QEMU, Qemu, write_ram
from pyvmm.bench.running import longest_gap, reset_gaps, run_on
from pyvmm.bench.warm import warm_host
from pyvmm.layout import BLOCK_SIZE, GIB, MIB, PAGE_SIZE, format_size
from pyvmm.record import Record
from pyvmm.snapshot.format import CODECS

if TYPE_CHECKING:
    from collections.abc import Callable
    from mmap import mmap

    from pyvmm.machine import VM
    from pyvmm.memory import GuestMemory

CONTENTS = ("random", "half zeros", "half text")
# name -> options of vm.snapshot(); a mode that it does not take is left out
MODES: dict[str, dict[str, object]] = {"paused": {}, "live": {"mode": "live"}}
_LIMIT = "write() and fsync()"
_BETWEEN = 0.1
"""Seconds in which the guest is at work again."""


class Size(Record):
    """memory: RAM of the VM whose saving is timed; running: of the guest whose stalls are; rounds: of each; rest:
    seconds before each save, for the disk's own cache: what one side leaves there would slow whoever comes next."""

    __slots__ = ("memory", "rest", "rounds", "running")

    def __init__(self, memory: int, running: int, rounds: int, rest: float) -> None:
        self.memory = memory
        self.running = running
        self.rounds = rounds
        self.rest = rest


FULL = Size(192 * MIB, GIB, 7, 0.3)
QUICK = Size(6 * MIB, 8 * MIB, 1, 0.0)


def measure(quick: bool = False) -> list[Result]:
    """Speed: bytes of RAM, zeros with them, by the time until the file is on the disk and has its name; the VM stands.

    QEMU's: from the command until it says that it is through, and the file is on the disk, too.
    "half zeros": every other page; "half text": of each 2 MiB half is text-like, half random. Stalls: of a guest that
    writes 10 pages a ms, by its own clock; "says": pause_seconds of what vm.snapshot() returns, where it does.
    """
    size = QUICK if quick else FULL
    found = Collected()
    for content in CONTENTS:
        _speeds(found, content, size)
    _stalls(found, size)
    return found.results()


# ---- speed ----


def _speeds(found: Collected, content: str, size: Size) -> None:
    codecs = [name for number, name in enumerate(CODECS) if lib.pv_codec_available(number) == 0]
    with folder(6 * size.memory) as path, waiting(size.memory, "", content) as vm, ExitStack() as stack:
        plain, length = _not_zeros(vm.memory)
        with plain:
            sides: dict[str, Callable[[str], object]] = {_LIMIT: lambda file: _write(file, plain, length)}
            for codec in codecs:
                sides[codec] = lambda file, codec=codec: vm.snapshot(file, codec=codec)  # type: ignore[misc]
            if QEMU:
                sides["QEMU"] = _peer(stack, path, size.memory, content).save
            else:
                found.add(f"{content} data", MISSING, "GB/s")
            for turn in range(size.rounds + 1):
                for name, side in sides.items():
                    file = os.path.join(path, name.split()[0])
                    time.sleep(size.rest)
                    warm_host(size.memory)  # the page cache takes as much
                    begin = time.perf_counter()
                    side(file)
                    seconds = time.perf_counter() - begin
                    if turn:  # the round before warms up
                        found.add(f"{content} data", name, "GB/s", size.memory / 1e9 / seconds)
                        found.add(f"{content} data: size of the file", name, "MiB", os.path.getsize(file) / MIB)


def _peer(stack: ExitStack, path: str, memory: int, content: str) -> Qemu:
    """The same guest, which stands."""
    ram = os.path.join(path, "ram")
    write_ram(ram, memory, content)
    qemu = stack.enter_context(Qemu(path, memory, "touch", "wait=1", ram))
    os.unlink(ram)
    qemu.command("stop")
    return qemu


def _not_zeros(memory: GuestMemory) -> tuple[mmap, int]:
    """All pages of RAM that are not zeros, one after the other, and how many bytes they are."""
    from mmap import mmap

    pages, zeros, length = mmap(-1, memory.size), bytes(PAGE_SIZE), 0
    for first in range(0, memory.size, BLOCK_SIZE):
        block = memory.read(memory.gpa_of(first // PAGE_SIZE), min(BLOCK_SIZE, memory.size - first))
        for at in range(0, len(block), PAGE_SIZE):
            if (page := block[at : at + PAGE_SIZE]) != zeros:
                pages[length : length + PAGE_SIZE] = page
                length += PAGE_SIZE
    return pages, length


def _write(path: str, pages: mmap, length: int) -> None:
    """As a snapshot is written: a new file, whole on the disk before it takes the place of the one before."""
    with open(f"{path}.new", "wb", buffering=0) as file, memoryview(pages) as view:
        for at in range(0, length, MIB):
            with view[at : min(at + MIB, length)] as piece:
                file.write(piece)
        os.fsync(file.fileno())
    os.rename(f"{path}.new", path)


# ---- stalls ----


def _stalls(found: Collected, size: Size) -> None:
    group = f"{format_size(size.running)}, the guest writes 10 pages a ms"
    with folder(3 * size.running) as path, waiting(size.running, "gaps=1 rate=10 pattern=uniform") as vm:
        vm.type("g")
        vm.resume()
        for turn in range(size.rounds + 1):
            for name, options in MODES.items():
                stall, took, said = _stall(vm, os.path.join(path, name), options, size.rest)
                if not turn:
                    continue
                found.add(f"{group}: its longest stall in a save", name, "s", stall)
                found.add(f"{group}: time of the save", name, "s", took)
                if said is not None:
                    found.add(f"{group}: the pause that vm.snapshot() says", name, "s", said)


def _stall(vm: VM, path: str, options: dict[str, object], rest: float) -> tuple[float, float, float | None]:
    """(the guest's longest stall, seconds of the save, the pause that vm.snapshot() tells, if it tells one)."""
    warm_host(vm.memory.size)
    run_on(vm, max(rest, _BETWEEN))
    reset_gaps(vm)
    snapshot: Callable[..., Any] = vm.snapshot
    begin = time.perf_counter()
    saved = snapshot(path, **options)
    took = time.perf_counter() - begin
    return longest_gap(vm) or 0.0, took, getattr(saved, "pause_seconds", None)
