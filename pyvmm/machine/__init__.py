# machine: builds a VM, owns its lifetime, dispatches its exits.
"""`VM`, and what running one gives: `RunResult`, `Progress`."""

from pyvmm.machine.machine import VM
from pyvmm.machine.outcome import Progress, RunResult, Work

__all__ = ["VM", "Progress", "RunResult", "Work"]
