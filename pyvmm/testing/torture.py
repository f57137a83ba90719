# torture.py: a guest that checks all of its memory, and random operations on that memory meanwhile. What is done
# follows from the seed alone; what it did to the guest is judged by the guest, by a model and by the kernel.
"""`Torture`: runs operations and checks. Raises TortureFailure, whose report names the seed and the operations."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from pyvmm.errors import BadInput, HostError
from pyvmm.host import has
from pyvmm.layout import BLOCK_SIZE, GIB, MIB, PAGE_SIZE, format_size
from pyvmm.memory.sharing.ksm import ksm_running
from pyvmm.testing.checkpoints import Ringed, Tortured
from pyvmm.testing.operations import (
    BLOCK_PAGES,
    KINDS,
    PATIENCE,
    ZEROS,
    Subject,
    Wrong,
    check_books,
    check_contents,
    insist,
    sequence,
)
from pyvmm.testing.verify_model import ram_hash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from pyvmm.machine import VM
    from pyvmm.memory.mapping import Pages
    from pyvmm.testing.operations import Operation

MIN_MEMORY = 16 * MIB
FIRST_TOUCH = 50 * MIB
"""Bytes a second that even a busy host gives out."""
CHECK_EVERY = 400
"""Operations from one full check to the next."""
RING_SEEDS = 1
"""Seeds that are so modulo 4 have a VM with dirty rings."""
SWAP_SEEDS = 2
"""Those that are so have pages go to the host's swap, with a limit that changes."""
_SCRATCH_BLOCKS = 3
"""At the end of RAM, not the guest's: more than the pages the host writes, since RAM may end within a block."""


class TortureFailure(Wrong):
    """Something is wrong. `report`: the seed, what, and the last operations, in lines for people."""

    def __init__(self, sentence: str, seed: int, last: Iterable[Operation]) -> None:
        super().__init__(sentence)
        lines = [f"  {operation}" for operation in last]
        self.report = "\n".join([f"seed {seed}: {sentence}", f"the last {len(lines)} operations:", *lines])


