# vcpu: one virtual CPU: thread, registers, CPUID, saved state.
"""Virtual CPUs."""

from pyvmm.vcpu.registers import Registers
from pyvmm.vcpu.vcpu import Vcpu

__all__ = ["Registers", "Vcpu"]
