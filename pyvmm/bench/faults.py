# faults.py: pages taken out of a guest and brought back, and the limit of that (measure P7, remove + reinstall).
"""2 MiB blocks and small pages, removed and brought back by a touch of the guest or by install(); beside the barest
loop that answers page faults by userfaultfd. Units: seconds, %."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

from pyvmm import host
from pyvmm._native import lib
from pyvmm.bench import Collected, Result
from pyvmm.bench.bare import BareLoop, Touched
from pyvmm.bench.running import alone, longest_gap, reset_gaps, run_on, timed, touching
from pyvmm.layout import BLOCK_SIZE, MIB, Gpa
from pyvmm.memory.engine import BLOCK_PAGES
from pyvmm.record import Record

if TYPE_CHECKING:
    from pyvmm.machine import VM
    from pyvmm.memory.engine import Engine
    from pyvmm.memory.mapping import Pages

_MOVE, _COPY = "move", "copy"
"""With UFFDIO_MOVE, and as on hosts that lack it."""
_ANSWER = "small page: message read to answer"
_FIRST = 2
"""The first block that is used: below it are the guest's program and page tables."""
_LOOK = 0.0005
_PASS = 0.02
"""Seconds in which the guest goes over its memory."""
_ARMING = ", arming"


class Size(Record):
    """memory: bytes of the guest's RAM; blocks, pages: so many a round, one after the other."""

    __slots__ = ("blocks", "memory", "pages", "rounds")

    def __init__(self, memory: int, blocks: int, pages: int, rounds: int) -> None:
        self.memory = memory
        self.blocks = blocks
        self.pages = pages
        self.rounds = rounds


FULL = Size(64 * MIB, 20, 100, 7)
QUICK = Size(16 * MIB, 2, 4, 1)


def measure(quick: bool = False) -> list[Result]:
    """Each group says what it times. "touched by the guest": remove(), and the longest time in which the vCPU did no
    work, by its own clock. "nobody waits": without any wake-up, the VM being paused; of small pages the engine's C
    alone. "arming": nothing else is away, so that userfaultfd is armed and disarmed each time.
    """
    size = QUICK if quick else FULL
    ways = {_MOVE: True, _COPY: False} if host.has("uffd_move") else {_COPY: False}
    found = Collected()
    _large(found, ways, size)
    _small(found, ways, size)
    _threads(found, ways, size)
    return found.results()


def _touching(memory: int, pages: Pages = "auto") -> AbstractContextManager[VM]:
    """A guest that writes to all but the last block: that may be away, and keeps userfaultfd armed."""
    return touching(memory, f"gaps=1 size={memory - 2 * BLOCK_SIZE}", pages=pages)


def _hold_away(engine: Engine) -> int:
    """Puts the last block away. Returns its first page."""
    last = engine.page_words.size - BLOCK_PAGES
    engine.remove(last, BLOCK_PAGES)
    return last


# ---- whole blocks ----


def _large(found: Collected, ways: dict[str, bool], size: Size) -> None:
    with ExitStack() as stack:
        vms = {way: stack.enter_context(_touching(size.memory)) for way in ways}
        for way, vm in vms.items():
            vm.memory.engine.has = lambda feature, way=way: ways[way]  # type: ignore[misc]
            vm.pause()
        for turn in range(size.rounds + 1):
            for way, vm in vms.items():
                engine = vm.memory.engine
                for held, name in ((True, way), (False, f"{way}{_ARMING}")):
                    first = _hold_away(engine)
                    if not held:
                        engine.install(first, BLOCK_PAGES)
                    _large_round(found if turn else Collected(), vm, name, size)
                    engine.install(first, BLOCK_PAGES)


def _large_round(found: Collected, vm: VM, name: str, size: Size) -> None:
    blocks = range(_FIRST, _FIRST + size.blocks)
    with alone(vm):
        run_on(vm, _PASS)
        before = vm.mappings()["pages_2m"]
        touched = [_touched(vm, block) for block in blocks]
        run_on(vm, _PASS)  # the guest touches all
        kept = vm.mappings()["pages_2m"] / max(before, 1)
    installed = [_installed(vm.memory.engine, block) for block in blocks]
    zeros = [_zeros_installed(vm, block) for block in blocks]
    both = [removed + stall for removed, stall in touched]
    found.add("KVM's 2 MiB mappings afterwards / before", name, "%", 100 * kept)
    found.add("large block: removed, touched by the guest", name, "s", *both)
    found.add("... of that: remove()", name, "s", *(removed for removed, _ in touched))
    found.add("large block: remove() and install(), nobody waits", name, "s", *installed)
    found.add("large block of zeros: install(), nobody waits", name, "s", *zeros)


