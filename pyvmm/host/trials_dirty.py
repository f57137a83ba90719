# trials_dirty.py: the ways in which KVM tells which pages a guest wrote. For the table in probe.py.
"""Trials of dirty logging: bitmap, manual protection, ring (Documentation/virt/kvm/api.rst, 4.8, 4.117, 8.29)."""

from __future__ import annotations

import mmap
import struct
from contextlib import closing

from pyvmm._native import ffi, lib
from pyvmm.errors import KernelError
from pyvmm.host.code import TOUCH
from pyvmm.host.feature import Outcome
from pyvmm.host.guest import DATA, SIZE, TrialGuest
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm import VmFd

_SLOT = 1
_PAGES = (SIZE - BLOCK_SIZE) // PAGE_SIZE
_RING_BYTES = 64 << 10
_GFN_DIRTY, _GFN_RESET = 1, 2  # KVM_DIRTY_GFN_F_*, which older kernel headers hide from user space


def _write(guest: TrialGuest, page: int) -> None:
    guest.run(TOUCH, ring=3, rcx=1, rdi=(DATA + page * PAGE_SIZE).value)


def _logged(guest: TrialGuest) -> set[int]:
    bits = int.from_bytes(guest.vm.get_dirty_log(_SLOT, _PAGES), "little")
    return {page for page in range(_PAGES) if bits >> page & 1}


def _clear(guest: TrialGuest) -> None:
    guest.vm.clear_dirty_log(_SLOT, 0, _PAGES, bytearray(b"\xff" * (_PAGES // 8)))


def _outcome(seen: list[set[int]], expected: list[set[int]], good: str) -> Outcome:
    return Outcome(seen == expected, good if seen == expected else f"the log shows {seen}, not {expected}")


def bitmap() -> Outcome:
    """The log shows the one page that was written, and is empty when asked again."""
    with TrialGuest(flags=lib.KVM_MEM_LOG_DIRTY_PAGES) as guest:
        seen = []
        for page in (5, 700):
            _write(guest, page)
            seen += [_logged(guest), _logged(guest)]
    return _outcome(seen, [{5}, set(), {700}, set()], "exactly the pages written")


def manual_protect() -> Outcome:
    """A page stays in the log until it is cleared there, and is then logged anew."""

    def enable(vm: VmFd) -> None:
        vm.enable_cap("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)

    with TrialGuest(flags=lib.KVM_MEM_LOG_DIRTY_PAGES, before_vcpu=enable) as guest:
        _write(guest, 5)
        seen = [_logged(guest), _logged(guest)]
        _clear(guest)
        seen.append(_logged(guest))
        _write(guest, 5)
        seen.append(_logged(guest))
    return _outcome(seen, [{5}, {5}, set(), {5}], "pages stay logged until cleared")


def initially_set() -> Outcome:
    """A new log has all pages set, and nothing write-protected before the first clearing."""

    def enable(vm: VmFd) -> None:
        flags = lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | lib.KVM_DIRTY_LOG_INITIALLY_SET
        vm.enable_cap("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", flags)

    with TrialGuest(flags=lib.KVM_MEM_LOG_DIRTY_PAGES, before_vcpu=enable) as guest:
        seen = [_logged(guest)]
        _clear(guest)
        _write(guest, 5)
        seen.append(_logged(guest))
    return _outcome(seen, [set(range(_PAGES)), {5}], "a new log has all pages set")


def ring() -> Outcome:
    """The page that was written is an entry of the vCPU's ring, which KVM takes back."""

    def enable(vm: VmFd) -> None:
        try:
            vm.enable_cap("KVM_CAP_DIRTY_LOG_RING_ACQ_REL", _RING_BYTES)
        except KernelError:  # kernels before 6.2; the same on x86
            vm.enable_cap("KVM_CAP_DIRTY_LOG_RING", _RING_BYTES)

    with TrialGuest(flags=lib.KVM_MEM_LOG_DIRTY_PAGES, before_vcpu=enable) as guest:
        start = lib.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
        with closing(mmap.mmap(guest.fd.fd, _RING_BYTES, offset=start)) as entries:
            _write(guest, 5)
            flags, slot, page = struct.unpack_from("<IIQ", entries)
            more = struct.unpack_from("<I", entries, ffi.sizeof("struct kvm_dirty_gfn"))[0] & _GFN_DIRTY
            struct.pack_into("<I", entries, 0, _GFN_RESET)
            taken = guest.vm.reset_dirty_rings()
    ok = (flags & _GFN_DIRTY, slot, page, more, taken) == (_GFN_DIRTY, _SLOT, 5, 0, 1)
    return Outcome(ok, "the page written is in the ring" if ok else f"{flags=} {slot=} {page=} {more=} {taken=}")
