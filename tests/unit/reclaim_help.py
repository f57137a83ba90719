# reclaim_help.py: access traces that hypothesis makes, and policies of tests.
from __future__ import annotations

from hypothesis import strategies as st

from pyvmm.memory.reclaim.policy import BLOCK_PAGES, Block, Policy, Share
from pyvmm.memory.reclaim.trace import Duplicates, Sample, Trace


def trace_of(pages, steps):
    """From (page, write), and events."""
    trace = Trace(pages)
    for step in steps:
        if isinstance(step, tuple):
            trace.touch(*step)
        else:
            trace.add(step)
    return trace


@st.composite
def traces(draw, pages, most=60, events=True):
    """Of few pages, which are the same again and again: in a VM of several blocks the first ones of each."""
    count = draw(pages)
    blocks = -(-count // BLOCK_PAGES)
    some = [
        page for block in range(blocks) for page in range(block * BLOCK_PAGES, block * BLOCK_PAGES + 6) if page < count
    ]
    touch = st.tuples(st.sampled_from(some), st.booleans())
    step = touch
    if events:
        marks = st.tuples(st.sampled_from([Sample, Duplicates]), st.integers(0, blocks - 1), st.integers(0, 63))
        step = touch | marks.map(
            lambda made: made[0](made[1], made[2] & (1 << min(BLOCK_PAGES, count - made[1] * BLOCK_PAGES)) - 1)
        )
    return trace_of(count, draw(st.lists(step, max_size=most)))


class Lru(Policy):
    """What was touched longest ago: one that sees all that a policy can be told of, and checks it."""

    def __init__(self, view):
        super().__init__(view)
        self.order = {}

    def came(self, page):
        assert self.view.resident[page]
        assert page not in self.order
        self.order[page] = True

    def left(self, page):
        assert not self.view.resident[page]
        del self.order[page]

    def touched(self, page, write):
        self.order[page] = self.order.pop(page)

    def victims(self, wanted):
        assert wanted > 0
        while self.order:
            yield next(iter(self.order))


class Chaos(Policy):
    """Any victim that can be."""

    def __init__(self, view):
        super().__init__(view)
        self.marked = {}

    def scanned(self, block, duplicates):
        self.marked[block] = duplicates

    def victims(self, wanted):
        view = self.view
        while view.used:
            block = view.random.choice([block for block, count in enumerate(view.present) if count])
            pages = [
                p for p in range(block * BLOCK_PAGES, min((block + 1) * BLOCK_PAGES, view.pages)) if view.resident[p]
            ]
            bits = self.marked.pop(block, 0)
            if any(bits >> page % BLOCK_PAGES & 1 for page in pages):
                yield Share(block)
            elif view.random.random() < 0.5:
                yield Block(block)
            else:
                yield view.random.choice(pages)
