# balloon.py: virtio memory balloon (virtio 1.2, section 5.5), with statistics by class, and classes of single pages.
"""`Balloon`. Frames are pages of 4 KiB by their guest-physical address; sizes in bytes, times in seconds."""

from __future__ import annotations

import random
import struct
import threading
import time
import zlib
from collections import Counter

from pyvmm.devices.virtio.classes import (
    CLASSES,
    ENTRY_SIZE,
    MAX_ENTRIES,
    UNKNOWN,
    classes_of,
    extrapolated,
    parse,
    refaults_of,
)
from pyvmm.devices.virtio.model import Model
from pyvmm.errors import BadInput, StateError
from pyvmm.layout import PAGE_SIZE, format_size
from pyvmm.memory.balloon import DEFLATE, FREE, INFLATE, change, frames_in, runs_of
from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.devices.virtio.queue import Buffers, Queue
    from pyvmm.memory import GuestMemory

F_MUST_TELL_HOST, F_STATS, F_DEFLATE_ON_OOM, F_REPORTING = 1 << 0, 1 << 1, 1 << 2, 1 << 5
F_CLASSES = 1 << 63
"""Ours, one of those that are a device's own (2.2): queue Q_CLASSES is there."""
Q_INFLATE, Q_DEFLATE, Q_STATS, Q_REPORTING, Q_REPORTING_TOO, Q_CLASSES = range(6)
"""Without free page hints the specification has reporting at 4, and Linux and QEMU have it at 3: both are it."""
PIECE = 64 << 10
"""Bytes of frames that are done at once: in between the device may be held."""
MAX_ASKED = 256
"""Pages that are asked about at once."""
_QUESTION = struct.Struct("<II")
_STATE_LIMIT = 1 << 26


