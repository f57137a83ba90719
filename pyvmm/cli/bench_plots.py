# bench_plots.py: a benchmark's results as PNG files, by matplotlib (the extra `bench`). Units: inches.
"""`draw()`: a panel for each group. Without pyplot: nothing here opens a window or keeps state between calls."""

from __future__ import annotations

import os
from itertools import groupby
from textwrap import fill, shorten

from pyvmm.bench import BETTER, MANY, Result, grouped, scaled
from pyvmm.bench.catalogue import BENCHMARKS, INSTEAD, LIMIT, OURS
from pyvmm.bench.targets import MET, MISSED, Verdict, digits, verdicts
from pyvmm.errors import BadInput

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ImportError:
    raise BadInput("plots and pages of results need matplotlib: run pip install 'pyvmm[bench]'") from None

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

COLOURS = {OURS: "#2c6fb3", INSTEAD: "#e08a1e", LIMIT: "#8b919a"}
"""Told apart by people who do not tell red from green."""
NAMES = {OURS: "pyvmm", INSTEAD: "what one would do instead", LIMIT: "a limit"}
_VERDICTS = {MET: "#1a7f37", MISSED: "#b35900"}
_WIDTH, _ROW, _AROUND, _LINE = 13.0, 0.27, 1.05, 0.18
"""Of a picture; the heights of a side, of what is around a panel's sides, and of a target's line above them."""
_DPI = 110
_PANELS = 8
"""In one file at most."""
_SPREAD = 20
"""Sides whose medians differ by more than so many times are drawn by their logarithm."""
_BETWEEN = ((60, (1.0, 2.0, 5.0)), (1000, (1.0, 3.0)))
"""Which figures there is room for on a logarithmic axis over so many times."""
_WRAP, _WRAP_SMALL = 60, 95
"""Letters of a title in a line, and of a target."""


class Panel:
    """Sides of one group that have one unit, in one unit for people."""

    def __init__(self, group: str, rows: Sequence[Result], judged: Sequence[Verdict]) -> None:
        self.group = group
        middle = scaled(max(rows, key=lambda row: row.median))
        factor = middle.median / max(row.median for row in rows) if middle.median else 1.0
        self.unit = middle.unit
        self.better = BETTER.get(rows[0].unit, 0)
        self.rows = [Result(row.name, self.unit, tuple(value * factor for value in row.values)) for row in rows]
        self.original = list(rows)
        self.verdicts = [verdict for verdict in judged if verdict.group == group and self._is_mine(verdict)]
        medians = [row.median for row in self.rows]
        self.log = min(medians) > 0 and max(medians) / min(medians) > _SPREAD

    def _is_mine(self, verdict: Verdict) -> bool:
        names = {row.name for row in self.rows}
        return any(name == verdict.what or verdict.what.startswith(f"{name} / ") for name in names) and (
            verdict.unit in ("", self.original[0].unit)
        )

    @property
    def title(self) -> str:
        """In a line or two."""
        return fill(self.group, _WRAP)

    @property
    def height(self) -> float:
        """With title and axis."""
        return _AROUND + _ROW * len(self.rows) + _LINE * (len(self.verdicts) + self.title.count("\n"))


def draw(folder: str, name: str, results: Sequence[Result], quick: bool = False) -> list[str]:
    """Writes NAME.png, and NAME-2.png and so on where there is much. Returns their names. Raises BadInput where they
    cannot be written."""
    panels = list(_panels(name, results, quick))
    files = []
    for at in range(0, len(panels), _PANELS):
        files.append(f"{name}{f'-{at // _PANELS + 1}' if at else ''}.png")
        _save(_figure(name, panels[at : at + _PANELS]), os.path.join(folder, files[-1]))
    return files


def _panels(name: str, results: Sequence[Result], quick: bool) -> Iterator[Panel]:
    judged = verdicts(name, results, quick)
    for group, rows in grouped(results).items():
        there = sorted(
            (row for row in rows if row.values), key=lambda row: [each.unit for each in rows].index(row.unit)
        )
        for _, same in groupby(there, key=lambda row: row.unit):
            yield Panel(group, list(same), judged)


