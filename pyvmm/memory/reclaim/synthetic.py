# synthetic.py: access traces that no VM made: patterns of which one knows what a policy should do. Units: small pages.
"""`make()`: a trace of one of `KINDS`. The same arguments give the same trace."""

from __future__ import annotations

from itertools import accumulate
from random import Random

from pyvmm.errors import BadInput
from pyvmm.memory.reclaim.policy import BLOCK_PAGES
from pyvmm.memory.reclaim.trace import MAX_RECORDS, Duplicates, Trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PART = 10_000
"""Touches drawn at a time."""
_WRITES = 0.25
_PHASES = 4


def make(kind: str, pages: int, touches: int, seed: int) -> Trace:
    """A trace of a VM of so many pages, a touch each us, of which a quarter are writes. Raises BadInput."""
    if kind not in KINDS:
        raise BadInput(f"no synthetic trace {kind!r}: choose one of {', '.join(KINDS)}")
    if not 1 <= touches < MAX_RECORDS:
        raise BadInput(f"{touches} touches: 1 to {MAX_RECORDS - 1} can be")
    trace = Trace(pages, seed, f"synthetic {kind}, {touches} touches")
    rng = Random(seed)
    if kind == "mixed":
        _plant(trace, rng)
    drawn = KINDS[kind](pages, touches, rng)
    while len(trace) < touches:
        part = next(drawn)[: touches - len(trace)]
        trace.words.extend([page << 1 | (rng.random() < _WRITES) for page in part])
        trace.deltas.extend([1] * len(part))
    return trace


def _zipf(pages: int, touches: int, rng: Random) -> Iterator[list[int]]:
    """The r-th hottest page has a share of 1 / r; hot pages lie anywhere."""
    order = rng.sample(range(pages), pages)
    weights = list(accumulate(1 / rank for rank in range(1, pages + 1)))
    while True:
        yield rng.choices(order, cum_weights=weights, k=_PART)


def _hotcold(pages: int, touches: int, rng: Random) -> Iterator[list[int]]:
    """An eighth of the blocks has nine tenths of the touches, at an eighth of its pages; others come in each phase."""
    blocks = -(-pages // BLOCK_PAGES)
    order = rng.sample(range(blocks), blocks)
    hot = max(1, blocks // 8)
    for phase in range(1 << 30):
        chosen = [order[(phase * hot + i) % blocks] for i in range(hot)]
        warm = [page for block in chosen for page in _some(block, pages, rng)]
        for _ in range(max(1, touches // _PHASES // _PART)):
            cold = rng.choices(range(pages), k=_PART)
            yield [rng.choice(warm) if rng.random() < 0.9 else page for page in cold]


def _some(block: int, pages: int, rng: Random) -> list[int]:
    size = min(BLOCK_PAGES, pages - block * BLOCK_PAGES)
    return [block * BLOCK_PAGES + place for place in rng.sample(range(size), max(1, size // 8))]


def _scan(pages: int, touches: int, rng: Random) -> Iterator[list[int]]:
    """All pages in order, over and over: what was touched last is needed last."""
    while True:
        for first in range(0, pages, _PART):
            yield list(range(first, min(first + _PART, pages)))


def _mixed(pages: int, touches: int, rng: Random) -> Iterator[list[int]]:
    """Half is zipf's, a quarter hot and cold blocks, a quarter a scan, in pieces of 1000. There are duplicates."""
    parts = [_zipf(pages, touches, rng), _hotcold(pages, touches, rng), _scan(pages, touches, rng)]
    left: list[list[int]] = [[], [], []]
    while True:
        which = rng.choices((0, 1, 2), (2, 1, 1))[0]
        if not left[which]:
            left[which] = next(parts[which])
        piece, left[which] = left[which][:1000], left[which][1000:]
        yield piece


def _plant(trace: Trace, rng: Random) -> None:
    """A quarter of the blocks have duplicates: few or many."""
    for block in range(trace.blocks):
        if block % 4 == 0:
            size = min(BLOCK_PAGES, trace.pages - block * BLOCK_PAGES)
            bits = sum(1 << place for place in rng.sample(range(size), rng.randrange(size + 1)))
            trace.add(Duplicates(block, bits))


KINDS: dict[str, Callable[[int, int, Random], Iterator[list[int]]]] = {
    "zipf": _zipf,
    "hotcold": _hotcold,
    "scan": _scan,
    "mixed": _mixed,
}
