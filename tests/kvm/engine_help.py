# engine_help.py: what the tests of the memory engine share: a guest at work, its judgement, homes that fail.
from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time

import pytest

from pyvmm import host
from pyvmm._native import ffi
from pyvmm.layout import MIB, PAGE_SIZE, Gpa
from pyvmm.memory.homes import Home
from pyvmm.pytest_plugin import needs
from pyvmm.testing.balance import imbalances, populated
from pyvmm.testing.verify_model import check_memory

BLOCK = 512
"""Pages."""
SECONDS = 20
"""Until something that must happen has not."""

# Each test with `way` runs twice: with UFFDIO_MOVE, and as on hosts that lack it.
both_ways = pytest.mark.parametrize(
    "way",
    [pytest.param("move", marks=needs("uffd_move")), pytest.param("copy", marks=needs("collapse"))],
    indirect=True,
)


@pytest.fixture
def way(request):
    if request.param == "move":
        yield "move"
    else:
        with host.without("uffd_move"):
            yield "copy"


def until(is_so, what="it"):
    """what: in words, or a function that gives them."""
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end, f"waited {SECONDS} s for {what() if callable(what) else what}"
        os.sched_yield()


def resident(machine):
    """Pages that the kernel has for RAM, by its page tables, and those that are aside."""
    return int(populated(machine.memory).sum()) + machine.memory.engine.homes()["aside"]


def limit_kept(machine, limit):
    """Of a guest that stands: do the engine and the kernel's tables count alike, and is the limit kept? What the kernel
    has merged is in the tables, and takes no memory: another program may have it do that."""

    def is_so():
        counts = machine.memory.reclaimer.counts()
        return counts.resident <= limit and resident(machine) * PAGE_SIZE == counts.resident + counts.merged

    def what():
        counts, books = machine.memory.reclaimer.counts().as_dict(), imbalances(machine.memory)
        return f"counts that agree, within {limit}: {counts}, {resident(machine)} by the kernel, {books}"

    until(is_so, what)


def working(vm, memory="32M", append="", **options):
    """The guest `verify`, through with its first pass."""
    machine = vm(memory=memory, **options)
    machine.append = append
    machine.load("verify", append)
    machine.start()
    until(lambda: machine.progress().passes > 0 or machine.ended, "the first pass")
    assert not machine.ended
    return machine


def passes(machine, count=2):
    """Lets the guest look at all its memory again."""
    goal = machine.progress().passes + count
    until(lambda: machine.progress().passes >= goal or machine.ended, "a pass")
    assert not machine.ended, machine.printed


def options(append):
    given = dict(word.split("=") for word in append.split())
    return {name: kind(given[name]) for name, kind in (("write", int), ("zeros", int), ("order", str)) if name in given}


def judge(machine, pinned=0):
    """Stops the guest: are all its pages right, and do all books agree? It has checked pages itself until here."""
    if not machine.paused:
        machine.pause()
    until(lambda: not imbalances(machine.memory, pinned), f"balance: {imbalances(machine.memory, pinned)}")
    assert check_memory(machine.memory, machine.progress(), **options(machine.append)) == []
    assert machine.progress().status == "running"


def away(machine):
    return machine.memory.pages().away


def shared_zero_pages(machine):
    """Pages of RAM that the kernel maps to its one page of zeros (PAGEMAP_SCAN, PAGE_IS_PFNZERO)."""
    start = machine.memory.hva(Gpa(0)).value
    found = bytearray(24 * 4096)
    vec = int(ffi.cast("uintptr_t", ffi.from_buffer(found)))
    scan = bytearray(struct.pack("12Q", 96, 0, start, start + machine.memory.size, 0, vec, 4096, 0, 0, 32, 0, 32))
    with open("/proc/self/pagemap", "rb") as file:
        count = fcntl.ioctl(file, 0xC0606610, scan)
    ends = [struct.unpack_from("2Q", found, 24 * i) for i in range(count)]
    return sum((end - first) // PAGE_SIZE for first, end in ends)


class Shelf(Home):
    """A home that keeps pages, until it is told to fail: `fail` is called with the first page of each fetch."""

    def __init__(self):
        self.pages = {}
        self.fetched = []
        self.forgotten = 0
        self.fail = lambda page: None
        self.room = 1 << 62

    def store(self, page, data):
        count = len(data) // PAGE_SIZE
        if len(self.pages) + count > self.room:
            raise OSError(errno.ENOSPC, "the shelf is full")
        for i in range(count):
            self.pages[page + i] = data[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
        return range(page, page + count)

    def fetch(self, page, locators):
        wrong = self.fail(page)
        if wrong is not None:
            return wrong
        assert list(locators) == list(range(page, page + len(locators)))
        self.fetched += locators
        return b"".join(self.pages[locator] for locator in locators)

    def forget(self, page, locators):
        for locator in locators:
            del self.pages[locator]
        self.forgotten += len(locators)


def shelve(machine, shelf, first=1, last=None):
    """Puts all blocks from `first` on into the shelf; the guest may fetch some back at once."""
    engine = machine.memory.engine
    engine.set_home("swap", shelf)
    for block in range(first, last or machine.memory.size // (2 * MIB)):
        engine.remove(block * BLOCK, BLOCK)
        engine.store(block * BLOCK, BLOCK, "swap")


class Workers:
    """Threads that do something over and over until the end of the `with`, where what they raised is raised."""

    def __init__(self, *functions):
        self._end = threading.Event()
        self._errors = []
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in functions]

    def _run(self, function):
        try:
            while not self._end.is_set():
                function()
        except BaseException as error:
            self._errors.append(error)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def well(self):
        return not self._errors

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join(SECONDS)
        assert not any(thread.is_alive() for thread in self._threads), "a thread hangs"
        for error in self._errors:
            raise error
