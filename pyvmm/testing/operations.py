# operations.py: what a guest's memory has to bear under torture: a sequence of operations that follows from a seed, and
# the table of their kinds. Units: pages of 4 KiB, numbered by their place in RAM.
"""`sequence`: the operations. `Subject`: the VM that they are done to, and what must be remembered of them."""

from __future__ import annotations

import errno
import os
import random
import time
from collections import Counter, deque

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, PyvmmError, check
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, Gpa
from pyvmm.memory import balloon
from pyvmm.memory.trace.coarse import Coarse
from pyvmm.record import Record
from pyvmm.testing.shelves import Store, Swapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Literal, TypeAlias

    from pyvmm.machine import VM
    from pyvmm.memory import GuestMemory
    from pyvmm.memory.counts import EngineStats
    from pyvmm.memory.trace import Trace
    from pyvmm.testing.moves import Move
    from pyvmm.testing.shelves import Shelf

    Scope: TypeAlias = Literal["block", "run", "scratch", "none"]

BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
SCRATCH_PAGES = 2 * BLOCK_PAGES
"""So many pages at the end of RAM are not the guest's, and the host writes there."""
PATIENCE = 20
"""Seconds until what takes as long does not come any more."""
SETTLE_SECONDS = 5
ZEROS = 100
"""Of the guest's pages, per mille, are zeros."""

TRACES: list[tuple[str, dict[str, object]]] = [
    ("coarse", {"unit": unit, "refine": refine}) for unit in ("4K", "64K", "2M", "8M", "1G") for refine in (0, 1, 3)
]
TRACES += [("bitmap", {}), ("manual", {"chunk": "1M"})] * 4
"""Trackers and their options, each as often as it is to be taken."""
RING_TRACES: list[tuple[str, dict[str, object]]] = [row for row in TRACES if row[0] == "coarse"][::3] + [
    ("ring", {})
] * 5
"""The same for a VM that has dirty rings: KVM has no bitmap for it."""


_NOT_NOW = (-errno.EBUSY, -errno.ENXIO, -errno.EINVAL, -errno.EALREADY)
"""Why a block cannot be sampled: in use; not large; the last one, which is not whole; or the reclaimer samples it."""


class Wrong(PyvmmError):
    """Something is not as it must be."""

    exit_code = 1


class Operation(Record):
    """One of a sequence. page, count: what it is done to, where it is done to pages; value: 32 random bits."""

    __slots__ = ("count", "kind", "number", "page", "value")

    def __init__(self, number: int, kind: str, page: int, count: int, value: int) -> None:
        self.number = number
        self.kind = kind
        self.page = page
        self.count = count
        self.value = value

    @property
    def block(self) -> int:
        """The block of its first page."""
        return self.page // BLOCK_PAGES

    def __str__(self) -> str:
        where = f" {self.count} from page {self.page} (block {self.block})" if self.count else ""
        return f"{self.number:6} {self.kind}{where} value={self.value:#x}"


class Kind:
    """weight: how often, of all weights; scope: what pages it takes; do: does it; here: not while the guest leaves for
    another VM, which is to decide when it runs, and whose pages nobody else may write to."""

    def __init__(
        self, weight: float, scope: Scope, do: Callable[[Subject, Operation], object], here: bool = False
    ) -> None:
        self.weight = weight
        self.scope = scope
        self.do = do
        self.here = here


