# heatmap.py: samples of activity as blocks by time. Units: blocks of 2 MiB, seconds since the map began.
"""`HeatMap`: what was seen of each block when; pyvmm.cli draws it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST = 1 << 20
"""Samples that are kept: after that the oldest half goes."""


class HeatMap:
    """Samples of the blocks of one VM."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._samples: list[tuple[float, int, int]] = []

    def add(self, block: int, touched: int, at: float) -> None:
        """A sample that ended at that time: so many pages were touched."""
        self._samples.append((at, block, touched))
        if len(self._samples) > _MOST:
            del self._samples[: _MOST // 2]

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def span(self) -> tuple[float, float]:
        """When the first and the last sample ended."""
        times = [at for at, _, _ in self._samples]
        return (min(times), max(times)) if times else (0.0, 0.0)

    def cells(self, rows: int, columns: int) -> list[list[float | None]]:
        """The map in so many rows, of blocks that follow each other, and columns, of equal time: pages touched, on
        average of a cell's samples, None where there is none."""
        first, last = self.span
        sums = [[0.0] * columns for _ in range(rows)]
        counts = [[0] * columns for _ in range(rows)]
        for at, block, touched in self._samples:
            row = block * rows // self.blocks
            column = min(int((at - first) / (last - first) * columns), columns - 1) if last > first else 0
            sums[row][column] += touched
            counts[row][column] += 1
        return [_means(*row) for row in zip(sums, counts, strict=True)]

    def held(self, rows: int, columns: int) -> list[list[float | None]]:
        """The same, but where nothing was looked at, a cell has what was seen before."""
        cells = self.cells(rows, columns)
        for row in cells:
            for column in range(1, columns):
                row[column] = row[column - 1] if row[column] is None else row[column]
        return cells

    def first_blocks(self, rows: int) -> list[int]:
        """The first block of each of so many rows."""
        return [-(-row * self.blocks // rows) for row in range(rows)]


def _means(sums: Sequence[float], counts: Sequence[int]) -> list[float | None]:
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]
