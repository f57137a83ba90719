# mmio.py: the virtio-mmio transport, version 2 (virtio 1.2, section 4.2): registers, status, features, interrupts.
"""`Mmio`: one virtio device on the MMIO bus. What kind of device it is, its `Model` says.

vCPUs read and write registers; the device's worker serves its queues. What the driver may change of a queue it may
change only while that is not ready, and it becomes unready while the worker stands: so the worker reads without a lock.
"""

from __future__ import annotations

import threading

from pyvmm.devices.virtio.queue import F_EVENT, F_INDIRECT, MAX_SIZE, Queue, RingError
from pyvmm.devices.virtio.worker import Worker
from pyvmm.errors import StateError
from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.devices.virtio.model import Model
    from pyvmm.memory import GuestMemory
    from pyvmm.state import Value

LENGTH = 0x1000
MAGIC, VERSION, VENDOR = 0x74726976, 2, 0x4D565950
F_VERSION_1 = 1 << 32
FEATURES = F_VERSION_1 | F_INDIRECT | F_EVENT
"""That every device offers."""

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 0x01, 0x02, 0x04, 0x08, 0x40, 0x80
_DRIVERS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED
USED_BUFFER, CONFIG_CHANGE = 0x1, 0x2
"""Bits of the interrupt status."""

# Registers.
R_MAGIC, R_VERSION, R_DEVICE, R_VENDOR = 0x000, 0x004, 0x008, 0x00C
R_DEVICE_FEATURES, R_DEVICE_FEATURES_SEL, R_DRIVER_FEATURES, R_DRIVER_FEATURES_SEL = 0x010, 0x014, 0x020, 0x024
R_QUEUE_SEL, R_QUEUE_MAX, R_QUEUE_SIZE, R_QUEUE_READY, R_QUEUE_NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
R_INTERRUPT_STATUS, R_INTERRUPT_ACK, R_STATUS = 0x060, 0x064, 0x070
R_QUEUE_DESCRIPTORS, R_QUEUE_DRIVER, R_QUEUE_DEVICE = 0x080, 0x090, 0x0A0
R_SHARED_FIRST, R_SHARED_END = 0x0B0, 0x0C0
R_GENERATION, R_CONFIG = 0x0FC, 0x100

_ADDRESSES = {
    register + half: (name, 8 * half)
    for register, name in ((R_QUEUE_DESCRIPTORS, "descriptors"), (R_QUEUE_DRIVER, "driver"), (R_QUEUE_DEVICE, "device"))
    for half in (0, 4)
}
_LOW = 0xFFFF_FFFF
_SELECTORS = {R_DEVICE_FEATURES_SEL: "device_sel", R_DRIVER_FEATURES_SEL: "driver_sel", R_QUEUE_SEL: "queue_sel"}


