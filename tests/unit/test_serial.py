# test_serial.py: the UART against the data sheet, against what Linux's 8250 driver does, and against hostile use.
from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyvmm.devices.serial import (
    DATA,
    FCR,
    FIFO_SIZE,
    IER,
    IIR,
    LCR,
    LSR,
    MCR,
    MSR,
    QUEUE_SIZE,
    SCR,
    Serial,
)
from pyvmm.errors import StateError
from pyvmm.state import State


class Port:
    """A UART with both its ends in the test's hands: `sent` is the host's, `levels` the interrupt controller's."""

    def __init__(self):
        self.sent = []
        self.levels = []
        self.serial = Serial(self.sent.append, self.levels.append)

    @property
    def line(self):
        return bool(self.levels) and self.levels[-1]

    @property
    def text(self):
        return b"".join(self.sent)

    def inb(self, register):
        return self.serial.read(register, 1)

    def outb(self, register, value):
        self.serial.write(register, value, 1)

    def interrupts(self, ier, fifo=0x01):
        self.outb(FCR, fifo)
        self.outb(MCR, 0x0B)
        self.outb(IER, ier)


@pytest.fixture
def port():
    return Port()


def test_a_fresh_uart(port):
    assert [port.inb(register) for register in range(8)] == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0]
    assert port.levels == []


def test_transmits_bytes_and_wider_accesses_by_their_low_byte(port):
    port.outb(DATA, ord("a"))
    port.serial.write(DATA, 0x4342_4162, 4)
    assert port.sent == [b"a", b"b"]
    assert port.inb(LSR) == 0x60


def test_a_string_is_one_output(port):
    port.serial.write_block(DATA, b"hello", 1)
    port.serial.write_block(DATA, b"w.o.", 2)
    assert port.sent == [b"hello", b"wo"]


def test_a_string_to_another_register_is_written_byte_by_byte(port):
    port.serial.write_block(SCR, b"abc", 1)
    assert port.inb(SCR) == ord("c")
    port.outb(FCR, 1)
    port.outb(MCR, 0x10)
    port.serial.write_block(DATA, b"xy", 1)
    assert [port.inb(DATA), port.inb(DATA)] == [ord("x"), ord("y")]
    assert port.sent == []


def test_the_divisor_latch_hides_data_and_interrupt_enable(port):
    port.outb(LCR, 0x83)
    port.outb(DATA, 0x01)
    port.outb(IER, 0x02)
    assert (port.inb(DATA), port.inb(IER)) == (0x01, 0x02)
    port.outb(LCR, 0x03)
    assert (port.inb(DATA), port.inb(IER), port.inb(LCR)) == (0, 0, 0x03)
    assert port.sent == []


def test_reserved_bits_read_as_zero(port):
    port.outb(IER, 0xFF)
    port.outb(MCR, 0xFF)
    assert (port.inb(IER), port.inb(MCR)) == (0x0F, 0x1F)


def test_line_and_modem_status_are_read_only(port):
    before = port.inb(LSR), port.inb(MSR)
    port.outb(LSR, 0xFF)
    port.outb(MSR, 0xFF)
    assert (port.inb(LSR), port.inb(MSR)) == before


def test_polled_input(port):
    assert port.serial.feed(b"hi") == 2
    assert port.serial.waiting == 2
    assert port.inb(LSR) & 0x01
    assert [port.inb(DATA), port.inb(DATA), port.inb(DATA)] == [ord("h"), ord("i"), 0]
    assert not port.inb(LSR) & 0x01
    assert port.serial.waiting == 0


def test_the_queue_is_bounded_and_says_what_it_took(port):
    data = bytes(range(256)) * 300
    assert port.serial.feed(data) == QUEUE_SIZE
    assert port.serial.room() == 0
    assert port.serial.feed(b"more") == 0
    assert bytes(port.inb(DATA) for _ in range(QUEUE_SIZE)) == data[:QUEUE_SIZE]
    assert port.serial.room() == QUEUE_SIZE
    assert not port.inb(LSR) & 0x03


@pytest.mark.parametrize("resets", [[0x02], [0x07], [0x01, 0x00], [0xC7, 0x00, 0xC7]])
def test_a_fifo_reset_loses_no_host_input(port, resets):
    port.serial.feed(b"typed ahead, and longer than a FIFO")
    for value in resets:
        port.outb(FCR, value)
    assert bytes(port.inb(DATA) for _ in range(port.serial.waiting)) == b"typed ahead, and longer than a FIFO"