def sequence(seed: int, pages: int, kinds: Mapping[str, Kind] | None = None) -> Iterator[Operation]:
    """Operations without end for a VM of so many pages; the same seed gives the same. Half of them go where one of the
    last eight went, so that they meet. kinds: those of KINDS where not given."""
    rows = KINDS if kinds is None else kinds
    names, weights = list(rows), [row.weight for row in rows.values()]
    rng = random.Random(seed)
    recent: deque[int] = deque([0], 8)
    number = 0
    while True:
        number += 1
        kind = rng.choices(names, weights)[0]
        page = count = 0
        if rows[kind].scope == "scratch":
            page, count = pages - 1 - rng.randrange(SCRATCH_PAGES), 1
        elif rows[kind].scope != "none":
            block = rng.choice(recent) if rng.random() < 0.5 else rng.randrange(-(-pages // BLOCK_PAGES))
            recent.append(block)
            page = block * BLOCK_PAGES
            count = min(BLOCK_PAGES, pages - page)
            if rows[kind].scope == "run":
                first = rng.randrange(count)
                page, count = page + first, min(count - first, 1 << rng.randrange(8))
        yield Operation(number, kind, page, count, rng.getrandbits(32))


class Subject:
    """A VM, and what must be true of it. written: pages that the host wrote, and their bytes; views: those held, each
    with the number of the operation until which it is; dirty: pages traced since `baseline`, RAM as it was then."""

    def __init__(self, vm: VM, ring: bool = False, swap: int | None = None) -> None:
        """ring: it has dirty rings; swap: the seed of the policy where pages go to the host's swap, else to a Store."""
        self._traces = RING_TRACES if ring else TRACES
        self._swap = swap
        self.pages = vm.memory.size // PAGE_SIZE
        self._former: list[EngineStats] = []
        self._take(vm)
        self.written: dict[int, bytes] = {}
        self.views: deque[tuple[memoryview, int]] = deque()
        self.refused: Counter[str] = Counter()
        self._trace: Trace | None = None
        self.dirty = bytearray(-(-self.pages // 64) * 8)
        self.baseline: bytes | None = None
        self.move: Move | None = None
        """The migration that is under way."""
        self.moves: Counter[str] = Counter()
        """Those that have come to an end, by how they ended."""

    def _take(self, vm: VM) -> None:
        self.vm = vm
        self.memory = vm.memory
        self.engine = vm.memory.engine
        self.store: Shelf = Store(self.memory) if self._swap is None else Swapped(self.memory, self._swap)

    def adopt(self, vm: VM) -> None:
        """Goes on with another VM, which has the same in its memory; the one before is closed."""
        self.end_move()
        former, store = self.turn_to(vm)
        self.retire(former, store)

    def turn_to(self, vm: VM) -> tuple[VM, Shelf]:
        """Goes on with another VM. Returns the one before, and its store: to retire() when nobody needs it any more."""
        self.stop_trace()
        self.views.clear()
        former, store = self.vm, self.store
        self._take(vm)
        return former, store

    def retire(self, former: VM, store: Shelf) -> None:
        """Closes a VM that was under torture."""
        self._former.append(former.memory.engine.stats())
        former.close()
        if store.wrong:
            raise Wrong("; ".join(store.wrong))

    def follow(self, number: int) -> bool:
        """Before operation `number`: goes on with the VM that the guest runs in by now. Is it leaving?"""
        return self.move is not None and self.move.follow(number)

    def end_move(self) -> None:
        """Waits until a migration that is under way has come to its end, whichever that is."""
        if self.move is not None:
            self.move.finish()

    def close(self) -> None:
        """Closes the VM, and that from which its guest comes."""
        self.views.clear()
        if self.move is not None:
            self.move.close()
        self.vm.close()

    def stats(self) -> EngineStats:
        """Of the engines of all VMs so far."""
        stats = self.engine.stats()
        for former in self._former:
            stats.add(former)
        return stats

    def gpa(self, operation: Operation) -> Gpa:
        """Where its pages begin."""
        return self.memory.gpa_of(operation.page)

    def pause(self) -> bool:
        """Pauses, if it is not; was it?"""
        was_paused = self.vm.paused
        if not was_paused:
            self.vm.pause()
        return was_paused

    def resume(self) -> None:
        """Lets the guest go on, if it does not."""
        if self.vm.paused:
            self.vm.resume()

    def read(self, operation: Operation) -> None:
        """Reads all of it; of pages that the host wrote, compares."""
        data = self.memory.read(self.gpa(operation), operation.count * PAGE_SIZE)
        for page in range(operation.page, operation.page + operation.count):
            at = (page - operation.page) * PAGE_SIZE
            if page in self.written and self.written[page] != data[at : at + PAGE_SIZE]:
                raise Wrong(f"page {page}, written by the host, has other bytes now")

    def write_back(self, operation: Operation) -> None:
        """Stops the guest and writes what is there."""
        was_paused = self.pause()
        gpa = self.gpa(operation)
        self.memory.write(gpa, self.memory.read(gpa, operation.count * PAGE_SIZE))
        if not was_paused:
            self.vm.resume()

    def write(self, operation: Operation) -> None:
        """Writes a page of the host's: zeros, or anything."""
        data = bytes(PAGE_SIZE) if operation.value % 4 == 0 else random.Random(operation.value).randbytes(PAGE_SIZE)
        self.written[operation.page] = data
        self.memory.write(self.gpa(operation), data)

    def give_up(self, operation: Operation) -> None:
        """Gives up a few pages of the host's, as a guest would by its balloon, and maybe takes them back: zeros, but in
        a block of which a view is held."""
        last = self.pages - 1 - operation.page  # how many follow it
        how = (balloon.INFLATE, balloon.INFLATE, balloon.DEFLATE, balloon.FREE)[operation.value >> 16 & 3]
        held = {page for first, count in self.memory.written_views() for page in range(first, first + count)}
        for first, count in self.engine.parts(operation.page, 1 + min(last, operation.value % 200)):
            pages = range(first, first + count)
            away = set(self.engine.at_home("balloon").take(first, count))
            told = balloon.change(self.memory, [(first, count)], how)
            if how == balloon.DEFLATE or told.stayed:
                continue
            if held & set(pages):
                raise Wrong(f"pages {pages} were given up, of which a view is held")
            if how == balloon.INFLATE and not away and told.gone != count:
                raise Wrong(f"{told.gone} of {count} pages were given up")
            self.written.update(dict.fromkeys(pages, bytes(PAGE_SIZE)))

    def put_away(self, operation: Operation) -> None:
        """Removes pages, and has those stored that the guest has not fetched back meanwhile."""
        self.store.put_away(operation.page, operation.count)

    def view(self, operation: Operation) -> None:
        """Holds a view for some operations; its pages must stay."""
        view = self.memory.view(self.gpa(operation), operation.count * PAGE_SIZE)
        self.views.append((view, operation.number + operation.value % 32))
        if gone := self.engine.remove(operation.page, operation.count):
            raise Wrong(f"{gone} pages of a view were removed")

    def drop_views(self, number: int) -> None:
        """Gives up the views that are held until before operation `number`."""
        for _ in range(len(self.views)):
            view, until = self.views.popleft()
            if until >= number:
                self.views.append((view, until))

    @property
    def traced(self) -> bool:
        """Is a write trace on?"""
        return self._trace is not None

    @property
    def watched(self) -> bool:
        """Does the trace that is on keep RAM registered with userfaultfd?"""
        return isinstance(self._trace, Coarse)

    def trace(self, operation: Operation) -> None:
        """Starts one of TRACES; collects what was written; or stops it."""
        if self._trace is None:
            name, options = self._traces[operation.value % len(self._traces)]
            self._trace = self.vm.trace(name, **options)
            self._trace.start()
        elif operation.value % 8:
            self.collect()
        else:
            self.stop_trace()

    def collect(self) -> None:
        """Adds to `dirty`, a bit a page, what was written since the last time."""
        if self._trace is not None:
            self._trace.collect().mark(ffi.from_buffer("uint64_t[]", self.dirty))

    def sample(self, operation: Operation) -> None:
        """Watches some blocks for a moment, and gives them up or has them back, as `value` says. What was touched is
        no more than what is there then."""
        told, watched = ffi.new("struct pv_sample *"), []
        rng = random.Random(operation.value)
        first = operation.block
        for block in {first, *(rng.randrange(self.pages // BLOCK_PAGES) for _ in range(4))}:
            begun = self.engine.call(lib.pv_sample_begin, block, rng.choice((0, 1, 8, 32)))
            if begun == 0:
                watched.append(block)
            elif begun not in _NOT_NOW:
                raise Wrong(f"block {block} cannot be sampled: {os.strerror(-begun)}")
        self.refused[operation.kind] += not watched
        time.sleep(rng.random() / 500)
        for block in watched:
            check(self.engine.call(lib.pv_sample_end, block, rng.random() < 0.6, told), "pv_sample_end", block=block)
            if sum(each.bit_count() for each in told.bits) != told.touched:
                raise Wrong(f"block {block}: {told.touched} pages touched, and other bits")

    def stop_trace(self) -> None:
        """Ends a trace, where there is one."""
        if self._trace is not None:
            self._trace.stop()
        self._trace = None
        self.baseline = None


def check_contents(vm: VM, written: Mapping[int, bytes]) -> None:
    """Is all memory of a VM that is paused as its guest, or the host, has left it? Raises Wrong."""
    from pyvmm.testing.verify_model import check_memory

    wrong = check_memory(vm.memory, vm.progress(), zeros=ZEROS, order="random")
    if wrong:
        raise Wrong(f"{len(wrong)} wrong pages: {'; '.join(page.text for page in wrong[:3])}")
    for page, data in written.items():
        if vm.memory.read(vm.memory.gpa_of(page), PAGE_SIZE) != data:
            raise Wrong(f"page {page}, written by the host, has other bytes now")


def check_books(memory: GuestMemory, store: Shelf, armed: bool | None = None) -> None:
    """Do the engine's books agree, of a VM that stands still? armed: see imbalances(). Raises Wrong. A fault that a
    vCPU took before it was parked may still be under way: its end is waited for."""
    from pyvmm.testing.balance import imbalances

    end = time.monotonic() + SETTLE_SECONDS
    while True:
        wrong = imbalances(memory, armed=armed) + store.wrong
        if (kept := store.kept()) != (stored := memory.engine.count().homes["swap"]):
            wrong.append(f"the home keeps {kept} pages, and the engine counts {stored} there")
        if not wrong:
            return
        if time.monotonic() > end:
            raise Wrong("; ".join(wrong))
        os.sched_yield()


def _share(subject: Subject, operation: Operation) -> None:
    subject.engine.break_(operation.block)
    subject.engine.share(operation.block)


def _snapshot(subject: Subject, operation: Operation) -> None:
    from pyvmm.testing.checkpoints import snapshot

    snapshot(subject, operation)


def _migrate(subject: Subject, operation: Operation) -> None:
    from pyvmm.testing.moves import migrate

    migrate(subject, operation)


def _refusable(do: Callable[[Subject, Operation], object]) -> Callable[[Subject, Operation], None]:
    """An operation on a whole block, which the last one may not be, and which a held view may forbid, or pages that
    are just being sent."""

    def tried(subject: Subject, operation: Operation) -> None:
        if operation.count == BLOCK_PAGES and not insist(
            lambda: do(subject, operation), lambda: not subject.views and subject.move is None
        ):
            subject.refused[operation.kind] += 1

    return tried


def insist(do: Callable[[], object], for_long: Callable[[], bool] = lambda: True) -> bool:
    """Does something to a block; was it done? While that is in use, and for_long(), it is tried for PATIENCE seconds: a
    kernel thread that works with a page may be kept from running. Raises what else goes wrong."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            do()
            return True
        except HostError as error:
            if "in use" not in str(error):
                raise
            if not for_long():
                return False
            if time.monotonic() > end:
                raise
            os.sched_yield()


KINDS = {
    "remove block": Kind(10, "block", lambda s, o: s.engine.remove(o.page, o.count)),
    "remove run": Kind(10, "run", lambda s, o: s.engine.remove(o.page, o.count)),
    "remove zeros": Kind(4, "block", lambda s, o: s.engine.remove(o.page, o.count, what="zero")),
    "remove zeros, run": Kind(4, "run", lambda s, o: s.engine.remove(o.page, o.count, what="zero")),
    "install block": Kind(3, "block", lambda s, o: s.engine.install(o.page, o.count)),
    "install run": Kind(3, "run", lambda s, o: s.engine.install(o.page, o.count)),
    "split": Kind(4, "block", lambda s, o: s.engine.split(o.block) if o.count == BLOCK_PAGES else None),
    "merge": Kind(6, "block", _refusable(lambda s, o: s.engine.merge(o.block))),
    "break": Kind(3, "block", _refusable(lambda s, o: s.engine.break_(o.block))),
    "share": Kind(3, "block", _refusable(_share)),
    "unshare": Kind(1, "block", _refusable(lambda s, o: s.engine.share(o.block, False))),
    "store block": Kind(5, "block", Subject.put_away),
    "store run": Kind(5, "run", Subject.put_away),
    "read": Kind(4, "run", Subject.read),
    "write": Kind(4, "scratch", Subject.write, here=True),
    "write back": Kind(2, "run", Subject.write_back, here=True),
    "view": Kind(2, "run", Subject.view),
    "pause": Kind(2, "none", lambda s, o: s.pause(), here=True),
    "resume": Kind(6, "none", lambda s, o: s.resume(), here=True),
    "trace": Kind(3, "none", Subject.trace, here=True),
    "limit": Kind(1, "none", lambda s, o: s.store.limit(o.value)),
    "snapshot": Kind(0.2, "none", _snapshot, here=True),
    "balloon": Kind(2, "scratch", Subject.give_up, here=True),
    "sample": Kind(4, "block", Subject.sample),
    "migrate": Kind(0.4, "none", _migrate),
}  # fmt: skip
