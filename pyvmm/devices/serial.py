# serial.py: a 16550A UART, for guests' consoles: eight byte registers, an interrupt line, host input. Unit: bytes.
"""`Serial`: the UART of a PC (National Semiconductor PC16550D data sheet; register numbers and bits are its own).

Time does not pass in it: a byte written is a byte sent, so the transmitter is always empty, and a "character timeout"
is due as soon as the receiver holds fewer bytes than its trigger level.

The receiver is the head of the host's queue. A byte that the host feeds leaves only by being read, never by an overrun,
a FIFO reset or a switch of modes: what a reset discards would have arrived just after it. Bytes that the guest sends
itself in loopback are kept apart, so that its self-test finds an empty receiver whatever the host has typed.

`output` is called without the lock, before the guest can see that the byte has left: it may call `feed()`, and bytes
that vCPUs send one after the other stay in order. `irq` is called with the lock held, so that levels arrive in order:
it must not call back.
"""

from __future__ import annotations

from threading import Lock

from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.state import Value

LENGTH = 8
"""Ports that the device takes."""
QUEUE_SIZE = 64 << 10
"""Bytes of host input that may wait for the guest."""
FIFO_SIZE = 16

# Registers. 0 and 1 are the divisor latch while LCR has DLAB; 2 is IIR to read and FCR to write.
DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(LENGTH)
FCR = IIR

IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 0x01, 0x02, 0x04, 0x08
IER_MASK = 0x0F

# What IIR reports, by falling priority.
IIR_LINE_STATUS = 0x06
IIR_RECEIVED = 0x04
IIR_TIMEOUT = 0x0C
IIR_THR_EMPTY = 0x02
IIR_MODEM_STATUS = 0x00
IIR_NONE = 0x01
IIR_FIFO = 0xC0

FCR_ENABLE, FCR_CLEAR_RECEIVER = 0x01, 0x02
TRIGGER_LEVELS = (1, 4, 8, 14)

LCR_DLAB = 0x80

MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
MCR_MASK = 0x1F

LSR_DATA_READY, LSR_OVERRUN = 0x01, 0x02
LSR_SENT = 0x60
"""THR empty, and transmitter empty."""

MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_DELTAS = 0x0F
LOOPED_MODEM = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
"""In loopback each modem output is wired to an input; else a ready peer with a carrier is there."""

SAVED = {
    "ier": IER_MASK,
    "fcr": 0xFF,
    "lcr": 0xFF,
    "mcr": MCR_MASK,
    "scr": 0xFF,
    "divisor": 0xFFFF,
    "deltas": MSR_DELTAS,
    "overrun": 1,
    "thre": 1,
}
"""The registers and flags of a saved state, and the highest value of each; `Serial` has them by these names."""


def _modem_inputs(mcr: int) -> int:
    if mcr & MCR_LOOP:
        return sum(high for low, high in LOOPED_MODEM if mcr & low)
    return MSR_CTS | MSR_DSR | MSR_DCD


def _fifo_control(value: int) -> int:
    """What FCR keeps of a write: without ENABLE its other bits are not programmed."""
    return value & (FCR_ENABLE | 0xC0) if value & FCR_ENABLE else 0


def _nothing() -> None:
    pass


