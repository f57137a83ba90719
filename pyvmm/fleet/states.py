# states.py: how short of memory the host is, in a word, and what may be done about it. Fractions of the budget.
"""`State`, the default table, and `next_state()`, with hysteresis."""

from __future__ import annotations

from itertools import pairwise

from pyvmm.errors import BadInput
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

STATES = ("high", "clear", "soft", "hard", "low")
"""From plenty to none."""
MEANS = ("balloon", "swap")


class State(Record):
    """name: of STATES. below: it begins where less of the budget than this fraction is free; above: it is left for a
    better one where at least so much is free. Negative: VMs have more than the budget. means: what may be done to VMs
    that have more than they are entitled to."""

    __slots__ = ("above", "below", "means", "name")

    def __init__(self, name: str, below: float, above: float, means: Iterable[str]) -> None:
        self.name = name
        self.below = below
        self.above = above
        self.means = tuple(means)


TABLE = (
    State("high", 1.0, 1.0, ()),
    State("clear", 0.10, 0.12, ("balloon",)),
    State("soft", 0.05, 0.06, ("balloon", "swap")),
    State("hard", -0.02, -0.005, ("swap",)),
    State("low", -0.06, -0.04, ("swap",)),
)
"""A fleet that uses its budget is soft. In hard and low a balloon would be too slow: what it still has to give up is
told to it, but nothing waits for that."""


def check_table(table: Sequence[State]) -> tuple[State, ...]:
    """The table, if it can be one. Raises BadInput, naming the state."""
    if [state.name for state in table] != list(STATES):
        raise BadInput(f"a table of states has these, in this order: {', '.join(STATES)}")
    for better, state in pairwise(table):
        if state.above < state.below:
            raise BadInput(f"{state.name}: it ends above {state.above:g}, and begins below {state.below:g} only")
        if state.below >= better.below or state.above > better.above:
            raise BadInput(f"{state.name}: it is worse than {better.name}, and must begin and end at less")
    for state in table:
        if unknown := [name for name in state.means if name not in MEANS]:
            raise BadInput(f"{state.name}: no means {unknown[0]!r}: choose of {', '.join(MEANS)}")
    return tuple(table)


def next_state(table: Sequence[State], now: str, free: float) -> State:
    """The state that follows `now`, when so much of the budget is free: the worst that has begun; but a state that was
    there is not left before its `above`, nor are those between."""
    begun = max(index for index, state in enumerate(table) if index == 0 or free < state.below)
    kept = max(index for index, state in enumerate(table) if index == 0 or free < state.above)
    before = STATES.index(now)
    return table[max(begun, min(before, kept))]
