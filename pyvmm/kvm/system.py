# system.py: /dev/kvm itself, for whoever creates VMs and for probes.
"""`Kvm`: the system-wide ioctls (Documentation/virt/kvm/api.rst, "System ioctls")."""

from __future__ import annotations

import errno
import os

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, KernelError
from pyvmm.kvm.fd import KvmFd
from pyvmm.kvm.vm import VmFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from pyvmm._native import CData

DEVICE = "/dev/kvm"
_CPUID_ENTRIES = 256  # KVM_MAX_CPUID_ENTRIES
_supported: list[CData] = []


class Kvm(KvmFd):
    """An open /dev/kvm. Raises HostError where there is none, or we may not use it."""

    def __init__(self, path: str = DEVICE) -> None:
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise HostError(_why_not(path, error)) from error
        try:
            version = self.ioctl_value("KVM_GET_API_VERSION")
        except KernelError as error:
            self.close()
            raise HostError(f"{path} is not KVM: {error}") from error
        if version != lib.KVM_API_VERSION:
            self.close()
            raise HostError(f"{path} speaks KVM API {version}, pyvmm needs {lib.KVM_API_VERSION}")

    def __enter__(self) -> Self:
        return self

    def check_extension(self, capability: str) -> int:
        """What KVM_CHECK_EXTENSION says of `capability` ("KVM_CAP_..."): 0 where it is not there."""
        return self.ioctl_value("KVM_CHECK_EXTENSION", getattr(lib, capability), capability=capability)

    def create_vm(self) -> VmFd:
        """A new VM without memory, vCPUs or devices."""
        while True:
            try:
                return VmFd(self.ioctl_value("KVM_CREATE_VM"))
            except KernelError as error:
                # A signal while KVM starts or changes its worker threads: nothing was created.
                if error.errno != errno.EINTR:
                    raise

    def vcpu_mmap_size(self) -> int:
        """Bytes of the area that a vCPU shares with us (struct kvm_run and what follows it)."""
        return self.ioctl_value("KVM_GET_VCPU_MMAP_SIZE")

    def supported_cpuid(self) -> CData:
        """A struct kvm_cpuid2 with what this host's KVM can offer a guest; it is the caller's to read, not to change.

        Asked once: where the host is a virtual machine itself, each leaf costs KVM an exit, together 0.4 ms.
        """
        if not _supported:
            cpuid = ffi.new("struct kvm_cpuid2 *", {"entries": _CPUID_ENTRIES})
            cpuid.nent = _CPUID_ENTRIES
            self.ioctl("KVM_GET_SUPPORTED_CPUID", cpuid)
            _supported.append(cpuid)
        return _supported[0]

    def msr_indices(self) -> list[int]:
        """The MSRs that belong to a vCPU's saved state, by KVM's own list."""
        probe = ffi.new("struct kvm_msr_list *", {"indices": 0})
        try:
            self.ioctl("KVM_GET_MSR_INDEX_LIST", probe)
        except KernelError as error:  # E2BIG tells how many there are
            if error.errno != errno.E2BIG:
                raise
        msrs = ffi.new("struct kvm_msr_list *", {"indices": probe.nmsrs})
        msrs.nmsrs = probe.nmsrs
        self.ioctl("KVM_GET_MSR_INDEX_LIST", msrs, nmsrs=probe.nmsrs)
        return list(msrs.indices[0 : msrs.nmsrs])


def _why_not(path: str, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return (
            f"no {path}: load KVM with 'sudo modprobe kvm_intel' or 'sudo modprobe kvm_amd', "
            "enable virtualization in the firmware, or nested virtualization if this is a VM"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission to open {path}: {_access_help(path)}"
    return f"cannot open {path}: {os.strerror(error.errno or 0)}"


def _access_help(path: str) -> str:
    import grp

    try:
        group = grp.getgrgid(os.stat(path).st_gid).gr_name
    except (OSError, KeyError):
        group = "kvm"
    if group == "root":
        return f"run 'sudo chgrp kvm {path} && sudo chmod 660 {path}', and join the group 'kvm'"
    return f"join its group with 'sudo usermod -aG {group} $USER', then log in again"
