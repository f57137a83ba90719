# stepper.py: single-steps a vCPU and shows each instruction, for `pyvmm run --trace N`.
"""`Stepper`: handles KVM_EXIT_DEBUG (KVM api.rst, 4.87 KVM_SET_GUEST_DEBUG)."""

from __future__ import annotations

from pyvmm import host
from pyvmm._native import lib
from pyvmm.explain import TraceFormatter, leaves_ring0
from pyvmm.vcpu.registers import read_registers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm._native import CData
    from pyvmm.image.symbols import Symbols
    from pyvmm.memory import GuestMemory
    from pyvmm.vcpu import Vcpu


class Stepper:
    """Arms single-step at once, before the vCPU's first instruction; then is called after every one."""

    def __init__(
        self, vcpu: Vcpu, memory: GuestMemory, symbols: Symbols | None, steps: int, show: Callable[[str], None]
    ) -> None:
        self._read = memory.read
        self._formatter = TraceFormatter(memory.read, symbols)
        self._left = steps
        self._show = show
        self._everywhere = host.has(host.Feature.SINGLE_STEP_RING3)
        self._before = read_registers(vcpu.fd)
        vcpu.fd.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)

    def __call__(self, vcpu: Vcpu, run: CData) -> None:
        after = read_registers(vcpu.fd)
        self._show(self._formatter.line(self._before, after))
        self._before = after
        self._left -= 1
        if self._left <= 0:
            self._stop(vcpu, "the trace is complete: the guest runs on")
        elif not self._everywhere and leaves_ring0(after, self._read):
            # Stepped over, the trap flag would go with the guest to ring 3 and surprise it with #DB.
            self._stop(vcpu, "the guest goes to ring 3, where this host's KVM cannot single-step: it runs on untraced")

    def _stop(self, vcpu: Vcpu, why: str) -> None:
        vcpu.fd.set_guest_debug(0)
        self._show(f"-- {why}")
