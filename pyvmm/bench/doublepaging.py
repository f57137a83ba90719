# doublepaging.py: a guest writes to its disk what the host has in its swap file (measure P15). Units: bytes, reads, s.
"""In each mode of the swap disk: counts of I/O first, since the page cache hides what a seek costs.

"sequences": pages that the host has taken out in no order are written to the disk, in sequences of 64; later each
sequence is read. Bytes read of the swap file per page written, in either way; reads per sequence that is read.
"the guest swapper": with a third of its memory, by a policy of the host's that knows nothing of the guest's; it makes
all pages of an array twice as large as its frames, and reads them in order. Reads per 64 blocks that come back; time.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from pyvmm.bench import Collected, Result
from pyvmm.bench.warm import warm_host
from pyvmm.devices.virtio.queue import Buffers
from pyvmm.devices.virtio.sequences import GAP
from pyvmm.devices.virtio.swapdisk import MODES, SwapDisk, make
from pyvmm.layout import BLOCK_SIZE, MIB, PAGE_SIZE
from pyvmm.machine import VM
from pyvmm.memory import GuestMemory
from pyvmm.memory.swap import Swap

if TYPE_CHECKING:
    from pyvmm.memory.swap import SwapCounts

_SIZE, _QUICK_SIZE = 32 * MIB, 8 * MIB
_ROUNDS, _QUICK_ROUNDS = 3, 1
_TOGETHER = 64
"""Pages of a sequence."""
_BYTES, _READS = "bytes", "reads"


def _read(counts: SwapCounts) -> int:
    return counts.bytes_read + counts.ref_bytes_read


def _reads(disk: SwapDisk) -> int:
    counts = disk.figures()
    return counts["local_reads"] + counts["slot_reads"]


def _sequences(found: Collected, mode: str, size: int) -> None:
    """Without a guest: what a device would do."""
    first, pages = BLOCK_SIZE // PAGE_SIZE, size // PAGE_SIZE
    memory = GuestMemory(size + 2 * BLOCK_SIZE, pages="4k")
    disk = make(str(size), mode)
    try:
        swap = Swap(memory, None, 4 * size)
        for page in range(first, first + pages):
            memory.write(memory.gpa_of(page), page.to_bytes(8, "little") * (PAGE_SIZE // 8))
        order = list(range(first, first + pages))
        random.Random(1).shuffle(order)
        for at in range(0, pages, _TOGETHER):
            swap.out((page, 1) for page in order[at : at + _TOGETHER])
            swap.drain()
        disk.activate()
        starts, before = range(0, pages, _TOGETHER), swap.stats()
        for at in starts:
            disk.write(at * 8, Buffers(memory, [(memory.gpa_of(first + at).value, _TOGETHER * PAGE_SIZE)]))
        found.add("sequences: read per page written", mode, _BYTES, (_read(swap.stats()) - _read(before)) / pages)
        end = time.monotonic() + 20
        while mode == "replace" and disk.figures()["replaced"] < pages and time.monotonic() < end:
            time.sleep(GAP)
        reads, into = _reads(disk), Buffers(memory, [(0, _TOGETHER * PAGE_SIZE)])
        for at in starts:
            disk.read(at * 8, into)
        found.add("sequences: reads to bring 64 back", mode, _READS, (_reads(disk) - reads) / len(starts))
    finally:
        disk.close()
        memory.close()


def _guest(found: Collected, mode: str, size: int) -> None:
    frames = size * 2 // 3 // PAGE_SIZE
    warm_host(size)
    with VM(size, devices=[f"swapdisk:{4 * size},mode={mode}"]) as vm:
        disk = vm.virtio[0].model.backend  # type: ignore[attr-defined]
        vm.memory.reclaim(size=4 * size, policy="random")
        vm.memory.limit = size // 3
        vm.load(
            "swapper", f"frames={frames} pages={2 * frames} out={_TOGETHER} order=seq read=100 touches={2 * frames}"
        )
        begin = time.perf_counter()
        if not vm.run(60).ok:
            raise RuntimeError(vm.printed)
        counts = disk.figures()
        swapped = counts["brought"] + counts["referred"]
        name = "the guest swapper"
        read = counts["brought"] * PAGE_SIZE / swapped if swapped else 0.0
        found.add(f"{name}: read per swapped page written", mode, _BYTES, read)
        found.add(f"{name}: pages written that were swapped", mode, "%", 100 * swapped / counts["blocks_written"])
        found.add(f"{name}: reads for 64 blocks", mode, _READS, _reads(disk) / counts["blocks_read"] * _TOGETHER)
        found.add(f"{name}: all of it", mode, "s", time.perf_counter() - begin)


def measure(quick: bool = False) -> list[Result]:
    """Alternating rounds, each with memory, swap and disk of its own."""
    found, size = Collected(), _QUICK_SIZE if quick else _SIZE
    for _ in range(_QUICK_ROUNDS if quick else _ROUNDS):
        for mode in MODES:
            _sequences(found, mode, size)
            _guest(found, mode, max(size, 24 * MIB))
    return found.results()
