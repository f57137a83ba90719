# running.py: a guest that runs on while something is done to its memory: its work and its stalls. Units: seconds.
"""What benchmarks and `pyvmm dirty` ask of a guest that keeps a progress page."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyvmm.errors import BadInput
from pyvmm.machine import VM
from pyvmm.machine.outcome import gap_gpa

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WARM_UP_SECONDS = 3.0
"""At most so long until the guest's memory is populated: the first touch of memory is no steady state."""
_WARM_UP_PASSES = 2
_SETTLE_SECONDS = 1.0


class Watch:
    """The guest's work over a stretch of time."""

    def __init__(self, vm: VM) -> None:
        self._vm = vm
        self._count, self._begin, self._spent = vm.progress().count, time.perf_counter(), _thread_seconds(vm)

    def rate(self) -> float:
        """Work a second since this was made."""
        return (self._vm.progress().count - self._count) / (time.perf_counter() - self._begin)

    def rate_of_threads(self) -> float:
        """Work a second in which a vCPU's thread had a CPU: other programs show less in it. Waiting does not show."""
        return (self._vm.progress().count - self._count) / max(_thread_seconds(self._vm) - self._spent, 1e-9)


def _schedstat(task: str) -> tuple[float, float]:
    """Seconds that a thread had a CPU, and was ready but had none (Documentation/scheduler/sched-stats.rst)."""
    with open(f"/proc/{task}/schedstat") as stat:
        running, waiting, _ = stat.read().split()
    return int(running) / 1e9, int(waiting) / 1e9


def _vcpus(vm: VM) -> list[tuple[float, float]]:
    return [_schedstat(f"self/task/{vcpu.native.tid}") for vcpu in vm.vcpus]


def _thread_seconds(vm: VM) -> float:
    return sum(running for running, _ in _vcpus(vm))


def vcpus_waited(vm: VM) -> float:
    """Seconds in which a vCPU, on average, was ready to run and had no CPU, since they began."""
    return sum(waiting for _, waiting in _vcpus(vm)) / len(vm.vcpus)


def seconds_without_cpu(vm: VM) -> float:
    """Time in which a vCPU or the calling thread was ready to run and had no CPU, since they began: grows by what other
    programs do to a measurement."""
    return sum(waiting for _, waiting in _vcpus(vm)) + _schedstat("thread-self")[1]


def memory_of(process: str) -> dict[str, float]:
    """MiB of a process of /proc: proportional (Pss), in all and by kind."""
    with open(f"/proc/{process}/smaps_rollup") as rollup:
        found = {words[0]: int(words[1]) / 1024 for line in rollup if (words := line.split())[-1] == "kB"}
    return {"all": found["Pss:"], "anonymous": found["Pss_Anon:"], "files": found["Pss_File:"]}


def run_on(vm: VM, seconds: float, guest: str = "touch") -> None:
    """Lets the guest, of that name, run. Raises BadInput where it ends."""
    if vm.wait(seconds).reason != "timeout":
        raise BadInput(f"the guest {guest} ended before it was traced: give one that runs on, such as touch")


def warm_up(vm: VM, guest: str = "touch") -> None:
    """Lets the guest go over its memory twice, if it does that within a few seconds."""
    end = time.monotonic() + _WARM_UP_SECONDS
    while vm.progress().passes < _WARM_UP_PASSES and time.monotonic() < end:
        run_on(vm, 0.01, guest)


def reset_gaps(vm: VM) -> None:
    """The longest gap of each vCPU begins anew."""
    for cpu in range(len(vm.vcpus)):
        if vm.progress().tsc_khz:  # a page of another guest is not ours to write to
            vm.memory.write(gap_gpa(cpu), bytes(8))


def settle(vm: VM) -> None:
    """Waits until each vCPU has done work again: only then the gap of one that stood is known."""
    before = [work.count for work in vm.progress().work]
    end = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < end and vm.wait(0.001).reason == "timeout":
        if all(now.count > then for now, then in zip(vm.progress().work, before, strict=True)):
            break


def longest_gap(vm: VM) -> float | None:
    """Seconds since reset_gaps(), with the gap that goes on; None where the guest keeps none."""
    settle(vm)
    return vm.progress().longest_gap


@contextmanager
def touching(memory: int, append: str, **options: object) -> Iterator[VM]:
    """A VM of so many bytes that runs the guest touch, its memory populated."""
    with VM(memory, **options) as vm:  # type: ignore[arg-type]
        vm.load("touch", append)
        vm.start()
        warm_up(vm)
        yield vm


@contextmanager
def apart(vm: VM) -> Iterator[None]:
    """Keeps vCPU 0 on one CPU and the calling thread on the others, so that neither takes the other's."""
    cpus, vcpu = os.sched_getaffinity(0), vm.vcpus[0].native.tid
    if len(cpus) == 1:
        yield
        return
    os.sched_setaffinity(vcpu, {max(cpus)})
    os.sched_setaffinity(0, cpus - {max(cpus)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
        os.sched_setaffinity(vcpu, cpus)


@contextmanager
def alone(vm: VM) -> Iterator[VM]:
    """Lets a paused VM run within the `with`, so that several take turns."""
    vm.resume()
    settle(vm)  # the gap of the pause is over
    try:
        yield vm
    finally:
        vm.pause()


def timed(work: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