class Mmio:
    """slot: its number among the VM's virtio devices; irq(level) follows its interrupt line, and must not call back;
    on_trouble: see Worker. on_broken, an attribute: called with what a driver did that none may, in a line; once,
    since a guest may break rules as fast as it can."""

    def __init__(
        self,
        slot: int,
        model: Model,
        memory: GuestMemory,
        irq: Callable[[bool], None],
        on_trouble: Callable[[BaseException], None],
    ) -> None:
        self.kind = f"virtio-{model.name}@{slot}"
        """The kind of its state, by which VMs with other devices are told from this one."""
        self.model = model
        self.on_broken: Callable[[str], None] = lambda line: None
        self.broken = ""
        """Why the device needs a reset, if it does."""
        self._told = False
        self._offered = model.features | FEATURES
        self._irq = irq
        self._level = False
        self._lock = threading.Lock()
        self._queues = [Queue(memory) for _ in range(model.queues)]
        self._worker = Worker(self.kind, self._step, on_trouble)
        self._next = 0
        self._forget()
        self._generation = 0
        model.kick, model.config_changed = self._worker.kick, self.config_changed
        model.attach(memory)

    def _forget(self) -> None:
        self._status = self._interrupt = self._accepted = 0
        self._device_sel = self._driver_sel = self._queue_sel = 0

    # ---- registers: on a vCPU's thread ----

    def read(self, offset: int, size: int) -> int:
        """The guest reads a register, or its device's configuration."""
        if offset >= R_CONFIG:
            return int.from_bytes(self.model.config()[offset - R_CONFIG :][:size], "little")
        if size != 4 or offset % 4:
            return 0
        with self._lock:
            return self._read(offset)

    def write(self, offset: int, value: int, size: int) -> None:
        """The guest writes a register, or its device's configuration."""
        if offset >= R_CONFIG:
            self.model.write_config(offset - R_CONFIG, value, size)
            return
        if size != 4 or offset % 4:
            return
        if offset == R_QUEUE_NOTIFY:
            if value < len(self._queues) and self._runs():
                self._worker.kick()
        elif offset == R_STATUS and value == 0:
            self._reset()
        elif offset == R_QUEUE_READY and not value & 1:
            with self._worker.excluded(), self._lock:
                if (queue := self._selected()) is not None:
                    queue.ready = False
        else:
            with self._lock:
                self._write(offset, value)
            if offset == R_STATUS and self._runs():
                self._worker.kick()

    def _read(self, offset: int) -> int:
        queue = self._selected()
        if offset in (R_MAGIC, R_VERSION, R_DEVICE, R_VENDOR):
            return (MAGIC, VERSION, self.model.id, VENDOR)[offset // 4]
        if offset == R_DEVICE_FEATURES:
            return self._offered >> 32 * self._device_sel & _LOW if self._device_sel < 2 else 0
        if offset == R_QUEUE_MAX:
            return MAX_SIZE if queue is not None else 0
        if offset == R_QUEUE_READY:
            return int(queue is not None and queue.ready)
        if offset == R_INTERRUPT_STATUS:
            return self._interrupt
        if offset == R_STATUS:
            return self._status
        if R_SHARED_FIRST <= offset < R_SHARED_END:
            return _LOW  # a region of shared memory that is not there (4.2.2)
        return self._generation if offset == R_GENERATION else 0

    def _write(self, offset: int, value: int) -> None:
        if offset in _SELECTORS:
            setattr(self, f"_{_SELECTORS[offset]}", value)
        elif offset == R_DRIVER_FEATURES:
            if self._driver_sel < 2 and not self._status & FEATURES_OK:
                shift = 32 * self._driver_sel
                self._accepted = self._accepted & ~(_LOW << shift) | value << shift
        elif offset == R_STATUS:
            self._set_status(value)
        elif offset == R_INTERRUPT_ACK:
            self._interrupt &= ~value
            self._update()
        elif (queue := self._selected()) is not None and not queue.ready:
            self._write_queue(queue, offset, value)

    def _write_queue(self, queue: Queue, offset: int, value: int) -> None:
        if offset == R_QUEUE_SIZE:
            queue.size = value
        elif offset in _ADDRESSES:
            name, shift = _ADDRESSES[offset]
            setattr(queue, name, getattr(queue, name) & ~(_LOW << shift) | value << shift)
        elif offset == R_QUEUE_READY:
            try:
                if not self._status & FEATURES_OK:
                    raise RingError("a queue is made ready before features are agreed on")
                queue.check()
            except RingError as error:
                self._break(str(error))
                return
            queue.features = self._accepted
            queue.taken = queue.given = 0
            queue.ready = True

    def _set_status(self, value: int) -> None:
        """Bits come; they go by a reset alone."""
        status = self._status | value & _DRIVERS
        if status & ~self._status & FEATURES_OK and (
            self._accepted & ~self._offered or not self._accepted & F_VERSION_1
        ):
            status &= ~FEATURES_OK
        self._status = status

    def _selected(self) -> Queue | None:
        return self._queues[self._queue_sel] if self._queue_sel < len(self._queues) else None

    def _runs(self) -> bool:
        """May queues be served?"""
        return self._status & (DRIVER_OK | FEATURES_OK | NEEDS_RESET) == DRIVER_OK | FEATURES_OK

    def _reset(self) -> None:
        with self._worker.excluded(), self._lock:
            self._forget()
            self.broken = ""
            for queue in self._queues:
                queue.reset()
            self.model.reset()
            self._update()

    # ---- interrupts ----

    def _update(self) -> None:
        """Makes the line agree with the interrupt status."""
        if (level := self._interrupt != 0) != self._level:
            self._level = level
            self._irq(level)

    def _interrupt_by(self, bit: int) -> None:
        with self._lock:
            self._interrupt |= bit
            self._update()

    def config_changed(self) -> None:
        """The model's configuration is another one now: the driver is told."""
        with self._lock:
            self._generation = self._generation + 1 & _LOW
            if self._status & DRIVER_OK:
                self._interrupt |= CONFIG_CHANGE
                self._update()

    def _break(self, why: str) -> None:
        """The driver broke a rule: nothing is served until it resets the device (2.1.2). The lock is held."""
        if self._status & NEEDS_RESET:
            return
        self._status |= NEEDS_RESET
        self.broken = why
        if self._status & DRIVER_OK:
            self._interrupt |= CONFIG_CHANGE
            self._update()
        if not self._told:
            self._told = True
            self.on_broken(f"{self.kind} stands until its driver resets it: {why}")

    # ---- the worker ----

    def _step(self) -> bool:
        """One request, of each queue in turn. Was there one?"""
        count = len(self._queues)
        for index in (*range(self._next, count), *range(self._next)):
            if not self._runs() or not self._queues[index].ready:
                continue
            try:
                wants = self.model.serve(index, self._queues[index], self._accepted)
            except RingError as error:
                with self._lock:
                    self._break(str(error))
                return False
            if wants is not None:
                self._next = (index + 1) % count
                if wants:
                    self._interrupt_by(USED_BUFFER)
                return True
        return False

    def go(self) -> None:
        """The guest runs, or is about to. Raises BadInput where the model cannot."""
        self.model.activate()
        self._worker.go()

    def ask(self) -> None:
        """No further request is begun; returns at once."""
        self._worker.ask()

    def hold(self) -> None:
        """No request is under way, and none is begun until go(). Raises HostError."""
        self._worker.hold()

    def release(self) -> None:
        """After hold(): another process may run the guest, until go()."""
        self.model.release()

    def close(self, let_go: Callable[[], None]) -> None:
        """Ends it. let_go: see Worker.close()."""
        self._worker.close(let_go)
        self.model.close()

    # ---- state ----

    def save(self) -> State:
        """What the driver has set up, and what was not asked for yet; requests that were not answered are in the rings,
        and are served after restore()."""
        with self._worker.excluded(), self._lock:
            fields: dict[str, Value] = {
                name: getattr(self, f"_{name}") for name in ("status", "interrupt", "accepted", "generation", "offered")
            }
            fields |= {name: getattr(self, f"_{name}") for name in _SELECTORS.values()}
            fields |= {"config": self.model.fixed(), "model": self.model.save(), "broken": self.broken}
            fields["queues"] = [queue.save() for queue in self._queues]
            return State(self.kind, 1, fields)

    def restore(self, state: State) -> None:
        """Becomes what save() saw. Raises StateError, and changes nothing, where that was another device."""
        state.require(self.kind, 1)
        offered, accepted = state.integer("offered"), state.integer("accepted")
        status = state.integer("status", high=_DRIVERS | NEEDS_RESET)
        if offered != self._offered or (status & FEATURES_OK and accepted & ~offered):
            raise StateError(f"{self.kind}: the state is of one with features {offered:#x}, not {self._offered:#x}")
        if state.blob("config", limit=LENGTH) != self.model.fixed():
            raise StateError(f"{self.kind}: the state is of a device of another size or geometry")
        selectors = {name: state.integer(name, high=_LOW) for name in _SELECTORS.values()}
        interrupt = state.integer("interrupt", high=USED_BUFFER | CONFIG_CHANGE)
        generation = state.integer("generation", high=_LOW)
        parts = state.parts("queues")
        if len(parts) != len(self._queues):
            raise StateError(f"{self.kind}: the state has {len(parts)} queues, the device {len(self._queues)}")
        queues = [queue.restored(part, accepted) for queue, part in zip(self._queues, parts, strict=True)]
        broken = state.fields.get("broken")
        model = state.part("model")
        with self._worker.excluded(), self._lock:
            self.model.restore(model)
            for name, value in selectors.items():
                setattr(self, f"_{name}", value)
            self._queues = queues
            self._accepted, self._status, self._generation = accepted, status, generation
            self.broken = broken if isinstance(broken, str) else ""
            self._interrupt = interrupt
            self._update()
