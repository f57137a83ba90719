# checkpoints.py: the torture of snapshots: the VM is saved, and a copy of it must be the same and get on. Now and then
# the torture goes on with the copy, so that pages that are still in the file meet all else that is done to pages.
"""`snapshot`: the operation. `Tortured`: a VM that can be restored as it was made."""

from __future__ import annotations

import os
import random
import time
from tempfile import TemporaryDirectory

from pyvmm._native import lib
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.machine import VM
from pyvmm.memory.source import UNITS
from pyvmm.snapshot.format import CODECS
from pyvmm.testing.operations import PATIENCE, Wrong, check_contents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.memory import GuestMemory
    from pyvmm.memory.mapping import Pages
    from pyvmm.testing.operations import Operation, Subject

RING_ENTRIES = 1024
WORK = (10, 300)
"""Pages that the copy's guest is to check before it is looked at: most is in the file then, or all is in the guest."""
_SHM = "/dev/shm"
"""To be quick, where it is: a disk waits for others."""


class Tortured(VM):
    """Staging memory that holds nothing is poisoned. `entries`: of each vCPU's dirty ring."""

    entries = 0

    def __init__(
        self,
        memory: int | str,
        cpus: int = 1,
        pages: Pages = "auto",
        hugetlb: bool = False,
        output: Callable[[bytes], None] | None = None,
        *,
        devices: Sequence[str] = (),
    ) -> None:
        super().__init__(memory, cpus, pages, hugetlb, output, self.entries, devices)
        self.memory.engine.poison = True


class Ringed(Tortured):
    """With dirty rings, which the guest fills again and again."""

    entries = RING_ENTRIES


def snapshot(subject: Subject, operation: Operation) -> None:
    """Saves the VM, restores it beside itself, compares, and has the copy work; goes on with one of the two."""
    rng = random.Random(operation.value)
    codec = rng.choice([name for number, name in enumerate(CODECS) if lib.pv_codec_available(number) == 0])
    block_size = rng.choice(("16K", "64K", "2M"))
    lazy, fill, stays = rng.random() < 0.7, rng.random() < 0.5, rng.random() < 0.4
    unit = rng.choice(UNITS) if lazy else "adaptive"
    live = rng.random() < 0.4 and not subject.vm.paused and not subject.watched
    was_paused = subject.vm.paused if live else subject.pause()
    with TemporaryDirectory(prefix="pyvmm-torture-", dir=_SHM if os.access(_SHM, os.W_OK) else None) as folder:
        path = os.path.join(folder, "snapshot")
        subject.vm.snapshot(path, codec=codec, block_size=block_size, mode="live" if live else "stop")
        pages = subject.memory.backing
        # Gone from its folder, a file that is read lazily is there for as long as it is open.
        copy = type(subject.vm).restore(path, lazy=lazy, fill=fill, unit=unit, pages=pages, generation=False)
    try:
        if not live:  # else the guest has gone on: the copy's own guest, and its model, are the judges
            _compare(subject.memory, copy.memory, rng, share=0.15 if lazy else 1.0)
        copy.start()
        _wait_for_work(copy, rng.choice(WORK))
        copy.pause()
        if live or not stays:
            check_contents(copy, subject.written)
        if stays:
            subject.adopt(copy)
    except BaseException:
        copy.close()
        raise
    if not stays:
        copy.close()
    if not was_paused:
        subject.resume()


def _compare(one: GuestMemory, other: GuestMemory, rng: random.Random, share: float) -> None:
    """So many of the blocks: what is looked at is in the file no more."""
    for first in range(0, one.size, BLOCK_SIZE):
        if rng.random() < share:
            gpa, size = one.gpa_of(first // PAGE_SIZE), min(BLOCK_SIZE, one.size - first)
            if one.read(gpa, size) != other.read(gpa, size):
                raise Wrong(f"block {first // BLOCK_SIZE} has other bytes in the restored VM")


def _wait_for_work(copy: VM, pages: int) -> None:
    """Every vCPU gets on, and all together so many pages."""
    before, end = copy.progress(), time.monotonic() + PATIENCE
    places = [(work.passes, work.index) for work in before.work]
    while True:
        result, now = copy.wait(0), copy.progress()
        if result.reason != "timeout":
            raise Wrong(f"the restored guest has ended: {result!r} {copy.printed.strip()!r}")
        moved = all((work.passes, work.index) != place for work, place in zip(now.work, places, strict=True))
        if moved and now.count >= before.count + pages:
            return
        if time.monotonic() > end:
            raise Wrong(f"the restored guest has checked {now.count - before.count} pages in {PATIENCE} s")
        os.sched_yield()
