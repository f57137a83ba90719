# blocks.py: how large storage blocks should be, and which codec (technique T3, US9053065B2). Units: seconds, reads.
"""A lazily restored guest reads part of its RAM, from snapshots of all block sizes and codecs.

Nothing is brought but for what it touches (fill=False): a page at a time, for each of which a storage block is read
and unpacked; a storage block; or a storage block and, with a second touch of the same 2 MiB, all of that (adaptive).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyvmm._native import lib
from pyvmm.bench import Collected, Result
from pyvmm.bench.checkpoints import bring, evict, folder, require_cold, run_task, waiting
from pyvmm.bench.warm import warm_host
from pyvmm.layout import MIB, format_size
from pyvmm.machine import VM
from pyvmm.record import Record
from pyvmm.snapshot.format import CODECS

if TYPE_CHECKING:
    from pyvmm.machine.restoring import RestoreOptions

SIZES = ("16K", "32K", "64K", "128K", "256K", "512K", "1M", "2M")
# name -> options of VM.restore(), codecs and files that are measured so: what reads a block for each page takes long
UNITS: dict[str, tuple[RestoreOptions, tuple[str, ...], tuple[str, ...]]] = {
    "by page": ({"lazy": True, "fill": False, "unit": "page"}, ("raw",), ("warm",)),
    "by storage block": ({"lazy": True, "fill": False, "unit": "block"}, CODECS, ("warm", "cold")),
    "adaptive": ({"lazy": True, "fill": False}, CODECS, ("warm", "cold")),
}
TASKS = {"dense": "read=1", "1 page in 64": "read=1 stride=256K"}


class Size(Record):
    """region of memory: what the guest reads, and its RAM; sizes: of storage blocks; rounds."""

    __slots__ = ("memory", "region", "rounds", "sizes")

    def __init__(self, region: int, memory: int, sizes: tuple[str, ...], rounds: int) -> None:
        self.region = region
        self.memory = memory
        self.sizes = sizes
        self.rounds = rounds


FULL = Size(16 * MIB, 24 * MIB, SIZES, 5)
QUICK = Size(2 * MIB, 6 * MIB, ("16K", "256K"), 1)


def measure(quick: bool = False) -> list[Result]:
    """From start() to the end of the guest's pass; half of the RAM is text-like, half random. Warm: the file is in the
    page cache; cold: it has just been dropped from there (left out where the host cannot). Reads: of storage blocks,
    more than once where a page at a time is brought.
    """
    size = QUICK if quick else FULL
    found = Collected()
    for task, append in TASKS.items():
        _task(found, task, append, size)
    return found.results()


def _task(found: Collected, task: str, append: str, size: Size) -> None:
    codecs = [name for number, name in enumerate(CODECS) if lib.pv_codec_available(number) == 0]
    with folder(len(codecs) * len(size.sizes) * size.memory) as path:
        files = {}
        with waiting(size.memory, f"size={size.region} {append}", "half text") as vm:
            for codec in codecs:
                for block in size.sizes:
                    name = f"{codec} {block}"
                    files[name] = os.path.join(path, name)
                    vm.snapshot(files[name], block_size=block, codec=codec)
        can_evict = evict(*files.values())
        for turn in range(size.rounds + 1):
            for unit, (options, only, states) in UNITS.items():
                group = f"{task}, {unit} ({format_size(size.region)})"
                for name, file in files.items():
                    for state in states if name.split()[0] in only else ():
                        if state == "warm" or can_evict:
                            _one(found if turn else Collected(), group, name, file, options, state, size.memory)


def _one(found: Collected, group: str, name: str, file: str, options: RestoreOptions, state: str, memory: int) -> None:
    if state == "warm":
        bring(file)
    else:
        require_cold(file)
    warm_host(memory)
    vm, task = run_task(lambda: VM.restore(file, **options))
    vm.close()
    found.add(f"{group}: {state} file", name, "s", task.seconds - task.restored)
    if state == "warm" and task.reads is not None:
        found.add(f"{group}: reads", name, "reads", task.reads)
