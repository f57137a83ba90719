# sequences.py: which blocks of a disk a guest wrote in one go. Units: blocks of 4 KiB, seconds of any clock.
"""`Sequences`: what was written together is read together later, and should then lie together (technique T6)."""

from __future__ import annotations

from collections import deque

from pyvmm.record import Record

GAP = 0.05
"""Seconds without a write that goes on with a sequence, after which it has ended."""
LEAST, MOST = 2, 512
"""Blocks of a sequence: a single one is one read wherever it lies; 2 MiB are moved at once."""
_OPEN, _WAITING = 16, 4096


class Sequence(Record):
    """`count` blocks from `first` on, the last of them written at `when`."""

    __slots__ = ("count", "first", "when")

    def __init__(self, first: int, count: int, when: float) -> None:
        self.first = first
        self.count = count
        self.when = when


class Sequences:
    """Told of each write, in order; gives sequences that have ended, the oldest first. Of several that a guest writes
    at the same time, each goes on by itself. Those that nobody takes are forgotten: they stay as they are."""

    def __init__(self) -> None:
        self._open: list[Sequence] = []
        self._ended: deque[Sequence] = deque(maxlen=_WAITING)

    def wrote(self, first: int, count: int, now: float) -> None:
        """These blocks were written."""
        for one in self._open:
            if one.first + one.count == first and now - one.when <= GAP and one.count + count <= MOST:
                one.count += count
                one.when = now
                return
        if len(self._open) == _OPEN:
            self._end(min(self._open, key=lambda one: one.when))
        self._open.append(Sequence(first, count, now))

    def take(self, now: float) -> Sequence | None:
        """One that has ended by now."""
        for one in [one for one in self._open if now - one.when > GAP]:
            self._end(one)
        return self._ended.popleft() if self._ended else None

    def next_end(self) -> float | None:
        """When take() may give the next one, if nothing more is written; None: there is none."""
        if self._ended:
            return self._ended[0].when
        return min((one.when + GAP for one in self._open), default=None)

    def clear(self) -> None:
        """Forgets all."""
        self._open.clear()
        self._ended.clear()

    def _end(self, one: Sequence) -> None:
        self._open.remove(one)
        if one.count >= LEAST:
            self._ended.append(one)
