# simulator.py: replays an access trace through a victim policy, in less memory than the VM has, and counts what that
# costs. Needs no KVM, and moves no byte. Units: small pages, and blocks of 512 of them.
"""`simulate()`; what it finds is an `Outcome`."""

from __future__ import annotations

from array import array
from itertools import accumulate
from random import Random

from pyvmm.errors import BadInput
from pyvmm.memory.reclaim.policy import BLOCK_PAGES, Block, Policy, Share, View, broken
from pyvmm.memory.reclaim.trace import Sample
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyvmm.memory.reclaim.policy import Victim
    from pyvmm.memory.reclaim.trace import Event, Trace

WINDOW = 20_000
"""Touches after which a policy is told how active blocks were, where the trace does not say."""

_NEVER, _HERE, _AWAY, _SHARED = range(4)
"""Where a page is: not touched yet, in memory, swapped out, given up for its twin."""
_ZEROS, _DIRTY, _STORED = range(3)
"""What a page holds: nothing yet; what swap has not; what swap has too."""
_STORES = bytes.maketrans(bytes((_DIRTY,)), bytes((_STORED,)))


class Outcome(Record):
    """What a policy cost. faults: touches that found no page; of these refaults: of pages that had been swapped out,
    and unshared: writes to pages that were shared. read, written: pages from and to swap.

    Pages that went without a write: saved, since swap still had them; zeros, since nobody had touched them; shared,
    since their twin is there. large: blocks that are one large page at the end, of `blocks` that ever were; broken: the
    others. What has no meaning is None.
    """

    __slots__ = ("blocks", "broken", "faults", "large", "name", "read", "refaults", "saved", "shared", "touches",
                 "unshared", "written", "zeros")  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.touches = self.faults = self.refaults = self.read = 0
        self.unshared: int | None = 0
        self.written: int | None = 0
        self.saved: int | None = 0
        self.zeros: int | None = 0
        self.shared: int | None = 0
        self.blocks: int | None = 0
        self.broken: int | None = 0
        self.large: int | None = 0

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def check_limit(trace: Trace, limit: int, large: bool) -> None:
    """Raises BadInput where no policy could do with `limit` pages."""
    least = min(BLOCK_PAGES, trace.pages) if large else 1
    if limit < least:
        raise BadInput(f"a limit of {limit} pages of 4 KiB: at least {least} are needed, to bring one page in")


def simulate(
    trace: Trace,
    policy: type[Policy],
    limit: int,
    *,
    name: str = "",
    seed: int = 0,
    large: bool = True,
    blind: bool = False,
    window: int = WINDOW,
    share: float = 1.0,
) -> Outcome:
    """Replays a trace with `limit` pages of memory. name: of the policy, for people. seed: of what the policy and the
    sampling have at random. large: each block is a large page when it is first touched. blind: touched() is told of
    faults alone. Every `window` touches, sampled() is told of a share of the blocks, unless the trace has samples.

    Raises BadInput for a limit that is too low, and for a policy that fails, in one line.
    """
    check_limit(trace, limit, large)
    if window < 1 or not 0 < share <= 1:
        raise BadInput(f"a window of {window} touches, a share of {share:g}: give 1 or more, and 0 to 1")
    name = name or policy.__name__
    try:
        run = _Run(trace, policy, limit, name, seed, large)
        run.replay(blind, window, share)
    except BadInput:
        raise
    except Exception as error:
        if error.__traceback__ is None or not _is_its(error, policy):
            raise
        path = policy.victims.__code__.co_filename
        raise BadInput(f"policy {name}: {broken(error, path)}") from error
    return run.ended()


