# cpuid.py: what CPUID tells the guest on each vCPU.
"""Fills a struct kvm_cpuid2 from what KVM supports (Intel SDM vol. 2, CPUID; KVM api.rst 4.46)."""

from __future__ import annotations

from pyvmm._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import CData

_HYPERVISOR = 0x4000_0000
_TIMING = 0x4000_0010
"""Hypervisors' common leaf: eax = TSC kHz, ebx = APIC bus kHz. Spares guests a calibration of 10 ms."""
_APIC_BUS_KHZ = 1_000_000  # KVM's LAPIC timer counts nanoseconds
_TOPOLOGY = (0xB, 0x1F)
_CHANGED = (0, 1, 0x8000_0008, _HYPERVISOR)


def address_bits(supported: CData) -> int:
    """Physical address width, bits."""
    for entry in supported.entries[0 : supported.nent]:
        if entry.function == 0x8000_0008:
            return int(entry.eax & 0xFF)
    return 36


def cpuid_for(supported: CData, index: int, cpus: int, tsc_khz: int) -> CData:
    """The table of vCPU `index` of `cpus`: KVM's own, with this vCPU's APIC id, one package of `cpus` cores, and the
    timing leaf."""
    size = ffi.sizeof("struct kvm_cpuid_entry2")
    raw = memoryview(ffi.buffer(supported.entries, supported.nent * size))
    functions = raw.cast("I")[:: size // 4].tolist()  # a table of some fifty: by entry, cffi would take longer than KVM
    kept = [i for i, function in enumerate(functions) if function not in (*_TOPOLOGY, _TIMING)]
    cpuid = ffi.new("struct kvm_cpuid2 *", {"entries": len(kept) + 4})
    ffi.memmove(cpuid.entries, b"".join(raw[i * size : (i + 1) * size] for i in kept), len(kept) * size)
    for i, number in enumerate(kept):
        if functions[number] not in _CHANGED:
            continue
        mine = cpuid.entries[i]
        if mine.function == 1:
            mine.ebx = (mine.ebx & 0xFFFF) | min(cpus, 255) << 16 | index << 24
            mine.edx = mine.edx | (1 << 28 if cpus > 1 else 0)  # HTT: ebx has a count
        elif mine.function == 0x8000_0008:
            mine.ecx = (mine.ecx & ~0xFF) | (cpus - 1) & 0xFF
        elif mine.function == _HYPERVISOR:
            mine.eax = max(mine.eax, _TIMING)
        elif mine.function == 0:
            mine.eax = max(mine.eax, 0xB)
    width = max(cpus - 1, 0).bit_length()
    count = len(kept)
    for level, (shift, number, kind) in enumerate(((0, 1, 1), (width, cpus, 2), (0, 0, 0))):  # thread, core, end
        _set(cpuid.entries[count + level], 0xB, level, (shift, number, kind << 8 | level, index))
    _set(cpuid.entries[count + 3], _TIMING, None, (tsc_khz, _APIC_BUS_KHZ, 0, 0))
    cpuid.nent = count + 4
    return cpuid


def _set(entry: CData, function: int, index: int | None, values: tuple[int, int, int, int]) -> None:
    entry.function = function
    if index is not None:
        entry.index, entry.flags = index, lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    entry.eax, entry.ebx, entry.ecx, entry.edx = values
