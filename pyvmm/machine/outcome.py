# outcome.py: how a run ended, and what a guest says of its work. Plain records.
"""`RunResult` and `Progress`."""

from __future__ import annotations

from pyvmm._native import ffi, lib
from pyvmm.errors import EXIT_TIMEOUT
from pyvmm.layout import Gpa
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, TypeAlias

    Reason: TypeAlias = Literal["exit", "timeout", "stopped", "migrated"]

PROGRESS_SIZE: int = ffi.sizeof("struct pv_progress")

_STATUS = {
    lib.PV_STATUS_BOOTING: "booting",
    lib.PV_STATUS_RUNNING: "running",
    lib.PV_STATUS_DONE: "done",
    lib.PV_STATUS_FAILED: "failed",
}


class RunResult(Record):
    """How run() or wait() came back.

    reason: "exit" (the guest ended itself), "timeout" (it runs on, paused after run()), "stopped" (by stop()) or
    "migrated" (it runs elsewhere); status: the guest's exit status 0..255, 124 after a timeout, 0 where it was stopped
    or has moved.
    """

    __slots__ = ("reason", "status")

    def __init__(self, reason: Reason, status: int) -> None:
        self.reason: Reason = reason
        self.status = status

    @property
    def ok(self) -> bool:
        """Did the guest end itself with status 0?"""
        return self.reason == "exit" and self.status == 0


TIMED_OUT = RunResult("timeout", EXIT_TIMEOUT)


class Work(Record):
    """One vCPU's counters in the progress page; what a unit of `count` is, is the guest's (guest/abi.h).

    longest_gap: the longest time between two units of work, TSC ticks, where the guest keeps it.
    """

    __slots__ = ("count", "index", "longest_gap", "passes", "writes")

    def __init__(self, count: int, writes: int, passes: int, index: int, longest_gap: int) -> None:
        self.count = count
        self.writes = writes
        self.passes = passes
        self.index = index
        self.longest_gap = longest_gap


def gap_gpa(cpu: int) -> Gpa:
    """Where vCPU `cpu` keeps longest_gap, a 64-bit word: the host may write 0 there, and it begins anew."""
    return Gpa(lib.PV_PROGRESS_GPA) + ffi.offsetof("struct pv_progress", "work", cpu, "longest_gap")


class Progress(Record):
    """A guest's progress page, as it was when it was read (guest/abi.h, struct pv_progress).

    status: "booting" (or a guest that keeps none), "running", "done" or "failed"; wrong_gpa, wrong_expected and
    wrong_found: the first wrong byte, where the guest found one; tsc_khz: of longest_gap, 0 where it is not kept;
    generation, restores, random_seed: what the host told the guest (pyvmm.machine.generation).
    """

    __slots__ = (
        "detail", "generation", "guest", "random_seed", "region_gpa", "region_size", "restores", "seed", "status",
        "tsc_khz", "work", "wrong_expected", "wrong_found", "wrong_gpa",
    )  # fmt: skip

    def __init__(self, page: bytes) -> None:
        raw = ffi.from_buffer("struct pv_progress *", page)
        valid = raw.magic == lib.PV_PROGRESS_MAGIC and raw.version == lib.PV_PROGRESS_VERSION
        self.guest = ffi.string(raw.guest).decode("ascii", "replace") if valid else ""
        self.status = _STATUS.get(raw.status, "failed") if valid else "booting"
        self.detail: int = raw.detail
        self.seed: int = raw.seed
        self.region_gpa: int = raw.region_gpa
        self.region_size: int = raw.region_size
        self.wrong_gpa: int = raw.wrong_gpa
        self.wrong_expected: int = raw.wrong_expected
        self.wrong_found: int = raw.wrong_found
        self.tsc_khz: int = raw.tsc_khz
        self.generation = bytes(raw.generation)
        self.restores: int = raw.restores
        self.random_seed: int = raw.random_seed
        cpus = min(raw.cpus, lib.PV_MAX_CPUS) if valid else 0  # the guest may have written anything
        self.work = [Work(w.count, w.writes, getattr(w, "pass"), w.index, w.longest_gap) for w in raw.work[0:cpus]]

    @property
    def count(self) -> int:
        """Units of work done by all vCPUs."""
        return sum(work.count for work in self.work)

    @property
    def passes(self) -> int:
        """Passes over the region that every vCPU has completed."""
        return min((work.passes for work in self.work), default=0)

    @property
    def longest_gap(self) -> float | None:
        """Seconds of the longest time in which a vCPU did no work; None where the guest does not keep it."""
        if not self.tsc_khz:
            return None
        return max((work.longest_gap for work in self.work), default=0) / self.tsc_khz / 1e3
