# tracing.py: a write trace for a VM, after asking the host whether the tracker works there.
"""`make_trace()`: the trackers' table (pyvmm.memory.trace) and what this host can do (pyvmm.host), together."""

from __future__ import annotations

from pyvmm import host
from pyvmm.errors import HostError
from pyvmm.memory import trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.kvm import VmFd
    from pyvmm.memory import GuestMemory
    from pyvmm.memory.trace import Rings, Target, Trace
    from pyvmm.vcpu import Vcpu


def why_not(tracker: str) -> str:
    """Why this host does not have the tracker, and what helps; "" where it has. Raises BadInput for an unknown one."""
    for feature in trace.tracker(tracker).features:
        found = host.finding(feature)
        if not found.ok:
            return f"{found.title}: {found.value}; {found.remedy}"
    return ""


def make_target(
    fd: VmFd, memory: GuestMemory, vcpus: list[Vcpu], rings: Rings | None, require_open: Callable[[], None]
) -> Target:
    """What all traces of one VM share."""
    return trace.Target(fd, memory, [vcpu.native for vcpu in vcpus], rings, require_open)


def make_trace(tracker: str, target: Target, options: dict[str, object]) -> Trace:
    """A trace, not started. Raises BadInput for an unknown tracker or option, HostError where it is not there."""
    reason = why_not(tracker)
    if reason:
        raise HostError(f"no tracker {tracker} here: {reason}")
    return trace.make_trace(tracker, target, options)