# Interrupts


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_levels(port, fcr, trigger):
    port.interrupts(ier=0x01, fifo=fcr)
    for count in range(1, FIFO_SIZE + 1):
        port.serial.feed(b"x")
        assert port.inb(IIR) == (0xC4 if count >= trigger else 0xCC)
    assert port.levels == [True]
    for _ in range(FIFO_SIZE):
        port.inb(DATA)
    assert port.levels == [True, False]
    assert port.inb(IIR) == 0xC1


def test_without_fifo_every_byte_is_received_data(port):
    port.interrupts(ier=0x01, fifo=0xC0)
    port.serial.feed(b"xy")
    assert port.inb(IIR) == 0x04


def test_transmitter_interrupt(port):
    port.interrupts(ier=0x02)
    assert port.line
    assert port.inb(IIR) == 0xC2
    assert port.inb(IIR) == 0xC1
    assert not port.line
    port.outb(DATA, ord("a"))
    assert port.line
    port.outb(IER, 0x02)
    assert port.inb(IIR) == 0xC2
    port.outb(IER, 0x02)
    assert port.inb(IIR) == 0xC1, "setting a bit that is set raises nothing"
    port.outb(IER, 0x00)
    port.outb(IER, 0x02)
    assert port.inb(IIR) == 0xC2
    assert port.levels == [True, False, True, False, True, False]


def test_the_output_is_made_before_the_interrupt():
    events = []
    serial = Serial(events.append, events.append)
    serial.write(MCR, 0x08, 1)
    serial.write(IER, 0x02, 1)
    serial.read(IIR, 1)
    serial.write(DATA, ord("a"), 1)
    assert events == [True, False, b"a", True]


def test_priorities(port):
    port.outb(FCR, 0x01)
    port.outb(MCR, 0x10)
    for _ in range(FIFO_SIZE + 1):
        port.outb(DATA, 0x55)
    port.outb(IER, 0x0F)
    assert port.inb(IIR) == 0xC6
    assert port.inb(LSR) == 0x63
    assert port.inb(IIR) == 0xC4
    for _ in range(FIFO_SIZE):
        port.inb(DATA)
    assert port.inb(IIR) == 0xC2
    assert port.inb(IIR) == 0xC0
    assert port.inb(MSR) & 0x0F
    assert port.inb(IIR) == 0xC1


def test_a_lower_source_is_not_cleared_by_reading_a_higher_one(port):
    port.interrupts(ier=0x03)
    port.serial.feed(b"x")
    assert port.inb(IIR) == 0xC4
    assert port.inb(IIR) == 0xC4
    port.inb(DATA)
    assert port.inb(IIR) == 0xC2


def test_out2_and_loopback_gate_the_line(port):
    port.outb(IER, 0x01)
    port.serial.feed(b"x")
    assert port.levels == []
    port.outb(MCR, 0x08)
    assert port.levels == [True]
    port.outb(MCR, 0x18)
    assert port.levels == [True, False]
    port.outb(MCR, 0x08)
    port.outb(MCR, 0x03)
    assert port.levels == [True, False, True, False]


# Loopback and the modem


def test_loopback_sees_only_its_own_bytes(port):
    port.serial.feed(b"typed")
    port.outb(MCR, 0x1E)
    assert port.inb(LSR) == 0x60
    port.outb(DATA, 0xAE)
    assert port.inb(LSR) == 0x61
    assert port.inb(DATA) == 0xAE
    assert port.inb(DATA) == 0
    port.outb(DATA, 0xAF)
    port.outb(MCR, 0x0F)
    assert bytes(port.inb(DATA) for _ in range(5)) == b"typed"
    assert port.sent == []


@pytest.mark.parametrize(("fcr", "left"), [(0, [17]), (1, list(range(1, 17)))])
def test_loopback_overrun(port, fcr, left):
    port.outb(FCR, fcr)
    port.outb(MCR, 0x10)
    for value in range(1, 18):
        port.outb(DATA, value)
    assert port.inb(LSR) == 0x63
    assert port.inb(LSR) == 0x61
    assert [port.inb(DATA) for _ in left] == left
    assert port.inb(LSR) == 0x60


def test_a_fifo_reset_discards_looped_bytes(port):
    port.outb(FCR, 1)
    port.outb(MCR, 0x10)
    port.outb(DATA, 1)
    port.outb(FCR, 1)
    assert port.inb(LSR) == 0x61
    port.outb(FCR, 3)
    assert port.inb(LSR) == 0x60


@pytest.mark.parametrize(("output", "status"), [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)])
def test_loopback_wires_modem_outputs_to_inputs(port, output, status):
    port.outb(MCR, 0x10)
    port.inb(MSR)
    port.outb(MCR, 0x10 | output)
    assert port.inb(MSR) & 0xF0 == status
    port.outb(MCR, 0x10)
    delta = status >> 4
    assert port.inb(MSR) == delta
    assert port.inb(MSR) == 0


def test_ring_reports_its_trailing_edge_alone(port):
    port.outb(MCR, 0x10)
    port.inb(MSR)
    port.outb(MCR, 0x14)
    assert port.inb(MSR) == 0x40
    port.outb(MCR, 0x10)
    assert port.inb(MSR) == 0x04


# Listening, threads


@pytest.mark.parametrize("act", [lambda port: port.inb(DATA), lambda port: port.outb(IER, 0x01)])
def test_the_guest_listens_once(port, act):
    heard = []
    port.serial.on_listen = lambda: heard.append(port.serial.room())
    port.outb(LCR, 0x80)
    port.inb(DATA)
    port.outb(IER, 0x01)
    port.outb(LCR, 0x00)
    port.outb(MCR, 0x10)
    port.inb(DATA)
    port.outb(MCR, 0x00)
    port.outb(IER, 0x0E)
    port.inb(LSR)
    assert heard == []
    assert not port.serial.listening
    act(port)
    act(port)
    assert heard == [QUEUE_SIZE]
    assert port.serial.listening


def test_the_output_may_feed(port):
    serial = port.serial
    serial.output = serial.feed
    serial.write(IER, 0x03, 1)
    serial.write(DATA, ord("e"), 1)
    assert serial.read(DATA, 1) == ord("e")


def test_a_thread_feeds_while_the_guest_reads(port):
    data = bytes(range(256)) * 400
    port.interrupts(ier=0x01, fifo=0xC1)

    def feed():
        left = data
        while left:
            left = left[port.serial.feed(left[:100]) :]

    thread = threading.Thread(target=feed)
    thread.start()
    received = bytearray()
    while len(received) < len(data):
        if port.inb(LSR) & 1:
            received.append(port.inb(DATA))
    thread.join()
    assert received == data
    assert not port.line
    assert all(a != b for a, b in zip(port.levels, port.levels[1:], strict=False))


# State


def test_state_carries_on_where_it_was(port):
    port.interrupts(ier=0x03, fifo=0x81)
    port.outb(SCR, 0x5A)
    port.serial.feed(b"unread")
    other = Port()
    heard = []
    other.serial.on_listen = lambda: heard.append(True)
    other.serial.restore(port.serial.save())
    assert other.serial.save() == port.serial.save()
    assert other.levels == [True]
    assert heard == [True]
    assert other.inb(SCR) == 0x5A
    assert other.inb(IIR) == 0xCC
    assert bytes(other.inb(DATA) for _ in range(6)) == b"unread"
    assert other.inb(IIR) == 0xC2


def test_restoring_lowers_the_line(port):
    idle = port.serial.save()
    port.interrupts(ier=0x02)
    port.serial.restore(idle)
    assert port.levels == [True, False]


FIELDS = Port().serial.save().fields


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [None, -1, 1 << 16, "1", bytes(QUEUE_SIZE + 1), [], 1.0])
def test_a_hostile_field_is_refused_and_changes_nothing(port, name, value):
    port.interrupts(ier=0x0F)
    before, levels = port.serial.save(), list(port.levels)
    with pytest.raises(StateError):
        port.serial.restore(State("serial", 1, {**FIELDS, name: value}))
    with pytest.raises(StateError):
        port.serial.restore(State("serial", 1, {key: FIELDS[key] for key in FIELDS if key != name}))
    assert port.serial.save() == before
    assert port.levels == levels


@pytest.mark.parametrize(("kind", "version"), [("serial", 2), ("vcpu", 1)])
def test_another_state_is_refused(port, kind, version):
    with pytest.raises(StateError):
        port.serial.restore(State(kind, version, dict(FIELDS)))


# Linux