class Serial:
    """A 16550A. `output(data)`, an attribute that may be replaced, gets what the guest sends; `irq(level)` follows its
    interrupt line.

    The line is the PC's: MCR's OUT2 connects it, and loopback, which releases OUT2, disconnects it. `irq` is called
    upon changes of its level alone. Registers are bytes: a wider access acts on the register at its offset only,
    reads zero-extended and writes its low byte.

    on_listen: called once, without the lock, when the guest first shows that it wants input: it reads the receiver, or
    enables its interrupt. A restored guest that had done so counts at once.
    """

    def __init__(self, output: Callable[[bytes], None], irq: Callable[[bool], None]) -> None:
        self.output = output
        self.on_listen: Callable[[], None] = _nothing
        self.listening = False
        self._irq = irq
        self._level = False
        self._lock = Lock()
        self._queue = bytearray()
        self._looped = bytearray()
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = self._deltas = 0
        self._divisor = 12
        self._overrun = False
        self._thre = False
        """THR empty is still to be reported by IIR. Means something only while IER has THRI."""

    def feed(self, data: bytes) -> int:
        """Host input. Returns how many bytes of `data` were taken, from its start: as many as `room()` allows."""
        with self._lock:
            taken = data[: QUEUE_SIZE - len(self._queue)]
            self._queue += taken
            self._update()
        return len(taken)

    def room(self) -> int:
        """How many bytes `feed()` would take now."""
        return QUEUE_SIZE - len(self._queue)

    @property
    def waiting(self) -> int:
        """Bytes fed that the guest has not read."""
        return len(self._queue)

    def read(self, offset: int, size: int) -> int:
        """The guest reads a register."""
        with self._lock:
            value = self._read(offset)
            listens = offset == DATA and not self._lcr & LCR_DLAB and not self._mcr & MCR_LOOP
        if listens:
            self._listen()
        return value

    def write(self, offset: int, value: int, size: int) -> None:
        """The guest writes a register."""
        value &= 0xFF
        if offset == DATA and self._on_line():
            self._send(bytes((value,)))
            return
        with self._lock:
            self._write(offset, value)
            self._update()
            listens = bool(self._ier & IER_RDI)
        if listens:
            self._listen()

    def write_block(self, offset: int, data: bytes, size: int) -> None:
        """The guest writes a string (`rep outs`) of elements of `size` bytes; to the transmitter it is one output."""
        data = data[::size]
        if offset == DATA and self._on_line():
            self._send(data)
            return
        for value in data:
            self.write(offset, value, 1)

    def save(self) -> State:
        """The registers, and the input that the guest has not read."""
        with self._lock:
            fields: dict[str, Value] = {name: int(getattr(self, f"_{name}")) for name in SAVED}
            fields |= {"listening": self.listening, "queue": bytes(self._queue), "looped": bytes(self._looped)}
        return State("serial", 1, fields)

    def restore(self, state: State) -> None:
        """Becomes what `save()` saw, and moves the line to where that has it. Raises StateError, and changes nothing,
        if `state` is not a UART's."""
        state.require("serial", 1)
        registers = {name: state.integer(name, high=high) for name, high in SAVED.items()}
        listening = state.integer("listening", high=1)
        queue = state.blob("queue", limit=QUEUE_SIZE)
        looped = state.blob("looped", limit=FIFO_SIZE)
        with self._lock:
            for name, value in registers.items():
                setattr(self, f"_{name}", value)
            self._fcr = _fifo_control(self._fcr)
            self._queue, self._looped = bytearray(queue), bytearray(looped)
            self._update()
        if listening:
            self._listen()

    def _on_line(self) -> bool:
        """Whether the data register is now the transmitter, and it is wired to the host."""
        return not self._lcr & LCR_DLAB and not self._mcr & MCR_LOOP

    def _send(self, data: bytes) -> None:
        self.output(data)
        if self._ier & IER_THRI:
            with self._lock:
                self._thre = True
                self._update()

    def _listen(self) -> None:
        if self.listening:
            return
        with self._lock:
            first, self.listening = not self.listening, True
        if first:
            self.on_listen()

    # Below, the lock is held.

    def _received(self) -> bytearray:
        """What the receiver holds, and in front of the host, what is to enter it."""
        return self._looped if self._mcr & MCR_LOOP else self._queue

    def _source(self) -> int:
        """The enabled interrupt of the highest priority that is pending, as IIR has it."""
        enabled = self._ier
        if enabled & IER_RLSI and self._overrun:
            return IIR_LINE_STATUS
        if enabled & IER_RDI:
            held = len(self._received())
            if held:
                trigger = TRIGGER_LEVELS[self._fcr >> 6] if self._fcr else 1
                return IIR_RECEIVED if held >= trigger else IIR_TIMEOUT
        if enabled & IER_THRI and self._thre:
            return IIR_THR_EMPTY
        if enabled & IER_MSI and self._deltas:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update(self) -> None:
        """Makes the line agree with the registers. To be called after each change of them."""
        level = self._mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 and self._source() != IIR_NONE
        if level != self._level:
            self._level = level
            self._irq(level)

    def _read(self, offset: int) -> int:
        if offset == LSR:
            value = LSR_SENT | (LSR_DATA_READY if self._received() else 0)
            if self._overrun:
                value |= LSR_OVERRUN
                self._overrun = False
                self._update()
            return value
        if offset == IIR:
            source = self._source()
            if source == IIR_THR_EMPTY:
                self._thre = False
                self._update()
            return source | (IIR_FIFO if self._fcr else 0)
        if offset == MSR:
            value = _modem_inputs(self._mcr) | self._deltas
            self._deltas = 0
            self._update()
            return value
        if offset == LCR:
            return self._lcr
        if offset == MCR:
            return self._mcr
        if offset == SCR:
            return self._scr
        if self._lcr & LCR_DLAB:
            return self._divisor & 0xFF if offset == DATA else self._divisor >> 8
        if offset == IER:
            return self._ier
        return self._receive()

    def _receive(self) -> int:
        received = self._received()
        if not received:
            return 0
        value = received[0]
        del received[:1]
        self._update()
        return value

    def _write(self, offset: int, value: int) -> None:
        """Writes what is not for the host. LSR and MSR are read-only."""
        if offset == FCR:
            control = _fifo_control(value)
            if (control and value & FCR_CLEAR_RECEIVER) or bool(control) != bool(self._fcr):
                self._looped.clear()
            self._fcr = control
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            self._set_modem(value & MCR_MASK)
        elif offset == SCR:
            self._scr = value
        elif offset in (DATA, IER) and self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF00 | value if offset == DATA else value << 8 | self._divisor & 0xFF
        elif offset == IER:
            enabled = value & IER_MASK
            if enabled & ~self._ier & IER_THRI:
                self._thre = True
            self._ier = enabled
        elif offset == DATA:
            self._loop(value)

    def _set_modem(self, mcr: int) -> None:
        before, after = _modem_inputs(self._mcr), _modem_inputs(mcr)
        # The ring indicator reports only its trailing edge.
        self._deltas |= ((before ^ after) & ~(after & MSR_RI)) >> 4
        if (self._mcr ^ mcr) & MCR_LOOP:
            self._looped.clear()
        self._mcr = mcr

    def _loop(self, value: int) -> None:
        """Sends to itself. A full FIFO keeps what it has; the single receiver register of the 8250 is overwritten."""
        if len(self._looped) >= (FIFO_SIZE if self._fcr else 1):
            self._overrun = True
            if not self._fcr:
                self._looped[:] = bytes((value,))
        else:
            self._looped.append(value)
        self._thre = True
