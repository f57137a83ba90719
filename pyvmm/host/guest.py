# guest.py: a guest of a few instructions, to see what this host's KVM really does with one. Bounded in time.
"""`TrialGuest`: a VM of 8 MiB with one vCPU that runs machine code in ring 0 or 3 of long mode.

It starts in its ring directly (KVM_SET_SREGS), with IOPL 3: no descriptor tables, no start code, so that a trial shows
the host and nothing else. The price is that any exception in the guest is a triple fault, an exit like any other.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError
from pyvmm.image.model import Entry
from pyvmm.kvm import Kvm
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, Gpa
from pyvmm.memory import GuestMemory
from pyvmm.vcpu import Vcpu
from pyvmm.vcpu.registers import set_entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from pyvmm.kvm import VcpuFd, VmFd
    from pyvmm.memory.mapping import Pages

TIME_LIMIT = 0.5
"""Seconds that a trial guest has for one run."""
SIZE = 4 * BLOCK_SIZE
DATA = Gpa(BLOCK_SIZE)
"""Memory slot 1: all behind the first 2 MiB, for the guest's own writes. Slot 0 has its code and page tables, which
KVM may write to by itself (accessed and dirty bits)."""
MARK = 0xF0
"""Port at which a guest says that it passed a point: the time is kept."""
END = 0xF4
"""Port at which a guest ends its run."""

_PML4, _PDPT, _PD, _CODE = Gpa(0x1000), Gpa(0x2000), Gpa(0x3000), Gpa(0x8000)
_PRESENT_WRITE_USER, _LARGE = 0x7, 0x80
_IOPL3 = 0x3000


class TrialGuest:
    """`pages` as GuestMemory takes them; `flags`: KVM_MEM_* of slot 1, the guest's data.

    `before_vcpu` is called with the VM while it has neither memory nor vCPU. `marks`: times (s) of the last run's
    marks; `steps`: the offsets in its code at which debug flags stopped it. Raises HostError without KVM.
    """

    def __init__(
        self, pages: Pages = "4k", flags: int = 0, before_vcpu: Callable[[VmFd], object] = lambda vm: None
    ) -> None:
        self.marks: list[float] = []
        self.steps: list[int] = []
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        with ExitStack() as stack:
            self.memory = GuestMemory(SIZE, pages)
            stack.callback(self.memory.close)
            kvm = stack.enter_context(Kvm())
            self.vm = stack.enter_context(kvm.create_vm())
            before_vcpu(self.vm)
            self.vm.set_tss_addr(0xFFFB_D000)
            self.vm.set_identity_map_addr(0xFFFB_C000)
            self.vm.set_user_memory_region(0, Gpa(0), BLOCK_SIZE, self.memory.hva(Gpa(0)))
            self.vm.set_user_memory_region(1, DATA, SIZE - BLOCK_SIZE, self.memory.hva(DATA), flags)
            self.fd: VcpuFd = stack.enter_context(self.vm.create_vcpu(0, kvm.vcpu_mmap_size()))
            self.fd.set_cpuid2(kvm.supported_cpuid())
            self.ports = ffi.new("struct pv_ports *")
            self.ports.action[MARK] = self.ports.action[END] = lib.PV_PORT_PYTHON
            self.vcpu = Vcpu(self.fd, self.ports)
            self._map_identity()
            self._stack = stack.pop_all()

    def _map_identity(self) -> None:
        entries = {_PML4: _PDPT.value, _PDPT: _PD.value}
        entries |= {_PD + 8 * i: i * BLOCK_SIZE | _LARGE for i in range(SIZE // BLOCK_SIZE)}
        for gpa, entry in entries.items():
            self.memory.write(gpa, (entry | _PRESENT_WRITE_USER).to_bytes(8, "little"))

    def start(self, code: bytes, ring: int, debug: int = 0, **registers: int) -> None:
        """Lets the guest run `code` from its first byte, in a thread of its own. `debug`: KVM_GUESTDBG_* flags."""
        self.place(code, ring, **registers)
        if debug:  # only now: KVM steps from the RIP that it finds here
            self.fd.set_guest_debug(debug)
        self.marks, self.steps, self._failure = [], [], None
        self._ended.clear()
        self.vcpu.request_run()
        self.vcpu.start(self._on_exit, self._on_end)

    def place(self, code: bytes, ring: int, **registers: int) -> None:
        """Points the vCPU at `code`, without running it."""
        self.memory.write(_CODE, code)
        set_entry(self.fd, Entry("long64", _CODE, registers), _PML4.value)
        if ring:
            self._lower_privilege(ring)

    def _lower_privilege(self, ring: int) -> None:
        sregs = self.fd.get_sregs()
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
            segment.dpl = ring
            segment.selector |= ring
        self.fd.set_sregs(sregs)
        regs = self.fd.get_regs()
        regs.rflags |= _IOPL3
        self.fd.set_regs(regs)

    def wait(self, limit: float = TIME_LIMIT) -> None:
        """Waits until the guest has ended by itself.

        Raises HostError where it ended in another way, or did not within `limit` seconds; close() then stops it.
        """
        if not self._ended.wait(limit):
            raise HostError(f"the trial guest did not end within {limit:g} s")
        self.vcpu.join()
        if self._failure is not None:
            raise self._failure

    def run(self, code: bytes, ring: int, debug: int = 0, **registers: int) -> None:
        """start() and wait()."""
        self.start(code, ring, debug, **registers)
        self.wait()

    def _on_exit(self, vcpu: Vcpu) -> None:
        now, run = time.perf_counter(), vcpu.fd.run
        if run.exit_reason == lib.KVM_EXIT_IO and run.io.port == MARK:
            self.marks.append(now)
        elif run.exit_reason == lib.KVM_EXIT_DEBUG:
            self.steps.append(vcpu.fd.get_regs().rip - _CODE.value)
        elif run.exit_reason == lib.KVM_EXIT_IO and run.io.port == END:
            vcpu.request_stop()
        else:
            raise HostError(f"the trial guest ended by {_exit_name(run.exit_reason)}")

    def _on_end(self, vcpu: Vcpu, failure: BaseException | None) -> None:
        self._failure = failure
        self._ended.set()

    def page_hva(self, page: int) -> int:
        """Where small page `page` of slot 1 lies in our address space."""
        return self.memory.hva(DATA + page * PAGE_SIZE).value

    def close(self) -> None:
        """Stops the guest if it still runs, and frees all it had."""
        self.vcpu.request_stop()
        self.vcpu.join()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


_EXITS = ("EXCEPTION", "HLT", "MMIO", "SHUTDOWN", "FAIL_ENTRY", "INTERNAL_ERROR", "IO", "DIRTY_RING_FULL")


def _exit_name(reason: int) -> str:
    names = [name for name in _EXITS if getattr(lib, f"KVM_EXIT_{name}") == reason]
    if names == ["SHUTDOWN"]:
        return "KVM_EXIT_SHUTDOWN: an exception was delivered to it"
    return f"KVM_EXIT_{names[0]}" if names else f"exit {reason}"