def linux_autoconfig(port):
    """The checks of the 8250 driver that a 16550A must pass, and that tell it from its relatives. Returns the type."""
    # Is anything there: three bits of IER must stay clear, then set.
    old_ier = port.inb(IER)
    port.outb(IER, 0)
    assert port.inb(IER) & 0x0F == 0
    port.outb(IER, 0x0F)
    assert port.inb(IER) & 0x0F == 0x0F
    port.outb(IER, old_ier)
    # Loopback: RTS and OUT2 appear as CTS and DCD.
    old_mcr, old_lcr = port.inb(MCR), port.inb(LCR)
    port.outb(MCR, 0x1A)
    assert port.inb(MSR) & 0xF0 == 0x90
    port.outb(MCR, old_mcr)
    # FIFO: an EFR of later parts is probed first, then IIR's top bits tell.
    port.outb(LCR, 0xBF)
    port.outb(FCR, 0)
    port.outb(LCR, 0)
    port.outb(FCR, 0x01)
    kind = {0: "8250 or 16450", 2: "16550", 3: "16550A"}.get(port.inb(IIR) >> 6, "unknown")
    # Not an ST16C650: its EFR would read 0 here.
    for lcr in (0x80, 0xBF):
        port.outb(LCR, lcr)
        assert port.inb(FCR) != 0
    # Not a SuperIO with a second register bank: MCR's loop bit does not show in register 2.
    port.outb(LCR, 0)
    mcr = port.inb(MCR)
    port.outb(LCR, 0xE0)
    bank = port.inb(IIR)
    assert not (bank ^ mcr) & 0x10
    port.outb(LCR, 0)
    port.outb(MCR, mcr ^ 0x10)
    port.outb(LCR, 0xE0)
    assert not (port.inb(IIR) ^ mcr) & 0x10
    port.outb(LCR, 0)
    port.outb(MCR, mcr)
    # Not a TI16750: no 64-byte FIFO.
    port.outb(FCR, 0x21)
    plain = port.inb(IIR) >> 5
    port.outb(FCR, 0x01)
    port.outb(LCR, 0x80)
    port.outb(FCR, 0x21)
    assert (plain, port.inb(IIR) >> 5) == (6, 6)
    port.outb(FCR, 0x01)
    port.outb(LCR, 0)
    # Not an XScale: no unit enable bit in IER.
    port.outb(IER, port.inb(IER) | 0x40)
    assert not port.inb(IER) & 0x40
    # The scratch register.
    for value in (0xA5, 0x5A):
        port.outb(SCR, value)
        assert port.inb(SCR) == value
    port.outb(LCR, old_lcr)
    port.outb(MCR, old_mcr)
    linux_clear_fifos(port)
    port.inb(DATA)
    port.outb(IER, 0)
    return kind


def linux_clear_fifos(port):
    for value in (0x01, 0x07, 0x00):
        port.outb(FCR, value)


def linux_startup(port):
    """The driver's startup: quirk tests of the transmitter interrupt, then FIFO and interrupts on."""
    linux_clear_fifos(port)
    for register in (LSR, DATA, IIR, MSR):
        port.inb(register)
    assert port.inb(LSR) != 0xFF
    # Is THRE raised again when IER's bit is set again (else the driver falls back to a timer)?
    port.outb(IER, 0x02)
    first = port.inb(IIR)
    port.outb(IER, 0)
    port.outb(IER, 0x02)
    second = port.inb(IIR)
    port.outb(IER, 0)
    assert not first & 0x01
    assert not second & 0x01
    port.outb(LCR, 0x03)
    port.outb(MCR, 0x08)
    # Does enabling it with an empty transmitter interrupt (else every write needs a kick)?
    port.outb(IER, 0x02)
    lsr, iir = port.inb(LSR), port.inb(IIR)
    port.outb(IER, 0)
    assert lsr & 0x40
    assert not iir & 0x01
    for register in (LSR, DATA, IIR, MSR):
        port.inb(register)
    assert not port.line
    port.outb(IER, 0x05)
    # Line settings: 115200 8n1, FIFO with a trigger of 8; then the terminal is opened.
    port.outb(LCR, 0x83)
    port.outb(DATA, 1)
    port.outb(IER, 0)
    port.outb(LCR, 0x03)
    port.outb(FCR, 0x01)
    port.outb(FCR, 0x81)
    port.outb(MCR, 0x0B)


def linux_interrupt(port, to_send, received):
    """The driver's handler: until IIR has nothing, receive all there is, then send a FIFO's worth."""
    passes = 0
    while not port.inb(IIR) & 0x01:
        passes += 1
        assert passes < 256, "the driver would give up: too much work for irq"
        lsr = port.inb(LSR)
        for _ in range(256):
            if not lsr & 0x01:
                break
            received.append(port.inb(DATA))
            lsr = port.inb(LSR)
        port.inb(MSR)
        if lsr & 0x20 and port.inb(IER) & 0x02:
            for _ in range(min(FIFO_SIZE, len(to_send))):
                port.outb(DATA, to_send.pop(0))
            if not to_send:
                port.outb(IER, port.inb(IER) & ~0x02)


