# restore.py: how soon a restored guest runs (measure P8), and how soon it has touched part of its RAM (P9; of P7 the
# large pages). Units: seconds, MiB.
"""Lazy restore beside eager, and beside what the kernel does alone with a file mapped MAP_PRIVATE (Firecracker's way).

All RAM is random data. The host's memory is warm: it was given out and taken back right before each restore.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from mmap import mmap
from typing import TYPE_CHECKING

from pyvmm.bench import Collected, Result
from pyvmm.bench.checkpoints import (
    Checkpoint,
    Task,
    await_work,
    bring,
    checkpoint,
    evict,
    folder,
    has_memory,
    large_at_last,
    recorded,
    require_cold,
    resident,
    restore_mapped,
    run_task,
    waiting,
)
from pyvmm.bench.qemu import MISSING, QEMU, Qemu, restore_to_first_byte, write_ram
from pyvmm.bench.warm import warm_host
from pyvmm.layout import GIB, MIB, PAGE_SIZE, format_size
from pyvmm.machine import VM
from pyvmm.record import Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.machine.restoring import RestoreOptions

# name -> the file (a field of Checkpoint), options of VM.restore(). The first is what the others are compared with.
WAYS: dict[str, tuple[str, RestoreOptions]] = {
    "mmap(MAP_PRIVATE)": ("raw", {}),
    "lazy": ("path", {"lazy": True}),
    "lazy, fill none": ("path", {"lazy": True, "fill": False}),
    "lazy, fill none, by first touch": ("packed", {"lazy": True, "fill": False}),
    "lazy, prefetch": ("packed", {"lazy": True, "fill": False, "prefetch": True}),
    "lazy, populate": ("packed", {"lazy": True, "fill": False, "populate": True}),
    "eager": ("path", {}),
}
# name -> what the guest does to its region
TASKS = {
    "dense writes": "",
    "dense reads": "read=1",
    "1 page in 64, writes": "stride=256K",
    "1 page in 64, reads": "stride=256K read=1",
}
START: RestoreOptions = {"lazy": True}
"""How a guest is restored whose first instruction is waited for."""

_LIMIT = "pread() of as much"
"""Into memory that is there: of a task that needs all of it, a limit."""
_WARM_FOR_START = 64 * MIB


class Size(Record):
    """starts: RAM of the guests whose start is timed; peers: of that which QEMU restores too; region of memory: what a
    guest touches, and its RAM; tasks: of TASKS; rounds."""

    __slots__ = ("memory", "peers", "region", "rounds", "starts", "tasks")

    def __init__(
        self, starts: tuple[int, ...], peers: int, region: int, memory: int, tasks: tuple[str, ...], rounds: int
    ) -> None:
        self.starts = starts
        self.peers = peers
        self.region = region
        self.memory = memory
        self.tasks = tasks
        self.rounds = rounds


FULL = Size((256 * MIB, GIB, 4 * GIB), GIB, 256 * MIB, 320 * MIB, tuple(TASKS), 5)
QUICK = Size((8 * MIB, 16 * MIB), 16 * MIB, 4 * MIB, 10 * MIB, ("dense writes", "1 page in 64, reads"), 1)


def measure(quick: bool = False) -> list[Result]:
    """Starts: with the file in the page cache. The first work is seen in the progress page, which is brought for that.
    A size that the host's memory has no room for is left out.

    exec: beside QEMU's `-incoming fd:` of a file that it wrote itself, both read before by the page cache.

    Tasks: from the call to the end of the guest's pass over the region; of a cold file, which has just been dropped
    from the page cache (left out where the host cannot), with all reads from the disk. "read from the disk": what is in
    the page cache when the pass is over. By first touch: from a file packed in the order of the task's working set,
    recorded before, which prefetch brings beside the guest and populate before it. "reads": of storage blocks, and
    their bytes. "faults": page faults of the whole process; one that userfaultfd answers counts again for who waits.
    "% large": KVM's 2 MiB mappings over those of the guest that was saved, when all has come and the guest went over it
    again.
    """
    size = QUICK if quick else FULL
    found = Collected()
    _starts(found, size)
    if has_memory(2 * size.peers):
        _peers(found, size.peers, size.rounds)
    for task in size.tasks:
        _tasks(found, task, TASKS[task], size)
    return found.results()


# ---- P8: the start ----


def _starts(found: Collected, size: Size) -> None:
    with folder(2 * sum(size.starts)) as path:
        files = {}
        for memory in filter(has_memory, size.starts):
            files[memory] = os.path.join(path, format_size(memory))
            with waiting(memory, "read=1 touches=1") as vm:
                vm.snapshot(files[memory])
        for turn in range(size.rounds + 1):
            for memory, file in files.items():
                entered, worked = _start(file)
                process = _process(file, "--lazy")
                alone = _make(memory)
                if turn:  # the round before warms up
                    found.add("VM() alone", format_size(memory), "s", alone)
                    found.add("VM.restore() to the first entry into the guest", format_size(memory), "s", entered)
                    found.add("VM.restore() to the guest's first work", format_size(memory), "s", worked)
                    found.add("`pyvmm restore` to the first byte", format_size(memory), "s", process)


def _start(file: str) -> tuple[float, float]:
    """Seconds from the call to the first entry into the guest, and to its first work."""
    warm_host(_WARM_FOR_START)
    begin = time.perf_counter()
    with VM.restore(file, **START) as vm:
        vm.type("g")
        vm.start()
        entered = _entered(vm)
        await_work(vm, "count", 1)
        return entered - begin, time.perf_counter() - begin


def _make(memory: int) -> float:
    """Seconds of VM(): what restoring cannot be faster than."""
    begin = time.perf_counter()
    with VM(memory):
        return time.perf_counter() - begin


def _entered(vm: VM) -> float:
    """When the vCPU first entered the guest, by time.perf_counter()."""
    while (entered := vm.vcpus[0].entered) is None:
        os.sched_yield()
    return entered


def _process(file: str, *options: str, warm: int = _WARM_FOR_START) -> float:
    """Seconds from exec to the guest's first byte, printed after its first touch. warm: of the host's memory."""
    warm_host(warm)
    command = [sys.executable, "-c", "import sys; from pyvmm.cli import main; sys.exit(main())", "restore", file]
    begin = time.perf_counter()
    with subprocess.Popen([*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"g")
        process.stdin.flush()
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        process.stdout.read()
    if not first:
        raise RuntimeError("pyvmm restore printed nothing")
    return seconds


def _peers(found: Collected, memory: int, rounds: int) -> None:
    """QEMU restores the same guest with the same bytes."""
    group = f"{format_size(memory)} of random data, warm file: exec to the guest's first byte"
    append = "wait=1 read=1 touches=1"
    with folder(4 * memory) as path:
        file, theirs = os.path.join(path, "ours"), os.path.join(path, "theirs")
        with waiting(memory, "read=1 touches=1") as vm:
            vm.snapshot(file, codec="raw")
        if QEMU:
            ram = os.path.join(path, "ram")
            write_ram(ram, memory, "random")
            with Qemu(path, memory, "touch", append, ram) as qemu:
                qemu.save(theirs)
            os.unlink(ram)
        else:
            found.add(group, MISSING, "s")
        for turn in range(rounds + 1):
            sides: dict[str, Callable[[], float]] = (
                {"QEMU": lambda: _qemu(path, memory, append, theirs)} if QEMU else {}
            )
            sides |= {
                "pyvmm restore": lambda: _process(file, warm=memory),
                "pyvmm restore --lazy": lambda: _process(file, "--lazy", warm=memory),
                _LIMIT: lambda: _read(file, memory),
            }
            for name, side in sides.items():
                bring(file, *([theirs] if QEMU else []))
                seconds = side()
                if turn:  # the round before warms up
                    found.add(group, name, "s", seconds)


def _qemu(path: str, memory: int, append: str, file: str) -> float:
    warm_host(memory)
    return restore_to_first_byte(path, memory, "touch", append, file)


# ---- P9: a task ----


def _tasks(found: Collected, task: str, append: str, size: Size) -> None:
    with folder(4 * size.memory) as path:
        with waiting(size.memory, f"size={size.region} {append}") as vm:
            saved = recorded(checkpoint(vm, os.path.join(path, "snapshot"), raw=True))
        files = saved.path, saved.raw, saved.packed
        cold = evict(*files)
        for turn in range(size.rounds + 1):
            for way, (file, options) in WAYS.items():
                bring(*files)
                outcome, _, large = _task(saved, file, options, size.memory)
                if turn:
                    found.add(f"{task}, warm file", way, "s", outcome.seconds)
                    _costs(found, f"{task}, warm file: what it took", way, saved, outcome, large)
            for way, (file, options) in WAYS.items() if cold and turn else ():
                require_cold(getattr(saved, file))
                outcome, read, _ = _task(saved, file, options, size.memory)
                found.add(f"{task}, cold file", way, "s", outcome.seconds)
                found.add(f"{task}, cold file: read from the disk", way, "MiB", read / MIB)
            if turn and "stride" not in append:
                _limits(found, task, saved.raw, size.region, cold)


def _task(saved: Checkpoint, which: str, options: RestoreOptions, memory: int) -> tuple[Task, int, int]:
    """(the task, bytes of the file in the page cache at its end, KVM's 2 MiB mappings)."""
    warm_host(memory)
    file: str = getattr(saved, which)
    vm, task = run_task(lambda: restore_mapped(saved) if which == "raw" else VM.restore(file, **options))
    with vm:
        read = resident(file)
        return task, read, large_at_last(vm)


def _limits(found: Collected, task: str, file: str, size: int, cold: bool) -> None:
    bring(file)
    found.add(f"{task}, warm file", _LIMIT, "s", _read(file, size))
    if cold:
        require_cold(file)
        found.add(f"{task}, cold file", _LIMIT, "s", _read(file, size))


def _read(file: str, size: int) -> float:
    with mmap(-1, size) as memory, memoryview(memory) as view, open(file, "rb") as source:
        for at in range(0, size, PAGE_SIZE):
            memory[at] = 1
        begin = time.perf_counter()
        for at in range(0, size, MIB):
            with view[at : at + MIB] as piece:
                os.preadv(source.fileno(), [piece], at)
        return time.perf_counter() - begin


def _costs(found: Collected, group: str, way: str, saved: Checkpoint, task: Task, large: int) -> None:
    """Rows of one table that differ in their units."""
    found.add(group, way, "faults", task.faults)
    if task.reads is not None:
        found.add(group, way, "reads", task.reads)
        found.add(group, way, "MiB", task.bytes_read / MIB)
    found.add(group, way, "% large", 100 * large / max(saved.large, 1))
