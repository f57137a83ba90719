# activity.py: how well a guest's active blocks are found, and what that costs it (measure P13). Units: %, seconds.
"""The guest hotcold, watched in turn by activity sampling, by what one would do without it, and not at all.

Truth is the guest's own: it counts in a table what it writes to each page. Work: a second, without the time in which
other programs had its CPU, over that of the stretches just before and after in which nobody watched it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pyvmm._native import lib
from pyvmm.bench import Collected, Result
from pyvmm.bench.running import run_on, vcpus_waited
from pyvmm.bench.warm import warm_host
from pyvmm.layout import BLOCK_SIZE, MIB, PAGE_SIZE, Gpa
from pyvmm.machine import VM
from pyvmm.memory.activity import Sampler
from pyvmm.record import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
WINDOW, SHARE, THRESHOLD = 0.5, 1 / 16, 32
"""The sampler's own, which the others are given too."""
_GUEST = "hot=25 pages=64 ms=1000000"
_TABLE = Gpa(BLOCK_SIZE)
"""Where hotcold counts (guest/hotcold.c): four bytes a page of its region."""


class Size(Record):
    """memory: bytes; guests: of each side; pairs: of stretches of so many seconds, unwatched and watched."""

    __slots__ = ("guests", "memory", "pairs", "seconds")

    def __init__(self, memory: int, guests: int, pairs: int, seconds: float) -> None:
        self.memory = memory
        self.guests = guests
        self.pairs = pairs
        self.seconds = seconds


FULL = Size(256 * MIB, 2, 3, 1.2)
QUICK = Size(32 * MIB, 1, 1, 0.8)


class Found:
    """What a way of watching has said. A context manager that watches, each time that it is entered."""

    def __init__(self, vm: VM, size: Size) -> None:
        self.vm = vm
        self.size = size
        self.said: list[tuple[int, bool]] = []

    def add(self, block: int, touched: int, active: bool) -> None:
        """A block was watched for a window."""
        self.said.append((block, active))

    def watched(self) -> AbstractContextManager[object]:
        """Watches within its `with`."""
        raise NotImplementedError


class _Sampled(Found):
    full = False

    def __init__(self, vm: VM, size: Size) -> None:
        super().__init__(vm, size)
        self._sampler = Sampler(vm.memory, window=WINDOW, share=SHARE, threshold=THRESHOLD, full=self.full, seed=1,
                                budget=1 if self.full else 0.02, on_sample=self.add)  # fmt: skip

    def watched(self) -> AbstractContextManager[object]:
        return self._sampler


class _Full(_Sampled):
    full = True


class _Threaded(Found):
    """As the two that follow do it: a step a window, on the thread that lets the guest run."""

    def watched(self) -> AbstractContextManager[object]:
        return self

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self) -> None:
        """A window begins."""
        raise NotImplementedError

    def end(self) -> None:
        """It is over."""
        raise NotImplementedError


class _Broken(_Threaded):
    """Blocks are broken, their pages taken aside one by one, and made large again afterwards."""

    def __init__(self, vm: VM, size: Size) -> None:
        super().__init__(vm, size)
        self._next = self._order()
        self._blocks: list[int] = []

    def _order(self) -> Iterator[int]:
        while True:
            yield from range(1, self.vm.memory.size // BLOCK_SIZE)

    def begin(self) -> None:
        engine = self.vm.memory.engine
        self._blocks = [next(self._next) for _ in range(max(int(self.vm.memory.size / BLOCK_SIZE * SHARE), 1))]
        for block in self._blocks:
            engine.break_(block)
            for page in range(block * BLOCK_PAGES, (block + 1) * BLOCK_PAGES):
                engine.remove(page)

    def end(self) -> None:
        engine = self.vm.memory.engine
        for block in self._blocks:
            words = engine.page_words[block * BLOCK_PAGES : (block + 1) * BLOCK_PAGES]
            touched = int((words & lib.PV_PAGE_HOME == 0).sum())
            self.add(block, touched, touched >= THRESHOLD)
            engine.merge(block)


class _Logged(_Threaded):
    """KVM's dirty log of all memory: writes alone."""

    def begin(self) -> None:
        self._trace = self.vm.trace("bitmap")
        self._trace.start()

    def end(self) -> None:
        written: dict[int, int] = {}
        for first, count in self._trace.collect():
            for page in range(first, first + count):
                written[page // BLOCK_PAGES] = written.get(page // BLOCK_PAGES, 0) + 1
        self._trace.stop()
        for block in range(1, self.vm.memory.size // BLOCK_SIZE):
            self.add(block, written.get(block, 0), written.get(block, 0) >= THRESHOLD)


SIDES: dict[str, type[Found]] = {
    "sampled": _Sampled,
    "sampled to the end of each window": _Full,
    "broken to small pages": _Broken,
    "KVM's dirty log": _Logged,
}


def measure(quick: bool = False) -> list[Result]:
    """A value a pair of stretches, or a guest. Large pages: of those before, when the guest has touched all again."""
    size = QUICK if quick else FULL
    found = Collected()
    for seed in range(1, size.guests + 1):
        for name, side in SIDES.items():
            warm_host(size.memory)
            with VM(size.memory) as vm:
                vm.load("hotcold", f"{_GUEST} seed={seed}")
                vm.start()
                while vm.progress().status != "running" or vm.progress().count < 1000:
                    run_on(vm, 0.01, "hotcold")
                _one(found, name, vm, side, size)
    return found.results()


def _rate(vm: VM, seconds: float, watch: Callable[[], AbstractContextManager[object]] | None = None) -> float:
    """Work a second, of a stretch of so long; watched, beginning and end of that are in it."""
    count, waited, begin = vm.progress().count, vcpus_waited(vm), time.perf_counter()
    if watch is None:
        run_on(vm, seconds, "hotcold")
    else:
        with watch():
            run_on(vm, seconds, "hotcold")
    spent = time.perf_counter() - begin - (vcpus_waited(vm) - waited)
    return (vm.progress().count - count) / spent


def _counts(vm: VM) -> memoryview:
    return memoryview(vm.memory.read(_TABLE, 4 * (vm.progress().region_size // PAGE_SIZE))).cast("I")


def _one(found: Collected, name: str, vm: VM, side: type[Found], size: Size) -> None:
    watching = side(vm, size)
    first = vm.memory.block_of(Gpa(vm.progress().region_gpa))
    large, before = vm.memory.large_blocks(), _counts(vm)
    for _ in range(size.pairs):
        before_it = _rate(vm, size.seconds / 2)
        watched = _rate(vm, size.seconds, watching.watched)
        alone = (before_it + _rate(vm, size.seconds / 2)) / 2
        found.add("the guest's work, of that while nobody watches", name, "%", 100 * watched / alone)
    after = _counts(vm)
    hot = {first + page // BLOCK_PAGES for page in range(len(after)) if after[page] != before[page]}
    said = [(block in hot, active) for block, active in watching.said if block >= first]
    hits = sum(is_hot and active for is_hot, active in said)
    for what, others in (
        ("precision: hot, of those called active", sum(active for _, active in said)),
        ("recall: called active, of the hot ones", sum(is_hot for is_hot, _ in said)),
    ):
        if others:
            found.add(what, name, "%", 100 * hits / others)
    found.add("blocks judged a second", name, "blocks/s", len(said) / (size.pairs * size.seconds))
    found.add("large pages kept", name, "%", 100 * vm.memory.large_blocks() / large)
