# settings.py: what this host is and how it is set, for people who read a report. Nothing decides by it.
"""`facts()`: kernel, cores, memory (bytes), limits of KVM and settings of memory management, as they are now."""

from __future__ import annotations

import os

from pyvmm.kvm import Kvm
from pyvmm.vcpu.cpuid import address_bits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

THP = "/sys/kernel/mm/transparent_hugepage"
HUGETLB = "/sys/kernel/mm/hugepages/hugepages-2048kB"
KSM = "/sys/kernel/mm/ksm"


def read(path: str) -> str:
    """A setting; where it lists its choices, the chosen one: "always [madvise] never" is "madvise"."""
    with open(path) as file:
        text = file.read().strip()
    return text.partition("[")[2].partition("]")[0] or text


def _memory(line: str) -> int:
    with open("/proc/meminfo") as meminfo:
        for name, value, *_ in map(str.split, meminfo):
            if name == f"{line}:":
                return int(value) * 1024
    raise LookupError(line)


def _cpu() -> str:
    with open("/proc/cpuinfo") as cpuinfo:
        return next(line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name"))


def _kvm(ask: Callable[[Kvm], int]) -> int:
    with Kvm() as kvm:
        return ask(kvm)


_FACTS: dict[str, Callable[[], object]] = {
    "kernel": lambda: os.uname().release,
    "cpu": _cpu,
    "cores": lambda: len(os.sched_getaffinity(0)),
    "memory_bytes": lambda: _memory("MemTotal"),
    "memory_available_bytes": lambda: _memory("MemAvailable"),
    "max_vcpus": lambda: _kvm(lambda kvm: kvm.check_extension("KVM_CAP_MAX_VCPUS")),
    "recommended_vcpus": lambda: _kvm(lambda kvm: kvm.check_extension("KVM_CAP_NR_VCPUS")),
    "address_bits": lambda: _kvm(lambda kvm: address_bits(kvm.supported_cpuid())),
    "thp_enabled": lambda: read(f"{THP}/enabled"),
    "thp_defrag": lambda: read(f"{THP}/defrag"),
    "thp_shmem_enabled": lambda: read(f"{THP}/shmem_enabled"),
    "hugetlb_2m_total": lambda: int(read(f"{HUGETLB}/nr_hugepages")),
    "hugetlb_2m_free": lambda: int(read(f"{HUGETLB}/free_hugepages")),
    "ksm_run": lambda: int(read(f"{KSM}/run")),
    "unprivileged_userfaultfd": lambda: int(read("/proc/sys/vm/unprivileged_userfaultfd")),
}


def facts() -> dict[str, object]:
    """Each fact by its name, the unit in it; None where the host does not tell."""
    return {name: _or_none(ask) for name, ask in _FACTS.items()}


def _or_none(ask: Callable[[], object]) -> object:
    try:
        return ask()
    except Exception:  # a report must not end because a host lacks one of its lines
        return None
