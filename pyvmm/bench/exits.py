# exits.py: what our handling of a port write costs over the bare KVM_RUN loop (measure P2). Unit: exits per second.
"""A guest that writes to a port as fast as it can: exits only counted, answered in C, and by a Python device."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from pyvmm._native import lib
from pyvmm.bench import ROUNDS, Result, alternate
from pyvmm.bus import Bus
from pyvmm.errors import check
from pyvmm.host.code import PORTS
from pyvmm.host.guest import END, MARK, TrialGuest
from pyvmm.machine.exits import Exits
from pyvmm.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

EXITS, _QUICK_EXITS = 3000, 100
"""Writes a round: about a tenth of a second where one costs 30 us."""
_PORT = 0x80


class _Sink:
    """A device as cheap as one can be; it counts."""

    def __init__(self) -> None:
        self.writes = 0

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, value: int, size: int) -> None:
        self.writes += 1

    def save(self) -> State:
        return State("sink", 1, {"writes": self.writes})

    def restore(self, state: State) -> None:
        self.writes = state.integer("writes")


def _timed(guest: TrialGuest, exits: int, work: Callable[[], None]) -> float:
    """Exits per second of one round, in a thread of its own as vCPUs have."""
    guest.place(PORTS, ring=3, rcx=exits)
    seconds = []

    def run() -> None:
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return exits / seconds[0]


def measure(quick: bool = False) -> list[Result]:
    """Exits per second: "bare" loop in C, "C" (a port nobody claims), "Python" (a device on the bus)."""
    count = _QUICK_EXITS if quick else EXITS
    with TrialGuest() as guest:
        vcpu = guest.vcpu
        sink, ports = _Sink(), Bus("port", 16)
        for port in (_PORT, MARK, END):
            ports.attach(port, 1, sink)

        def crash(_: object, kind: str) -> None:
            raise RuntimeError(f"the guest ended by {kind}")

        exits = Exits(ports, Bus("MMIO", 64), crash)

        def ours() -> None:
            ended = False
            while not ended:
                check(lib.pv_run(vcpu.native), "KVM_RUN")
                ended = vcpu.fd.run.io.port == END
                exits(vcpu)

        def bare() -> None:
            check(lib.pv_run_bare(vcpu.fd.fd, count + 3), "KVM_RUN")  # with the marks and the end

        def in_c() -> None:
            guest.ports.action[_PORT] = lib.PV_PORT_FLOAT
            ours()

        def in_python() -> None:
            guest.ports.action[_PORT] = lib.PV_PORT_PYTHON
            ours()

        sides = {"bare": bare, "C": in_c, "Python": in_python}
        timed = {name: partial(_timed, guest, count, work) for name, work in sides.items()}
        return alternate(timed, "exits/s", 1 if quick else ROUNDS)
