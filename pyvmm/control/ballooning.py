# ballooning.py: what a VM's control socket does and says of its balloon. Sizes in bytes, times in seconds.
"""`change()` the target; `figures()`: how it stands, as plain data; `short()`: what can be said without asking."""

from __future__ import annotations

from pyvmm.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.virtio.balloon import Balloon
    from pyvmm.machine import VM

ANSWERING = 0.5
"""A guest that runs has so long to say how it uses its memory; then what it last said is told."""


def change(vm: VM, target: int | None) -> None:
    """The guest is to give up so much in all. Raises BadInput."""
    balloon = _balloon(vm)
    if target is not None:
        balloon.target = target


def figures(vm: VM) -> dict[str, object]:
    """With what the guest says now. Raises BadInput where there is no balloon."""
    balloon = _balloon(vm)
    asks = vm.started and not vm.ended and not vm.paused
    stats = balloon.classes(ANSWERING if asks else None)
    return {**short(balloon), "stats": stats, "refaults": balloon.refaults()}


def short(balloon: Balloon) -> dict[str, object]:
    """Without asking the guest."""
    return {"target": balloon.target, "actual": balloon.actual, "away": balloon.away}


def _balloon(vm: VM) -> Balloon:
    if vm.balloon is None:
        raise BadInput("this VM has no balloon: start it with --balloon")
    return vm.balloon