def _touched(vm: VM, block: int) -> tuple[float, float]:
    """Seconds of remove(), and of the guest's stall."""
    engine = vm.memory.engine
    reset_gaps(vm)
    removed = timed(lambda: engine.remove(block * BLOCK_PAGES, BLOCK_PAGES))
    return removed, _stall(vm, block)


def _stall(vm: VM, block: int) -> float:
    """Of a vCPU that will touch something away in the block."""
    words = vm.memory.engine.block_words
    while int(words[block]) >> lib.PV_BLOCK_AWAY_SHIFT & 0x3FF:
        run_on(vm, _LOOK)
    return longest_gap(vm) or 0.0


def _installed(engine: Engine, block: int) -> float:
    def both() -> None:
        engine.remove(block * BLOCK_PAGES, BLOCK_PAGES)
        engine.install(block * BLOCK_PAGES, BLOCK_PAGES)

    return timed(both)


def _zeros_installed(vm: VM, block: int) -> float:
    """Of a block whose home is zero: a large page of zeros has to be made."""
    engine = vm.memory.engine
    vm.memory.zero(vm.memory.gpa_of(block * BLOCK_PAGES), BLOCK_SIZE)
    engine.remove(block * BLOCK_PAGES, BLOCK_PAGES, "zero")
    return timed(lambda: engine.install(block * BLOCK_PAGES, BLOCK_PAGES))


# ---- small pages ----


def _small(found: Collected, ways: dict[str, bool], size: Size) -> None:
    """Of a guest in small pages, others being away; the bare loop serves a VM that has no engine."""
    group = "small page, touched by the guest: the vCPU's stall"
    with ExitStack() as stack:
        names = ["bare loop", *ways]
        vms = {name: stack.enter_context(_touching(16 * MIB, "4k")) for name in names}
        for name, vm in vms.items():
            vm.pause()
            if name in ways:
                vm.memory.engine.has = lambda feature, name=name: ways[name]  # type: ignore[misc]
                _hold_away(vm.memory.engine)
        start = vms["bare loop"].memory.hva(Gpa(_FIRST * BLOCK_SIZE)).value
        loop = stack.enter_context(BareLoop(start, BLOCK_SIZE))
        for turn in range(size.rounds + 1):
            with alone(vms["bare loop"]) as vm:
                bare = [_bare_stall(vm, loop, page) for page in range(size.pages)]
            if turn:
                found.add(group, "bare loop", "s", *(stall for stall, _ in bare))
                found.add(f"{_ANSWER} (guest)", "bare loop", "s", *(answer for _, answer in bare))
            for name in ways:
                with alone(vms[name]) as vm:
                    seen = [_small_stall(vm, _FIRST * BLOCK_PAGES + page) for page in range(size.pages)]
                alone_seconds = [_own(vm.memory.engine, _FIRST * BLOCK_PAGES + page) for page in range(size.pages)]
                if turn:
                    found.add(group, name, "s", *(stall for stall, _ in seen))
                    found.add(f"{_ANSWER} (guest)", name, "s", *(answer for _, answer in seen))
                    found.add("small page: install(), nobody waits", name, "s", *alone_seconds)


def _bare_stall(vm: VM, loop: BareLoop, page: int) -> tuple[float, float]:
    reset_gaps(vm)
    answering = loop.answer(1)
    loop.drop(page, 1)
    answer = answering.seconds()
    return longest_gap(vm) or 0.0, answer


def _small_stall(vm: VM, page: int) -> tuple[float, float]:
    engine = vm.memory.engine
    reset_gaps(vm)
    before = engine.stats()
    engine.remove(page, 1)
    stall = _stall(vm, page // BLOCK_PAGES)
    after = engine.stats()
    return stall, (after.nanoseconds - before.nanoseconds) / 1e9 / max(after.faults - before.faults, 1)


def _own(engine: Engine, page: int) -> float:
    """The engine's C alone."""
    engine.remove(page, 1)
    before = engine.stats().operations["install"]
    engine.install(page, 1)
    return (engine.stats().operations["install"].nanoseconds - before.nanoseconds) / 1e9


def _threads(found: Collected, ways: dict[str, bool], size: Size) -> None:
    """Touched by a thread of ours, one page after the other: no KVM."""
    with ExitStack() as stack:
        sides = {"bare loop, copy": (True, False)}
        sides |= {"bare loop, move": (True, True)} if _MOVE in ways else {}
        sides |= {f"engine, {way}": (False, move) for way, move in ways.items()}
        touched = {name: stack.enter_context(Touched(*how)) for name, how in sides.items()}
        for turn in range(size.rounds + 1):
            for name, each in touched.items():
                waited, answer = each.measure(min(size.pages * 5, BLOCK_PAGES - 1))
                if turn:
                    found.add("small page, touched by a thread: its wait", name, "s", waited)
                    found.add(f"{_ANSWER} (thread)", name, "s", answer)
