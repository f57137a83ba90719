# convergence.py: when to switch over, and what to do where the guest writes faster than the connection takes. Pure: it
# is told figures and gives a decision. Seconds, bytes, pages of 4 KiB.
"""`Convergence`: change this, and you have changed the policy of pre-copy."""

from __future__ import annotations

from pyvmm.layout import PAGE_SIZE
from pyvmm.record import Record

SWITCH, ROUND, POSTCOPY, GIVE_UP = "switch", "round", "postcopy", "give up"
STATE_COST = 0.003
"""Seconds of the downtime that do not depend on pages: to pause, save, send, restore and start. Measured: 2 to 4 ms."""
SHRINKS = 0.7
"""A round that leaves more than this part of what the one before left does not get nearer to the end."""
STEPS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
"""Shares of the time in which vCPUs are held, one after the other."""


class Decision(Record):
    """next: SWITCH, ROUND, POSTCOPY or GIVE_UP; defer: pages that were written in two rounds in a row come with the
    last round only; fine: writes are traced by small pages; throttle: share of the time in which vCPUs are held;
    expected: the downtime, were it now; help: what is new about this, in words, or nothing."""

    __slots__ = ("defer", "expected", "fine", "help", "next", "throttle")

    def __init__(self, next: str, expected: float, defer: bool, fine: bool, throttle: float, help: str = "") -> None:
        self.next = next
        self.expected = expected
        self.defer = defer
        self.fine = fine
        self.throttle = throttle
        self.help = help


class Convergence:
    """downtime: seconds that may be; throttle: may vCPUs be held; postcopy: may it end in post-copy; rounds: how many
    there may be; fine: could writes be traced by small pages, and are not yet. Helps, in this order: fewer copies of
    hot pages, by what is known of them and then by a finer trace; vCPUs held for a growing part of the time; post-copy.
    """

    def __init__(self, downtime: float, throttle: bool, postcopy: bool, rounds: int, fine: bool = False) -> None:
        self._downtime = downtime
        self._may_throttle = throttle
        self._postcopy = postcopy
        self._rounds = rounds
        self._may_be_fine = fine
        self._defer = self._fine = False
        self._share = 0.0
        self._before: int | None = None

    def after(self, round: int, left: int, bandwidth: float) -> Decision:
        """A round has ended. left: pages still to be sent, all together; bandwidth: bytes a second."""
        before, self._before = self._before, left
        expected = STATE_COST + left * PAGE_SIZE / max(bandwidth, 1.0)
        if expected <= self._downtime and not self._pays(round, before, left, expected):
            return self._decide(SWITCH, expected)
        if round >= self._rounds:
            return self._decide(POSTCOPY if self._postcopy else GIVE_UP, expected)
        if before is None or left <= before * SHRINKS:
            return self._decide(ROUND, expected)
        if not self._defer:
            self._defer = True
            return self._decide(ROUND, expected, "hot pages last")
        if self._may_be_fine and not self._fine:
            self._fine = True
            return self._decide(ROUND, expected, "small pages traced")
        higher = [step for step in STEPS if step > self._share]
        if self._may_throttle and higher:
            self._share = higher[0]
            return self._decide(ROUND, expected, "throttle")
        if self._postcopy:
            return self._decide(POSTCOPY, expected, "postcopy")
        return self._decide(ROUND, expected)

    def _pays(self, round: int, before: int | None, left: int, expected: float) -> bool:
        """It may be now; but one more round is short, and makes the downtime much shorter."""
        shrinks = before is None or left <= before // 2
        return shrinks and round < self._rounds and expected > 1.5 * STATE_COST

    def _decide(self, next: str, expected: float, help: str = "") -> Decision:
        return Decision(next, expected, self._defer, self._fine, self._share, help)
