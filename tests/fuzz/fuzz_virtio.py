# fuzz_virtio.py: a hostile driver of a virtio device: what it writes to registers and rings, in what order. A byte says
# which device, then come steps of 17 bytes: what (a byte), a (4 bytes), b (8), c (4).
"""`one_input()`; `repaired()` and `mutate()` for fuzzers; `step()` makes a step, for seeds."""

from __future__ import annotations

import random
import struct

from checks import one_line
from swap_disk import CheckedSwapDisk

from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.balloon import Balloon
from pyvmm.devices.virtio.block import Block
from pyvmm.devices.virtio.console import VirtioConsole
from pyvmm.devices.virtio.mmio import Mmio
from pyvmm.devices.virtio.model import Model
from pyvmm.devices.virtio.queue import Buffers
from pyvmm.devices.virtio.rng import Rng
from pyvmm.host import has
from pyvmm.layout import Gpa
from pyvmm.memory import GuestMemory

STEP = struct.Struct("<BIQI")
MAX_SIZE = 1 + 160 * STEP.size
RAM = 2 << 20
SECTORS = 64
SET, GET, PUT, HALF, SERVE, MOVE, FEED = range(7)
"""Writes c to register a; reads it; writes b and c to memory at a; writes half of c there; the device serves what there
is; its state goes into another one; the host types, or does to memory and disk what it may."""
SWAP_DISKS = {4: ("references", True), 5: ("replace", False)}
"""kind -> mode of a swap disk, and whether it is durable."""
KINDS = 4 + len(SWAP_DISKS) if has("uffd_guest") else 3
"""Of devices: with the balloon and with swap disks pages go away, which not every host can do."""
BURST = 600
"""Requests that are served in one go: more than a ring can hold."""


class Sectors:
    """A block backend in memory that believes nothing."""

    sectors, read_only, id = SECTORS, False, "fuzz"

    def __init__(self) -> None:
        self._data = bytearray(SECTORS * 512)

    def _check(self, sector: int, size: int) -> int:
        assert size % 512 == 0, size
        assert 0 <= sector <= sector + size // 512 <= SECTORS, (sector, size)
        return sector * 512

    def read(self, sector: int, into: Buffers) -> None:
        at = self._check(sector, into.size)
        assert into.write(bytes(self._data[at : at + into.size])) == into.size

    def write(self, sector: int, source: Buffers) -> None:
        at = self._check(sector, source.size)
        self._data[at : at + source.size] = source.read()

    def discard(self, sector: int, count: int) -> None:
        self._check(sector, count * 512)

    def write_zeroes(self, sector: int, count: int, unmap: bool) -> None:
        at = self._check(sector, count * 512)
        self._data[at : at + count * 512] = bytes(count * 512)

    def flush(self) -> None: ...

    def figures(self) -> dict[str, int]:
        return {}

    def require_lasting(self) -> None: ...

    def settle(self) -> None: ...

    def activate(self) -> None: ...

    def close(self) -> None: ...


class Line:
    """An interrupt line: it is told of changes alone."""

    level = False

    def __call__(self, level: bool) -> None:
        assert level != self.level
        self.level = level


def _make(kind: int, memory: GuestMemory, backend: Sectors | CheckedSwapDisk, line: Line) -> Mmio:
    block = Block(backend)  # type: ignore[arg-type]
    model = block if kind in SWAP_DISKS else (Rng(seed=1), VirtioConsole(lambda data: None), block, Balloon())[kind]

    def trouble(error: BaseException) -> None:
        raise error

    device = Mmio(0, model, memory, line, trouble)
    device.on_broken = one_line
    return device


