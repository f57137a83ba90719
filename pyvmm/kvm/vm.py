# vm.py: one VM's ioctls, for the machine and for probes. Layouts are the kernel's, sizes bytes.
"""`VmFd`: a KVM VM (Documentation/virt/kvm/api.rst, "VM ioctls"). One method an ioctl."""

from __future__ import annotations

import os

from pyvmm._native import ffi, lib
from pyvmm.kvm.fd import KvmFd
from pyvmm.kvm.stats import read_stats
from pyvmm.kvm.vcpu import VcpuFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from pyvmm.layout import Gpa, Hva

IRQCHIPS = ("KVM_IRQCHIP_PIC_MASTER", "KVM_IRQCHIP_PIC_SLAVE", "KVM_IRQCHIP_IOAPIC")


class VmFd(KvmFd):
    """Owns the VM: closing it, and all its vCPUs, ends the guest."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._stats_fd = -1

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        """Closes the VM's descriptors."""
        if self._stats_fd >= 0:
            os.close(self._stats_fd)
            self._stats_fd = -1
        super().close()

    def check_extension(self, capability: str) -> int:
        """KVM_CHECK_EXTENSION for this VM; 0 where the capability is not there."""
        return self.ioctl_value("KVM_CHECK_EXTENSION", getattr(lib, capability), capability=capability)

    def create_vcpu(self, index: int, mmap_size: int) -> VcpuFd:
        """A vCPU with APIC id `index`; `mmap_size` from Kvm.vcpu_mmap_size()."""
        return VcpuFd(self.ioctl_value("KVM_CREATE_VCPU", index, index=index), index, mmap_size)

    def set_user_memory_region(self, slot: int, gpa: Gpa, size: int, hva: Hva, flags: int = 0) -> None:
        """Maps `size` bytes of ours at `hva` into the guest at `gpa`; size 0 takes the slot away.

        The caller keeps the memory mapped for as long as the slot exists.
        """
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot, region.flags = slot, flags
        region.guest_phys_addr, region.memory_size, region.userspace_addr = gpa.value, size, hva.value
        self.ioctl("KVM_SET_USER_MEMORY_REGION", region, slot=slot, gpa=gpa, size=size, flags=flags)

    def set_tss_addr(self, address: int) -> None:
        """Three pages that VT-x without unrestricted guest needs in the hole below 4 GiB."""
        self.ioctl_value("KVM_SET_TSS_ADDR", address, address=address)

    def set_identity_map_addr(self, address: int) -> None:
        """One more page, for the same."""
        self.ioctl("KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", address), address=address)

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and a LAPIC for each vCPU created later, in the kernel."""
        self.ioctl_value("KVM_CREATE_IRQCHIP")

    def create_pit2(self) -> None:
        """The 8254 timer, in the kernel."""
        self.ioctl("KVM_CREATE_PIT2", ffi.new("struct kvm_pit_config *"))

    def irq_line(self, irq: int, level: bool) -> None:
        """Sets interrupt line `irq` (GSI) of the in-kernel irqchip."""
        self.ioctl("KVM_IRQ_LINE", ffi.new("struct kvm_irq_level *", [irq, level]), irq=irq, level=level)

    def get_irqchip(self, chip: str) -> bytes:
        """A struct kvm_irqchip; `chip` is one of IRQCHIPS."""
        data = ffi.new("struct kvm_irqchip *")
        data.chip_id = getattr(lib, chip)
        self.ioctl("KVM_GET_IRQCHIP", data, chip=chip)
        return bytes(ffi.buffer(data))

    def set_irqchip(self, data: bytes) -> None:
        """Restores what get_irqchip() gave; the chip's id is inside."""
        self.put("KVM_SET_IRQCHIP", "struct kvm_irqchip", data)

    def get_pit2(self) -> bytes:
        """A struct kvm_pit_state2."""
        return self.get("KVM_GET_PIT2", "struct kvm_pit_state2")

    def set_pit2(self, data: bytes) -> None:
        """Restores what get_pit2() gave."""
        self.put("KVM_SET_PIT2", "struct kvm_pit_state2", data)

    def get_clock(self) -> int:
        """The guest's kvmclock, nanoseconds."""
        data = ffi.new("struct kvm_clock_data *")
        self.ioctl("KVM_GET_CLOCK", data)
        return int(data.clock)

    def set_clock(self, nanoseconds: int) -> None:
        """Sets the guest's kvmclock: it goes on from there."""
        data = ffi.new("struct kvm_clock_data *")
        data.clock = nanoseconds
        self.ioctl("KVM_SET_CLOCK", data, clock=nanoseconds)

    def enable_cap(self, capability: str, argument: int) -> None:
        """KVM_ENABLE_CAP on the VM."""
        cap = ffi.new("struct kvm_enable_cap *")
        cap.cap = getattr(lib, capability)
        cap.args[0] = argument
        self.ioctl("KVM_ENABLE_CAP", cap, capability=capability, arg0=argument)

    def get_dirty_log(self, slot: int, pages: int) -> bytearray:
        """One bit a small page of the slot, little-endian, set where the guest wrote since last asked.

        Without KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE this also clears the log.
        """
        bitmap = bytearray((pages + 63) // 64 * 8)
        log = ffi.new("struct kvm_dirty_log *")
        log.slot = slot
        log.dirty_bitmap = ffi.from_buffer(bitmap)
        self.ioctl("KVM_GET_DIRTY_LOG", log, slot=slot)
        return bitmap

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, bitmap: bytearray | memoryview) -> None:
        """Clears and write-protects anew the pages whose bits are set; `first_page` a multiple of 64."""
        log = ffi.new("struct kvm_clear_dirty_log *")
        log.slot, log.first_page, log.num_pages = slot, first_page, pages
        log.dirty_bitmap = ffi.from_buffer(bitmap)
        self.ioctl("KVM_CLEAR_DIRTY_LOG", log, slot=slot, first_page=first_page, num_pages=pages)

    def reset_dirty_rings(self) -> int:
        """Takes back the collected entries of all dirty rings: how many."""
        return self.ioctl_value("KVM_RESET_DIRTY_RINGS")

    def stats(self) -> dict[str, int]:
        """KVM's binary statistics of the VM: pages_4k, pages_2m, pages_1g, ..."""
        if self._stats_fd < 0:
            self._stats_fd = self.ioctl_value("KVM_GET_STATS_FD")
        return read_stats(self._stats_fd)
