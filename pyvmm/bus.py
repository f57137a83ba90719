# bus.py: which device answers at a port or MMIO address, for the exit dispatch. Units: addresses and sizes in bytes.
"""`Bus`: devices by address range, and a count of what the guest asked of addresses that nobody claims.

One sorted list of ranges serves ports and MMIO alike: its bisection costs about 0.1 microseconds. A dictionary with an
entry for each port would save half of that, which is not worth a second mechanism.

An access is one device's or nobody's: one that begins in a range and runs past its end counts as unclaimed, whole.
"""

from __future__ import annotations

from bisect import bisect_right

from pyvmm.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pyvmm.state import State

    class Device(Protocol):
        """What a bus can attach. Offsets count from the start of the range; sizes are 1, 2, 4 or 8 bytes.

        A device may also have `write_block(offset, data, size)`, which takes a whole string of writes to one offset.
        """

        def read(self, offset: int, size: int) -> int:
            """The value at `offset`, in 0..256**size-1."""

        def write(self, offset: int, value: int, size: int) -> None:
            """Puts `value`, in 0..256**size-1, at `offset`."""

        def save(self) -> State:
            """Everything that the guest could tell from a fresh device."""

        def restore(self, state: State) -> None:
            """Becomes what `save()` saw; raises StateError, and stays as it is, if `state` does not fit."""


UNKNOWN_LIMIT = 4096
"""Distinct unclaimed addresses that are listed; a guest that scans further only adds to the total."""


class Bus:
    """An address space of `width` bits (16: ports, 64: MMIO). Devices bring their own locks."""

    def __init__(self, name: str, width: int) -> None:
        self.name = name
        self.width = width
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, Device]] = []
        """(first address, address behind the last, device), by address; `_starts` has their first addresses."""
        self._nobody = _Nobody()

    @property
    def unknown(self) -> dict[int, list[int]]:
        """Accesses that no device claimed: address -> [reads, writes], for at most UNKNOWN_LIMIT addresses."""
        return self._nobody.counts

    @property
    def unknown_total(self) -> int:
        """How many accesses no device claimed, listed in `unknown` or not."""
        return self._nobody.total

    def attach(self, base: int, length: int, device: Device) -> None:
        """Gives `device` the addresses base..base+length-1. Raises BadInput if another has one of them already."""
        end = base + length
        if base < 0 or length <= 0 or end > 1 << self.width:
            raise BadInput(f"{_show(base, end, device)} does not fit the {self.width}-bit {self.name} bus")
        at = bisect_right(self._starts, base)
        for neighbour in self._ranges[max(at - 1, 0) : at + 1]:
            if neighbour[0] < end and base < neighbour[1]:
                raise BadInput(f"{self.name} bus: {_show(base, end, device)} overlaps {_show(*neighbour)}")
        self._starts.insert(at, base)
        self._ranges.insert(at, (base, end, device))

    def read(self, address: int, size: int) -> int:
        """What the guest reads: `size` bytes as one little-endian number, all ones where nobody answers."""
        device, offset = self._find(address, size)
        return device.read(offset, size)

    def write(self, address: int, value: int, size: int) -> None:
        """The guest wrote `value` of `size` bytes; nothing happens where nobody answers."""
        device, offset = self._find(address, size)
        device.write(offset, value, size)

    def read_block(self, address: int, size: int, count: int) -> bytes:
        """String input: `count` reads of `size` bytes, all at `address`."""
        device, offset = self._find(address, size)
        return b"".join(device.read(offset, size).to_bytes(size, "little") for _ in range(count))

    def write_block(self, address: int, data: bytes, size: int) -> None:
        """String output: `data` as writes of `size` bytes, all at `address`; in one call if the device takes blocks."""
        device, offset = self._find(address, size)
        take = getattr(device, "write_block", None)
        if take is not None:
            take(offset, data, size)
            return
        for at in range(0, len(data), size):
            device.write(offset, int.from_bytes(data[at : at + size], "little"), size)

    def _find(self, address: int, size: int) -> tuple[Device | _Nobody, int]:
        at = bisect_right(self._starts, address)
        if at:
            base, end, device = self._ranges[at - 1]
            if address + size <= end:
                return device, address - base
        return self._nobody, address


class _Nobody:
    """Answers where no device does. Its offsets are bus addresses.

    The counts are for diagnosis: vCPUs that count at the same instant may lose one.
    """

    def __init__(self) -> None:
        self.counts: dict[int, list[int]] = {}
        self.total = 0

    def read(self, address: int, size: int) -> int:
        self._count(address, 0)
        return (1 << 8 * size) - 1

    def write(self, address: int, value: int, size: int) -> None:
        self._count(address, 1)

    def _count(self, address: int, kind: int) -> None:
        self.total += 1
        count = self.counts.get(address)
        if count is None:
            if len(self.counts) >= UNKNOWN_LIMIT:
                return
            count = self.counts[address] = [0, 0]
        count[kind] += 1


def _show(base: int, end: int, device: object) -> str:
    return f"{type(device).__name__} at {base:#x}..{end - 1:#x}"
