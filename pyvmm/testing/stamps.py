# stamps.py: page contents that guests can compute again (guest/lib/stamp.h), on arrays; memory compared with them.
# Page numbers count a guest's RAM from 2 MiB on, and go on behind the hole below 4 GiB. uint64 wraps as in C.
"""`mix`, `shuffled`: the guests' random numbers. `compare`: is each page of a stopped guest as it must be?"""

from __future__ import annotations

from pyvmm.errors import StateError
from pyvmm.layout import BLOCK_SIZE, GIB, HOLE_END, PAGE_SIZE, Gpa
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    from pyvmm.memory import GuestMemory

    U64: TypeAlias = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
WORDS = PAGE_SIZE // 8
CHUNK = BLOCK_SIZE // PAGE_SIZE
"""Pages compared at a time: 2 MiB stay in the cache."""
_EXPLAINED = 8
"""Wrong pages of which the origin is searched for: it takes long."""


class WrongPage(Record):
    """A page that is not as it must be. offset: of the first wrong byte in it; expected, found: that byte.

    version: the version that is expected. text: all that, and what the page looks like, for people.
    """

    __slots__ = ("expected", "found", "gpa", "offset", "page", "text", "version")

    def __init__(self, page: int, gpa: Gpa, version: int, offset: int, expected: int, found: int, text: str) -> None:
        self.page = page
        self.gpa = gpa
        self.version = version
        self.offset = offset
        self.expected = expected
        self.found = found
        self.text = text


# ---- the random numbers of guest/lib/lib.h ----


def mix(x: U64) -> U64:
    """lib.h's mix(), of each."""
    x = x.copy()
    x ^= x >> 30
    x *= 0xBF58476D1CE4E5B9
    x ^= x >> 27
    x *= 0x94D049BB133111EB
    x ^= x >> 31
    return x


def mix_one(x: int) -> int:
    """lib.h's mix(), of one number, which is cut to 64 bits."""
    x &= MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def shuffled(count: int, key: int) -> U64:
    """lib.h's shuffled() of 0..count-1."""
    import numpy as np

    bits = (count - 1).bit_length()
    mask, shift = (1 << bits) - 1, bits // 2 + 1
    x = np.arange(count, dtype=np.uint64)
    outside = np.arange(count)
    while len(outside):
        y = (x[outside] * (key | 1) + (key >> 32)) & mask
        y ^= y >> shift
        y = (y * GOLDEN) & mask
        y ^= y >> shift
        x[outside] = y
        outside = outside[y >= count]
    return x


def keys(seed: int, pages: U64) -> U64:
    """The key of each page: what its contents follow from."""
    return mix(pages * GOLDEN + mix_one(seed))


# ---- a guest's memory ----


class Contents:
    """What each page must be like: word j of page i is base[i] + j * step[i]; versions[i] tells which content that is.

    A page of which `known` is False is not looked at.
    """

    def __init__(self, bases: U64, steps: U64, versions: NDArray[np.int64], known: NDArray[np.bool_]) -> None:
        self.bases = bases
        self.steps = steps
        self.versions = versions
        self.known = known

    def words(self, page: int) -> U64:
        """A page as it must be."""
        right: U64 = words_of(self.bases[page : page + 1], self.steps[page : page + 1])[0]
        return right


def words_of(bases: U64, steps: U64) -> U64:
    """words[page, word]."""
    import numpy as np

    right = np.multiply.outer(steps, np.arange(WORDS, dtype=np.uint64))
    right += bases[:, None]
    return right


def compare(
    memory: GuestMemory,
    contents: Contents,
    other: dict[int, U64],
    looks: Callable[[U64, U64], str],
    skip: int = 0,
) -> list[WrongPage]:
    """The pages that are not as they must be. Pages of `contents` begin `skip` pages behind 2 MiB.

    other: pages that may have each word as they must be or as it is there. looks: words of a wrong page and what they
    should be -> what they may come from, "" or ", looks like ...".
    """
    import numpy as np

    wrong: list[WrongPage] = []
    for first, gpa, words in chunks(memory, len(contents.bases), skip):
        part = slice(first, first + len(words))
        differs = (words != words_of(contents.bases[part], contents.steps[part])).any(axis=1)
        for i in np.flatnonzero(differs & contents.known[part]):
            page, right = first + int(i), contents.words(first + int(i))
            if page in other and bool(((words[i] == right) | (words[i] == other[page])).all()):
                continue
            origin = looks(words[i], right) if len(wrong) < _EXPLAINED else ""
            wrong.append(
                _describe(words[i], right, page, gpa + int(i) * PAGE_SIZE, int(contents.versions[page]), origin)
            )
    return wrong


def chunks(memory: GuestMemory, pages: int, skip: int = 0) -> Iterator[tuple[int, Gpa, U64]]:
    """(first page, its address, words[page, word]) of `pages` pages of the guest, from `skip` pages behind 2 MiB on."""
    import numpy as np

    first = -skip
    for start, end in _ranges(memory):
        at = start
        while at < end:
            count = min(CHUNK, (end - at) // PAGE_SIZE, -first if first < 0 else pages - first)
            if count == 0:
                return
            if first >= 0:
                data = memory.read(Gpa(at), count * PAGE_SIZE)
                yield first, Gpa(at), np.frombuffer(data, np.uint64).reshape(count, WORDS)
            first += count
            at += count * PAGE_SIZE
    if first < pages:
        raise StateError(f"the guest speaks of {pages} pages, of which {max(first, 0)} exist")


def _ranges(memory: GuestMemory) -> Iterator[tuple[int, int]]:
    """From where to where the guest finds RAM (memory_region() in guest/lib/memory.c)."""
    low, *high = memory.regions
    high_bytes = min(sum(region.size for region in high), 508 * GIB)
    tables = -(-high_bytes // GIB) * PAGE_SIZE  # the guest's own, for what lies above 4 GiB, in whole blocks
    yield BLOCK_SIZE, low.size - -(-tables // BLOCK_SIZE) * BLOCK_SIZE
    yield HOLE_END, HOLE_END + high_bytes


def _describe(words: U64, right: U64, page: int, gpa: Gpa, version: int, looks: str) -> WrongPage:
    import numpy as np

    found, expected = words.view(np.uint8), right.view(np.uint8)
    at = int(np.flatnonzero(found != expected)[0])
    text = (
        f"page {page} (gpa {gpa.value:#x}) byte {at:#x}: expected {expected[at]:#x}, found {found[at]:#x}, "
        f"version {version} expected; {np.count_nonzero(words != right)} of {WORDS} words are wrong{looks}"
    )
    return WrongPage(page, gpa, version, at, int(expected[at]), int(found[at]), text)
