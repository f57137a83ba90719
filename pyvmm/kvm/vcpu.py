# vcpu.py: one vCPU's ioctls, for pyvmm.vcpu and for probes. State travels as the kernel's structs, as bytes.
"""`VcpuFd`: a KVM vCPU (Documentation/virt/kvm/api.rst, "vcpu ioctls"). One method an ioctl."""

from __future__ import annotations

import os

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError
from pyvmm.kvm.fd import KvmFd
from pyvmm.kvm.stats import read_stats

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from pyvmm._native import CData
    from pyvmm.layout import Gpa


class VcpuFd(KvmFd):
    """A vCPU and the area it shares with us. All but the mapping's fields is for the thread that runs it, or while
    it is parked."""

    def __init__(self, fd: int, index: int, mmap_size: int) -> None:
        super().__init__(fd)
        self.index = index
        self._mmap_size = mmap_size
        self._stats_fd = -1
        self.run: CData = lib.pv_map_run(fd, mmap_size)
        if self.run == ffi.NULL:
            super().close()
            raise HostError(f"cannot map the shared area of vCPU {index} ({mmap_size} bytes)")

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        """Unmaps the shared area and closes the descriptor. No thread may be in KVM_RUN."""
        if self.fd >= 0:
            lib.pv_unmap_run(self.run, self._mmap_size)
            if self._stats_fd >= 0:
                os.close(self._stats_fd)
        super().close()

    def mapped(self, offset: int, size: int) -> bytes:
        """Bytes of the shared area; raises HostError for a range outside it."""
        if not 0 <= offset <= self._mmap_size - size:
            raise HostError(f"KVM names bytes {offset}+{size} of a shared area of {self._mmap_size}")
        return bytes(ffi.buffer(ffi.cast("char *", self.run) + offset, size))

    def put_mapped(self, offset: int, data: bytes) -> None:
        """Writes into the shared area; raises HostError for a range outside it."""
        if not 0 <= offset <= self._mmap_size - len(data):
            raise HostError(f"KVM names bytes {offset}+{len(data)} of a shared area of {self._mmap_size}")
        ffi.memmove(ffi.cast("char *", self.run) + offset, data, len(data))

    def get_regs(self) -> CData:
        """A struct kvm_regs."""
        regs = ffi.new("struct kvm_regs *")
        self.ioctl("KVM_GET_REGS", regs, vcpu=self.index)
        return regs

    def set_regs(self, regs: CData) -> None:
        """Sets the general registers, RIP and RFLAGS."""
        self.ioctl("KVM_SET_REGS", regs, vcpu=self.index)

    def get_sregs(self) -> CData:
        """A struct kvm_sregs."""
        sregs = ffi.new("struct kvm_sregs *")
        self.ioctl("KVM_GET_SREGS", sregs, vcpu=self.index)
        return sregs

    def set_sregs(self, sregs: CData) -> None:
        """Sets segment, control and descriptor-table registers."""
        self.ioctl("KVM_SET_SREGS", sregs, vcpu=self.index)

    def get_struct(self, name: str, struct: str) -> bytes:
        """The bytes of one of the KVM_GET_* parts of a vCPU's state."""
        return self.get(name, struct, vcpu=self.index)

    def set_struct(self, name: str, struct: str, data: bytes) -> None:
        """Restores one part of the state from exactly the bytes that get_struct() gave."""
        self.put(name, struct, data, vcpu=self.index)

    def get_xsave(self, size: int) -> bytes:
        """FPU, SSE, AVX ... registers: `size` bytes where KVM_CAP_XSAVE2 said so, else 4096."""
        if size <= 4096:
            return self.get_struct("KVM_GET_XSAVE", "struct kvm_xsave")
        area = ffi.new("uint64_t[]", size // 8)
        self.ioctl("KVM_GET_XSAVE2", area, vcpu=self.index)
        return bytes(ffi.buffer(area))

    def set_xsave(self, data: bytes) -> None:
        """Restores what get_xsave() gave."""
        area = ffi.new("uint64_t[]", max(len(data), 4096) // 8)
        ffi.memmove(area, data, len(data))
        self.ioctl("KVM_SET_XSAVE", area, vcpu=self.index)

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        """The MSRs that KVM lets us read, by index. KVM stops at the first it does not: that one is left out."""
        found: dict[int, int] = {}
        while indices:
            msrs = self._msrs([(index, 0) for index in indices])
            done = self.ioctl("KVM_GET_MSRS", msrs, vcpu=self.index)
            found.update((msrs.entries[i].index, msrs.entries[i].data) for i in range(done))
            indices = indices[done + 1 :]
        return found

    def set_msrs(self, values: list[tuple[int, int]]) -> list[int]:
        """Sets MSRs in order; returns the indices of those that KVM refused."""
        refused = []
        while values:
            done = self.ioctl("KVM_SET_MSRS", self._msrs(values), vcpu=self.index)
            refused += [index for index, _ in values[done : done + 1]]
            values = values[done + 1 :]
        return refused

    @staticmethod
    def _msrs(values: list[tuple[int, int]]) -> CData:
        msrs = ffi.new("struct kvm_msrs *", {"entries": len(values)})
        msrs.nmsrs = len(values)
        for i, (index, data) in enumerate(values):
            msrs.entries[i].index = index
            msrs.entries[i].data = data
        return msrs

    def set_cpuid2(self, cpuid: CData) -> None:
        """What CPUID tells the guest on this vCPU."""
        self.ioctl("KVM_SET_CPUID2", cpuid, vcpu=self.index, nent=cpuid.nent)

    def get_mp_state(self) -> int:
        """KVM_MP_STATE_*."""
        state = ffi.new("struct kvm_mp_state *")
        self.ioctl("KVM_GET_MP_STATE", state, vcpu=self.index)
        return int(state.mp_state)

    def set_mp_state(self, value: int) -> None:
        """Sets KVM_MP_STATE_*."""
        self.ioctl("KVM_SET_MP_STATE", ffi.new("struct kvm_mp_state *", [value]), vcpu=self.index, mp_state=value)

    def set_guest_debug(self, control: int) -> None:
        """KVM_GUESTDBG_* flags."""
        debug = ffi.new("struct kvm_guest_debug *")
        debug.control = control
        self.ioctl("KVM_SET_GUEST_DEBUG", debug, vcpu=self.index, control=control)

    def tsc_khz(self) -> int:
        """The rate of the guest's TSC, kHz."""
        return self.ioctl_value("KVM_GET_TSC_KHZ", vcpu=self.index)

    def pre_fault_memory(self, gpa: Gpa, size: int) -> None:
        """Fills the second-level page tables for a range of RAM (kernels from 6.11, two-dimensional paging only)."""
        request = ffi.new("struct kvm_pre_fault_memory *")
        request.gpa, request.size = gpa.value, size
        self.ioctl("KVM_PRE_FAULT_MEMORY", request, vcpu=self.index, gpa=gpa, size=size)

    def stats(self) -> dict[str, int]:
        """KVM's binary statistics of the vCPU: exits, io_exits, mmio_exits, halt_exits, ..."""
        self.open_stats()
        return read_stats(self._stats_fd)

    def open_stats(self) -> None:
        """Opens the statistics, if they are not open. While the vCPU is in KVM_RUN this waits for its next exit."""
        if self._stats_fd < 0:
            self._stats_fd = self.ioctl_value("KVM_GET_STATS_FD", vcpu=self.index)
