# swapper_model.py: what the guest `swapper` (guest/swapper.c) has in its frames and on its disk; for tests. It does
# what the guest does, touch by touch. Units: pages, frames and blocks of 4 KiB.
"""`Swapper`: the guest after so many touches, or write-outs; are its memory and its disk as they must be?"""

from __future__ import annotations

from pyvmm.errors import BadInput, StateError
from pyvmm.layout import PAGE_SIZE, Gpa
from pyvmm.record import Record
from pyvmm.testing.stamps import GOLDEN, MASK, WORDS, mix_one

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pyvmm.machine import Progress
    from pyvmm.memory import GuestMemory


class _Entry(Record):
    __slots__ = ("block", "dirty", "frame", "page", "used", "version")

    def __init__(self, page: int) -> None:
        self.page = page
        self.version = 0
        self.frame: int | None = None
        self.block: int | None = None
        self.dirty = self.used = False


class Swapper:
    """All arguments are the guest's options; blocks: of its disk. `touches`, `outs`: how many touches, and write-outs,
    there were; `written`: what the last write-out wrote, (block, page, version) of each."""

    def __init__(
        self, blocks: int, frames: int, pages: int, out: int = 16, read: int = 50, order: str = "random", seed: int = 1
    ) -> None:
        if not 0 < out <= 256 or frames < 2 * out or not 0 < pages <= blocks - out or order not in ("random", "seq"):
            raise BadInput(f"frames={frames} pages={pages} out={out}: not options of the guest swapper")
        self._out, self._read, self._in_order = out, read, order == "seq"
        self._seed = mix_one(seed)
        self._state = mix_one(self._seed)
        self._pages = [_Entry(page) for page in range(pages)]
        self._frames: list[_Entry | None] = [None] * frames
        self._blocks: list[_Entry | None] = [None] * blocks
        self._free = frames
        self._next_frame = self._next_block = self._hand = 0
        self.touches = self.outs = 0
        self.written: list[tuple[int, int, int]] = []

    # ---- what the guest does ----

    def _random_below(self, limit: int) -> int:
        self._state = self._state + GOLDEN & MASK
        return mix_one(self._state) * limit >> 64

    def touch(self) -> None:
        """The next one."""
        count = len(self._pages)
        page = self._pages[self.touches % count if self._in_order else self._random_below(count)]
        writes = self._random_below(100) >= self._read
        if page.frame is None:
            self._bring(page)
        page.used = True
        if writes:
            if page.block is not None:
                self._blocks[page.block] = None
                page.block = None
            page.dirty = True
            page.version += 1
        self.touches += 1

    def _bring(self, page: _Entry) -> None:
        while self._free < self._out:
            self._write_out()
        if page.block is None:
            self._give_frame(page)
            page.dirty = True
            return
        for entry in self._blocks[page.block : page.block + self._out]:
            if entry is None or entry.frame is not None:
                break
            self._give_frame(entry)

    def _give_frame(self, page: _Entry) -> None:
        while self._frames[self._next_frame] is not None:
            self._next_frame = (self._next_frame + 1) % len(self._frames)
        page.frame = self._next_frame
        self._frames[self._next_frame] = page
        self._free -= 1
        self._next_frame = (self._next_frame + 1) % len(self._frames)

    def _write_out(self) -> None:
        victims: list[_Entry] = []
        for _ in range(2 * len(self._frames)):
            if len(victims) == self._out:
                break
            page = self._frames[self._hand]
            self._hand = (self._hand + 1) % len(self._frames)
            if page is not None and page.used:
                page.used = False
            elif page is not None:
                page.used = True
                victims.append(page)
        dirty = [page for page in victims if page.dirty]
        for page in dirty:
            self._give_block(page)
        for page in victims:
            assert page.frame is not None
            self._frames[page.frame] = None
            page.frame = None
            page.dirty = page.used = False
            self._free += 1
        if dirty:
            self.outs += 1
            self.written = [(page.block or 0, page.page, page.version) for page in dirty]

    def _give_block(self, page: _Entry) -> None:
        while self._blocks[self._next_block] is not None:
            self._next_block = (self._next_block + 1) % len(self._blocks)
        page.block = self._next_block
        self._blocks[self._next_block] = page
        self._next_block = (self._next_block + 1) % len(self._blocks)

    def write_outs(self) -> Iterator[list[tuple[int, int, int]]]:
        """Goes on for ever; `written` of each write-out."""
        while True:
            before = self.outs
            self.touch()
            if self.outs > before + 1:
                raise StateError("two write-outs in one touch: this guest has them one by one")
            if self.outs > before:
                yield self.written

    # ---- what must be where ----

    def content(self, page: int, version: int) -> bytes:
        """A page as it must be."""
        import numpy as np

        base = mix_one(mix_one(self._seed + page * GOLDEN) + version)
        words = np.arange(WORDS, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(base)
        return words.tobytes()

    def _in_frames(self) -> list[tuple[int, int] | None]:
        return [None if page is None else (page.page, page.version) for page in self._frames]

    def check(self, memory: GuestMemory, progress: Progress) -> list[str]:
        """Compares all frames of a guest that stands still; [] is good. The touch that it is at may have been done in
        part, so that what that changes may be as before, as after, or as brought. Goes on to that touch."""
        import numpy as np

        if progress.guest != "swapper" or progress.status not in ("running", "done"):
            raise StateError(f"the guest {progress.guest!r} ({progress.status}) is not the guest swapper at work")
        while self.touches < progress.count:
            self.touch()
        before = self._in_frames()
        self.touch()
        after, wrong = self._in_frames(), []
        for frame, (old, new) in enumerate(zip(before, after, strict=True)):
            if old is None:
                continue
            found = np.frombuffer(memory.read(Gpa(progress.region_gpa + frame * PAGE_SIZE), PAGE_SIZE), np.uint64)
            allowed = [old] if new == old else [old, *([] if new is None else [new, (new[0], max(new[1] - 1, 0))])]
            rights = [np.frombuffer(self.content(*each), np.uint64) for each in allowed]
            if not np.any([found == right for right in rights], axis=0).all():
                wrong.append(f"frame {frame}: page {old[0]}, version {old[1]} expected")
        return wrong

    def check_disk(self, read: Callable[[int], bytes], besides: Iterable[int] = ()) -> list[str]:
        """Compares all blocks that pages are in, but for some; read: the bytes of a block. [] is good."""
        skipped = set(besides)
        return [
            f"block {number}: page {page.page}, version {page.version} expected"
            for number, page in enumerate(self._blocks)
            if page is not None and number not in skipped and read(number) != self.content(page.page, page.version)
        ]