def _is_its(error: Exception, policy: type[Policy]) -> bool:
    """Was it raised on behalf of the policy, and not by a mistake here?"""
    trace, files = error.__traceback__, set()
    while trace is not None:
        files.add(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return policy.victims.__code__.co_filename in files


class _Run:
    def __init__(self, trace: Trace, policy: type[Policy], limit: int, name: str, seed: int, large: bool) -> None:
        self.trace = trace
        self.large = large
        self.outcome = Outcome(name)
        self.view = View(trace.pages, limit, seed)
        self.random = Random(~seed)
        self.where = bytearray(trace.pages)
        self.holds = bytearray(trace.pages)
        self.marked = bytearray(trace.pages)
        self.policy = policy(self.view)
        self.told = {
            method: getattr(policy, method) is not getattr(Policy, method) for method in ("came", "left", "touched")
        }

    # ---- the trace ----

    def replay(self, blind: bool, window: int, share: float) -> None:
        """Goes through all of it."""
        events = self.trace.events
        has_samples = any(isinstance(event, Sample) for _, event in events)
        samples = not has_samples and type(self.policy).sampled is not Policy.sampled
        times = array("Q", accumulate(self.trace.deltas))
        self.outcome.touches = len(self.trace.words)
        done = window_begin = at = 0
        for end in self._ends(window if samples else 0):
            self._touches(done, end, times, self.told["touched"] and not blind)
            done = end
            while at < len(events) and events[at][0] <= end:
                self._event(events[at][1])
                at += 1
            if samples and end - window_begin == window:
                self._samples(window_begin, end, share)
                window_begin = end

    def _ends(self, window: int) -> list[int]:
        """Places in the trace at which something happens beside touches, and its end."""
        ends = {len(self.trace.words), *(place for place, _ in self.trace.events)}
        if window:
            ends.update(range(window, len(self.trace.words) + 1, window))
        return sorted(ends)

    def _touches(self, begin: int, end: int, times: array[int], tells: bool) -> None:
        """A million touches a second, so what it uses is at hand."""
        where, holds, marked, touched = self.where, self.holds, self.marked, self.policy.touched
        for place, word in enumerate(self.trace.words[begin:end], begin):
            page, write = word >> 1, word & 1
            if where[page] != _HERE:
                if where[page] == _SHARED and not write:
                    continue  # the twin is read
                self.view.now = times[place]
                self._fault(page)
                if not tells and self.told["touched"]:
                    touched(page, bool(write))
            if write:
                holds[page] = _DIRTY
                marked[page] = 0
            elif not holds[page]:
                holds[page] = _DIRTY
            if tells:
                touched(page, bool(write))

    def _event(self, event: Event) -> None:
        if isinstance(event, Sample):
            self.policy.sampled(event.block, event.bits)
            return
        for page in event.pages():
            self.marked[page] = 1
        first = event.block * BLOCK_PAGES
        marked = self.marked[first : first + BLOCK_PAGES]
        self.policy.scanned(event.block, sum(1 << place for place, mark in enumerate(marked) if mark))

    def _samples(self, begin: int, end: int, share: float) -> None:
        touched: dict[int, int] = {}
        for page in {word >> 1 for word in self.trace.words[begin:end]}:
            block = page // BLOCK_PAGES
            touched[block] = touched.get(block, 0) | 1 << page % BLOCK_PAGES
        for block, present in enumerate(self.view.present):
            if present and (share == 1 or self.random.random() < share):
                self.policy.sampled(block, touched.get(block, 0))

    def ended(self) -> Outcome:
        """The figures, once it is through."""
        self.outcome.large = sum(self.view.large)
        return self.outcome

    # ---- pages that come ----

    def _fault(self, page: int) -> None:
        view, outcome = self.view, self.outcome
        block, before = page // BLOCK_PAGES, self.where[page]
        outcome.faults += 1
        outcome.refaults += before == _AWAY
        if before == _SHARED:
            outcome.unshared = (outcome.unshared or 0) + 1
        if before == _NEVER and self.large:
            view.large[block] = 1
            outcome.blocks = (outcome.blocks or 0) + 1
        first, end = self._extent(block) if view.large[block] else (page, page + 1)
        self._make_room(end - first)
        if before == _AWAY:
            outcome.read += self.holds[first:end].count(_STORED)
        self.where[first:end] = view.resident[first:end] = bytes((_HERE,)) * (end - first)
        view.present[block] += end - first
        view.used += end - first
        if self.told["came"]:
            for each in range(first, end):
                self.policy.came(each)

    def _extent(self, block: int) -> tuple[int, int]:
        first = block * BLOCK_PAGES
        return first, min(first + BLOCK_PAGES, self.view.pages)

    # ---- pages that go ----

    def _make_room(self, pages: int) -> None:
        view = self.view
        wanted = view.used + pages - view.limit
        if wanted <= 0:
            return
        given = self.policy.victims(wanted)
        if not hasattr(given, "__iter__"):
            raise BadInput(f"policy {self.outcome.name}: victims({wanted}) gave {given!r}: give a list, or yield")
        victims: Iterator[Victim] = iter(given)
        vain = 0
        while view.used + pages > view.limit:
            victim = next(victims, None)
            if victim is None:
                missing = view.used + pages - view.limit
                raise BadInput(f"policy {self.outcome.name}: victims({wanted}) ended, and {missing} pages are missing")
            if isinstance(victim, Block):
                self._block(victim.number)
            elif isinstance(victim, Share):
                vain += not self._share(victim.number)
                if vain > view.blocks:  # it would go on for ever
                    raise BadInput(f"policy {self.outcome.name}: Share() of {vain} blocks gave no page")
            else:
                self._page(victim)

    def _page(self, page: int) -> None:
        if not isinstance(page, int) or not 0 <= page < self.view.pages or not self.view.resident[page]:
            raise BadInput(f"policy {self.outcome.name}: {page!r} is no page in memory, and cannot leave it")
        self._break(page // BLOCK_PAGES)
        self._out(page)

    def _block(self, block: int) -> None:
        pages = self._pages_of(block)
        if len(pages) < BLOCK_PAGES:
            for page in pages:
                self._out(page)
            return
        part = slice(pages[0], pages[-1] + 1)  # the same, for all at once
        self._count_out(self.holds[part])
        self.holds[part] = self.holds[part].translate(_STORES)
        self._leave(part, _AWAY)

    def _share(self, block: int) -> int:
        """How many: what was scanned may have been written since, and then there is less or nothing to share."""
        pages = [page for page in self._pages_of(block) if self.marked[page]]
        self._break(block)
        for page in pages:
            self._leave(slice(page, page + 1), _SHARED)
        self.outcome.shared = (self.outcome.shared or 0) + len(pages)
        return len(pages)

    def _pages_of(self, block: int) -> Sequence[int]:
        """Those in memory."""
        view = self.view
        if not isinstance(block, int) or not 0 <= block < view.blocks or not view.present[block]:
            raise BadInput(f"policy {self.outcome.name}: block {block!r} has no page in memory, and cannot leave it")
        first, end = self._extent(block)
        if view.present[block] == end - first:
            return range(first, end)
        return [page for page in range(first, end) if view.resident[page]]

    def _break(self, block: int) -> None:
        if self.view.large[block]:
            self.view.large[block] = 0
            self.outcome.broken = (self.outcome.broken or 0) + 1

    def _out(self, page: int) -> None:
        self._count_out(self.holds[page : page + 1])
        self.holds[page] = _STORES[self.holds[page]]
        self._leave(slice(page, page + 1), _AWAY)

    def _count_out(self, holds: bytearray) -> None:
        outcome = self.outcome
        outcome.written = (outcome.written or 0) + holds.count(_DIRTY)
        outcome.saved = (outcome.saved or 0) + holds.count(_STORED)
        outcome.zeros = (outcome.zeros or 0) + holds.count(_ZEROS)

    def _leave(self, part: slice, to: int) -> None:
        """Pages of one block."""
        view, size = self.view, part.stop - part.start
        self.where[part] = bytes((to,)) * size
        view.resident[part] = bytes(size)
        view.present[part.start // BLOCK_PAGES] -= size
        view.used -= size
        if self.told["left"]:
            for page in range(part.start, part.stop):
                self.policy.left(page)
