# reclaimer.py: has a VM live in less memory than it has: a thread that asks a policy what is to go, and has it go to
# the host's swap. Units: small pages, and blocks of 512 of them; of what people say and see, bytes.
"""`Reclaimer`: the limit of one VM. `ReclaimCounts`: how it is kept."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from weakref import WeakSet

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, HostError, MemoryAccessError, PyvmmError, check
from pyvmm.layout import MIB, PAGE_SIZE, format_size
from pyvmm.memory.reclaim.chooser import Chooser
from pyvmm.memory.reclaim.live import LiveView
from pyvmm.memory.reclaim.policy import BLOCK_PAGES, broken, find
from pyvmm.memory.reclaim.senses import Senses
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.memory import GuestMemory
    from pyvmm.memory.swap import Swap

LEAST = 8 * MIB
"""Bytes: no limit is lower. A guest needs some pages at once, and one block of 2 MiB may come with each."""
POLICY = "activity"
_NEVER = (1 << 64) - 1
_ROOM = BLOCK_PAGES
"""Pages below the limit at which reclaim begins, so that a fault that brings a whole block need not wait for it."""
_STEP = 128
"""It goes on until one in so many pages of the limit is free beyond that."""
_CHANCE = 16
"""One in so many pages of the limit is aside, where a touch brings it back at once: the second chance."""
_BATCH = 4096
"""Pages taken out between two looks at how much is left."""
_TICK_MS = 100
_RETRY_SECONDS = 1.0
_sharing: WeakSet[Reclaimer] = WeakSet()
"""Those that gave pages to the kernel, to be merged."""


def check_limit(limit: int, name: str = "a limit of ") -> None:
    """Raises BadInput for a limit that no VM can live in. name: what the user calls it."""
    if limit < LEAST:
        raise BadInput(f"{name}{format_size(limit)}: a VM needs at least {format_size(LEAST)} of memory")


class ReclaimCounts(Record):
    """limit, resident, aside, merged: bytes; limit is None where there is none, merged is in the guest and takes no
    memory of its own. Pages since the beginning: taken out of the guest, and of these, spared: back before they were
    written. waits: faults that waited for room, `seconds` in all, `longest` of one; overruns: of these, went on
    without. policy: its name. trouble: why no more can go, or "".
    """

    __slots__ = ("aside", "limit", "longest", "merged", "overruns", "policy", "resident", "seconds", "spared", "taken",
                 "trouble", "waits")  # fmt: skip

    def __init__(self, limit: int | None, resident: int, merged: int, aside: int, policy: str, trouble: str) -> None:
        self.limit, self.resident, self.merged, self.aside = limit, resident, merged, aside
        self.policy, self.trouble = policy, trouble
        self.taken = self.spared = self.waits = self.overruns = 0
        self.seconds = self.longest = 0.0

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


class Reclaimer:
    """Keeps what `memory` takes of the host's at `limit` bytes: in the guest, and aside. What goes is chosen by a
    policy (pyvmm.memory.reclaim.policy), a name or file.py:Class, and goes aside first, where a touch brings it back at
    once; the oldest of that goes to `swap`, when room is needed. A fault waits where it would go beyond the limit; what
    is read ahead with it, and what the host itself reads, may do so for the moment that it takes to have others go.

    Raises BadInput for a policy that is none. seed: of what the policy has at random.
    A policy that raises, or gives what is no page, is told of in `trouble`, and `clock` takes its place. Where nothing
    can go any more (the swap is full, the disk or the kernel fails), that is told there too, the VM keeps more than the
    limit, and it is tried again every second. on_trouble is called with each such line, on the reclaimer's thread.
    """

    def __init__(self, memory: GuestMemory, swap: Swap, policy: str | None = None, seed: int = 0) -> None:
        self.on_trouble: Callable[[str], None] | None = None
        self.swap = swap
        self._memory, self._engine = memory, memory.engine
        self._troubles: dict[str, str] = {}  # by what has them
        kind = find(policy or POLICY)
        self._view = LiveView(self._engine, 1, seed)
        self._chooser = Chooser(kind, policy or POLICY, self._view, lambda text: self._say("policy", text))
        self._limit: int | None = None
        self._set = _NEVER, _NEVER  # what C knows: pages above which faults wait, and above which reclaim begins
        self._changing = threading.Lock()
        self._working = threading.RLock()  # held while something is taken out: on_trouble() may lift the limit
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False
        self._over = threading.Event()
        self._taken = 0
        self._before = swap.stats().out
        self._senses = Senses(memory, kind, self._free)
        self._shares = False  # were pages given to the kernel, to be merged?
        self._waiting: dict[int, None] = {}  # blocks of which something is aside, the oldest first
        self._tried = 0.0
        self._since: float | None = None  # nothing can go

    # ---- the limit ----

    @property
    def limit(self) -> int | None:
        """Bytes of the guest's RAM that may take memory of the host; None: all of it.

        To set it returns at once; raises BadInput for one below LEAST. Once it is lifted nothing more goes, and what is
        away stays so until it is touched.
        """
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        if limit is None:
            self._lift()
            return
        check_limit(limit)
        with self._changing:
            if self._ending:
                raise MemoryAccessError("the VM is closed: its memory is gone")
            before = self._limit
            if before is None:
                check(self._engine.call(lib.pv_limit_begin), "UFFDIO_REGISTER")
            self._limit = limit
            self._set = _NEVER, _NEVER
            self._lower(self._used())
            if before is None:
                self._senses.start()
            if self._thread is None:
                self._memory.before_end(self._end)
                self._thread = threading.Thread(target=self._run, name="reclaim", daemon=True)
                self._thread.start()

    def _lift(self) -> None:
        with self._changing:
            if self._ending:
                raise MemoryAccessError("the VM is closed: its memory is gone")
            self._limit = None
            self._engine.tell(lib.pv_limit_set, _NEVER, _NEVER)
        with self._working, self._changing:  # who was about to take something out is through with that
            if self._limit is None:
                self._senses.stop()

    def _lower(self, resident: int) -> None:
        """Has faults wait above the limit; while it is being reached, above what is resident now: else the first of
        them would wait for all of the way."""
        if self._limit is None:
            return
        limit = self._limit // PAGE_SIZE + self._merged()
        set_before = self._set
        ceiling = max(limit, min(set_before[0], resident + _ROOM))
        self._set = ceiling, limit - _ROOM
        if self._set != set_before:
            self._engine.tell(lib.pv_limit_set, *self._set)

    def _merged(self) -> int:
        """Pages that are resident and take no memory of their own, since the kernel has merged them with others."""
        if not self._shares:
            return 0
        from pyvmm.memory.sharing.ksm import freed_here

        try:
            return freed_here() // len(_sharing)  # the kernel tells it by process
        except HostError:
            return 0

    def _free(self) -> float:
        limit = self._limit
        return 1.0 if limit is None else max(0.0, 1 - self._resident() / limit)

    def counts(self) -> ReclaimCounts:
        """How it stands."""
        told = ffi.new("struct pv_limit_told *")
        self._engine.tell(lib.pv_limit_look, told)
        merged, aside = self._merged() * PAGE_SIZE, self._aside() * PAGE_SIZE
        resident = self._used() * PAGE_SIZE - merged
        counts = ReclaimCounts(self._limit, resident, merged, aside, self.policy, self.trouble)
        counts.taken = self._taken
        counts.spared = max(0, self._taken - (self.swap.stats().out - self._before) - self._aside())
        counts.waits, counts.overruns = int(told.waits), int(told.overruns)
        counts.seconds, counts.longest = told.nanoseconds / 1e9, told.longest / 1e9
        return counts

    def working_set(self) -> tuple[int, int, int] | None:
        """Bytes that the guest uses of what is resident: at least, by estimate, and at most, 19 times out of 20. None
        where the policy does not watch how active blocks are, or too few were."""
        return self._senses.working_set(self._resident())

    def settled(self, timeout: float = 10.0) -> bool:
        """Waits until what is resident is within the limit; False where it is not, after so many seconds."""
        end = time.monotonic() + timeout
        with self._news:
            while self._limit is not None and self._resident() > self._limit:
                left = end - time.monotonic()
                if left <= 0 or self._ending:
                    return False
                self._news.wait(left)
        return True

    def _used(self) -> int:
        """Pages in the guest, and aside."""
        return int(self._engine.call(lib.pv_limit_resident, equip=False))

    def _resident(self) -> int:
        """Bytes."""
        return PAGE_SIZE * (self._used() - self._merged())

    # ---- the thread ----

    def _end(self) -> None:
        with self._changing:
            self._ending = True
        self._over.set()
        with suppress(MemoryAccessError):
            self._engine.tell(lib.pv_limit_end)
        with self._news:
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with suppress(MemoryAccessError):  # the VM is closed
            self._chooser.look(self._senses, touched=False)
            while not self._ending:
                above = self._engine.call(lambda native: lib.pv_limit_wait(native, _TICK_MS), equip=False)
                try:
                    self._tick(bool(above))
                except MemoryAccessError:
                    raise
                except Exception as error:  # whatever it is, faults must not wait for us
                    self._engine.tell(lib.pv_limit_stuck, True)
                    self._say("kernel", str(error) if isinstance(error, PyvmmError) else broken(error))
                    self._over.wait(_TICK_MS / 1000)
                with self._news:
                    self._news.notify_all()

    def _tick(self, above: bool) -> None:
        self._retry()
        if above:
            self._shrink()
        elif self._since is not None or "kernel" in self._troubles:  # there is room now, or no limit
            self._stuck(False)
        self._troubles.pop("kernel", None)
        if self._since is not None:
            self._over.wait(_TICK_MS / 1000)

    def _look(self, touched: bool = True) -> None:
        self._chooser.look(self._senses, touched)
        while self._senses.cold:
            block = self._senses.cold.popleft()
            self._taken += self._view.aside_of(block)
            self._put_last(block)
        if missing := self._senses.missing():
            self._say("senses", f"policy {self.policy} is not told how active blocks are: {missing}")

    def _put_last(self, block: int) -> None:
        self._waiting.pop(block, None)
        self._waiting[block] = None

    def _shrink(self) -> None:
        """Until enough room is free."""
        self._senses.press()
        self._look()
        vain = 0
        while not self._ending and (vain := self._step(vain)) >= 0:
            if vain >= 2 * self._view.pages:  # a policy may come by all that is in use first
                break
        self._stuck(vain > 0)

    def _step(self, vain: int) -> int:
        """Takes some out, if there is too little room. vain: victims in a row that have stayed; returns how many now,
        or -1 where there is room enough, or no limit any more."""
        view = self._view
        with self._working:
            limit = self._limit
            if limit is None:
                return -1
            view.limit = limit // PAGE_SIZE + self._merged()  # the kernel may have merged more, or less, by now
            before = view.measure()
            with self._changing:
                self._lower(before)
            over = before - (view.limit - _ROOM - view.limit // _STEP)
            if over <= 0:
                return -1
            given = gone = 0
            aside = self._aside()
            wanted = over + view.limit // _CHANCE - aside
            if wanted > 0:
                given, gone = self._take(min(wanted, _BATCH))
            self._write(over)
            if gone or view.measure() < before:
                return 0
            return vain + (given or 2 * view.pages)

    def _aside(self) -> int:
        """Pages that are aside to go out; those of sampled blocks are in use."""
        counts = ffi.new("struct pv_sample_counts *")
        self._engine.tell(lib.pv_sample_counts, counts)
        return max(self._engine.homes()["aside"] - int(counts.aside), 0)

    def _take(self, wanted: int) -> tuple[int, int]:
        """Has so many pages go aside, or as many as the policy gives. How many it gave, and how many went."""
        runs, given = self._chooser.choose(wanted, self._share)
        if not runs:
            return given, 0
        native = ffi.new("struct pv_run_pages[]", _joined(runs))
        gone = self._engine.call(lib.pv_engine_remove_runs, native, len(native))
        check(min(gone, 0), "UFFDIO_MOVE", runs=len(native))
        for first, _ in runs:
            self._put_last(first // BLOCK_PAGES)
        self._taken += gone
        self._look(touched=False)  # what was in use has stayed
        return given, gone

    def _share(self, block: int) -> int:
        """Technique T5: breaks the block, drops its zeros, and lets the kernel merge the others, if it does that. How
        many pages went; those that are merged count when that is done."""
        from pyvmm.memory.sharing.sharer import mark_unless_in_use

        gone = mark_unless_in_use(self._engine, block)
        if gone is not None:
            _sharing.add(self)
        self._shares = self._shares or gone is not None
        self._view.large[block] = 0
        return gone or 0

    def _write(self, wanted: int) -> None:
        """Has the oldest of what is aside written, so many pages or a little more, and waits for that."""
        while wanted > 0 and self._waiting:
            block = next(iter(self._waiting))
            del self._waiting[block]
            if aside := self._view.aside_of(block):
                self.swap.write(block)
                wanted -= aside
        try:
            self.swap.drain()
        except HostError as error:
            self._say("swap", str(error))

    def _retry(self) -> None:
        now = time.monotonic()
        if now - self._tried < _RETRY_SECONDS:
            return
        self._tried = now
        if self.swap.stats().behind:
            self.swap.retry()
        else:
            self._troubles.pop("swap", None)

    # ---- where it goes wrong ----

    @property
    def policy(self) -> str:
        """The name of who chooses."""
        return self._chooser.name

    @property
    def trouble(self) -> str:
        """Why no more can go, or what else is wrong; or nothing."""
        return "; ".join(list(self._troubles.values()))

    def _stuck(self, stuck: bool) -> None:
        """Pages that are in use for a while, as by a save, are no trouble yet."""
        self._engine.tell(lib.pv_limit_stuck, stuck)
        now = time.monotonic()
        if not stuck:
            self._since = None
            self._troubles.pop("use", None)
        elif self._since is None:
            self._since = now
        elif now - self._since > _RETRY_SECONDS and not self._troubles:
            self._say("use", "nothing more can leave memory: it is in use")

    def _say(self, what: str, text: str) -> None:
        if text != self._troubles.get(what):
            self._troubles[what] = text
            if self.on_trouble is not None:
                with suppress(Exception):  # as where nobody reads it: faults wait for us all the same
                    self.on_trouble(text)


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs that follow each other within a block as one."""
    joined: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if joined and sum(joined[-1]) == first and first % BLOCK_PAGES:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined
