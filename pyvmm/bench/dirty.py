# dirty.py: what a guest writes and what tracing that costs it, for `pyvmm dirty`. Units are in the names.
"""One tracker, one VM: the guest's work before, during and after a write trace, and the trace's samples."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from pyvmm.bench.running import Watch, longest_gap, reset_gaps, run_on, warm_up
from pyvmm.machine import VM
from pyvmm.machine.exits import EXIT_NAMES
from pyvmm.memory.trace import Runs, Tracker

if TYPE_CHECKING:
    from pyvmm.memory.trace import Trace

_RING_FULL = "dirty_ring_full"


@dataclass(frozen=True)
class Plan:
    """What to run and how to look. memory: bytes; seconds: of the trace, and half of it without before and after."""

    guest: str
    append: str
    memory: int
    cpus: int
    pages: str
    seconds: float
    interval_seconds: float
    paused: bool = False
    """Install the trace while all vCPUs stand."""


@dataclass(frozen=True)
class Sample:
    """One look. at_seconds: since the trace began; seconds: since the look before; pages: written in these."""

    at_seconds: float
    seconds: float
    pages: int
    collect_seconds: float

    @property
    def pages_per_second(self) -> float:
        """The dirty page rate."""
        return self.pages / self.seconds


@dataclass
class Measured:
    """What was seen. Work is in the guest's units; None: not measured, since the guest keeps no gaps or has ended."""

    tracker: str
    work_per_second_before: float = 0.0
    work_per_second_traced: float = 0.0
    work_per_second_after: float | None = None
    install_seconds: float = 0.0
    longest_stall_seconds: float | None = None
    longest_gap_untraced_seconds: float | None = None
    remove_seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    different_pages: int = 0
    ring_full_exits: int = 0
    mappings_before: dict[str, int] = field(default_factory=dict)
    mappings_traced: dict[str, int] = field(default_factory=dict)
    mappings_after: dict[str, int] = field(default_factory=dict)

    @property
    def pages(self) -> int:
        """Pages of all looks together."""
        return sum(sample.pages for sample in self.samples)

    @property
    def pages_per_second(self) -> float:
        """The dirty page rate over all looks: it falls with longer intervals, since a page counts once in each."""
        return self.pages / max(sum(sample.seconds for sample in self.samples), 1e-9)

    @property
    def collect_seconds(self) -> float:
        """A look, on average."""
        return sum(sample.collect_seconds for sample in self.samples) / max(len(self.samples), 1)

    @property
    def speed(self) -> float:
        """Work while traced, as a share of untraced work: the mean of before and after."""
        rates = [rate for rate in (self.work_per_second_before, self.work_per_second_after) if rate]
        return self.work_per_second_traced * len(rates) / sum(rates) if rates else 0.0

    def as_json(self) -> dict[str, object]:
        """All of it as plain data."""
        totals = {"pages": self.pages, "pages_per_second": self.pages_per_second, "speed": self.speed}
        return asdict(self) | totals | {"collect_seconds": self.collect_seconds}


def measure(row: Tracker, plan: Plan) -> Measured:
    """Runs the guest in a VM of its own and traces it with one tracker.

    Raises BadInput for a guest that does not run long enough, GuestCrash for one that crashes.
    """
    options: dict[str, object] = {"cpus": plan.cpus, "pages": plan.pages} | row.vm_options
    with VM(plan.memory, **options) as vm:  # type: ignore[arg-type]
        vm.load(plan.guest, plan.append)
        trace = vm.trace(row.name)
        vm.start()
        warm_up(vm, plan.guest)
        found = Measured(row.name, mappings_before=vm.mappings())
        reset_gaps(vm)
        watch = Watch(vm)
        run_on(vm, plan.seconds / 2, plan.guest)
        found.work_per_second_before = watch.rate()
        found.longest_gap_untraced_seconds = vm.progress().longest_gap
        _install(vm, trace, plan, found)
        ended = _look(vm, trace, plan, found)
        if not ended:
            found.mappings_traced = vm.mappings()
        trace.stop()
        found.install_seconds, found.remove_seconds = trace.stats.start_seconds, trace.stats.stop_seconds
        found.ring_full_exits = _exits(vm, _RING_FULL)
        if not ended:
            watch = Watch(vm)
            if vm.wait(plan.seconds / 2).reason == "timeout":
                found.work_per_second_after = watch.rate()
                found.mappings_after = vm.mappings()
        return found


def _exits(vm: VM, name: str) -> int:
    counts = (vcpu.exits() for vcpu in vm.vcpus)
    return sum(count for exits in counts for reason, count in exits.items() if EXIT_NAMES.get(reason) == name)


def _install(vm: VM, trace: Trace, plan: Plan, found: Measured) -> None:
    reset_gaps(vm)
    if plan.paused:
        vm.pause()
    trace.start()
    if plan.paused:
        vm.resume()
    found.longest_stall_seconds = longest_gap(vm)


def _look(vm: VM, trace: Trace, plan: Plan, found: Measured) -> bool:
    """Collects at each interval; True where the guest ended meanwhile."""
    trace.collect()  # what was written since the installation, in no interval
    watch, ever = Watch(vm), Runs()
    begin = last = time.perf_counter()
    ended = False
    while not ended and last - begin < plan.seconds:
        due = last + plan.interval_seconds
        ended = vm.wait(max(due - time.perf_counter(), 0)).reason != "timeout"
        before = time.perf_counter()
        runs = trace.collect()
        now = time.perf_counter()
        found.samples.append(Sample(now - begin, now - last, runs.pages, now - before))
        ever |= runs
        last = now
    found.work_per_second_traced = watch.rate()
    found.different_pages = ever.pages
    return ended