def test_linux_finds_a_16550a_and_drives_it_by_interrupts(port):
    assert linux_autoconfig(port) == "16550A"
    assert not port.line
    linux_startup(port)
    assert not port.line
    assert port.sent == []

    message = b"Welcome to a guest that sends more than one FIFO of text.\n"
    to_send, received = list(message), []
    port.outb(IER, port.inb(IER) | 0x02)
    edges = 0
    while port.line:
        edges += 1
        linux_interrupt(port, to_send, received)
    assert port.text == message
    assert edges == 1, "each byte sent in the handler is due again before it looks at IIR"

    port.serial.feed(b"x")
    assert port.line
    linux_interrupt(port, [], received)
    assert not port.line
    typed = bytes(range(256)) * 20
    port.serial.feed(typed)
    assert port.line
    linux_interrupt(port, [], received)
    assert bytes(received) == b"x" + typed
    assert not port.line


# Hostile use

REGISTERS = st.integers(0, 7)
SIZES = st.sampled_from((1, 1, 1, 2, 4))
VALUES = st.one_of(
    st.sampled_from((0, 1, 2, 3, 4, 7, 8, 0x0B, 0x0F, 0x10, 0x1A, 0x81, 0xC7)), st.integers(0, (1 << 32) - 1)
)


class Guest(RuleBasedStateMachine):
    """Any guest with any host: values are bytes, the line is what IIR says, and host input arrives as it was fed."""

    @initialize()
    def begin(self):
        self.port = Port()
        self.fed = bytearray()
        self.got = bytearray()

    def hears_host(self):
        return not self.port.inb(LCR) & 0x80 and not self.port.inb(MCR) & 0x10

    @rule(register=REGISTERS, size=SIZES)
    def read(self, register, size):
        if register == DATA and self.hears_host() and self.port.serial.waiting:
            assert self.port.inb(LSR) & 0x01
            self.got.append(self.port.serial.read(register, size))
        else:
            assert 0 <= self.port.serial.read(register, size) <= 0xFF

    @rule(register=REGISTERS, value=VALUES, size=SIZES)
    def write(self, register, value, size):
        heard = register == DATA and self.hears_host()
        before = len(self.port.sent)
        self.port.serial.write(register, value, size)
        assert self.port.sent[before:] == ([bytes((value & 0xFF,))] if heard else [])

    @rule(register=REGISTERS, data=st.binary(max_size=40), size=SIZES)
    def write_block(self, register, data, size):
        self.port.serial.write_block(register, data, size)

    @rule(data=st.binary(max_size=40))
    def feed(self, data):
        assert self.port.serial.feed(data) == len(data)
        self.fed += data

    @rule()
    def move(self):
        """As a migration does: another UART goes on from the saved state."""
        other = Port()
        other.serial.restore(self.port.serial.save())
        assert other.serial.save() == self.port.serial.save()
        assert other.line == self.port.line
        self.port = other

    @rule(name=st.sampled_from(sorted(FIELDS)), value=st.one_of(st.integers(), st.binary(max_size=20), st.booleans()))
    def restore_hostile(self, name, value):
        state = self.port.serial.save()
        scratch = Port()
        try:
            scratch.serial.restore(State("serial", 1, {**state.fields, name: value}))
        except StateError:
            assert scratch.serial.save().fields == FIELDS
            assert scratch.levels == []
        for register in range(8):
            assert 0 <= scratch.inb(register) <= 0xFF

    @invariant()
    def the_line_is_what_iir_says(self):
        twin = Port()
        twin.serial.restore(self.port.serial.save())
        pending = not twin.inb(IIR) & 0x01
        assert self.port.line == (pending and twin.inb(MCR) & 0x18 == 0x08)
        levels = self.port.levels
        assert levels == [at % 2 == 0 for at in range(len(levels))]

    @invariant()
    def what_waits_is_what_was_not_read(self):
        assert self.port.serial.waiting == len(self.fed) - len(self.got)
        assert self.port.serial.room() == QUEUE_SIZE - self.port.serial.waiting

    def teardown(self):
        self.port.outb(LCR, 0)
        self.port.outb(MCR, 0)
        while self.port.inb(LSR) & 0x01:
            self.got.append(self.port.inb(DATA))
        assert self.got == self.fed


TestGuest = Guest.TestCase
TestGuest.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(data=st.binary(max_size=300), fcr=st.sampled_from((0, 0x01, 0x41, 0x81, 0xC1)), chunk=st.integers(1, 40))
def test_an_interrupt_driven_guest_gets_every_byte_in_order(data, fcr, chunk):
    port, received = Port(), []
    port.interrupts(ier=0x01, fifo=fcr)
    for at in range(0, len(data), chunk):
        port.serial.feed(data[at : at + chunk])
        assert port.line
        linux_interrupt(port, [], received)
        assert not port.line
    assert bytes(received) == data
