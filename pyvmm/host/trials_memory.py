# trials_memory.py: large pages and merged pages of the host, tried on 2 MiB of ours. For the table in probe.py.
"""Trials of THP (Documentation/admin-guide/mm/transhuge.rst), MADV_COLLAPSE, hugetlb, KSM. None changes a setting."""

from __future__ import annotations

import os
import time

from pyvmm._native import lib
from pyvmm.errors import KernelError
from pyvmm.host import settings
from pyvmm.host.feature import Outcome
from pyvmm.host.scratch import advise, large_bytes, pointer, scratch, shared
from pyvmm.layout import BLOCK_SIZE

_GIVES = {True: "one touch gives 2 MiB", False: "one touch gives 4 KiB"}
_DEFRAG = f"echo madvise | sudo tee {settings.THP}/defrag"


def _became_large(address: int) -> bool:
    before = large_bytes(address)
    lib.pv_poke(pointer(address), 1)
    return large_bytes(address) >= before + BLOCK_SIZE


def thp() -> Outcome:
    """The first touch of an advised block gives a 2 MiB page."""
    with scratch(backing="PV_BACKING_THP") as address:
        large = _became_large(address)
    enabled = settings.read(f"{settings.THP}/enabled")
    # Allowed and yet not given: there is no free block, or finding one is forbidden.
    remedy = None if large or enabled == "never" else f"sudo sysctl vm.compact_memory=1; {_DEFRAG}"
    return Outcome(large, f"{_GIVES[large]}, enabled={enabled}", remedy)


def thp_shmem() -> Outcome:
    """The same for a block of a memfd."""
    with shared() as (address,):
        advise(address, "MADV_HUGEPAGE")
        large = _became_large(address)
    return Outcome(large, f"{_GIVES[large]}, shmem_enabled={settings.read(f'{settings.THP}/shmem_enabled')}")


def collapse() -> Outcome:
    """MADV_COLLAPSE makes one large page of 512 small ones."""
    with scratch() as address:
        return _collapse(address)


def collapse_shmem() -> Outcome:
    """MADV_COLLAPSE of a memfd's pages."""
    with shared() as (address,):
        return _collapse(address)


def _collapse(address: int) -> Outcome:
    advise(address, "MADV_POPULATE_WRITE")
    advise(address, "MADV_HUGEPAGE")  # lifts MADV_NOHUGEPAGE; the pages are small already
    before = large_bytes(address)
    start = time.perf_counter()
    advise(address, "MADV_COLLAPSE")
    elapsed = (time.perf_counter() - start) * 1e6
    large = large_bytes(address) >= before + BLOCK_SIZE
    return Outcome(
        large, f"{elapsed:.0f} us for 2 MiB" if large else "the pages stay small", numbers={"microseconds": elapsed}
    )


def hugetlb() -> Outcome:
    """One page of the reserve can be mapped and written."""
    total, free = (int(settings.read(f"{settings.HUGETLB}/{name}")) for name in ("nr_hugepages", "free_hugepages"))
    value = f"{free} of {total} reserved 2 MiB pages free"
    try:
        with scratch(backing="PV_BACKING_HUGETLB") as address:
            advise(address, "MADV_POPULATE_WRITE")  # a write of ours would end in SIGBUS where a cgroup forbids it
    except KernelError as error:
        return Outcome(False, value if not free else f"{value}; {error}")
    return Outcome(True, value)


def ksm() -> Outcome:
    """Memory can be offered for merging, and the kernel's thread that merges runs, or is ours to start."""
    run = int(settings.read(f"{settings.KSM}/run"))
    with scratch() as address:
        advise(address, "MADV_MERGEABLE")
    if run == 1:
        return Outcome(True, "running")
    ours = os.access(f"{settings.KSM}/run", os.W_OK)
    return Outcome(ours, f"there, not running (run={run}){', and ours to start' if ours else ''}")
