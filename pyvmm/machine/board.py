# board.py: which devices a VM has, and where. A new device is one row here.
"""The literal table of devices, and the buses that it fills."""

from __future__ import annotations

from pyvmm._native import lib
from pyvmm.bus import Bus
from pyvmm.devices import exit_port, serial
from pyvmm.errors import BadInput, StateError
from pyvmm.record import Record
from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm._native import CData
    from pyvmm.bus import Device
    from pyvmm.devices.virtio.balloon import Balloon
    from pyvmm.devices.virtio.mmio import Mmio
    from pyvmm.memory import GuestMemory


class Wires(Record):
    """What a device may be connected to: the console's output, interrupt lines, the end of the guest, its memory, and
    who is told that a device's own thread cannot go on (a FetchError: until the VM is resumed)."""

    __slots__ = ("irq", "memory", "on_exit", "on_trouble", "output")

    def __init__(
        self,
        output: Callable[[bytes], None],
        irq: Callable[[int], Callable[[bool], None]],
        on_exit: Callable[[int], None],
        memory: GuestMemory,
        on_trouble: Callable[[BaseException], None],
    ) -> None:
        self.output = output
        self.irq = irq
        self.on_exit = on_exit
        self.memory = memory
        self.on_trouble = on_trouble


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


class Board:
    """The devices of one VM, by name and on their buses. virtio: descriptions of virtio devices
    (pyvmm.devices.virtio.specs), each of which gets the next page from layout.MMIO_BASE on. Raises BadInput."""

    def __init__(self, wires: Wires, native_ports: CData, virtio: Sequence[str] = ()) -> None:
        self.ports = Bus("port", 16)
        self.mmio = Bus("MMIO", 64)
        self.devices: dict[str, Device] = {}
        self.virtio: list[Mmio] = []
        self.balloon: Balloon | None = None
        for name, base, length, build in PORT_DEVICES:
            self.devices[name] = device = build(wires)
            self.ports.attach(base, length, device)
            for port in range(base, base + length):
                native_ports.action[port] = lib.PV_PORT_PYTHON
        try:
            for slot, spec in enumerate(virtio):
                self._add_virtio(wires, slot, spec)
        except BaseException:
            self.close(lambda: None)
            raise

    def _add_virtio(self, wires: Wires, slot: int, spec: str) -> None:
        from pyvmm.devices.virtio import mmio, specs

        if slot >= lib.PV_VIRTIO_SLOTS:
            raise BadInput(f"device {spec!r} is one too many: a VM takes {lib.PV_VIRTIO_SLOTS} virtio devices")
        if spec == "balloon" and self.balloon is not None:
            raise BadInput("a second balloon: a VM takes one")
        model = specs.make(spec, wires.output)
        device = mmio.Mmio(slot, model, wires.memory, wires.irq(specs.irq_of(slot)), wires.on_trouble)
        self.virtio.append(device)
        if model.name == "balloon":
            self.balloon = model  # type: ignore[assignment]  # its name says what it is
        self.devices[device.kind] = device
        self.mmio.attach(lib.PV_VIRTIO_GPA + slot * lib.PV_VIRTIO_STEP, mmio.LENGTH, device)

    # ---- devices that work by themselves, on threads of their own ----

    def go(self) -> None:
        """The guest is about to run. Raises BadInput, with all at rest, where a device cannot."""
        try:
            for device in self.virtio:
                device.go()
        except BaseException:
            self.ask()
            raise

    def ask(self) -> None:
        """Devices are to rest, as soon as each has done the request that it is at; returns at once."""
        for device in self.virtio:
            device.ask()

    def hold(self) -> None:
        """Devices rest: none touches the guest's memory until go(). Raises HostError."""
        self.ask()
        for device in self.virtio:
            device.hold()

    def require_lasting(self) -> None:
        """Raises BadInput where a device is kept in this process alone: the VM can be neither saved nor moved."""
        for device in self.virtio:
            device.model.require_lasting()

    def release(self) -> None:
        """After hold(): another process may run the guest, with what its devices are kept in, until go()."""
        for device in self.virtio:
            device.release()

    def close(self, let_go: Callable[[], None]) -> None:
        """Ends their threads. let_go: called where one waits for a page that does not come."""
        for device in self.virtio:
            device.close(let_go)

    # ---- state ----

    def save(self) -> State:
        """The states of all devices, by name."""
        return State("board", 1, {name: device.save() for name, device in self.devices.items()})

    def restore(self, state: State) -> None:
        """Puts the states back. Raises StateError where a device is missing on either side, or its state does not
        fit."""
        fields = state.require("board", 1)
        if fields.keys() != self.devices.keys():
            theirs, ours = (", ".join(sorted(names)) for names in (fields, self.devices))
            raise StateError(f"the state is of a VM with the devices {theirs:.300}; this one has {ours}")
        for name, device in self.devices.items():
            device.restore(state.part(name))