def _figure(name: str, panels: Sequence[Panel]) -> Figure:
    columns = 2 if len(panels) > 1 else 1
    rows = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    picture = Figure((_WIDTH if columns > 1 else _WIDTH * 0.62, sum(heights) + 1), layout="constrained")
    text = f"{name}: {BENCHMARKS[name].text}" if name in BENCHMARKS else name
    picture.suptitle(text, x=0.01, ha="left", fontsize=11.5)
    axes = picture.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    kinds = set()
    for row, across in zip(rows, axes, strict=True):
        for axis, panel in zip(across, row, strict=False):
            kinds |= _draw(axis, name, panel)
        for axis in across[len(row) :]:
            axis.set_visible(False)
    patches = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in COLOURS if kind in kinds]
    if len(patches) > 1:
        picture.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=9)
    return picture


def _draw(axis: Axes, name: str, panel: Panel) -> set[str]:
    """Medians with their ranges, and the figures beside them. Returns the kinds of sides."""
    row = BENCHMARKS.get(name)
    kinds = [row.kind(side.name) if row else OURS for side in panel.rows]
    for y, (side, kind) in enumerate(zip(panel.rows, kinds, strict=True)):
        low, high = side.quantile(0), side.quantile(0.9 if len(side.values) >= MANY else 1)
        if not panel.log:
            axis.barh(y, side.median, height=0.62, color=COLOURS[kind], alpha=0.85, linewidth=0)
        else:
            axis.plot([side.median], [y], "o", color=COLOURS[kind], markersize=7)
        if len(side.values) > 1 and (not panel.log or low > 0):
            axis.plot([low, high], [y, y], color="#222222" if not panel.log else COLOURS[kind], linewidth=1.3, zorder=3)
        text = _figures(panel.original[y] if panel.log else side, len(side.values) >= MANY, panel.log)
        axis.text(1.015, y, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8, color="#333333")
    _axes(axis, panel)
    return set(kinds)


def _figures(side: Result, many: bool, own_unit: bool) -> str:
    """Median and range; where medians are far apart, each in a unit of its own."""
    shown = scaled(side) if own_unit else side
    places = digits(shown.median) if shown.median else 0
    middle, low, high = (
        f"{value:,.{places}f}" for value in (shown.median, shown.quantile(0), shown.quantile(0.9 if many else 1))
    )
    unit = f" {shown.unit}" if own_unit and shown.unit != side.unit else ""
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low} to {high})"


def _axes(axis: Axes, panel: Panel) -> None:
    axis.set_yticks(range(len(panel.rows)), [row.name for row in panel.rows], fontsize=8.5)
    axis.set_ylim(len(panel.rows) - 0.4, -0.6)
    if panel.log:
        axis.set_xscale("log")
        least, most = axis.get_xlim()
        subs = next((subs for far, subs in _BETWEEN if most / least < far), (1.0,))
        axis.xaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.tick_params(which="minor", length=0)
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        nothing = not any(any(row.values) for row in panel.rows)
        axis.set_xlim(min(0, *(row.quantile(0) for row in panel.rows)), 1 if nothing else None)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.grid(axis="x", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8, axis="x")
    axis.tick_params(length=0, axis="y")
    axis.spines[:].set_visible(False)
    better = {1: "more is better", -1: "less is better"}.get(panel.better)
    words = [panel.unit, *([better] if better else []), *(["logarithmic"] if panel.log else [])]
    axis.set_xlabel("; ".join(words), fontsize=8.5, color="#444444")
    _titles(axis, panel)


def _titles(axis: Axes, panel: Panel) -> None:
    """The group, and below it a line for each of its targets."""
    lines = len(panel.verdicts)
    axis.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=6 + 13 * lines)
    for number, verdict in enumerate(panel.verdicts):
        text = f"{verdict.target.measure}: {verdict.what}, wanted {verdict.bound}: {verdict.figure()}, {verdict.said}"
        axis.annotate(
            shorten(text, _WRAP_SMALL, placeholder=" ..."), (0, 1), (0, 4 + 13 * (lines - 1 - number)),
            xycoords="axes fraction", textcoords="offset points", fontsize=8,
            color=_VERDICTS.get(verdict.said, "#666666"),
        )  # fmt: skip


def _save(picture: Figure, path: str) -> None:
    try:
        picture.savefig(path, format="png", dpi=_DPI)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
