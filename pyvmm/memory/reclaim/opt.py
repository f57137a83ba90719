# opt.py: the least that any victim policy can cost on a trace: Belady's rule, which knows the future: what goes is the
# page that is needed again last. Unit: small pages.
"""`optimum()`."""

from __future__ import annotations

from array import array
from heapq import heapify, heappop, heappush

from pyvmm.memory.reclaim.simulator import Outcome, check_limit
from pyvmm.memory.reclaim.trace import Duplicates

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory.reclaim.trace import Trace

NAME = "OPT"


def optimum(trace: Trace, limit: int) -> Outcome:
    """No policy reads fewer pages from swap than this one, whether it brings pages or whole blocks, shares or does not.

    It may have fewer *faults* than this, where one fault brings a block. Bytes written are not bounded: None.
    """
    check_limit(trace, limit, large=False)
    lives = _lives(trace)
    outcome = Outcome(NAME)
    outcome.touches = len(trace)
    outcome.faults, outcome.refaults = _replay(lives, limit)
    outcome.read = outcome.refaults
    for name in ("unshared", "written", "saved", "zeros", "shared", "blocks", "broken", "large"):
        setattr(outcome, name, None)
    return outcome


def _lives(trace: Trace) -> array[int]:
    """The touches that need a page in memory, by its number. A page that has been marked as a duplicate may be given up
    for nothing and read at its twin; when it is written, it comes from there for nothing too. That is another page
    then, whose first touch costs nothing."""
    duplicates = [(place, event) for place, event in trace.events if isinstance(event, Duplicates)]
    if not duplicates:
        return array("I", [word >> 1 for word in trace.words])
    lives, marked, now, fresh, done = array("I"), set[int](), dict[int, int](), trace.pages, 0
    for place, event in [*duplicates, (len(trace), None)]:
        for word in trace.words[done:place]:
            page = word >> 1
            if page in marked:
                if not word & 1:
                    continue
                marked.remove(page)
                now[page] = fresh
                fresh += 1
            lives.append(now.get(page, page))
        done = place
        if event is not None:
            marked.update(event.pages())
    return lives


def _replay(pages: array[int], limit: int) -> tuple[int, int]:
    """(faults, refaults)."""
    never = len(pages)
    following = _following(pages)
    here: dict[int, int] = {}  # page in memory -> its next touch
    seen: set[int] = set()
    furthest: list[int] = []  # -(next touch << 32 | page), some of them out of date
    faults = refaults = 0
    for place, page in enumerate(pages):
        if page not in here:
            faults += 1
            refaults += page in seen
            seen.add(page)
            if len(here) == limit:
                _evict(here, furthest)
        after = following[place]
        here[page] = after
        heappush(furthest, -(after << 32 | page))
        if len(furthest) > 2 * limit + never // 8 + 64:  # most are out of date
            furthest = [-(then << 32 | each) for each, then in here.items()]
            heapify(furthest)
    return faults, refaults


def _evict(here: dict[int, int], furthest: list[int]) -> None:
    while True:
        entry = -heappop(furthest)
        page = entry & 0xFFFFFFFF
        if here.get(page) == entry >> 32:
            del here[page]
            return


def _following(pages: array[int]) -> array[int]:
    """For each touch the place of the page's next one; the number of touches where there is none."""
    found = array("Q", bytes(8 * len(pages)))
    last: dict[int, int] = {}
    for place in range(len(pages) - 1, -1, -1):
        page = pages[place]
        found[place] = last.get(page, len(pages))
        last[page] = place
    return found