def one_input(data: bytes) -> None:
    """The device refuses what breaks a rule and tells that; its line follows its status; its state can be saved and
    restored at any moment."""
    if not data:
        return
    kind, memory, line = data[0] % KINDS, GuestMemory(RAM, "4k"), Line()
    try:
        backend = CheckedSwapDisk(memory, SECTORS, *SWAP_DISKS[kind]) if kind in SWAP_DISKS else Sectors()
        device = _make(kind, memory, backend, line)
        whole = len(data) - 1 - (len(data) - 1) % STEP.size
        for what, a, b, c in STEP.iter_unpack(data[1 : 1 + whole]):
            if what % 7 == MOVE:
                state, other = device.save(), Line()
                device = _make(kind, memory, backend, other)
                device.restore(state)
                assert device.save() == state
                line = other
            else:
                _do(device, memory, what % 7, a, b, c)
            assert line.level == (device.read(mmio.R_INTERRUPT_STATUS, 4) != 0)
            assert bool(device.read(mmio.R_STATUS, 4) & mmio.NEEDS_RESET) == (device.broken != "")
        backend.close()
    finally:
        memory.close()


def _do(device: Mmio, memory: GuestMemory, what: int, a: int, b: int, c: int) -> None:
    if what == SET:
        device.write(a % mmio.LENGTH, c, (4, 1, 2, 8)[b % 4])
    elif what == GET:
        size = (4, 1, 2, 8)[b % 4]
        assert 0 <= device.read(a % mmio.LENGTH, size) < 1 << 8 * size
    elif what == PUT:
        memory.write(Gpa(a % (RAM - 12)), struct.pack("<QI", b, c))
    elif what == HALF:
        memory.write(Gpa(a % (RAM - 2)), struct.pack("<H", c & 0xFFFF))
    elif what == FEED:
        _feed(device.model, a)
    elif what == SERVE:
        for _ in range(BURST):
            if not device._step():
                break
        else:
            raise AssertionError("requests without an end")


def _feed(model: Model, a: int) -> None:
    """What a host does by itself; of what a balloon says afterwards, all is within the memory."""
    if isinstance(model, VirtioConsole):
        model.feed(bytes(a % 300))
    elif isinstance(model, Block) and isinstance(model.backend, CheckedSwapDisk):
        model.backend.host_does(a)
    elif isinstance(model, Balloon):
        model.target = a % (RAM + 1)
        model.classify([a % 512, 3], timeout=0)
        known = [size for size in model.classes(fresh=0).values() if size is not None]
        assert all(size >= 0 for size in known), known
        assert sum(known) <= RAM
        assert 0 <= model.away <= RAM
        assert 0 <= model.actual <= RAM


# ---- for fuzzers ----


def step(what: int, a: int = 0, b: int = 0, c: int = 0) -> bytes:
    """A step."""
    return STEP.pack(what, a, b, c)


def repaired(data: bytes) -> bytes:
    """Whole steps, of a kind that there is, on addresses where something is."""
    data = data[:MAX_SIZE] or b"\0"
    out = bytearray((data[0] % KINDS,))
    whole = len(data) - 1 - (len(data) - 1) % STEP.size
    for what, a, b, c in STEP.iter_unpack(data[1 : 1 + whole]):
        most = {SET: mmio.LENGTH, GET: mmio.LENGTH, PUT: RAM - 12, HALF: RAM - 12}.get(what % 7, 1 << 32)
        out += step(what % 7, a % most, b, c)
    return bytes(out)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Steps come, go, come twice; the device serves, is reset, or moves in between."""
    data = repaired(data)
    steps = [data[at : at + STEP.size] for at in range(1, len(data), STEP.size)]
    at = rng.randrange(len(steps) + 1)
    choice = rng.randrange(5)
    if choice == 0 and steps:
        del steps[at : at + rng.randint(1, 3)]
    elif choice == 1 and steps:
        steps[at:at] = steps[rng.randrange(len(steps)) :][: rng.randint(1, 6)]
    elif choice == 2:
        steps.insert(at, step(rng.choice((SERVE, SERVE, MOVE, FEED)), rng.randrange(300)))
    elif choice == 3:
        steps.insert(at, step(SET, mmio.R_STATUS, 0, rng.choice((0, 3, 11, 15))))
    elif steps:
        at = rng.randrange(len(steps))
        what, a, b, c = STEP.unpack(steps[at])
        b, c = rng.choice(
            ((b, rng.choice((0, 1, 16, c + 1 & 0xFFFF_FFFF, 0xFFFF_FFFF))), (rng.randrange(RAM), c), (b, c ^ 1))
        )
        steps[at] = step(what, a, b, c)
    return repaired(data[:1] + b"".join(steps))
