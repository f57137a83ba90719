# feature.py: the names of what a host may or may not offer, and what a probe says of one.
"""`Feature`: what one may ask for by name. `Finding`: what trying it showed."""

from __future__ import annotations

from enum import StrEnum

from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class Feature(StrEnum):
    """A feature of the host; its value is its name in `PYVMM_WITHOUT`, in tests and in JSON."""

    KVM = "kvm"
    RING0_NATIVE = "ring0_native"
    RING3_NATIVE = "ring3_native"
    FAST_EXITS = "fast_exits"
    STATS_FD = "stats_fd"
    LARGE_MAPPINGS = "large_mappings"
    DIRTY_BITMAP = "dirty_bitmap"
    MANUAL_PROTECT = "manual_protect"
    INITIALLY_SET = "initially_set"
    DIRTY_RING = "dirty_ring"
    PRE_FAULT = "pre_fault"
    SINGLE_STEP_RING0 = "single_step_ring0"
    SINGLE_STEP_RING3 = "single_step_ring3"
    TSC_STABLE = "tsc_stable"
    TSC_SCALING = "tsc_scaling"
    THP = "thp"
    THP_SHMEM = "thp_shmem"
    COLLAPSE = "collapse"
    COLLAPSE_SHMEM = "collapse_shmem"
    HUGETLB = "hugetlb"
    KSM = "ksm"
    UFFD = "uffd"
    UFFD_MISSING = "uffd_missing"
    UFFD_GUEST = "uffd_guest"
    UFFD_WP = "uffd_wp"
    UFFD_WP_LARGE = "uffd_wp_large"
    UFFD_WP_ASYNC = "uffd_wp_async"
    UFFD_MINOR = "uffd_minor"
    UFFD_MOVE = "uffd_move"
    UFFD_MOVE_LARGE = "uffd_move_large"


class Outcome(Record):
    """What a trial returns: `value`, a few words; `numbers`, what it measured, by name with unit.

    `remedy` replaces that of the table of probes where the trial knows better what helps.
    """

    __slots__ = ("numbers", "ok", "remedy", "value")

    def __init__(
        self, ok: bool, value: str, remedy: str | None = None, numbers: Mapping[str, float] | None = None
    ) -> None:
        self.ok = ok
        self.value = value
        self.remedy = remedy
        self.numbers = dict(numbers or {})

    __hash__ = None  # type: ignore[assignment]


class Finding(Record):
    """What is known of one feature of this host.

    ok: it works here; value: a few words, or the error of the trial; numbers: measured values, the unit in the name;
    cost: what pyvmm lacks or does slower without it; remedy: the command or setting that brings it;
    only_slower: nothing is unavailable without it; needs: the missing feature for whose lack this one was not tried;
    seconds: how long the trial took.
    """

    __slots__ = (
        "cost", "feature", "group", "needs", "numbers", "ok", "only_slower", "remedy", "seconds", "title", "value",
    )  # fmt: skip

    def __init__(
        self,
        feature: Feature,
        group: str,
        title: str,
        outcome: Outcome,
        cost: str,
        remedy: str,
        only_slower: bool = False,
        needs: Feature | None = None,
        seconds: float = 0.0,
    ) -> None:
        self.feature = feature
        self.group = group
        self.title = title
        self.ok: bool = outcome.ok
        self.value: str = outcome.value
        self.numbers: dict[str, float] = outcome.numbers
        self.cost = cost
        self.remedy: str = remedy if outcome.remedy is None else outcome.remedy
        self.only_slower = only_slower
        self.needs = needs
        self.seconds = seconds

    __hash__ = None  # type: ignore[assignment]
