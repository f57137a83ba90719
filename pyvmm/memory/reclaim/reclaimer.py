# reclaimer.py: has a VM live in less memory than it has: a thread that asks a policy what is to go, and has it go to
# the host's swap. Units: small pages, and blocks of 512 of them; of what people say and see, bytes.
"""`Reclaimer`: the limit of one VM. `ReclaimCounts`: how it is kept."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, HostError, MemoryAccessError, check
from pyvmm.layout import MIB, PAGE_SIZE, format_size
from pyvmm.memory.reclaim.live import LiveView, Told
from pyvmm.memory.reclaim.policies import Clock
from pyvmm.memory.reclaim.policy import BLOCK_PAGES, Block, Share, broken, find
from pyvmm.memory.reclaim.senses import Senses
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyvmm.memory import GuestMemory
    from pyvmm.memory.reclaim.policy import Policy, Victim
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
_IN_USE = "nothing more can leave memory: it is in use"


class ReclaimCounts(Record):
    """limit, resident, aside: bytes; limit is None where there is none. Pages since the beginning: taken out of the
    guest, and of these, spared: back before they were written. waits: faults that waited for room, `seconds` in all,
    `longest` of one; overruns: of these, went on without. policy: its name. trouble: why no more can go, or "".
    """

    __slots__ = (
        "aside", "limit", "longest", "overruns", "policy", "resident", "seconds", "spared", "taken", "trouble", "waits",
    )  # fmt: skip

    def __init__(self, limit: int | None, resident: int, aside: int, policy: str, trouble: str) -> None:
        self.limit, self.resident, self.aside = limit, resident, aside
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
    can go any more (the swap is full, the disk fails), that is told there too, the VM keeps more than the limit, and it
    is tried again every second. on_trouble is called with each such line, on the reclaimer's thread.
    """

    def __init__(self, memory: GuestMemory, swap: Swap, policy: str = POLICY, seed: int = 0) -> None:
        self.on_trouble: Callable[[str], None] | None = None
        self.swap = swap
        self.policy = policy
        self.trouble = ""
        self._memory, self._engine = memory, memory.engine
        self._kind: type[Policy] = find(policy)
        self._seed = seed
        self._limit: int | None = None
        self._set = _NEVER, _NEVER  # what C knows: pages above which faults wait, and above which reclaim begins
        self._changing = threading.Lock()
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False
        self._over = threading.Event()
        self._taken = 0
        self._before = swap.stats().out
        self._senses = Senses(memory, self._kind, self._free)
        self._shares = False  # were pages given to the kernel, to be merged?
        self._waiting: dict[int, None] = {}  # blocks of which something is aside, the oldest first
        self._tried = 0.0
        self._since: float | None = None  # nothing can go

    # ---- the limit ----

    @property
    def limit(self) -> int | None:
        """Bytes of the guest's RAM that may take memory of the host; None: all of it.

        To set it returns at once; raises BadInput for one below LEAST. What is away stays so until it is touched.
        """
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        if limit is not None and limit < LEAST:
            raise BadInput(f"a limit of {format_size(limit)}: a VM needs at least {format_size(LEAST)} of memory")
        with self._changing:
            if self._ending:
                raise MemoryAccessError("the VM is closed: its memory is gone")
            if limit is None:
                self._limit = None
                self._engine.tell(lib.pv_limit_set, _NEVER, _NEVER)
                self._senses.stop()
                return
            before = self._limit
            if before is None:
                check(self._engine.call(lib.pv_limit_begin), "UFFDIO_REGISTER")
            self._limit = limit
            self._set = _NEVER, _NEVER
            self._lower(self._engine.call(lib.pv_limit_resident, equip=False))
            if before is None:
                self._senses.start()
            if self._thread is None:
                self._memory.before_end(self._end)
                self._thread = threading.Thread(target=self._run, name="reclaim", daemon=True)
                self._thread.start()

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

        return freed_here()

    def _free(self) -> float:
        limit = self._limit
        return 1.0 if limit is None else max(0.0, 1 - self._resident() / limit)

    def counts(self) -> ReclaimCounts:
        """How it stands."""
        told = ffi.new("struct pv_limit_told *")
        self._engine.tell(lib.pv_limit_look, told)
        counts = ReclaimCounts(self._limit, self._resident(), self._aside() * PAGE_SIZE, self.policy, self.trouble)
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

    def _resident(self) -> int:
        """Bytes."""
        return PAGE_SIZE * (int(self._engine.call(lib.pv_limit_resident, equip=False)) - self._merged())

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
            self._view = LiveView(self._engine, 1, self._seed)
            self._told = Told(self._kind, self._view)
            self._tell(touched=False)
            while not self._ending:
                above = self._engine.call(lambda native: lib.pv_limit_wait(native, _TICK_MS), equip=False)
                self._retry()
                if above and self._limit is not None:
                    self._shrink(self._limit // PAGE_SIZE + self._merged())
                    if self._since is not None:
                        self._over.wait(_TICK_MS / 1000)
                with self._news:
                    self._news.notify_all()

    def _tell(self, touched: bool = True) -> None:
        came, left = self._view.look()
        try:
            self._told.changed(came, left, touched)
            self._senses.tell(self._told.policy)
        except Exception as error:
            self._replace(error)
        while self._senses.cold:
            self._put_last(self._senses.cold.popleft())

    def _put_last(self, block: int) -> None:
        self._waiting.pop(block, None)
        self._waiting[block] = None

    def _shrink(self, limit: int) -> None:
        """Until enough room is free."""
        view = self._view
        view.limit = limit
        self._senses.press()
        with self._changing:  # the kernel may have merged more, or less, since the last time
            self._lower(view.measure())
        target = limit - _ROOM - limit // _STEP
        self._tell()
        vain, enough = 0, 2 * view.pages  # victims in a row that stayed: a policy may come by all that is in use first
        while not self._ending and self._limit is not None and view.measure() > target and vain < enough:
            before, chosen, gone = view.used, 0, 0
            over = view.used - target
            aside = self._aside()
            if aside < over + limit // _CHANCE:
                chosen, gone = self._take(min(over + limit // _CHANCE - aside, _BATCH))
            self._write(over)
            vain = 0 if gone or view.measure() < before else vain + (chosen or enough)
            with self._changing:
                self._lower(view.used)
        self._stuck(vain >= enough)

    def _aside(self) -> int:
        """Pages that are aside to go out; those of sampled blocks are in use."""
        counts = ffi.new("struct pv_sample_counts *")
        self._engine.tell(lib.pv_sample_counts, counts)
        return max(self._engine.homes()["aside"] - int(counts.aside), 0)

    def _take(self, wanted: int) -> tuple[int, int]:
        """Has so many pages go aside, or as many as the policy gives. How many it gave, and how many went."""
        runs: list[tuple[int, int]] = []
        chosen = 0
        try:
            for victim in self._told.victims(wanted):
                if isinstance(victim, Share):
                    chosen += self._share(victim)
                for first, count in self._pages(victim):
                    self._view.gone(first, count)
                    self._told.gone(range(first, first + count))
                    runs.append((first, count))
                    chosen += count
                if chosen >= wanted:
                    break
        except Exception as error:
            self._replace(error)
        if not runs:
            return 0, 0
        native = ffi.new("struct pv_run_pages[]", _joined(runs))
        gone = self._engine.call(lib.pv_engine_remove_runs, native, len(native))
        check(min(gone, 0), "UFFDIO_MOVE", runs=len(native))
        for first, _ in runs:
            self._put_last(first // BLOCK_PAGES)
        self._taken += gone
        self._tell(touched=False)  # what was in use has stayed
        return chosen, gone

    def _pages(self, victim: Victim) -> Iterator[tuple[int, int]]:
        """Runs of what a victim is. Raises BadInput for what is none."""
        view = self._view
        if isinstance(victim, Share):
            return
        if isinstance(victim, Block):
            self._require_block(victim.number)
            first = victim.number * BLOCK_PAGES
            yield first, min(BLOCK_PAGES, view.pages - first)
        elif isinstance(victim, int) and 0 <= victim < view.pages and view.resident[victim]:
            yield victim, 1
        else:
            raise BadInput(f"{victim!r} is no page in memory, and cannot leave it")

    def _require_block(self, block: int) -> None:
        if not isinstance(block, int) or not 0 <= block < self._view.blocks:
            raise BadInput(f"block {block!r}: the VM has {self._view.blocks}")

    def _share(self, victim: Share) -> int:
        """Technique T5: breaks the block, drops its zeros, and lets the kernel merge the others, if it does that. How
        many pages went; those that are merged count when that is done."""
        from pyvmm.memory.sharing.sharer import mark_unless_in_use

        self._require_block(victim.number)
        gone = mark_unless_in_use(self._engine, victim.number)
        self._shares = self._shares or gone is not None
        self._view.large[victim.number] = 0
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
            self._say(str(error))

    def _retry(self) -> None:
        now = time.monotonic()
        if now - self._tried < _RETRY_SECONDS:
            return
        self._tried = now
        if self.swap.stats().behind:
            self.swap.retry()
        elif self.trouble and not self.trouble.startswith("policy"):
            self.trouble = ""

    # ---- where it goes wrong ----

    def _replace(self, error: Exception) -> None:
        """A policy that fails is a student's, more often than not: the VM goes on, and `clock` chooses."""
        path = getattr(self._kind.victims, "__code__", None)
        text = str(error) if isinstance(error, BadInput) else broken(error, path.co_filename if path else "")
        self._kind = Clock
        self._told = Told(Clock, self._view)
        self._say(f"policy {self.policy}: {text}: clock goes on in its place")
        self.policy = "clock"

    def _stuck(self, stuck: bool) -> None:
        """Pages that are in use for a while, as by a save, are no trouble yet."""
        self._engine.tell(lib.pv_limit_stuck, stuck)
        now = time.monotonic()
        if not stuck:
            self._since = None
            if self.trouble == _IN_USE:
                self.trouble = ""
        elif self._since is None:
            self._since = now
        elif now - self._since > _RETRY_SECONDS and not self.trouble:
            self._say(_IN_USE)

    def _say(self, text: str) -> None:
        if text != self.trouble:
            self.trouble = text
            if self.on_trouble is not None:
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
