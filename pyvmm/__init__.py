# pyvmm: what a program or a student may call, listed in one place. Imported lazily: `import pyvmm` costs nothing.
"""A userspace mini-hypervisor on /dev/kvm.

with VM(memory="256M", cpus=2) as vm:
    vm.load("verify")
    vm.run(timeout=5)
    print(vm.progress().count, "pages checked")
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.errors import (
        BadInput,
        FetchError,
        GuestCrash,
        HostError,
        ImageError,
        KernelError,
        PyvmmError,
        SnapshotError,
        StateError,
    )
    from pyvmm.layout import Gfn, Gpa, Hva
    from pyvmm.machine import VM, Progress, RunResult
    from pyvmm.machine.saving import Saved
    from pyvmm.memory import GuestMemory
    from pyvmm.memory.counts import EngineStats, PageCounts
    from pyvmm.memory.homes import Home
    from pyvmm.memory.trace import Runs, Trace
    from pyvmm.snapshot import Snapshot
    from pyvmm.state import State
    from pyvmm.vcpu import Registers

__version__ = "0.1.0"

# name -> module it lives in
_PUBLIC = {
    "VM": "pyvmm.machine",
    "Progress": "pyvmm.machine",
    "RunResult": "pyvmm.machine",
    "Saved": "pyvmm.machine.saving",
    "GuestMemory": "pyvmm.memory",
    "Home": "pyvmm.memory.homes",
    "PageCounts": "pyvmm.memory.counts",
    "EngineStats": "pyvmm.memory.counts",
    "Runs": "pyvmm.memory.trace",
    "Trace": "pyvmm.memory.trace",
    "Registers": "pyvmm.vcpu",
    "Snapshot": "pyvmm.snapshot",
    "State": "pyvmm.state",
    "Gpa": "pyvmm.layout",
    "Gfn": "pyvmm.layout",
    "Hva": "pyvmm.layout",
    "PyvmmError": "pyvmm.errors",
    "BadInput": "pyvmm.errors",
    "FetchError": "pyvmm.errors",
    "GuestCrash": "pyvmm.errors",
    "HostError": "pyvmm.errors",
    "ImageError": "pyvmm.errors",
    "KernelError": "pyvmm.errors",
    "SnapshotError": "pyvmm.errors",
    "StateError": "pyvmm.errors",
}

__all__ = [
    "VM",
    "BadInput",
    "EngineStats",
    "FetchError",
    "Gfn",
    "Gpa",
    "GuestCrash",
    "GuestMemory",
    "Home",
    "HostError",
    "Hva",
    "ImageError",
    "KernelError",
    "PageCounts",
    "Progress",
    "PyvmmError",
    "Registers",
    "RunResult",
    "Runs",
    "Saved",
    "Snapshot",
    "SnapshotError",
    "State",
    "StateError",
    "Trace",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pyvmm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
