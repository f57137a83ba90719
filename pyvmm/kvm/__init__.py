# kvm: /dev/kvm through cffi, one method an ioctl. Knows nothing of guests, devices or policies.
"""Typed wrappers of KVM's ioctls: `Kvm` (system), `VmFd` (a VM), `VcpuFd` (a vCPU)."""

from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vcpu import VcpuFd
from pyvmm.kvm.vm import VmFd

__all__ = ["Kvm", "VcpuFd", "VmFd"]
