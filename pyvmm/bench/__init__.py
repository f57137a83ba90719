# bench: measures, as data. A benchmark asserts nothing.
"""Benchmarks by name: each yields `Result`s, of alternating rounds in one run."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 9
"""Rounds of A B C A B C ...: medians and extremes are over these."""


@dataclass(frozen=True)
class Result:
    """One side of a comparison: what was measured, in which unit, once a round."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return median(self.values)


def alternate(sides: dict[str, Callable[[], float]], unit: str, rounds: int = ROUNDS) -> list[Result]:
    """Measures the sides in turn, `rounds` times each; one more round before that warms host and code up."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, measure in sides.items():
            value = measure()
            if turn:
                values[name].append(value)
    return [Result(name, unit, tuple(values[name])) for name in sides]
