# trace: which pages of RAM were written since last asked. For migration, snapshots and `pyvmm dirty`. Unit: RAM pages.
"""The trackers by name, and `Trace`, the interface that they share. A VM makes one: `vm.trace("bitmap")`."""

from __future__ import annotations

import inspect

from pyvmm.errors import BadInput
from pyvmm.memory.trace.kvm_log import Bitmap, Manual
from pyvmm.memory.trace.ring import Ring, Rings
from pyvmm.memory.trace.runs import Runs
from pyvmm.memory.trace.trace import Target, Trace, TraceStats
from pyvmm.record import Record

__all__ = ["TRACKERS", "Rings", "Runs", "Target", "Trace", "TraceStats", "Tracker", "make_trace", "tracker"]


class Tracker(Record):
    """One way to trace writes. about: a line for people; features: of the host (pyvmm.host.Feature) that it needs;
    vm_options: what VM() must have been given for it, by name."""

    __slots__ = ("about", "build", "features", "name", "vm_options")

    def __init__(
        self,
        name: str,
        about: str,
        build: type[Trace],
        features: tuple[str, ...],
        vm_options: dict[str, object] | None = None,
    ) -> None:
        self.name = name
        self.about = about
        self.build = build
        self.features = features
        self.vm_options = vm_options or {}

    __hash__ = None  # type: ignore[assignment]


TRACKERS = {
    row.name: row
    for row in (
        Tracker(
            "bitmap",
            "KVM's dirty bitmap: a look takes it, and protects what was written anew",
            Bitmap,
            ("dirty_bitmap",),
        ),
        Tracker(
            "manual",
            "the same, but RAM is protected piece by piece, also at the start",
            Manual,
            ("manual_protect", "initially_set"),
        ),
        Tracker(
            "ring", "KVM's dirty ring: each vCPU lists what it writes", Ring, ("dirty_ring",), {"dirty_ring": 8192}
        ),
    )
}


def tracker(name: str) -> Tracker:
    """The row of that name. Raises BadInput where there is none."""
    if name not in TRACKERS:
        raise BadInput(f"no tracker {name!r}: choose one of {', '.join(TRACKERS)}")
    return TRACKERS[name]


def make_trace(name: str, target: Target, options: dict[str, object]) -> Trace:
    """The tracker `name` for one VM, not started. Raises BadInput for a name or options that it does not know."""
    build = tracker(name).build
    known = [option for option in inspect.signature(build).parameters if option != "target"]
    for option in options:
        if option not in known:
            raise BadInput(f"tracker {name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return build(target, **options)
