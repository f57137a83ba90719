# queue.py: a split virtqueue as its device sees it (virtio 1.2, section 2.7). Units: bytes; guest-physical addresses.
"""`Queue`: takes descriptor chains from the driver and gives them back; `Chain` and `Buffers` are what it takes.

All three parts lie in the guest's memory, and the driver may write anything there at any time: each descriptor, index
and table is copied once, checked, and only the copy is used. What breaks a rule raises `RingError`.

Who calls must be allowed to wait: memory may be away. A FetchError leaves the queue as it was, so that the same call
can be made again.
"""

from __future__ import annotations

import struct

from pyvmm.errors import FetchError, StateError
from pyvmm.layout import Gpa
from pyvmm.record import Record
from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.memory import GuestMemory

MAX_SIZE = 256
"""Entries of the largest queue that a driver may make."""
F_INDIRECT = 1 << 28
F_EVENT = 1 << 29
NEXT, WRITE, INDIRECT = 1, 2, 4
"""Flags of a descriptor."""
NO_INTERRUPT = 1
"""Flag of the available ring."""
_MAX_CHAIN = 1 << 32
"""Bytes that all buffers of a chain may have together (2.7.5)."""
_DESCRIPTOR = struct.Struct("<QIHH")
_INDEX = 0xFFFF
_PARTS = ("descriptors", "driver", "device")


class RingError(Exception):
    """What a driver did that no driver may do, in a few words."""


class Buffers(Record):
    """Guest memory that belongs together though it lies in pieces. `parts`: (address, bytes) of each."""

    __slots__ = ("memory", "parts", "size")

    def __init__(self, memory: GuestMemory, parts: Sequence[tuple[int, int]]) -> None:
        self.memory = memory
        self.parts = tuple(parts)
        self.size = sum(size for _, size in parts)

    def part(self, at: int, size: int) -> Buffers:
        """The `size` bytes from byte `at` on; fewer where there are no more."""
        found = []
        for start, length in self.parts:
            skip = min(at, length)
            take = min(length - skip, size)
            if take:
                found.append((start + skip, take))
            at, size = at - skip, size - take
        return Buffers(self.memory, found)

    def read(self) -> bytes:
        """A copy of all bytes. Raises FetchError."""
        return b"".join(self.memory.read(Gpa(start), size) for start, size in self.parts)

    def write(self, data: bytes | memoryview) -> int:
        """Puts `data` at the start, as much as fits; returns how much. Raises FetchError."""
        done = 0
        for start, size in self.parts:
            piece = data[done : done + size]
            if not piece:
                break
            self.memory.write(Gpa(start), piece)
            done += len(piece)
        return done


class Chain(Record):
    """One request. `head` names it towards the driver; `readable`, then `writable`: its buffers, by who may do what."""

    __slots__ = ("head", "readable", "writable")

    def __init__(self, head: int, readable: Buffers, writable: Buffers) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable


