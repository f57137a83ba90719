# admission.py: does one more VM fit, before it is started (technique T2.5)? Bytes.
"""`needs()` of a VM; `admit()`."""

from __future__ import annotations

from pyvmm.errors import BadInput
from pyvmm.layout import rough_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.fleet.demand import Demand

_SHOWN = 8
"""VMs that a refusal names."""


def needs(vm: Demand) -> int:
    """What cannot be had from this VM without harm: its reservation, or what it uses if that is more: then the next VM
    would live of pages that come back at once. Of a VM of which nobody knows what it uses: its reservation."""
    return max(vm.reservation, min(vm.active or 0, vm.limit))


def admit(running: Sequence[Demand], vm: Demand, budget: int) -> None:
    """Raises BadInput, with the figures, where what all need is more than the budget."""
    taken = sum(needs(each) for each in running)
    asked = needs(vm)
    if taken + asked <= budget:
        return
    most = sorted(running, key=lambda each: (-needs(each), each.name))
    shown = [f"{each.name} {rough_size(needs(each))}" for each in most[:_SHOWN]]
    if len(most) > _SHOWN:
        shown.append(f"{len(most) - _SHOWN} more {rough_size(sum(needs(each) for each in most[_SHOWN:]))}")
    others = f" of the {rough_size(budget)} others need {rough_size(taken)} ({', '.join(shown)})" if shown else ""
    left = max(0, budget - taken)
    raise BadInput(
        f"{vm.name} does not fit: it needs {rough_size(asked)}, and {rough_size(left)} are left;"
        f"{others or f' the budget is {rough_size(budget)}'}: stop one, or reserve less"
    )