class Balloon(Model):
    """`target`: what the guest is to have given up, of which it does what it can. Any thread may set and ask.

    counts: pages inflated, deflated and reported; "stayed": that the host used; "strange": frames that are no RAM;
    "blocks": of 2 MiB that went whole.
    """

    name, id, queues = "balloon", 5, 6
    features = F_MUST_TELL_HOST | F_STATS | F_DEFLATE_ON_OOM | F_REPORTING | F_CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._target = self._actual = 0
        self._done = [0] * self.queues  # bytes of the request at hand that are done
        self._kept: bytes | None = None  # pages that restore() told of, until the guest runs
        self._news = threading.Condition()  # of all that follows
        self._stats: dict[int, int] = {}
        self._stats_at = 0.0  # time.monotonic(); 0.0: never
        self._stats_read = self._stats_wanted = False  # read: the buffer that the driver has posted
        self._question: list[int] = []
        self._number = self._sent = 0  # of the question; sent: the number of the last one that went
        self._classes: list[int] | None = None

    def attach(self, memory: GuestMemory) -> None:
        if memory.hugetlb:
            raise BadInput("a balloon takes pages out of memory, and those of hugetlb memory stay: use --pages 2m")
        self._memory = memory

    # ---- for people and schedulers ----

    @property
    def target(self) -> int:
        """Bytes that the guest is to give up in all. Raises BadInput for more than there is."""
        return self._target * PAGE_SIZE

    @target.setter
    def target(self, target: int) -> None:
        if not 0 <= target <= self._memory.size:
            raise BadInput(f"a balloon of {format_size(target)}: the VM has {format_size(self._memory.size)}")
        if self._target != target // PAGE_SIZE:
            self._target = target // PAGE_SIZE
            self.config_changed()

    @property
    def actual(self) -> int:
        """Bytes that the guest says it has given up."""
        return min(self._actual * PAGE_SIZE, self._memory.size)

    @property
    def away(self) -> int:
        """Bytes that it has given up and not touched since: they take no memory of the host."""
        return self._memory.engine.homes()["balloon"] * PAGE_SIZE

    def stats(self, fresh: float | None = None) -> dict[int, int]:
        """What the driver last told, value by tag; fresh: asks it, and waits so long at most for the answer."""
        with self._news:
            if fresh is not None:
                before = self._stats_at
                self._stats_wanted = True
                self.kick()
                self._news.wait_for(lambda: self._stats_at != before, fresh)
            return dict(self._stats)

    def classes(self, fresh: float | None = None) -> dict[str, int | None]:
        """Bytes by class, likewise. None: not known."""
        return classes_of(self.stats(fresh), self._memory.size)

    def refaults(self) -> int | None:
        """Pages that the guest has read again, by what it last told."""
        return refaults_of(self.stats())

    def classify(self, frames: Sequence[int], timeout: float = 1.0) -> list[int] | None:
        """Asks the driver what these pages are: places in CLASSES, or greater. None: it does not say. One at a time."""
        if not 1 <= len(frames) <= MAX_ASKED:
            raise BadInput(f"{len(frames)} pages to be classified: ask for 1 to {MAX_ASKED}")
        with self._news:
            self._question, self._classes = list(frames), None
            self._number = number = self._number % 0xFFFF_FFFF + 1
            self._news.notify_all()  # who asked before gives up
            self.kick()
            self._news.wait_for(lambda: self._classes is not None or self._number != number, timeout)
            found = self._classes if self._number == number else None
            if self._number == number:
                self._question = []
            return found

    def sample(self, count: int = MAX_ASKED, seed: int | None = None, timeout: float = 1.0) -> dict[str, int] | None:
        """Bytes by class, by so many pages drawn at random. None: the driver does not say."""
        rng = random.Random(seed)
        pages = [rng.randrange(self._memory.size // PAGE_SIZE) for _ in range(count)]
        found: list[int] = []
        for at in range(0, count, MAX_ASKED):
            frames = [self._memory.gpa_of(page).value // PAGE_SIZE for page in pages[at : at + MAX_ASKED]]
            part = self.classify(frames, timeout)
            if part is None:
                return None
            found += part
        return extrapolated(found, self._memory.size)

    # ---- the driver's ----

    def config(self) -> bytes:
        return struct.pack("<IIII", self._target, self._actual, 0, 0)

    def fixed(self) -> bytes:
        return b""

    def write_config(self, offset: int, value: int, size: int) -> None:
        if offset == 4 and size == 4:
            self._actual = value

    def serve(self, index: int, queue: Queue, features: int) -> bool | None:
        if index in (Q_INFLATE, Q_DEFLATE):
            return self._frames(index, queue)
        if index == Q_STATS and features & F_STATS:
            return self._statistics(queue)
        if index in (Q_STATS, Q_REPORTING, Q_REPORTING_TOO) and features & F_REPORTING:
            return self._reported(index, queue)
        return self._classified(queue) if index == Q_CLASSES and features & F_CLASSES else None

    def _frames(self, index: int, queue: Queue) -> bool | None:
        chain = queue.take()
        if chain is None:
            return None
        data = chain.readable.part(self._done[index], PIECE).read()
        runs, strange = runs_of(self._memory, frames_in(data))
        self._change(runs, INFLATE if index == Q_INFLATE else DEFLATE)
        self.counts["strange"] += strange
        return self._piece_done(index, queue, chain.head, chain.readable.size, len(data))

    def _reported(self, index: int, queue: Queue) -> bool | None:
        """Free pages: the buffers themselves."""
        chain = queue.take()
        if chain is None:
            return None
        frames: list[int] = []
        piece = chain.writable.part(self._done[index], PIECE // 4 * PAGE_SIZE)
        for start, size in piece.parts:  # wholly RAM, as all buffers are
            frames += range(-(-start // PAGE_SIZE), (start + size) // PAGE_SIZE)
        self._change(runs_of(self._memory, frames)[0], FREE)
        return self._piece_done(index, queue, chain.head, chain.writable.size, piece.size)

    def _piece_done(self, index: int, queue: Queue, head: int, size: int, done: int) -> bool:
        self._done[index] += done
        if self._done[index] < size and done:
            return False  # the rest with the next call; after a restore() all of it once more, which changes nothing
        self._done[index] = 0
        return queue.give(head, 0)

    def _change(self, runs: list[tuple[int, int]], how: int) -> None:
        if not runs:
            return
        found = change(self._memory, runs, how)
        self.counts[{INFLATE: "inflated", DEFLATE: "deflated", FREE: "reported"}[how]] += (
            found.back if how == DEFLATE else found.gone
        )
        self.counts["stayed"] += found.stayed
        self.counts["blocks"] += found.blocks

    def _statistics(self, queue: Queue) -> bool | None:
        """The driver posts a buffer with statistics; it gets it back when newer ones are wanted."""
        if self._stats_read and not self._stats_wanted:
            return None
        chain = queue.take()
        if chain is None:
            return None
        if not self._stats_read:
            told = parse(chain.readable.part(0, MAX_ENTRIES * ENTRY_SIZE).read())
            with self._news:
                self._stats_read = True
                if self._stats_at or told:  # the first buffer may be empty
                    self._stats, self._stats_at = told, time.monotonic()
                    self._news.notify_all()
            return False
        wants = queue.give(chain.head, 0)
        self._stats_read = self._stats_wanted = False
        return wants

    def _classified(self, queue: Queue) -> bool | None:
        """Each request has the answer to the question before, if there was one, and room for the next question."""
        chain = queue.take()
        if chain is None:
            return None
        self._answered(chain.readable)
        with self._news:
            if not self._question or self._sent == self._number:
                return None
            number, frames = self._number, self._question
        data = struct.pack(f"<II{len(frames)}I", number, len(frames), *frames)
        if chain.writable.size < len(data):
            return queue.give(chain.head, 0)  # nobody is asked in a buffer that is too small
        chain.writable.write(data)
        wants = queue.give(chain.head, len(data))
        self._sent = number
        return wants

    def _answered(self, buffers: Buffers) -> None:
        data = buffers.part(0, _QUESTION.size + MAX_ASKED).read()
        if len(data) < _QUESTION.size:
            return
        number, count = _QUESTION.unpack_from(data)
        found = list(data[_QUESTION.size :][:count])
        with self._news:
            if number == self._number and self._sent == number and len(found) == len(self._question) and found:
                self._classes = [each if each < len(CLASSES) else UNKNOWN for each in found]
                self._question = []
                self._news.notify_all()

    def reset(self) -> None:
        """What was ballooned stays away, and comes as zeros where the next driver touches it."""
        self._done = [0] * self.queues
        self._actual = 0
        with self._news:
            self._stats_read = False
            self._stats, self._stats_at = {}, 0.0
            self._question, self._sent = [], 0

    # ---- elsewhere ----

    def activate(self) -> None:
        """What had been given up is that here too: it was zeros, and nobody has touched it. Raises HostError."""
        self._memory.engine.equip()  # a host that cannot take pages away says so now, not when the guest gives them
        kept, self._kept = self._kept, None
        if kept is None:
            return
        if kept:
            from pyvmm.memory.pageset import PageSet

            pages = PageSet(self._memory.size // PAGE_SIZE)
            pages.put(0, pages.pages, kept)
            self._change(list(pages.runs()), INFLATE)
        self.config_changed()  # the target may have changed just when this was saved

    def save(self) -> State:
        """With the pages that are away as the guest has given them up, a bit each, packed; none of them: no bytes."""
        bits = self._kept
        if bits is None:
            engine = self._memory.engine
            bits = engine.at_home("balloon").bytes() if engine.homes()["balloon"] else b""
        packed = zlib.compress(bits, 1) if bits else b""
        return State("virtio-balloon", 1, {"target": self._target, "actual": self._actual, "pages": packed})

    def restore(self, state: State) -> None:
        self.require(state)
        pages = self._memory.size // PAGE_SIZE
        target, actual = state.integer("target", high=pages), state.integer("actual", high=0xFFFF_FFFF)
        packed, bits = state.blob("pages", limit=_STATE_LIMIT), b""
        if packed:
            unpacking = zlib.decompressobj()
            try:
                bits = unpacking.decompress(packed, -(-pages // 8) + 1)
            except zlib.error:
                bits = b""
            if len(bits) != -(-pages // 8) or not unpacking.eof or unpacking.unused_data:
                raise StateError("virtio-balloon state: what it says of pages is not of a VM of this size")
            if pages % 8 and bits[-1] >> pages % 8:
                raise StateError("virtio-balloon state: it speaks of pages that the VM does not have")
        self._target, self._actual, self._kept = target, actual, bits
        self._stats_read = False
