# heat.py: a map of activity for people: blocks by time, drawn by rich. Knows no VM. Units: small pages, 2 MiB blocks.
"""`HeatPicture`: how many pages of which blocks were touched when. Says without colours the same as with them."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.memory.activity import HeatMap

ROWS, LEAST_COLUMNS = 24, 8
BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
LEVELS = (0, 1, 8, 32, 128)
"""From so many touched pages on, a cell looks like that:"""
_GLYPHS, _ASCII = "·░▒▓█", ".-+*#"
_COLOURS = ("#a8a8a8", "#56b4e9", "#f0e442", "#e69f00", "#d55e00")


def level(touched: float) -> int:
    """Which of LEVELS."""
    return max(number for number, least in enumerate(LEVELS) if touched >= least)


class HeatPicture:
    """A row a block, or several; a column a stretch of time. address: where a block begins, for the row's label."""

    def __init__(self, heat: HeatMap, address: Callable[[int], int], rows: int = ROWS) -> None:
        self._heat = heat
        self._address = address
        self._rows = min(rows, heat.blocks)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = _GLYPHS if console.encoding.startswith("utf") else _ASCII
        labels = [f"{self._address(block):#x}" for block in self._heat.first_blocks(self._rows)]
        digits = max(map(len, labels))
        columns = max(options.max_width - digits - 1, LEAST_COLUMNS)
        for label, row in zip(labels, self._heat.held(self._rows, columns), strict=True):
            line = Text(f"{label:>{digits}} ")
            for touched in row:
                if touched is None:
                    line.append(" ")
                else:
                    line.append(glyphs[level(touched)], _COLOURS[level(touched)])
            yield line
        first, last = self._heat.span
        yield Text(f"{'':{digits}} 0 s{f'{last - first:.1f} s':>{columns - 3}}", "dim")
        legend = Text("pages touched, when it was last looked: ")
        for number, least in enumerate(LEVELS):
            legend.append(glyphs[number], _COLOURS[number])
            legend.append(f" {least}{'' if number == 0 else '+'}  ")
        yield legend
