# checkpoints.py: guests with filled RAM, saved, restored in several ways, and watched until they have done a task; the
# files between the page cache and the disk. For bench/restore.py, blocks.py and save.py. Units: bytes, seconds.
"""The guest is `touch wait=1`: it stands at the beginning of its first pass until a byte is typed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import time
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, check
from pyvmm.layout import BLOCK_SIZE, KIB, MIB, PAGE_SIZE, Gpa, format_size
from pyvmm.machine import VM
from pyvmm.memory import GuestMemory
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.rewrite import pack, set_wset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyvmm.memory.mapping import Pages

_PATIENCE = 60
"""Seconds in which a guest has done its task, also where it reads each page from a slow disk."""
_LOOK = 0.2
"""Seconds after which the waiting thread sees Ctrl-C, and why a VM was paused."""
_BOOT = 0.001
_DROP_SECONDS = 5
"""In which the kernel has given up whatever keeps a page of a file that nobody uses."""
_ROTATION = 4104
"""Bytes by which one block's noise is that of the block before, rotated: no two pages are the same."""


class Checkpoint(NamedTuple):
    """A saved guest. path: the snapshot; raw: the bytes of its RAM, where they were wanted; large: KVM's 2 MiB mappings
    of the guest that was saved, when it had done the task; packed: the snapshot with the task's working set first,
    where that was recorded."""

    path: str
    raw: str
    large: int
    packed: str = ""


class Task(NamedTuple):
    """What a restored guest's task took, until it was done. restored: of the seconds, those until start(); reads:
    storage blocks that faults and the filler read, None where RAM is not read by them."""

    seconds: float
    restored: float
    faults: int
    reads: int | None
    bytes_read: int


# ---- what RAM holds ----


@cache
def _noise() -> bytes:
    return random.Random(1).randbytes(BLOCK_SIZE)


def _rotated(noise: bytes, block: int) -> bytes:
    at = block * _ROTATION % BLOCK_SIZE
    return noise[at:] + noise[:at]


def _mixed(noise: bytes, block: int) -> bytes:
    half, text = BLOCK_SIZE // 2, _text()
    at = block * _ROTATION % half
    return _rotated(noise, block)[:half] + text[at:] + text[:at]


