# test_bus.py: which device an access reaches, what happens where there is none, and the exit port.
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.bus import UNKNOWN_LIMIT, Bus
from pyvmm.devices.exit_port import LENGTH, ExitPort
from pyvmm.errors import BadInput, StateError
from pyvmm.state import State


class Scratch:
    """A device that remembers the calls, and reads as the offset."""

    def __init__(self):
        self.calls = []

    def read(self, offset, size):
        self.calls.append(("read", offset, size))
        return offset

    def write(self, offset, value, size):
        self.calls.append(("write", offset, value, size))

    def save(self):
        return State("scratch", 1, {})

    def restore(self, state):
        state.require("scratch", 1)


class Blocks(Scratch):
    def write_block(self, offset, data, size):
        self.calls.append(("block", offset, data, size))


@pytest.fixture
def bus():
    return Bus("port", 16)


def test_an_access_reaches_its_device_by_offset(bus):
    low, high = Scratch(), Scratch()
    bus.attach(0x3F8, 8, high)
    bus.attach(0xF4, 4, low)
    bus.write(0xF4, 5, 1)
    bus.write(0x3FC, 0x1234, 2)
    assert bus.read(0x3FF, 1) == 7
    assert low.calls == [("write", 0, 5, 1)]
    assert high.calls == [("write", 4, 0x1234, 2), ("read", 7, 1)]
    assert bus.unknown == {}


@pytest.mark.parametrize("address", [0x3F7, 0x400, 0, 0xFFFF])
def test_nobody_reads_all_ones_and_is_counted(bus, address):
    bus.attach(0x3F8, 8, Scratch())
    assert [bus.read(address, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]
    bus.write(address, 1, 1)
    assert bus.unknown == {address: [3, 1]}
    assert bus.unknown_total == 4


@pytest.mark.parametrize("address", [0x3F7, 0x3FF])
def test_an_access_across_an_edge_of_a_range_is_nobodys(bus, address):
    device = Scratch()
    bus.attach(0x3F8, 8, device)
    assert bus.read(address, 2) == 0xFFFF
    bus.write(address, 1, 4)
    assert device.calls == []
    assert bus.unknown == {address: [1, 1]}


def test_an_access_across_two_ranges_is_nobodys(bus):
    bus.attach(0x10, 4, Scratch())
    bus.attach(0x14, 4, Scratch())
    assert bus.read(0x13, 2) == 0xFFFF


def test_distinct_unknown_addresses_are_capped_and_the_total_is_not(bus):
    for address in range(UNKNOWN_LIMIT + 100):
        bus.read(address, 1)
    bus.write(0, 0, 1)
    assert len(bus.unknown) == UNKNOWN_LIMIT
    assert bus.unknown[0] == [1, 1]
    assert bus.unknown_total == UNKNOWN_LIMIT + 101


@pytest.mark.parametrize(("base", "length"), [(0x3F8, 8), (0x3F0, 9), (0x3FF, 1), (0x3F0, 0x20), (0x3FA, 2)])
def test_an_overlap_names_both(bus, base, length):
    bus.attach(0x3F8, 8, Scratch())
    bus.attach(0x500, 8, Scratch())
    with pytest.raises(BadInput, match=rf"port bus: Blocks at {base:#x}\S* overlaps Scratch at 0x3f8\.\.0x3ff"):
        bus.attach(base, length, Blocks())
    bus.attach(0x400, 0x100, Blocks())


@pytest.mark.parametrize(("base", "length"), [(-1, 4), (0xFFFF, 2), (0x100, 0)])
def test_a_range_must_fit_the_bus(bus, base, length):
    with pytest.raises(BadInput, match="16-bit port bus"):
        bus.attach(base, length, Scratch())


def test_a_block_goes_whole_to_a_device_that_takes_blocks(bus):
    device = Blocks()
    bus.attach(0x3F8, 8, device)
    bus.write_block(0x3F8, b"hello", 1)
    assert device.calls == [("block", 0, b"hello", 1)]


def test_a_block_goes_in_elements_to_others(bus):
    device = Scratch()
    bus.attach(0x10, 8, device)
    bus.write_block(0x12, b"\x01\x02\x03\x04", 2)
    assert bus.read_block(0x13, 2, 3) == b"\x03\x00" * 3
    assert device.calls == [("write", 2, 0x0201, 2), ("write", 2, 0x0403, 2), *[("read", 3, 2)] * 3]


def test_blocks_of_nobody(bus):
    bus.write_block(0x80, b"abcd", 2)
    assert bus.read_block(0x80, 4, 2) == b"\xff" * 8
    assert bus.unknown == {0x80: [2, 2]}


def test_mmio_addresses_of_64_bits():
    bus, device = Bus("mmio", 64), Scratch()
    bus.attach((1 << 64) - 0x1000, 0x1000, device)
    assert bus.read((1 << 64) - 8, 8) == 0xFF8
    assert bus.read((1 << 64) - 4, 8) == (1 << 64) - 1


@given(
    ranges=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40))),
    accesses=st.lists(st.tuples(st.integers(0, 350), st.sampled_from((1, 2, 4, 8)))),
)
def test_agrees_with_a_search_of_all_ranges(ranges, accesses):
    bus, taken = Bus("mmio", 64), []
    for base, length in ranges:
        device = Scratch()
        if any(base < other + size and other < base + length for other, size, _ in taken):
            with pytest.raises(BadInput):
                bus.attach(base, length, device)
        else:
            bus.attach(base, length, device)
            taken.append((base, length, device))
    for address, size in accesses:
        owners = [(b, d) for b, length, d in taken if b <= address and address + size <= b + length]
        value = bus.read(address, size)
        if owners:
            ((base, device),) = owners
            assert value == address - base
            assert device.calls[-1] == ("read", address - base, size)
        else:
            assert value == (1 << 8 * size) - 1


def test_exit_port_hands_on_the_low_byte(bus):
    codes = []
    bus.attach(0xF4, LENGTH, ExitPort(codes.append))
    bus.write(0xF4, 0x2A, 1)
    bus.write(0xF4, 0x1203, 4)
    assert codes == [0x2A, 3]
    assert bus.read(0xF5, 1) == 0
    assert bus.unknown_total == 0


def test_exit_port_state():
    port = ExitPort(lambda code: None)
    port.restore(port.save())
    with pytest.raises(StateError):
        port.restore(State("serial", 1, {}))
