# verify_model.py: what the guest `verify` (guest/verify.c) has in its memory, by its progress page; for tests.
# Page numbers count the guest's region: page 0 lies at 2 MiB, and they go on behind the hole below 4 GiB.
"""`check_memory`: is every page of a stopped `verify` as it must be? `ram_hash`: one value for all RAM."""

from __future__ import annotations

import hashlib

from pyvmm.errors import BadInput, StateError
from pyvmm.layout import BLOCK_SIZE, GIB, HOLE_END, PAGE_SIZE, Gpa
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal, TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    from pyvmm.machine import Progress
    from pyvmm.memory import GuestMemory

    Order: TypeAlias = Literal["seq", "random"]
    U64: TypeAlias = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_WORDS = PAGE_SIZE // 8
_CHUNK = 512
"""Pages compared at a time: 2 MiB stay in the cache."""
_EXPLAINED = 8
"""Wrong pages of which the origin is searched for: it takes long."""


class WrongPage(Record):
    """A page that is not as it must be. offset: of the first wrong byte in it; expected, found: that byte.

    version: the pass that wrote what is expected. text: all that, and what the page looks like, for people.
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


def expected_page(seed: int, page: int, version: int, zeros: int = 0) -> bytes:
    """The 4096 bytes that `page` has in `version`. zeros: the guest's option, per mille."""
    import numpy as np

    return _content(_keys(seed, np.full(1, page, np.uint64)), np.full(1, version, np.int64), zeros).tobytes()


def version(seed: int, page: int, pass_: int, write: int = 25) -> int:
    """The version of `page` after pass `pass_`: the last pass so far that wrote it. write: the option, per cent."""
    import numpy as np

    return int(_versions(_keys(seed, np.full(1, page, np.uint64)), np.full(1, pass_, np.int64), write)[0])


def check_memory(
    memory: GuestMemory, progress: Progress, *, write: int = 25, zeros: int = 0, order: Order = "seq"
) -> list[WrongPage]:
    """Compares every page of the guest `verify`, which must not be running, with what it must be; [] is good.

    write, zeros, order: the guest's options; the rest is in its progress. The one page that each vCPU may be about to
    write may have each 8-byte word of its old or its new version. Pages not written for the first time are not looked
    at. Raises StateError where the guest is another one or has not started, BadInput for an option that cannot be.
    """
    import numpy as np

    if not 0 <= write <= 100 or not 0 <= zeros <= 1000 or order not in ("seq", "random"):
        raise BadInput(f"write={write}, zeros={zeros}, order={order}: these are not options of the guest verify")
    if progress.guest != "verify" or progress.status == "booting" or progress.region_gpa != BLOCK_SIZE:
        raise StateError(f"the guest {progress.guest!r} ({progress.status}) is not the guest verify at work")
    pages = progress.region_size // PAGE_SIZE
    keys = _keys(progress.seed, np.arange(pages, dtype=np.uint64))
    passes, in_flight = _places(progress, pages, order)
    versions = _versions(keys, passes, write)
    bases, steps = _contents(keys, versions, zeros)
    newest = max((work.passes for work in progress.work), default=0)
    wrong: list[WrongPage] = []
    for first, gpa, words in _chunks(memory, pages):
        part = slice(first, first + len(words))
        for i in _differing(words, bases[part], steps[part], passes[part]):
            page = first + i
            if page in in_flight and _may_be(words[i], keys, page, in_flight[page], versions, write, zeros):
                continue
            right = _content(keys[page : page + 1], versions[page : page + 1], zeros)
            looks = _looks(words[i], right, keys, newest) if len(wrong) < _EXPLAINED else ""
            wrong.append(_describe(words[i], right, page, gpa + i * PAGE_SIZE, int(versions[page]), looks))
    return wrong


def ram_hash(memory: GuestMemory) -> str:
    """BLAKE2b of all RAM and of where it lies, in hexadecimal. The guest must not be running."""
    digest = hashlib.blake2b(digest_size=32)
    for region in memory.regions:
        digest.update(f"{region.gpa.value:x}+{region.size:x};".encode())
        for offset in range(0, region.size, _CHUNK * PAGE_SIZE):
            digest.update(memory.read(region.gpa + offset, min(_CHUNK * PAGE_SIZE, region.size - offset)))
    return digest.hexdigest()


# ---- the functions of guest/verify.c, on arrays; uint64 wraps as in C ----


def _mix(x: U64) -> U64:
    x = x.copy()
    x ^= x >> 30
    x *= 0xBF58476D1CE4E5B9
    x ^= x >> 27
    x *= 0x94D049BB133111EB
    x ^= x >> 31
    return x


def _mix_one(x: int) -> int:
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31


def _keys(seed: int, pages: U64) -> U64:
    return _mix(pages * GOLDEN + _mix_one(seed & _MASK))


def _versions(keys: U64, passes: NDArray[np.int64], write: int) -> NDArray[np.int64]:
    """For each page its version after its pass; -1 stays: not written yet."""
    import numpy as np

    if write == 0:
        return np.minimum(passes, 0)
    versions = passes.copy()
    unsure = np.flatnonzero(versions > 0)
    while len(unsure):
        hashes = _mix(~keys[unsure] + versions[unsure].astype(np.uint64) * GOLDEN) % 100
        unsure = unsure[hashes >= write]
        versions[unsure] -= 1
        unsure = unsure[versions[unsure] > 0]
    return versions


