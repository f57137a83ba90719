# classes_model.py: what the guest `classes` (guest/classes.c) has in its memory, and of which class; for tests.
# Pages are numbered from the guest's first, which progress.region_gpa is; their table lies in front, from 2 MiB on.
"""`Classes`: is every page as it must be? How many are of each class, and what is each?"""

from __future__ import annotations

from pyvmm.devices.virtio.classes import CLASSES
from pyvmm.errors import StateError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, Gpa
from pyvmm.testing.stamps import GOLDEN, Contents, WrongPage, compare, keys, mix, words_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pyvmm.machine import Progress
    from pyvmm.memory import GuestMemory

FREE, FIXED, HEAP, CLEAN, DIRTY, GIVEN = range(6)
_GROUPS = (0, 1, 2, 3, 3, 0)
_START = Gpa(BLOCK_SIZE)


class Classes:
    """A guest `classes` that stands still. kinds, ids, versions: of each of its pages, by its table; heap, cache, hot:
    its options. Raises StateError where the guest is another one or has not started."""

    def __init__(self, memory: GuestMemory, progress: Progress, heap: int = 25, cache: int = 40, hot: int = 25) -> None:
        import numpy as np

        if progress.guest != "classes" or progress.status == "booting":
            raise StateError(f"the guest {progress.guest!r} ({progress.status}) is not the guest classes at work")
        self._memory, self._progress = memory, progress
        self.pages = progress.region_size // PAGE_SIZE
        self.first = memory.page_of(Gpa(progress.region_gpa))
        """The number in RAM of its page 0."""
        table = np.frombuffer(memory.read(_START, 8 * self.pages), np.uint32).reshape(-1, 2)
        self.kinds: NDArray[np.uint32] = table[:, 0] >> np.uint32(28)
        self.ids: NDArray[np.uint32] = table[:, 0] & np.uint32(0xFFFFFFF)
        self.versions: NDArray[np.int64] = table[:, 1].astype(np.int64)
        self._hot_heap = self.pages * heap // 100 * hot // 100
        self._hot_files = self.pages * cache // 100 * hot // 100

    def given(self) -> list[int]:
        """The pages that it has given up, by their numbers in RAM."""
        import numpy as np

        return [self.first + int(page) for page in np.flatnonzero(self.kinds == GIVEN)]

    def classes(self) -> NDArray[np.uint8]:
        """The place in CLASSES of each page; len(CLASSES) for one that was given up."""
        import numpy as np

        heap, file = self.kinds == HEAP, (self.kinds == CLEAN) | (self.kinds == DIRTY)
        hot = np.where(heap, self.ids < self._hot_heap, self.ids < self._hot_files) | (self.kinds == DIRTY)
        found = np.full(self.pages, len(CLASSES), np.uint8)
        for name, these in (
            ("free", self.kinds == FREE), ("unreclaimable", self.kinds == FIXED),
            ("active anonymous", heap & hot), ("inactive anonymous", heap & ~hot),
            ("active buffer", file & hot), ("inactive buffer", file & ~hot),
        ):  # fmt: skip
            found[these] = CLASSES.index(name)
        return found

    def sizes(self) -> dict[str, int]:
        """Bytes by class. All memory that is not the region's cannot be reclaimed."""
        import numpy as np

        count = np.bincount(self.classes(), minlength=len(CLASSES) + 1)
        found = {name: int(count[place]) * PAGE_SIZE for place, name in enumerate(CLASSES)}
        found["unreclaimable"] += self._memory.size - self.pages * PAGE_SIZE
        return found

    def check(self) -> list[WrongPage]:
        """Compares every page that has a content with what it must be; [] is good. The page that is touched may have
        each 8-byte word of the version in the table or of the next one."""
        import numpy as np

        groups = np.array(_GROUPS, np.uint64)[self.kinds]
        of_page = keys(self._progress.seed, groups << np.uint64(32) | self.ids.astype(np.uint64))
        steps = np.full(self.pages, GOLDEN, np.uint64)
        bases = mix(of_page + self.versions.astype(np.uint64))
        at, other = self._progress.work[0].index, {}
        if self._progress.status != "done":
            one = slice(at, at + 1)
            after = self.versions[one].astype(np.uint64) + np.uint64(1)
            other[at] = words_of(mix(of_page[one] + after), steps[one])[0]
        contents = Contents(bases, steps, self.versions, groups != 0)
        skip = (Gpa(self._progress.region_gpa) - _START) // PAGE_SIZE
        return compare(self._memory, contents, other, lambda words, right: "", skip)
