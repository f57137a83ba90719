# virtio_driver.py: a virtio driver in Python, for tests of devices: it sees memory and registers, as a guest does.
from __future__ import annotations

import struct
import threading
import time

from pyvmm.devices.virtio import mmio
from pyvmm.layout import Gpa
from pyvmm.memory import GuestMemory

VERSION_1, INDIRECT, EVENT = mmio.F_VERSION_1, 1 << 28, 1 << 29
NEXT, WRITE, TABLE = 1, 2, 4
USED = 0x1_0000
"""Where buffers begin."""
SECONDS = 10


class Line:
    """An interrupt line that notes its edges."""

    def __init__(self):
        self.level, self.rises = False, 0
        self._changed = threading.Condition()

    def __call__(self, level):
        with self._changed:
            assert level != self.level, "a level is told that has not changed"
            self.level = level
            self.rises += level
            self._changed.notify_all()


class Ring:
    """One queue, as its driver sees it, in three pages from `base` on."""

    def __init__(self, driver, index, base, size):
        self.driver, self.index, self.size, self.base = driver, index, size, base
        self.table, self.avail, self.used = base, base + 0x1000, base + 0x2000
        self.head = self.seen = self.posted = 0
        driver.memory.zero(Gpa(base), 0x3000)
        driver.select(index)
        driver.set(mmio.R_QUEUE_SIZE, size)
        for register, address in ((0x80, self.table), (0x90, self.avail), (0xA0, self.used)):
            driver.set(register, address & 0xFFFF_FFFF)
            driver.set(register + 4, address >> 32)
        driver.set(mmio.R_QUEUE_READY, 1)

    def describe(self, index, address, size, flags=0, after=0, table=None):
        self.driver.memory.write(
            Gpa((self.table if table is None else table) + 16 * index),
            struct.pack("<QIHH", address, size, flags, after),
        )

    def offer(self, head, notify=True):
        """Makes descriptor `head` available."""
        memory = self.driver.memory
        memory.write(Gpa(self.avail + 4 + 2 * (self.posted % self.size)), struct.pack("<H", head))
        self.posted = (self.posted + 1) & 0xFFFF
        memory.write(Gpa(self.avail + 2), struct.pack("<H", self.posted))
        if notify:
            self.driver.set(mmio.R_QUEUE_NOTIFY, self.index)

    def post(self, readable=(), writable=(), indirect=False, notify=True):
        """A request of buffers [(address, size)]; returns its head."""
        parts = [(*part, 0) for part in readable] + [(*part, WRITE) for part in writable]
        table = self.base + 0x2800 if indirect else None
        first = 0 if indirect else self.head
        for at, (address, size, flags) in enumerate(parts):
            more = NEXT if at + 1 < len(parts) else 0
            place = at if indirect else (first + at) % self.size
            self.describe(place, address, size, flags | more, at + 1 if indirect else (place + 1) % self.size, table)
        head = self.head
        if indirect:
            self.describe(head, table, 16 * len(parts), TABLE)
        self.head = (self.head + (1 if indirect else len(parts))) % self.size
        self.offer(head, notify)
        return head

    @property
    def given(self):
        return int.from_bytes(self.driver.memory.read(Gpa(self.used + 2), 2), "little")

    def answer(self):
        """(head, bytes written) of the next request that is answered; waits for it."""
        end = time.monotonic() + SECONDS
        while self.given == self.seen:
            assert time.monotonic() < end, f"no answer; {self.driver.device.broken}"
            assert not self.driver.troubles, self.driver.troubles
            time.sleep(0.0002)
        raw = self.driver.memory.read(Gpa(self.used + 4 + 8 * (self.seen % self.size)), 8)
        self.seen = (self.seen + 1) & 0xFFFF
        return struct.unpack("<II", raw)


class Driver:
    """A device with a driver that has found it; start() negotiates and makes queues."""

    def __init__(self, model, memory=None, slot=0):
        self.memory = memory or GuestMemory(4 << 20)
        self.line, self.troubles, self.told = Line(), [], []
        self.device = mmio.Mmio(slot, model, self.memory, self.line, self.troubles.append)
        self.device.on_broken = self.told.append
        self.rings = []

    def get(self, register):
        return self.device.read(register, 4)

    def set(self, register, value):
        self.device.write(register, value, 4)

    def select(self, index):
        self.set(mmio.R_QUEUE_SEL, index)

    @property
    def status(self):
        return self.get(mmio.R_STATUS)

    def offered(self):
        found = 0
        for half in (0, 1):
            self.set(mmio.R_DEVICE_FEATURES_SEL, half)
            found |= self.get(mmio.R_DEVICE_FEATURES) << 32 * half
        return found

    def accept(self, features):
        for half in (0, 1):
            self.set(mmio.R_DRIVER_FEATURES_SEL, half)
            self.set(mmio.R_DRIVER_FEATURES, features >> 32 * half & 0xFFFF_FFFF)
        self.set(mmio.R_STATUS, self.status | mmio.FEATURES_OK)
        return bool(self.status & mmio.FEATURES_OK)

    def start(self, features=VERSION_1, size=8, go=True):
        self.set(mmio.R_STATUS, 0)
        assert self.status == 0
        self.set(mmio.R_STATUS, mmio.ACKNOWLEDGE)
        self.set(mmio.R_STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER)
        assert self.accept(features)
        self.rings = [Ring(self, index, 0x4000 * (index + 1), size) for index in range(self.device.model.queues)]
        self.set(mmio.R_STATUS, self.status | mmio.DRIVER_OK)
        if go:
            self.device.go()
        return self

    def acknowledge(self):
        found = self.get(mmio.R_INTERRUPT_STATUS)
        self.set(mmio.R_INTERRUPT_ACK, found)
        return found

    def until(self, condition):
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.0002)

    def close(self):
        self.device.close(lambda: None)
        self.memory.close()