class Torture:
    """One VM under torture, with the guest at work. A context manager. done: operations by kind; checks: full ones."""

    def __init__(self, seed: int, memory: int = 64 * MIB, cpus: int = 1, pages: Pages = "auto") -> None:
        if memory < MIN_MEMORY:
            raise BadInput(f"{format_size(memory)} of memory: torture takes at least {format_size(MIN_MEMORY)}")
        self.seed = seed
        self.done: Counter[str] = Counter()
        self.checks = 0
        self._last: deque[Operation] = deque(maxlen=20)
        ring = seed % 4 == RING_SEEDS and has("dirty_ring")
        vm = (Ringed if ring else Tortured)(memory, cpus, pages)
        try:
            tables = memory > 3 * GIB  # of the guest's own, for what lies above
            size = (memory // BLOCK_SIZE - 1 - _SCRATCH_BLOCKS - tables) * BLOCK_SIZE
            vm.load("verify", f"seed={seed} order=random zeros={ZEROS} size={size}")
            self.subject = Subject(vm, ring, seed if seed % 4 == SWAP_SEEDS else None)
            vm.start()
            patience = PATIENCE + memory / FIRST_TOUCH
            self._await(lambda: self.vm.progress().passes > 0, "the guest's first pass", patience)
        except BaseException:
            vm.close()
            raise

    @property
    def vm(self) -> VM:
        """The one that is under torture now: a restored one takes the place of another."""
        return self.subject.vm

    def __enter__(self) -> Torture:
        return self

    def __exit__(self, *_: object) -> None:
        self.subject.close()

    @property
    def operations(self) -> int:
        """How many were done."""
        return self.done.total()

    def run(self, seconds: float, show: Callable[[Torture], None] = lambda torture: None, most: int = 0) -> None:
        """Operations for so long, at most `most` if that is given, and the last check. show: called now and then."""
        with _merging():
            self._run(seconds, show, most)

    def _run(self, seconds: float, show: Callable[[Torture], None], most: int) -> None:
        end = time.monotonic() + seconds
        for operation in sequence(self.seed, self.subject.pages):
            if time.monotonic() >= end or (most and operation.number > most):
                break
            self.do(operation)
            if operation.number % CHECK_EVERY == 0:
                self.check()
            if operation.number % 50 == 0:
                show(self)
        self.finish()

    def do(self, operation: Operation) -> None:
        """One operation, and a look at the guest."""
        self._last.append(operation)
        self.subject.drop_views(operation.number)
        kind = KINDS[operation.kind]
        with self._blamed():
            if self.subject.follow(operation.number) and kind.here:
                self.subject.refused[operation.kind] += 1
            else:
                kind.do(self.subject, operation)
            self._look_at_guest()
        self.done[operation.kind] += 1

    # ---- checks ----

    def check(self) -> None:
        """Looks at everything, with all of it in the guest and with all of it away."""
        with self._blamed():
            self._check()

    def _check(self) -> None:
        """Every vCPU must get on. Then, paused: books, memory; all of it is taken out; and the same again."""
        self.subject.end_move()
        self.subject.resume()
        before = [(work.passes, work.index) for work in self.vm.progress().work]
        self._await(lambda: all(_moved(self.vm, before)), "the next page of each vCPU")
        self.vm.pause()
        self.subject.views.clear()
        self._check_books()
        first = self._check_contents()
        if self.subject.traced:
            self._check_trace()
        self._await(self._all_removed, "all pages to be away, where nothing runs")
        self._check_books()
        if self._check_contents() != first:
            raise Wrong("RAM has changed while the guest was paused")
        self.checks += 1
        self.vm.resume()

    def finish(self) -> None:
        """The last check. Then all blocks are merged, and must be mapped large by KVM where the guest touched them."""
        with self._blamed():
            self._check()
            self._check_merged()

    def _all_removed(self) -> bool:
        for page in range(0, self.subject.pages, BLOCK_PAGES):
            self.subject.engine.remove(page, min(BLOCK_PAGES, self.subject.pages - page))
        return self.subject.engine.count().present == 0

    def _check_merged(self) -> None:
        self.subject.stop_trace()
        self.subject.store.limit(0)
        for block in range(self.subject.pages // BLOCK_PAGES):
            self.subject.engine.install(block * BLOCK_PAGES, BLOCK_PAGES)
            insist(partial(self.subject.engine.merge, block))
        self.subject.engine.install(0, self.subject.pages)
        passes = self.vm.progress().passes + 2
        self._await(lambda: self.vm.progress().passes >= passes, "a pass over merged memory")
        self.vm.pause()
        count, found = self.subject.engine.count(), self.vm.mappings()
        if count.away or count.armed or count.large < self.subject.pages // BLOCK_PAGES * BLOCK_PAGES:
            raise Wrong(f"all blocks are merged, and the kernel has {count!r}")
        if found["pages_2m"] < self.vm.progress().region_size // BLOCK_SIZE and found["pages_4k"]:
            raise Wrong(f"all blocks are merged and touched, and KVM maps {found}")
        self._check_books()
        self._check_contents()

    def _check_contents(self) -> str:
        check_contents(self.vm, self.subject.written)
        return ram_hash(self.vm.memory)

    def _check_books(self) -> None:
        check_books(self.subject.memory, self.subject.store, armed=True if self.subject.watched else None)

    def _check_trace(self) -> None:
        """Every page that has changed since the last time must have been reported."""
        import numpy as np

        self.subject.collect()
        now = b"".join(self.vm.memory.read(region.gpa, region.size) for region in self.vm.memory.regions)
        if self.subject.baseline is not None:
            changed = (_words(now) != _words(self.subject.baseline)).any(axis=1)
            reported = np.unpackbits(np.frombuffer(self.subject.dirty, np.uint8), bitorder="little")[: len(changed)]
            if len(missed := np.flatnonzero(changed & (reported == 0))):
                raise Wrong(f"{len(missed)} pages were written and not traced: {missed[:8].tolist()}")
        self.subject.baseline = now
        self.subject.dirty[:] = bytes(len(self.subject.dirty))

    def _look_at_guest(self) -> None:
        result = self.vm.wait(0)
        if result.reason == "migrated" and self.subject.move is not None:
            return  # to where the next operation finds it
        if result.reason != "timeout":
            raise Wrong(f"the guest has ended: {result!r} {self.vm.printed.strip()!r}")

    def _await(self, is_so: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            self._look_at_guest()
            if time.monotonic() > end:
                raise Wrong(f"waited {seconds:.0f} s for {what}")
            os.sched_yield()

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Whatever goes wrong within is a TortureFailure."""
        try:
            yield
        except Exception as error:
            sentence = str(error) if type(error) is Wrong else f"{type(error).__name__}: {error}"
            raise TortureFailure(sentence, self.seed, self._last) from error


@contextmanager
def _merging() -> Iterator[None]:
    """Within its `with` the kernel merges equal pages of blocks that are shared, where it can be had to do so."""
    with ExitStack() as stack:
        with suppress(HostError):  # it cannot, or another process sees to it just now
            stack.enter_context(ksm_running(start=True, how={"pages_to_scan": 2000, "sleep_millisecs": 10}, patience=0))
        yield


def _moved(vm: VM, before: list[tuple[int, int]]) -> list[bool]:
    return [(work.passes, work.index) != then for work, then in zip(vm.progress().work, before, strict=True)]


def _words(ram: bytes) -> NDArray[np.uint64]:
    import numpy as np

    return np.frombuffer(ram, np.uint64).reshape(-1, PAGE_SIZE // 8)
