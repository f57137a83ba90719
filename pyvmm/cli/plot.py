# plot.py: the map of a guest's blocks as a PNG file, by matplotlib (the extra `plot`). Units: blocks of 2 MiB, inches.
"""`draw()`. Without pyplot: nothing here opens a window or keeps state between calls."""

from __future__ import annotations

import numpy as np

from pyvmm.cli.heat import BLOCK_PAGES, LEVELS
from pyvmm.cli.picture import KINDS, map_rows
from pyvmm.errors import BadInput
from pyvmm.layout import BLOCK_SIZE, GIB, MIB

try:
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError:
    raise BadInput("--png needs matplotlib: run pip install 'pyvmm[plot]'") from None

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from pyvmm.cli.picture import Stage
    from pyvmm.layout import Region
    from pyvmm.memory.activity import HeatMap

_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_WIDTH, _MARGINS = 10.0, 2.0
"""Of a picture, and what of its width axis labels take."""
_LEAST_ACROSS = 32
_GAP = 0.08
"""Between cells, of a cell's width, unless they are too tiny for one."""
_TINY = 0.05
_HEAT_ROWS, _HEAT_COLUMNS = 128, 160
_LABELS = 8
"""So many addresses are written beside a map at most, and one more for each region."""


def draw(path: str, title: str, stages: Sequence[Stage], regions: Sequence[Region]) -> None:
    """Writes a PNG: a map a stage, one cell a block, with a gap where guest-physical space has one; and a legend.

    Raises BadInput where the file cannot be written.
    """
    blocks = sum(-(-region.size // BLOCK_SIZE) for region in regions)
    # Some four to eight times as wide as high, for they are drawn below each other.
    across = max(1 << ((4 * blocks).bit_length() + 1) // 2, _LEAST_ACROSS)
    maps = [_cells(stage.looks, regions, across) for stage in stages]
    rows = len(maps[0][1])
    cell = (_WIDTH - _MARGINS) / across
    figure = Figure((_WIDTH, len(stages) * (rows * cell + 0.6) + 1.2), layout="constrained")
    axes = figure.subplots(len(stages), squeeze=False)[:, 0]
    for axis, stage, (cells, addresses) in zip(axes, stages, maps, strict=True):
        _draw_map(axis, cells, addresses, cell)
        axis.set_title(stage.title, loc="left", fontsize=10)
    axes[-1].set_xlabel(f"guest-physical address of the row, and MiB behind it; a cell is {BLOCK_SIZE // MIB} MiB")
    figure.suptitle(title, fontsize=13)
    found = {look for stage in stages for look in stage.looks}
    patches = [Patch(facecolor=kind.colour, label=name) for name, kind in KINDS.items() if name in found]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    _save(figure, path)


def draw_heat(path: str, title: str, heat: HeatMap, address: Callable[[int], int]) -> None:
    """Writes a PNG: blocks by time, how many of their pages were touched. Raises BadInput where that cannot be."""
    rows = min(heat.blocks, _HEAT_ROWS)
    cells = np.array([[np.nan if each is None else each for each in row] for row in heat.held(rows, _HEAT_COLUMNS)])
    figure = Figure((_WIDTH, 5.5), layout="constrained")
    axis = figure.subplots()
    first, last = heat.span
    colours = BoundaryNorm([*LEVELS, BLOCK_PAGES], 256)
    edges = np.linspace(0, max(last - first, 1e-3), _HEAT_COLUMNS + 1)
    drawn = axis.pcolormesh(edges, np.arange(rows + 1), np.ma.masked_invalid(cells), cmap="viridis", norm=colours)
    axis.invert_yaxis()
    addresses: list[int | None] = [address(block) for block in heat.first_blocks(rows)]
    labelled = _labelled(addresses)
    axis.set_yticks([row + 0.5 for row, _ in labelled], [text for _, text in labelled])
    axis.set_xlabel("seconds")
    axis.set_title(title, loc="left", fontsize=10)
    figure.colorbar(drawn, label="pages touched, of 512")
    _save(figure, path)


def _save(figure: Figure, path: str) -> None:
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise BadInput(f"--png {path}: {error.strerror or error}") from None


def _cells(
    looks: Sequence[str], regions: Sequence[Region], across: int
) -> tuple[NDArray[np.float64], list[int | None]]:
    """Numbers of kinds by row, NaN where there is no RAM, and each row's address, None for the gap between regions."""
    rows: list[list[float]] = []
    addresses: list[int | None] = []
    for region in regions:
        if rows:
            rows.append([])
            addresses.append(None)
        for address, kinds in map_rows(looks, region, across, 1):
            rows.append([_NUMBERS[kind] for kind in kinds])
            addresses.append(address)
    return np.array([row + [np.nan] * (across - len(row)) for row in rows]), addresses


def _draw_map(axis: Axes, cells: NDArray[np.float64], addresses: Sequence[int | None], cell: float) -> None:
    across = cells.shape[1]
    colours = ListedColormap([kind.colour for kind in KINDS.values()])
    gap = _GAP * cell * 72 if cell > _TINY else 0  # points
    shown = np.ma.masked_invalid(cells)
    axis.pcolormesh(shown, cmap=colours, vmin=-0.5, vmax=len(KINDS) - 0.5, edgecolors="white", linewidth=gap)
    axis.set_aspect("equal")
    axis.invert_yaxis()
    labelled = _labelled(addresses)
    axis.set_yticks([row + 0.5 for row, _ in labelled], [address for _, address in labelled])
    step = max(across // 8, 1)
    axis.set_xticks(range(0, across, step), [str(cell * BLOCK_SIZE // MIB) for cell in range(0, across, step)])
    axis.tick_params(length=2, labelsize=8)
    axis.spines[:].set_visible(False)


def _labelled(addresses: Sequence[int | None]) -> list[tuple[int, str]]:
    """Rows that get their address, with it: every so manyth, counted from where each region begins."""
    step = 1 << (-(-len(addresses) // _LABELS) - 1).bit_length()
    rows: list[tuple[int, str]] = []
    begin = 0
    for row, address in enumerate(addresses):
        if address is None:
            begin = row + 1
        elif (row - begin) % step == 0:
            if rows and row - rows[-1][0] < step / 2:  # they would overlap
                rows.pop()
            gib = f" = {address / GIB:g} GiB" if address and address % (GIB // 8) == 0 else ""
            rows.append((row, f"{address:#x}{gib}"))
    return rows
