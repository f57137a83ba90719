# ring.py: write traces by KVM's dirty rings (KVM api.rst, 8.29). The work is in cffi_build/ring.c.
"""`Rings`: the rings of a VM, made with it; `Ring`: the tracker that uses them."""

from __future__ import annotations

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, HostError, KernelError, check
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory.trace.kvm_log import log_writes
from pyvmm.memory.trace.runs import new_bitmap, words_for
from pyvmm.memory.trace.trace import Trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import CData
    from pyvmm.kvm import VmFd
    from pyvmm.memory import GuestMemory
    from pyvmm.memory.trace.trace import Target

_CAPABILITIES = ("KVM_CAP_DIRTY_LOG_RING_ACQ_REL", "KVM_CAP_DIRTY_LOG_RING")  # the second: kernels before 6.2
_ENTRY: int = ffi.sizeof("struct kvm_dirty_gfn")
MIN_ENTRIES = PAGE_SIZE // _ENTRY
KICK_LIMIT = 10.0
"""Seconds after which a vCPU that does not leave the guest is a fault of ours or of the host."""


class Rings:
    """One ring of `entries` for each vCPU. Make it before the VM has vCPUs, attach() each, close() at the end.

    Raises BadInput for a number that cannot be, HostError where KVM has no rings.
    """

    def __init__(self, fd: VmFd, memory: GuestMemory, entries: int) -> None:
        capability = next((name for name in _CAPABILITIES if fd.check_extension(name)), None)
        if capability is None:
            raise HostError("this host's KVM has no dirty ring: needs a kernel >= 5.11 on x86; use tracker bitmap")
        most = fd.check_extension(capability) // _ENTRY
        if not MIN_ENTRIES <= entries <= most or entries & (entries - 1):
            raise BadInput(f"dirty_ring={entries}: give a power of two from {MIN_ENTRIES} to {most}, or 0 for none")
        try:
            fd.enable_cap(capability, entries * _ENTRY)
        except KernelError as error:  # the limits that KVM tells are not all: it keeps entries back for a CPU's own log
            raise BadInput(f"dirty_ring={entries} is too small for this host's CPU: give more ({error})") from error
        self.entries = entries
        self.native = ffi.new("struct pv_rings *")
        self._bits = new_bitmap(memory.size // PAGE_SIZE)
        self.native.vm_fd, self.native.entries = fd.fd, entries
        self.native.bits, self.native.words = self._bits, words_for(memory.size // PAGE_SIZE)
        self.native.slots = len(memory.regions)
        for slot, region in enumerate(memory.regions):
            self.native.slot[slot].first_page = region.offset // PAGE_SIZE
            self.native.slot[slot].pages = region.size // PAGE_SIZE
        check(lib.pv_rings_init(self.native), "pthread_mutex_init")

    def attach(self, vcpu: CData) -> None:
        """Maps the ring of a vCPU (struct pv_vcpu *) that has not run yet, and has pv_run empty it when it is full."""
        out = ffi.new("struct kvm_dirty_gfn **")
        check(lib.pv_ring_map(vcpu.fd, self.entries, out), "mmap", of="dirty ring", entries=self.entries)
        ring = self.native.ring[self.native.count]
        ring.vcpu, ring.gfns = vcpu, out[0]
        self.native.count += 1
        vcpu.rings = self.native

    def collect(self, bits: CData) -> None:
        """Adds all pages in the rings to `bits`, and gives their entries back to KVM. Raises KernelError."""
        result = lib.pv_rings_collect(self.native, bits, int(KICK_LIMIT * 1e9))
        check(min(result, 0), "KVM_RESET_DIRTY_RINGS", entries=self.entries, rings=self.native.count)

    def close(self) -> None:
        """Unmaps the rings. No vCPU may run."""
        while self.native.count:
            self.native.count -= 1
            lib.pv_ring_unmap(self.native.ring[self.native.count].gfns, self.entries)
        lib.pv_rings_deinit(self.native)


class Ring(Trace):
    """Each vCPU lists the pages that it writes, in a ring of its own; a full one is emptied in C, by the vCPU.

    Costs by what is written, not by how much RAM there is. Needs VM(dirty_ring=ENTRIES). collect() makes each vCPU
    leave the guest once, since some CPUs keep a list of their own until then.
    """

    def __init__(self, target: Target) -> None:
        if target.rings is None:
            raise HostError("this VM has no dirty ring: make it with VM(dirty_ring=8192), or use tracker bitmap")
        super().__init__(target)
        self._rings = target.rings

    @property
    def entries_taken(self) -> int:
        """Entries that came out of the VM's rings so far: writes that KVM told of."""
        return int(self._rings.native.taken)

    def _arm(self) -> None:
        self._rings.native.blind = 0  # all is protected from here on
        log_writes(self._target, True)

    def _fetch(self, bits: CData) -> None:
        self._rings.collect(bits)

    def _disarm(self) -> None:
        try:
            log_writes(self._target, False)
        finally:
            self._rings.collect(self._pending)  # left behind, they would fill the rings of the next trace
