# stalls.py: installing a write trace: how long it takes, and how long a vCPU stands still meanwhile (measure P16).
"""A trace over all RAM put on while vCPUs stand, by a thread beside them, or in large units. For bench/traces.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvmm.bench import Collected, Result
from pyvmm.bench.running import apart, longest_gap, reset_gaps, run_on, seconds_without_cpu, timed, touching
from pyvmm.layout import MIB, format_size
from pyvmm.machine.tracing import why_not
from pyvmm.record import Record

if TYPE_CHECKING:
    from pyvmm.machine import VM
    from pyvmm.memory.mapping import Pages

# name -> tracker, whether the vCPUs stand meanwhile
SIDES = {
    "stop-all 4 KiB": ("bitmap", True),
    "helper-thread 4 KiB": ("manual", False),
    "coarse": ("coarse", False),
}
_NONE = "no trace"
_BETWEEN = 0.05
"""Seconds after a trace was removed: the guest writes to all of its memory again."""
_DISTURBED, _TRIES = 0.0002, 5
"""A vCPU or the installing thread waited so many seconds for a CPU: the installation is repeated, so often at most."""
_MOVED = 0.002
"""Seconds after threads were told on which CPUs to run."""
_USUAL = 0.01
"""Seconds in which the longest gap of a guest that is not traced is looked for."""


class Stalls(Record):
    """memory: bytes of the guest's RAM, of which it writes all but 8 MiB; rounds: installations of each kind."""

    __slots__ = ("memory", "rounds")

    def __init__(self, memory: int, rounds: int) -> None:
        self.memory = memory
        self.rounds = rounds


def stalls(size: Stalls) -> list[Result]:
    """Seconds that start() took, with pause and resume where the vCPUs stand; and the longest time in which the vCPU
    did no work meanwhile, by its own clock. "no trace": the longest in some time without any. The vCPU and the thread
    that installs have CPUs of their own; what other programs disturbed is measured again, as far as that helps.
    """
    found = Collected()
    pages: Pages
    for pages, kind in (("4k", "small"), ("auto", "large")):
        guest = f"{format_size(size.memory)} of {kind} pages"
        with touching(size.memory, f"gaps=1 size={size.memory - 8 * MIB}", pages=pages) as vm:
            if not why_not("coarse"):
                with vm.trace("coarse"):
                    pass  # the engine's thread begins here, to run on any CPU
            for turn in range(size.rounds + 1):
                untraced = _usual(vm)
                installed = {side: _undisturbed(vm, *how) for side, how in SIDES.items() if not why_not(how[0])}
                if not turn:
                    continue  # the round that warms up
                for side, (seconds, stall) in installed.items():
                    found.add(f"{guest}: longest stall of a vCPU", side, "s", stall)
                    found.add(f"{guest}: time to install", side, "s", seconds)
                found.add(f"{guest}: longest stall of a vCPU", _NONE, "s", untraced)
    return found.results()


def _undisturbed(vm: VM, name: str, standing: bool) -> tuple[float, float]:
    """An installation while which other programs took no CPU away; of several that they disturbed, the least so."""
    found: list[tuple[float, tuple[float, float]]] = []
    while not found or (found[-1][0] > _DISTURBED and len(found) < _TRIES):
        before = seconds_without_cpu(vm)
        installed = _install(vm, name, standing)
        found.append((seconds_without_cpu(vm) - before, installed))
        run_on(vm, _BETWEEN)
    return min(found)[1]


def _usual(vm: VM) -> float:
    reset_gaps(vm)
    run_on(vm, _USUAL)
    return longest_gap(vm) or 0.0


def _install(vm: VM, name: str, standing: bool) -> tuple[float, float]:
    """(seconds of the installation, of the longest stall)."""
    trace = vm.trace(name)

    def install() -> None:
        if standing:
            vm.pause()
        trace.start()
        if standing:
            vm.resume()

    with apart(vm):
        run_on(vm, _MOVED)
        reset_gaps(vm)
        seconds = timed(install)
        stall = longest_gap(vm) or 0.0
    trace.stop()
    return seconds, stall
