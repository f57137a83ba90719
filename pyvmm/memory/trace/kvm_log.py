# kvm_log.py: write traces by KVM's dirty log, a bitmap a memory slot (KVM api.rst, 4.8 and 4.117).
"""`Bitmap` and `Manual`: the same log; what differs is when pages are write-protected, and how many at a time."""

from __future__ import annotations

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, HostError
from pyvmm.layout import PAGE_SIZE, Hva, format_size, parse_size
from pyvmm.memory.trace.runs import words_for
from pyvmm.memory.trace.trace import Trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import CData
    from pyvmm.layout import Region
    from pyvmm.memory.trace.trace import Target

CHUNK = "8M"
"""RAM that KVM protects at a time under its lock; a vCPU that faults meanwhile waits for so much. Of a GiB in small
mappings, all at once stalled a vCPU for 8 ms, 64M for 0.7 and 8M for 0.2; still smaller ones only took longer."""
_CHUNK_UNIT = 64 * PAGE_SIZE  # KVM_CLEAR_DIRTY_LOG takes whole 64-bit words


def log_writes(target: Target, on: bool) -> None:
    """Switches the log of all memory slots. On: all or none; off: as many as KVM lets us. Raises KernelError."""
    failure: Exception | None = None
    for slot in range(len(target.memory.regions)):
        try:
            _set_flags(target, slot, lib.KVM_MEM_LOG_DIRTY_PAGES if on else 0)
        except Exception as error:
            failure = error
            if on:
                break
    if failure is None:
        return
    if on:
        for before in range(slot):
            _set_flags(target, before, 0)
    raise failure


def _set_flags(target: Target, slot: int, flags: int) -> None:
    region = target.memory.regions[slot]
    hva = Hva(target.memory.hva(region.gpa).value)
    target.fd.set_user_memory_region(slot, region.gpa, region.size, hva, flags)


class Bitmap(Trace):
    """KVM_GET_DIRTY_LOG: tells what was written and protects it anew, in one go for a slot.

    start() protects all RAM at once, and large mappings become small ones where they are written; after stop() KVM
    makes them large again.
    """

    def __init__(self, target: Target) -> None:
        if target.rings is not None:
            raise HostError("a VM with a dirty ring has no dirty bitmap: use tracker ring, or a VM without dirty_ring")
        super().__init__(target)

    def _arm(self) -> None:
        log_writes(self._target, True)

    def _fetch(self, bits: CData) -> None:
        for slot, region in enumerate(self._target.memory.regions):
            self._fetch_slot(slot, region, bits)

    def _fetch_slot(self, slot: int, region: Region, bits: CData) -> bytearray:
        pages = region.size // PAGE_SIZE
        log = self._target.fd.get_dirty_log(slot, pages)
        # Regions begin at whole words: the hole is at 3 GiB.
        at = bits + region.offset // PAGE_SIZE // 64
        lib.pv_bits_or(at, ffi.from_buffer("uint64_t[]", log), words_for(pages))
        return log

    def _disarm(self) -> None:
        log_writes(self._target, False)


class Manual(Bitmap):
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with KVM_DIRTY_LOG_INITIALLY_SET: KVM_CLEAR_DIRTY_LOG protects, `chunk` bytes
    at a time (a multiple of 256K), so that no vCPU waits for all RAM, also not at the start.
    """

    def __init__(self, target: Target, chunk: int | str = CHUNK) -> None:
        super().__init__(target)
        size = parse_size(chunk)
        if size <= 0 or size % _CHUNK_UNIT:
            raise BadInput(f"chunk={chunk}: give a multiple of {format_size(_CHUNK_UNIT)}, such as {CHUNK}")
        self._chunk = size // PAGE_SIZE

    def _arm(self) -> None:
        fd = self._target.fd
        flags = lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | lib.KVM_DIRTY_LOG_INITIALLY_SET
        fd.enable_cap("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", flags)
        try:
            super()._arm()  # protects nothing: all bits are set
            for slot, region in enumerate(self._target.memory.regions):
                pages = region.size // PAGE_SIZE
                self._clear(slot, pages, bytearray(b"\xff" * (words_for(pages) * 8)))
        except BaseException:
            self._disarm()
            raise

    def _fetch_slot(self, slot: int, region: Region, bits: CData) -> bytearray:
        log = super()._fetch_slot(slot, region, bits)
        self._clear(slot, region.size // PAGE_SIZE, log)
        return log

    def _clear(self, slot: int, pages: int, bitmap: bytearray) -> None:
        view = memoryview(bitmap)
        words = ffi.from_buffer("uint64_t[]", bitmap)
        for first in range(0, pages, self._chunk):
            count = min(self._chunk, pages - first)
            if lib.pv_bits_count(words + first // 64, count):
                self._target.fd.clear_dirty_log(slot, first, count, view[first // 8 :])

    def _disarm(self) -> None:
        try:
            super()._disarm()
        finally:
            # Off again, or the next log would be one that only KVM_CLEAR_DIRTY_LOG clears.
            self._target.fd.enable_cap("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", 0)
