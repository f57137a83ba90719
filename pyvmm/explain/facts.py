# facts.py: how a vCPU ended, as KVM said it: the machine fills it in, explain() reads it.
"""`ExitFacts` (struct kvm_run in KVM's api.rst, section 5)."""

from __future__ import annotations

from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, TypeAlias

    from pyvmm._native import CData

    ExitKind: TypeAlias = Literal["shutdown", "internal_error", "fail_entry", "unhandled"]

_MOST_DATA = 16  # words in kvm_run.internal.data


class ExitFacts(Record):
    """`reason`: KVM_EXIT_*. `suberror`, `data`: of an internal error. `hardware_reason`: of a failed entry, the CPU's
    own code."""

    __slots__ = ("data", "hardware_reason", "kind", "reason", "suberror")

    def __init__(
        self, kind: ExitKind, reason: int = 0, suberror: int = 0, data: tuple[int, ...] = (), hardware_reason: int = 0
    ) -> None:
        self.kind = kind
        self.reason = reason
        self.suberror = suberror
        self.data = data
        self.hardware_reason = hardware_reason

    @classmethod
    def from_run(cls, kind: ExitKind, run: CData) -> ExitFacts:
        """Copies what belongs to this kind out of a struct kvm_run."""
        facts = cls(kind, run.exit_reason)
        if kind == "internal_error":
            internal = run.internal
            facts.suberror = internal.suberror
            facts.data = tuple(internal.data[i] for i in range(min(internal.ndata, _MOST_DATA)))
        elif kind == "fail_entry":
            facts.hardware_reason = run.fail_entry.hardware_entry_failure_reason
        return facts