class Queue:
    """`size`, the three addresses (`descriptors`, `driver`: the available ring, `device`: the used ring) and `ready`
    are the transport's to set; `features`: what was negotiated. Only one thread at a time may take() and give()."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.features = 0
        self.reset()

    def reset(self) -> None:
        """As it was in the beginning."""
        self.size = MAX_SIZE
        self.ready = False
        self.descriptors = self.driver = self.device = 0
        self.taken = 0
        """Index of the next available entry, modulo 2^16: those before it are answered."""
        self.given = 0
        """Index of the next used entry, modulo 2^16."""

    def check(self) -> None:
        """Raises RingError unless the driver has put all parts where they can be. To be called before `ready`."""
        if not 1 <= self.size <= MAX_SIZE or self.size & (self.size - 1):
            raise RingError(f"a queue of {self.size} entries: a power of two, {MAX_SIZE} at most, can be")
        extents = (16 * self.size, 6 + 2 * self.size, 6 + 8 * self.size)
        for name, alignment, extent in zip(_PARTS, (16, 2, 4), extents, strict=True):
            address = getattr(self, name)
            if address % alignment:
                raise RingError(f"{name} of a queue at {address:#x}: not a multiple of {alignment}")
            if not self._memory.is_ram(address, extent):
                raise RingError(f"{name} of a queue at {address:#x}: not RAM")

    def take(self) -> Chain | None:
        """The oldest request that was not answered yet; give() is to follow. None: there is none, and the driver has
        been asked to tell of the next one. Raises RingError, FetchError."""
        waiting = self._waiting()
        if not waiting and self.features & F_EVENT:
            # "Tell me of the next one", then a second look, since one may have come before the driver could see that.
            # The store must not come after the load: each of these copies takes the GIL again, which is a full barrier.
            self._memory.write(Gpa(self.device + 4 + 8 * self.size), self.taken.to_bytes(2, "little"))
            waiting = self._waiting()
        if not waiting:
            return None
        return self._chain(self._word(self.driver + 4 + 2 * (self.taken % self.size)))

    def give(self, head: int, written: int) -> bool:
        """Answers the request that take() gave: so many bytes of its writable buffers were written, from the first one
        on. Does the driver want an interrupt? Raises FetchError where the driver was told nothing, and the queue is as
        it was."""
        entry = struct.pack("<II", head, written)
        self._memory.write(Gpa(self.device + 4 + 8 * (self.given % self.size)), entry)
        before, new = self.given, self.given + 1 & _INDEX
        self._memory.write(Gpa(self.device + 2), new.to_bytes(2, "little"))
        self.given, self.taken = new, self.taken + 1 & _INDEX
        # The driver writes what it wants, then looks at the index; we, the other way round; the barrier is take()'s.
        try:
            if self.features & F_EVENT:
                return self._word(self.driver + 4 + 2 * self.size) == before
            return not self._word(self.driver) & NO_INTERRUPT
        except FetchError:  # the answer is given: an interrupt too many does no harm
            return True

    def save(self) -> State:
        """Of a queue that nobody serves now."""
        numbers = {name: getattr(self, name) for name in (*_PARTS, "size", "taken", "given")}
        return State("virtqueue", 1, {"ready": int(self.ready), **numbers})

    def restored(self, state: State, features: int) -> Queue:
        """Another one, as save() saw it. Raises StateError for what no queue can be."""
        state.require("virtqueue", 1)
        queue = Queue(self._memory)
        queue.features = features
        for name in _PARTS:
            setattr(queue, name, state.integer(name))
        queue.size = state.integer("size", high=0xFFFF_FFFF)
        queue.taken, queue.given = state.integer("taken", high=_INDEX), state.integer("given", high=_INDEX)
        queue.ready = bool(state.integer("ready", high=1))
        if queue.ready:
            try:
                queue.check()
            except RingError as error:
                raise StateError(f"virtqueue state: {error}") from None
        return queue

    def _waiting(self) -> int:
        waiting = self._word(self.driver + 2) - self.taken & _INDEX
        if waiting > self.size:
            raise RingError(f"{waiting} requests are available in a queue of {self.size}")
        return waiting

    def _word(self, address: int) -> int:
        return int.from_bytes(self._memory.read(Gpa(address), 2), "little")

    def _chain(self, head: int) -> Chain:
        if head >= self.size:
            raise RingError(f"descriptor {head} is available in a queue of {self.size}")
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        table, entries, index, indirect = self.descriptors, self.size, head, False
        total, left = 0, self.size
        while left:  # by which a loop ends
            if index >= entries:
                raise RingError(f"a descriptor's next one is {index}, of {entries}")
            address, size, flags, after = _DESCRIPTOR.unpack(self._memory.read(Gpa(table + 16 * index), 16))
            if flags & INDIRECT:
                entries = self._indirect(address, size, flags, indirect)
                table, index, indirect = address, 0, True
                continue
            left, total = left - 1, total + size
            self._check_buffer(address, size, flags, bool(writable), total)
            if size:
                (writable if flags & WRITE else readable).append((address, size))
            if not flags & NEXT:
                return Chain(head, Buffers(self._memory, readable), Buffers(self._memory, writable))
            index = after
        raise RingError(f"a chain of more than {self.size} descriptors, or one without an end")

    def _indirect(self, address: int, size: int, flags: int, within: bool) -> int:
        """Entries of the table that a descriptor refers to."""
        if not self.features & F_INDIRECT:
            raise RingError("an indirect descriptor, which was not negotiated")
        if within:
            raise RingError("an indirect descriptor within an indirect table")
        if flags & NEXT:
            raise RingError("an indirect descriptor that has a next one")
        if not size or size % 16:
            raise RingError(f"an indirect table of {size} bytes")
        if not self._memory.is_ram(address, size):
            raise RingError(f"an indirect table at {address:#x}+{size:#x}: not RAM")
        return size // 16

    def _check_buffer(self, address: int, size: int, flags: int, after_writable: bool, total: int) -> None:
        if after_writable and not flags & WRITE:
            raise RingError("a readable buffer behind a writable one")
        if total > _MAX_CHAIN:
            raise RingError("a chain of more than 4 GiB")
        if size and not self._memory.is_ram(address, size):
            raise RingError(f"a buffer at {address:#x}+{size:#x}: not RAM")