def _contents(keys: U64, versions: NDArray[np.int64], zeros: int) -> tuple[U64, U64]:
    """For each page (base, step): its word j is base + j * step."""
    import numpy as np

    bases = _mix(keys + versions.astype(np.uint64))
    steps = np.full(len(keys), GOLDEN, np.uint64)
    if zeros:
        blank = _mix(bases) % 1000 < zeros
        bases[blank] = steps[blank] = 0
    return bases, steps


def _shuffled(count: int, key: int) -> U64:
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


# ---- a guest's memory ----


def _places(progress: Progress, pages: int, order: Order) -> tuple[NDArray[np.int64], dict[int, int]]:
    """The last pass through with each page (-1: none), and {page: pass} of those that a vCPU may be writing."""
    import numpy as np

    passes = np.full(pages, -1, np.int64)
    in_flight = {}
    cpus = len(progress.work)
    for cpu, work in enumerate(progress.work):
        owned = np.arange(cpu, pages, cpus)
        if order == "random":
            owned = owned[_shuffled(len(owned), _mix_one(((_mix_one(progress.seed) ^ _MASK) + work.passes) & _MASK))]
        if work.index >= len(owned):
            raise StateError(f"CPU {cpu} of the guest verify is at page {work.index} of {len(owned)}")
        passes[owned[: work.index]] = work.passes
        passes[owned[work.index :]] = work.passes - 1
        if progress.status != "done":
            in_flight[int(owned[work.index])] = work.passes
    return passes, in_flight


def _chunks(memory: GuestMemory, pages: int) -> Iterator[tuple[int, Gpa, U64]]:
    """(first page, its address, words[page, word]) of the guest's region."""
    import numpy as np

    first = 0
    for start, end in _ranges(memory):
        for at in range(start, end, _CHUNK * PAGE_SIZE):
            count = min(_CHUNK, (end - at) // PAGE_SIZE, pages - first)
            if count == 0:
                return
            data = memory.read(Gpa(at), count * PAGE_SIZE)
            yield first, Gpa(at), np.frombuffer(data, np.uint64).reshape(count, _WORDS)
            first += count
    if first < pages:
        raise StateError(f"the guest verify speaks of {pages} pages, of which {first} exist")


def _ranges(memory: GuestMemory) -> Iterator[tuple[int, int]]:
    """From where to where the guest finds RAM (memory_region() in guest/lib/memory.c)."""
    low, *high = memory.regions
    high_bytes = min(sum(region.size for region in high), 508 * GIB)
    tables = -(-high_bytes // GIB) * PAGE_SIZE  # the guest's own, for what lies above 4 GiB, in whole blocks
    yield BLOCK_SIZE, low.size - -(-tables // BLOCK_SIZE) * BLOCK_SIZE
    yield HOLE_END, HOLE_END + high_bytes


def _differing(words: U64, bases: U64, steps: U64, passes: NDArray[np.int64]) -> list[int]:
    import numpy as np

    right = steps[:, None] * np.arange(_WORDS, dtype=np.uint64)
    right += bases[:, None]
    return [int(i) for i in np.flatnonzero((words != right).any(axis=1) & (passes >= 0))]


def _may_be(words: U64, keys: U64, page: int, pass_: int, versions: NDArray[np.int64], write: int, zeros: int) -> bool:
    """Can a vCPU that is in `pass_` have left this in the page that it writes?"""
    import numpy as np

    key = keys[page : page + 1]
    now = np.full(1, pass_, np.int64)
    if _versions(key, now, write)[0] != pass_:
        return False
    old, new = (_content(key, version, zeros) for version in (versions[page : page + 1], now))
    return bool(((words == old) | (words == new)).all())


def _content(key: U64, version: NDArray[np.int64], zeros: int) -> U64:
    import numpy as np

    bases, steps = _contents(key, version, zeros)
    return bases + np.arange(_WORDS, dtype=np.uint64) * steps


def _describe(words: U64, right: U64, page: int, gpa: Gpa, version: int, looks: str) -> WrongPage:
    import numpy as np

    found, expected = words.view(np.uint8), right.view(np.uint8)
    at = int(np.flatnonzero(found != expected)[0])
    text = (
        f"page {page} (gpa {gpa.value:#x}) byte {at:#x}: expected {expected[at]:#x}, found {found[at]:#x}, "
        f"version {version} expected; {np.count_nonzero(words != right)} of {_WORDS} words are wrong{looks}"
    )
    return WrongPage(page, gpa, version, at, int(expected[at]), int(found[at]), text)


def _looks(words: U64, right: U64, keys: U64, newest: int) -> str:
    """What the first wrong word may come from: zeros, or one of the last 1000 versions of any page."""
    import numpy as np

    word = int(np.flatnonzero(words != right)[0])
    if words[word] == 0:
        return ", looks like zeros"
    base = (words - np.arange(_WORDS, dtype=np.uint64) * GOLDEN)[word]
    for version in range(newest, max(newest - 1000, -1), -1):
        pages = np.flatnonzero(_mix(keys + version) == base)
        if len(pages):
            return f", looks like version {version} of page {pages[0]}"
    return ""
