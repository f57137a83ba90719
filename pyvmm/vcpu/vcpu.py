# vcpu.py: one vCPU and the thread that runs it.
"""`Vcpu`: starts, pauses and stops one vCPU. What an exit means is decided by the callable it is given."""

from __future__ import annotations

import errno
import threading

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, check
from pyvmm.kvm import VcpuFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm._native import CData


class Vcpu:
    """A vCPU. Its registers and state may be read while it is parked or not started."""

    def __init__(self, fd: VcpuFd, ports: CData) -> None:
        self.fd = fd
        self.index = fd.index
        self.tsc_khz = fd.tsc_khz()  # asked for now, since KVM would have it wait while the vCPU runs
        self.native = ffi.new("struct pv_vcpu *")
        self.native.fd = fd.fd
        self.native.run = fd.run
        self.native.ports = self._ports = ports  # kept alive: the struct holds a bare pointer
        self._thread: threading.Thread | None = None

    def start(self, on_exit: Callable[[Vcpu], None], on_end: Callable[[Vcpu, BaseException | None], None]) -> None:
        """Runs the vCPU in a thread of its own until request_stop().

        on_exit is called in that thread for each exit that C does not handle itself; on_end when the thread ends,
        with the exception that ended it, if one did.
        """
        self.fd.open_stats()  # KVM would have the first look wait for a guest that never exits
        self._thread = threading.Thread(
            target=self._loop, args=(on_exit, on_end), name=f"vcpu{self.index}", daemon=True
        )
        self._thread.start()

    def _loop(self, on_exit: Callable[[Vcpu], None], on_end: Callable[[Vcpu, BaseException | None], None]) -> None:
        native, run, stopped = self.native, lib.pv_run, lib.PV_RUN_STOPPED
        failure: BaseException | None = None
        try:
            while (result := run(native)) != stopped:
                if result:
                    check(result, "KVM_RUN", vcpu=self.index)
                on_exit(self)
        except BaseException as error:  # whatever it is, the machine must hear of it
            failure = error
        lib.pv_end(native)
        on_end(self, failure)

    @property
    def started(self) -> bool:
        """Has it a thread?"""
        return self._thread is not None

    @property
    def entered(self) -> float | None:
        """When it first entered the guest, by time.perf_counter(); None: not yet."""
        return int(self.native.entered) / 1e9 or None

    @property
    def is_current(self) -> bool:
        """Is the calling thread this vCPU's?"""
        return self._thread is threading.current_thread()

    def request_pause(self) -> None:
        """Asks the vCPU to park, wherever it is; returns at once."""
        lib.pv_request(self.native, lib.PV_REQUEST_PAUSE)

    def request_run(self) -> None:
        """Lets a parked vCPU go on."""
        lib.pv_request(self.native, lib.PV_REQUEST_RUN)

    def request_stop(self) -> None:
        """Asks the thread to end; returns at once."""
        lib.pv_request(self.native, lib.PV_REQUEST_STOP)

    def wait_parked(self, seconds: float) -> None:
        """Waits until the vCPU is parked or ended: no I/O half done, its state readable. Raises HostError then."""
        result = lib.pv_wait_parked(self.native, int(seconds * 1e9))
        if result == -errno.ETIMEDOUT:
            raise HostError(f"vCPU {self.index} did not park within {seconds:g} s")

    def join(self, seconds: float | None = None) -> bool:
        """Waits for the thread to end, after request_stop(), at most so long: has it ended?"""
        if self._thread is None or self.is_current:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def exits(self) -> dict[int, int]:
        """Exits so far, by KVM_EXIT_* number; those handled in C are counted too."""
        return {reason: count for reason, count in enumerate(self.native.exits) if count}
