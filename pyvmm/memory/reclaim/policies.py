# policies.py: the victim policies that pyvmm brings. A new one is a class here and a row in POLICIES.
# Units: small pages, and blocks of 512 of them.
"""`POLICIES`: name -> class."""

from __future__ import annotations

from pyvmm.memory.reclaim.policy import BLOCK_PAGES, Block, Policy, Share

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.memory.reclaim.policy import Victim, View

_LEAST_DUPLICATES = 16
"""A large page is not broken for fewer."""
_WAY_TO_GO = 8
"""From a free share of 1 / 8 down to none the threshold falls from all of a block to the least."""
_HOT = BLOCK_PAGES // 16
"""So many small pages touched in a window make a block hot."""


def duplicates_needed(free: float) -> int:
    """So many of its 512 pages must be duplicates for a large page to be broken, with that share of memory free."""
    return max(_LEAST_DUPLICATES, int(BLOCK_PAGES * min(1.0, free * _WAY_TO_GO)))


class RandomPages(Policy):
    """Any page, each as likely: what every other policy must be better than."""

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self._pages: list[int] = []
        self._place: dict[int, int] = {}

    def came(self, page: int) -> None:
        """See Policy."""
        self._place[page] = len(self._pages)
        self._pages.append(page)

    def left(self, page: int) -> None:
        """See Policy."""
        last = self._pages.pop()
        place = self._place.pop(page)
        if last != page:  # the last one fills the gap
            self._pages[place] = last
            self._place[last] = place

    def victims(self, wanted: int) -> Iterator[Victim]:
        """See Policy."""
        while self._pages:
            yield self._pages[self.view.random.randrange(len(self._pages))]


class Clock(Policy):
    """A hand goes round over all pages: one that was touched since it last came by is spared once (second chance)."""

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self._touched = bytearray(view.pages)
        self._hand = 0

    def touched(self, page: int, write: bool) -> None:
        """See Policy."""
        self._touched[page] = 1

    def victims(self, wanted: int) -> Iterator[Victim]:
        """See Policy."""
        touched, begin = self._touched, self._hand
        for first, end in ((begin, self.view.pages), (0, begin)) * 2:  # twice round, and each has been a victim
            page = self.view.resident.find(1, first, end)
            while page >= 0:
                if touched[page]:
                    touched[page] = 0
                else:
                    self._hand = page + 1
                    yield page
                page = self.view.resident.find(1, page + 1, end)


class Activity(Clock):
    """What was not touched in the last window, from blocks of which least was (technique T8, US9501422B2).

    A block that nobody touched goes whole; one of low activity is broken, and its other pages go. When nothing is left
    of all that, as Clock, whose hand spares once what a window has shown to be touched.
    """

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self._seen: dict[int, int] = {}
        self._order: Iterator[Victim] = self._ordered()

    def sampled(self, block: int, touched: int) -> None:
        """See Policy."""
        self._seen[block] = touched.bit_count()
        self._order = self._ordered()
        first = block * BLOCK_PAGES
        while touched:
            lowest = touched & -touched
            self._touched[first + lowest.bit_length() - 1] = 1
            touched ^= lowest

    def activity(self, block: int) -> int:
        """Small pages touched in the last window; a block that was not watched counts as a lukewarm one."""
        return self._seen.get(block, _HOT - 1)

    def victims(self, wanted: int) -> Iterator[Victim]:
        """See Policy. Goes on where it stopped: what came back since then was touched since then."""
        for victim in self._order:  # noqa: UP028 (`yield from` would end it as soon as who asks has enough)
            yield victim
        yield from super().victims(wanted)

    def _ordered(self) -> Iterator[Victim]:
        tie, view = self.view.random.random, self.view
        order = sorted((self.activity(block), tie(), block) for block in range(view.blocks))
        for activity, _, block in order:
            if activity >= _HOT:
                return
            first, end = block * BLOCK_PAGES, min((block + 1) * BLOCK_PAGES, view.pages)
            if view.present[block] and self._touched.find(1, first, end) < 0:
                yield Block(block)
                continue
            page = view.resident.find(1, first, end)
            while page >= 0:
                if not self._touched[page]:
                    yield page
                page = view.resident.find(1, page + 1, end)


class SharingFirst(Activity):
    """Duplicates go before anything is written to a disk (technique T5, US9977747B2). Then as Activity.

    Large blocks are broken in the order of how many they have, down to a threshold that falls with free memory; hot
    ones are spared. What may have been merged goes last: it takes little memory, and would need its own to come back.
    """

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self._duplicates: dict[int, int] = {}
        self._shared: set[int] = set()

    def scanned(self, block: int, duplicates: int) -> None:
        """See Policy."""
        self._duplicates[block] = duplicates

    def threshold(self) -> int:
        """A block must have so many duplicates."""
        return duplicates_needed(max(0, self.view.limit - self.view.used) / self.view.limit)

    def victims(self, wanted: int) -> Iterator[Victim]:
        """See Policy."""
        least, view = self.threshold(), self.view
        found = [
            (-pages.bit_count(), block)
            for block, pages in self._duplicates.items()
            if pages.bit_count() >= least and view.large[block] and view.present[block] and self.activity(block) <= _HOT
        ]
        for _, block in sorted(found):
            self._shared.add(block)
            yield Share(block)
        yield from (victim for victim in super().victims(wanted) if not self._is_shared(victim))
        yield from super().victims(wanted)

    def _is_shared(self, victim: Victim) -> bool:
        if isinstance(victim, int):
            block, bits = victim // BLOCK_PAGES, 1 << victim % BLOCK_PAGES
        else:
            block, bits = victim.number, -1
        return block in self._shared and bool(self._duplicates[block] & bits)


POLICIES: dict[str, type[Policy]] = {
    "clock": Clock,
    "random": RandomPages,
    "activity": Activity,
    "sharing-first": SharingFirst,
}