@cache
def _text() -> bytes:
    rng = random.Random(2)
    words = [rng.randbytes(8) for _ in range(64)]
    return b"".join(rng.choices(words, k=BLOCK_SIZE // 2 // 8))


def _half_zeros(noise: bytes, block: int) -> bytes:
    whole = bytearray(_rotated(noise, block))
    for at in range(0, BLOCK_SIZE, 2 * PAGE_SIZE):
        whole[at : at + PAGE_SIZE] = bytes(PAGE_SIZE)
    return bytes(whole)


def _scattered(share: float) -> Callable[[bytes, int], bytes]:
    """So much of it, 0 to 1, are pages of zeros, anywhere."""

    def content(noise: bytes, block: int) -> bytes:
        rng, whole = random.Random(block), bytearray(_rotated(noise, block))
        for at in range(0, BLOCK_SIZE, PAGE_SIZE):
            if rng.random() < share:
                whole[at : at + PAGE_SIZE] = bytes(PAGE_SIZE)
        return bytes(whole)

    return content


ZEROS = {f"{share} % zeros": share / 100 for share in (0, 0.1, 1, 10)}
"""Contents that differ in how many pages of zeros there are among random data."""

CONTENTS: dict[str, Callable[[bytes, int], bytes]] = {
    "random": _rotated,  # no codec makes it smaller
    "half text": _mixed,  # of each 2 MiB, 1 MiB random and 1 MiB text-like
    "half zeros": _half_zeros,  # every other page
} | {name: _scattered(share) for name, share in ZEROS.items()}


def blocks(size: int, content: str) -> Iterator[tuple[int, bytes]]:
    """What RAM of `size` bytes holds from its second block of 2 MiB on: the first is the guest's program."""
    noise = _noise()
    for block in range(1, size // BLOCK_SIZE):
        yield block, CONTENTS[content](noise, block)


def fill(memory: GuestMemory, content: str) -> None:
    """Writes to all RAM but the first 2 MiB."""
    for block, data in blocks(memory.size, content):
        memory.write(memory.gpa_of(block * BLOCK_SIZE // PAGE_SIZE), data)


# ---- guests ----


@contextmanager
def waiting(memory: int, append: str, content: str = "random", pages: Pages = "auto") -> Iterator[VM]:
    """A VM whose RAM is full, paused, its guest before its first touch."""
    with VM(memory, pages=pages) as vm:
        vm.load("touch", f"wait=1 {append}")
        fill(vm.memory, content)
        vm.start()
        while not vm.serial.listening:
            _check_alive(vm, _BOOT)
        vm.pause()
        yield vm


def _check_alive(vm: VM, seconds: float = 0) -> None:
    """Waits. Raises what wait() does, and HostError where the guest has ended."""
    if vm.wait(seconds).reason != "timeout":
        raise HostError(f"the guest touch ended before it had done its work: {vm.printed.strip()}")


def await_work(vm: VM, field: str, least: int) -> None:
    """Waits until a field of vCPU 0's work is `least` or more. Brings the progress page."""
    offset = ffi.offsetof("struct pv_progress", "work") + ffi.offsetof("struct pv_work", field)
    at = ffi.cast("uint64_t *", vm.memory.hva(Gpa(lib.PV_PROGRESS_GPA)).value + offset)
    for _ in range(int(_PATIENCE / _LOOK)):
        result = lib.pv_wait_word(at, least, int(_LOOK * 1e9))
        if result != -errno.ETIMEDOUT:
            check(result, "pv_wait_word")
            return
        _check_alive(vm)
    raise HostError(f"the guest touch has not done its work in {_PATIENCE} s")


def run_task(restored: Callable[[], VM]) -> tuple[VM, Task]:
    """Restores a guest and lets it do one pass: from the call to the pass's end. The VM is the caller's to close."""
    faults = _process_faults()
    begin = time.perf_counter()
    vm = restored()
    try:
        vm.type("g")
        restored_seconds = time.perf_counter() - begin
        vm.start()
        await_work(vm, "pass", 1)
        seconds = time.perf_counter() - begin
        faults = _process_faults() - faults
        home = vm.restored
        return vm, Task(seconds, restored_seconds, faults, home.reads if home else None, home.bytes_read if home else 0)
    except BaseException:
        vm.close()
        raise


def _process_faults() -> int:
    """Page faults of this process, KVM's on behalf of its vCPUs with them; those that another thread answers twice."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


def large_at_last(vm: VM) -> int:
    """KVM's 2 MiB mappings, when all is there and the guest has done two more passes."""
    if (home := vm.restored) is not None:
        home.wait()
    await_work(vm, "pass", vm.progress().passes + 2)
    vm.pause()
    return vm.mappings()["pages_2m"]


def restore_mapped(checkpoint: Checkpoint) -> VM:
    """The kernel's own lazy restore, Firecracker's: the raw file mapped, copied on write, as the guest's RAM."""
    with Snapshot.open(checkpoint.path) as snapshot:
        vm = VM(snapshot.memory_size)
        try:
            map_private(vm.memory, checkpoint.raw)
            vm.restore_state(snapshot.states)
        except BaseException:
            vm.close()
            raise
    return vm


def map_private(memory: GuestMemory, path: str) -> None:
    """Puts a file of RAM's size in place of RAM that was never touched."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at = ffi.cast("uint8_t *", memory.hva(Gpa(0)).value)
        check(lib.pv_map_private(at, memory.size, fd), "mmap", size=memory.size)
    finally:
        os.close(fd)


# ---- files ----


@contextmanager
def folder(size: int) -> Iterator[str]:
    """A new folder for `size` bytes of files, which goes however this ends. Raises HostError where they do not fit."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as path:
        free = shutil.disk_usage(path).free
        if free < size:
            room = f"{format_size(size // MIB * MIB)} of files do not fit into {os.path.dirname(path)}"
            raise HostError(f"{room}, which has {free / MIB:,.0f} MiB: set TMPDIR to a folder that has more room")
        yield path


def checkpoint(vm: VM, path: str, raw: bool = False, **options: object) -> Checkpoint:
    """Saves a guest that waits(), its RAM beside it if `raw`; and has it do its task, to see what KVM maps then."""
    vm.snapshot(path, **options)  # type: ignore[arg-type]
    raw_path = f"{path}.raw" if raw else ""
    if raw:
        write_raw(vm.memory, raw_path)
    vm.type("g")
    vm.resume()
    await_work(vm, "pass", 1)
    return Checkpoint(path, raw_path, large_at_last(vm))


def recorded(saved: Checkpoint) -> Checkpoint:
    """The same, and another file that begins with what a guest touches first in its task."""
    vm, _ = run_task(lambda: VM.restore(saved.path, lazy=True, record=True))
    with vm:
        vm.pause()
        assert vm.restored is not None
        set_wset(saved.path, vm.restored.working_set())
    packed = f"{saved.path}.packed"
    pack(saved.path, packed, order="touch")
    return saved._replace(packed=packed)


def write_raw(memory: GuestMemory, path: str) -> None:
    """All RAM into a file, which is on the disk then."""
    with open(path, "wb", buffering=0) as file:
        for region in memory.regions:
            for at in range(0, region.size, MIB):
                with memory.view(region.gpa + at, min(MIB, region.size - at)) as view:
                    file.write(view)
        os.fsync(file.fileno())


def resident(path: str) -> int:
    """Bytes of a file that are in the page cache."""
    with open(path, "rb") as file:
        pages = ffi.new("uint64_t *")
        check(lib.pv_resident(file.fileno(), os.path.getsize(path), pages), "mincore")
    return int(pages[0]) * PAGE_SIZE


def evict(*paths: str) -> bool:
    """Takes files, that are on the disk, out of the page cache. False where the host keeps some (tmpfs does)."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not any(map(resident, paths))


def require_cold(path: str) -> None:
    """The same of a file for which it has worked before. Raises HostError where it does no longer."""
    end = time.monotonic() + _DROP_SECONDS
    while not evict(path):
        if time.monotonic() > end:
            raise HostError(f"{path} does not leave the page cache: does another program have it open?")
        time.sleep(_LOOK)


def bring(*paths: str) -> None:
    """Reads files into the page cache."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(4 * MIB):
                pass


def has_memory(size: int) -> bool:
    """Can the host spare so much, and a little more?"""
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * KIB for line in file if line.startswith("MemAvailable:"))
    return size + size // 8 < available
