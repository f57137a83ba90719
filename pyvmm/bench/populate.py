# populate.py: a guest's first pass over memory that the host has put there before, or not (measure P17). Unit: seconds.
"""First touches by the guest, beside MADV_POPULATE_WRITE before them (technique T4, US11586371B2)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pyvmm._native import ffi, lib
from pyvmm.bench import Collected, Result
from pyvmm.bench.checkpoints import await_work
from pyvmm.bench.running import run_on, timed
from pyvmm.bench.warm import warm_host
from pyvmm.errors import check
from pyvmm.layout import BLOCK_SIZE, MIB, Gpa, format_size
from pyvmm.machine import VM
from pyvmm.record import Record

if TYPE_CHECKING:
    from pyvmm.memory.mapping import Pages

_SIDES = {"not populated": False, "populated": True}
_BOOT = 0.001
_LATER = 0.05
"""Seconds of passes for which all is there."""


class Size(Record):
    """hot: bytes that the guest writes to; rounds."""

    __slots__ = ("hot", "rounds")

    def __init__(self, hot: int, rounds: int) -> None:
        self.hot = hot
        self.rounds = rounds


FULL = Size(256 * MIB, 7)
QUICK = Size(4 * MIB, 1)


def measure(quick: bool = False) -> list[Result]:
    """The first pass over the hot set, a word a page, in memory that nobody has touched; the host's memory is warm.
    What populating takes stands beside it, and a pass for which all is there. KVM's own tables are filled by touches in
    any case."""
    size = QUICK if quick else FULL
    found = Collected()
    pages: Pages
    for pages, kind in (("2m", "large"), ("4k", "small")):
        group = f"{format_size(size.hot)} of {kind} pages"
        for turn in range(size.rounds + 1):
            for name, populated in _SIDES.items():
                first, later, took = _pass(size.hot, pages, populated)
                if not turn:
                    continue  # the round that warms up
                found.add(f"{group}: the first pass", name, "s", first)
                found.add(f"{group}: the later passes", name, "s", later)
                found.add(f"{group}: the first pass, and populating", name, "s", first + took)
                if populated:
                    found.add(f"{group}: time of populating", "MADV_POPULATE_WRITE", "s", took)
    return found.results()


def _pass(hot: int, pages: Pages, populated: bool) -> tuple[float, float, float]:
    """Seconds of the first pass, of a later one, and of populating."""
    warm_host(hot + 4 * MIB)
    with VM(hot + 4 * MIB, pages=pages) as vm:
        vm.load("touch", f"wait=1 size={hot}")
        vm.start()
        while not vm.serial.listening:
            run_on(vm, _BOOT)
        took = 0.0
        if populated:
            at = ffi.cast("uint8_t *", vm.memory.hva(Gpa(BLOCK_SIZE)).value)
            took = timed(lambda: check(lib.pv_madvise(at, hot, lib.MADV_POPULATE_WRITE), "madvise"))
        begin = time.perf_counter()
        vm.type("g")
        await_work(vm, "pass", 1)
        first = time.perf_counter()
        passes, begun = vm.progress().passes, time.perf_counter()
        run_on(vm, _LATER)
        return first - begin, (time.perf_counter() - begun) / max(vm.progress().passes - passes, 1), took
