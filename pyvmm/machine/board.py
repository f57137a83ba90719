# board.py: which devices a VM has, and where. A new device is one row here.
"""The literal table of devices, and the buses that it fills."""

from __future__ import annotations

from pyvmm._native import lib
from pyvmm.bus import Bus
from pyvmm.devices import exit_port, serial
from pyvmm.record import Record
from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm._native import CData
    from pyvmm.bus import Device


class Wires(Record):
    """What a device may be connected to: the console's output, interrupt lines, and the end of the guest."""

    __slots__ = ("irq", "on_exit", "output")

    def __init__(
        self,
        output: Callable[[bytes], None],
        irq: Callable[[int], Callable[[bool], None]],
        on_exit: Callable[[int], None],
    ) -> None:
        self.output = output
        self.irq = irq
        self.on_exit = on_exit


# name, first port, ports, how to build it
PORT_DEVICES: tuple[tuple[str, int, int, Callable[[Wires], Device]], ...] = (
    (
        "serial",
        lib.PV_PORT_SERIAL,
        serial.LENGTH,
        lambda wires: serial.Serial(wires.output, wires.irq(lib.PV_IRQ_SERIAL)),
    ),
    ("exit", lib.PV_PORT_EXIT, exit_port.LENGTH, lambda wires: exit_port.ExitPort(wires.on_exit)),
)

# name, first address, bytes, how to build it. Empty as yet: MMIO devices are at layout.MMIO_BASE and up.
MMIO_DEVICES: tuple[tuple[str, int, int, Callable[[Wires], Device]], ...] = ()


class Board:
    """The devices of one VM, by name and on their buses."""

    def __init__(self, wires: Wires, native_ports: CData) -> None:
        self.ports = Bus("port", 16)
        self.mmio = Bus("MMIO", 64)
        self.devices: dict[str, Device] = {}
        for table, bus in ((PORT_DEVICES, self.ports), (MMIO_DEVICES, self.mmio)):
            for name, base, length, build in table:
                self.devices[name] = device = build(wires)
                bus.attach(base, length, device)
        for _, base, length, _ in PORT_DEVICES:
            for port in range(base, base + length):
                native_ports.action[port] = lib.PV_PORT_PYTHON

    def save(self) -> State:
        """The states of all devices, by name."""
        return State("board", 1, {name: device.save() for name, device in self.devices.items()})

    def restore(self, state: State) -> None:
        """Puts the states back. Raises StateError where a device is missing or its state does not fit."""
        state.require("board", 1)
        for name, device in self.devices.items():
            device.restore(state.part(name))
