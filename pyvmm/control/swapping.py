# swapping.py: what a VM's control socket does and says of its swap. Sizes in bytes, pages of 4 KiB, seconds.
"""`change()` the limit; `figures()`: how it stands, as plain data."""

from __future__ import annotations

from pyvmm.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory import GuestMemory

SETTLING = 10.0
"""For so long at most a new limit is waited for."""


def change(memory: GuestMemory, target: int | None, policy: str | None, off: bool, wait: bool = True) -> None:
    """Sets the limit, or with `off` takes it away, and waits until it is kept unless `wait` says no. policy: where none
    was chosen before. Raises BadInput, HostError."""
    if off and (target is not None or policy is not None):
        raise BadInput("no limit at all needs no target and no policy")
    if policy is not None:
        if memory.reclaimer is not None:
            raise BadInput(f"this VM has the policy {memory.reclaimer.policy} since it was first given a limit")
        if target is None:
            raise BadInput("a policy chooses what goes: say with a target how much may stay")
        from pyvmm.memory.reclaim.reclaimer import check_limit

        check_limit(target)
        memory.reclaim(policy=policy)
    if off:
        memory.limit = None
    elif target is not None:
        memory.limit = target
        if wait and memory.reclaimer is not None:
            memory.reclaimer.settled(SETTLING)


def figures(memory: GuestMemory) -> dict[str, object]:
    """{"limit": null} where no limit was ever set."""
    reclaimer = memory.reclaimer
    if reclaimer is None:
        return {"memory": memory.size, "limit": None, "swap": None}
    used = reclaimer.working_set()
    return {
        "memory": memory.size,
        **reclaimer.counts().as_dict(),
        "working_set": None if used is None else dict(zip(("low", "size", "high"), used, strict=True)),
        "swap": reclaimer.swap.stats().as_dict(),
    }
