# reclaim.py: a guest in a part of its memory, by who chooses what leaves. Units: MiB and millions of touches a second.
"""The guest hotcold, a quarter of its blocks hot, others in each phase of two seconds, in a half of its memory.

Each round runs it once without a limit, and once with each policy. Refaults: what came back before as much had left as
may be resident.
"""

from __future__ import annotations

import time

from pyvmm.bench import Collected, Result
from pyvmm.bench.warm import warm_host
from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.machine import VM
from pyvmm.memory.reclaim.policies import POLICIES

_SIZE, _QUICK_SIZE = 256 * MIB, 32 * MIB
_ROUNDS = 5
_SECONDS, _QUICK_SECONDS = 4.0, 0.1
_MIB = MIB // PAGE_SIZE
_GUEST = "hot=25 pages=256 shift=50 ms=2000"


def _speed(size: int, seconds: float, policy: str | None, found: Collected) -> None:
    warm_host(size)
    with VM(size) as vm:
        vm.load("hotcold", _GUEST)
        vm.start()
        while vm.progress().count == 0:
            time.sleep(0.01)
        if policy is not None:
            reclaimer = vm.memory.reclaim(policy=policy)
            vm.memory.limit = size // 2
            reclaimer.settled()
        before, begin = vm.progress().count, time.perf_counter()
        vm.wait(seconds)
        count, spent = vm.progress().count - before, time.perf_counter() - begin
        name = policy or "no limit"
        found.add("speed", name, "M/s", count / 1e6 / spent)
        if policy is None:
            return
        counts = reclaimer.swap.stats()
        found.add("back from swap", name, "MiB/s", counts.came / _MIB / spent)
        found.add("refaults", name, "MiB/s", counts.refaults / _MIB / spent)
        found.add("written", name, "MiB/s", counts.bytes_written / MIB / spent)
        found.add("large at the end", name, "MiB", vm.memory.large_blocks() * 2.0)


def measure(quick: bool = False) -> list[Result]:
    """Alternating rounds, each with a VM of its own."""
    found = Collected()
    size, seconds = (_QUICK_SIZE, _QUICK_SECONDS) if quick else (_SIZE, _SECONDS)
    for turn in range(1 + (1 if quick else _ROUNDS)):
        for policy in (None, *POLICIES):
            _speed(size, seconds, policy, found if turn else Collected())
    return found.results()
