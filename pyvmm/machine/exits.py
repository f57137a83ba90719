# exits.py: what is done about each KVM exit that C leaves to Python. A literal table.
"""`Exits`: dispatches a vCPU's exits to the buses, or calls it a crash (KVM api.rst, section 5)."""

from __future__ import annotations

from pyvmm._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm._native import CData
    from pyvmm.bus import Bus
    from pyvmm.vcpu import Vcpu

    Handler = Callable[[Vcpu, CData], None]

_OUT: int = lib.KVM_EXIT_IO_OUT

EXIT_NAMES: dict[int, str] = {
    getattr(lib, f"KVM_EXIT_{name}"): name.lower()
    for name in (
        "UNKNOWN", "EXCEPTION", "IO", "DEBUG", "HLT", "MMIO", "IRQ_WINDOW_OPEN", "SHUTDOWN", "FAIL_ENTRY", "INTR",
        "SYSTEM_EVENT", "INTERNAL_ERROR", "DIRTY_RING_FULL",
    )
}  # fmt: skip


class Exits:
    """Call it with a vCPU whose KVM_RUN has returned; it is called on that vCPU's thread."""

    def __init__(self, ports: Bus, mmio: Bus, on_crash: Callable[[Vcpu, str], None]) -> None:
        self._ports = ports
        self._mmio = mmio
        self._on_crash = on_crash
        self.on_debug: Handler = self._unhandled
        self._table: dict[int, Handler] = {
            lib.KVM_EXIT_IO: self._io,
            lib.KVM_EXIT_MMIO: self._mmio_access,
            lib.KVM_EXIT_DEBUG: self._debug,
            lib.KVM_EXIT_SHUTDOWN: lambda vcpu, run: self._on_crash(vcpu, "shutdown"),
            lib.KVM_EXIT_INTERNAL_ERROR: lambda vcpu, run: self._on_crash(vcpu, "internal_error"),
            lib.KVM_EXIT_FAIL_ENTRY: lambda vcpu, run: self._on_crash(vcpu, "fail_entry"),
        }

    def __call__(self, vcpu: Vcpu) -> None:
        run = vcpu.fd.run
        self._table.get(run.exit_reason, self._unhandled)(vcpu, run)

    def _debug(self, vcpu: Vcpu, run: CData) -> None:
        self.on_debug(vcpu, run)  # looked up now: a stepper may have come since

    def _unhandled(self, vcpu: Vcpu, run: CData) -> None:
        self._on_crash(vcpu, "unhandled")

    def _io(self, vcpu: Vcpu, run: CData) -> None:
        io = run.io
        port, size, count, offset = io.port, io.size, io.count, io.data_offset
        if io.direction == _OUT:
            data = vcpu.fd.mapped(offset, size * count)
            if count == 1:
                self._ports.write(port, int.from_bytes(data, "little"), size)
            else:
                self._ports.write_block(port, data, size)
        else:
            vcpu.fd.put_mapped(offset, self._ports.read_block(port, size, count))

    def _mmio_access(self, vcpu: Vcpu, run: CData) -> None:
        access = run.mmio
        size = min(access.len, 8)
        if access.is_write:
            self._mmio.write(access.phys_addr, int.from_bytes(bytes(access.data[0:size]), "little"), size)
        else:
            access.data[0:size] = self._mmio.read(access.phys_addr, size).to_bytes(size, "little")
