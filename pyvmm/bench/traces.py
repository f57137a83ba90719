# traces.py: what tracing writes costs a guest, and how much it has sent again (measures P16 and, of P6, the traces).
"""Each tracker in turn on guests that write: their speed, what is reported, and (bench/stalls.py) the installation."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pyvmm.bench import Collected, Result
from pyvmm.bench.running import Watch, alone, run_on, touching
from pyvmm.bench.stalls import Stalls, stalls
from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.machine.tracing import why_not
from pyvmm.memory.trace import tracker
from pyvmm.record import Record

if TYPE_CHECKING:
    from pyvmm.machine import VM
    from pyvmm.memory.trace import Trace

# name -> tracker, its options
SIDES: dict[str, tuple[str, dict[str, object]]] = {
    "bitmap": ("bitmap", {}),
    "manual": ("manual", {}),
    "ring": ("ring", {}),
    "coarse": ("coarse", {}),
    "coarse, never refined": ("coarse", {"unit": "2M", "refine": 0}),
}
WORKLOADS = {
    "sequential, as fast as it can": "pattern=sequential",
    "zipf, as fast as it can": "pattern=zipf",
    "zipf, 10 pages a ms": "pattern=zipf rate=10",
}

_ROOM = 8 * MIB
"""RAM beside the region."""


class Size(Record):
    """region: bytes that the guest writes to; seconds: traced, and half of it untraced; interval: between looks."""

    __slots__ = ("interval", "region", "rounds", "seconds", "stalls")

    def __init__(self, region: int, rounds: int, seconds: float, interval: float, stalls: Stalls) -> None:
        self.region = region
        self.rounds = rounds
        self.seconds = seconds
        self.interval = interval
        self.stalls = stalls


FULL = Size(256 * MIB, 5, 1.2, 0.1, Stalls(1024 * MIB, 15))
QUICK = Size(4 * MIB, 1, 0.1, 0.02, Stalls(16 * MIB, 2))


def measure(quick: bool = False) -> list[Result]:
    """Speed: writes a second while traced, with all looks, over those of the same guest untraced just before and after,
    %. Reported: what a copier would have to send, MiB/s; bitmap and manual report exactly the pages written. Then
    bench/stalls.py. Missing trackers are left out."""
    size = QUICK if quick else FULL
    found = Collected()
    for name, append in WORKLOADS.items():
        _workload(found, name, f"{append} size={size.region}", size)
    return found.results() + stalls(size.stalls)


def _workload(found: Collected, name: str, append: str, size: Size) -> None:
    """All trackers in turn, round by round. The ring needs a VM of its own: a VM with a ring has no other log."""
    sides = {side: (tracker(which), options) for side, (which, options) in SIDES.items() if not why_not(which)}
    with ExitStack() as stack:
        vms: dict[bool, VM] = {}
        for row, _ in sides.values():
            if bool(row.vm_options) not in vms:
                vm = stack.enter_context(touching(size.region + _ROOM, append, **row.vm_options))
                vms[bool(row.vm_options)] = vm
                vm.pause()
        for turn in range(size.rounds + 1):
            for side, (row, options) in sides.items():
                with alone(vms[bool(row.vm_options)]) as vm:
                    untraced, traced, reported = _round(vm, vm.trace(row.name, **options), size)
                if turn:  # the round before warms up
                    found.add(f"{name}: speed", side, "%", 100 * traced / untraced)
                    found.add(f"{name}: reported", side, "MiB/s", reported / MIB)
                    found.add("writes untraced", name, "M/s", untraced / 1e6)


def _round(vm: VM, trace: Trace, size: Size) -> tuple[float, float, float]:
    """Writes a second untraced and traced, and bytes reported a second."""
    before = _untraced(vm, size)
    with trace:
        trace.collect()  # what was written since the installation, in no interval
        watch, bytes_reported = Watch(vm), 0
        begin = last = time.perf_counter()
        while last - begin < size.seconds:
            run_on(vm, max(last + size.interval - time.perf_counter(), 0))
            bytes_reported += trace.collect().pages * PAGE_SIZE
            last = time.perf_counter()
        traced = watch.rate()
    return (before + _untraced(vm, size)) / 2, traced, bytes_reported / (last - begin)


def _untraced(vm: VM, size: Size) -> float:
    run_on(vm, size.interval)  # mappings that a trace made small have become large again
    watch = Watch(vm)
    run_on(vm, size.seconds / 4)
    return watch.rate()
