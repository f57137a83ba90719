# picture.py: where a guest's pages are, drawn for people: tables, histograms, maps. Draws records and knows no VM, so
# that any command can use it. Units: pages of 4 KiB, blocks of 2 MiB, ns.
"""What rich prints: `PagesTable`, `BlockMap`, `Histogram`, and tables of operations and stalls.

All of it fits the console's width, and says without colours, and on a console without Unicode, the same as with them.
"""

from __future__ import annotations

from collections import Counter
from itertools import groupby, pairwise
from typing import NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pyvmm.layout import BLOCK_SIZE, GIB, MIB, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pyvmm.layout import Region
    from pyvmm.memory.counts import EngineStats, Operation, PageCounts, Stall

ROWS = 20
"""A map has about as many rows at most: where there are more blocks, several share a cell."""
_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
_BARS = "▏▎▍▌▋▊▉█"


class Kind(NamedTuple):
    """How one kind of page is shown: a character for a cell, also where there is no Unicode, and a colour."""

    glyph: str
    ascii: str
    colour: str


# Colours that stay apart for those who do not see red and green apart (Okabe and Ito's, and three more).
KINDS = {
    "large": Kind("█", "#", "#009e73"),
    "small": Kind("▒", "+", "#e69f00"),
    "untouched": Kind("·", ".", "#a8a8a8"),
    "zero": Kind("0", "0", "#56b4e9"),
    "aside": Kind("A", "A", "#cc79a7"),
    "file": Kind("F", "F", "#0072b2"),
    "swap": Kind("S", "S", "#d55e00"),
    "peer": Kind("P", "P", "#f0e442"),
    "balloon": Kind("B", "B", "#8c6d5a"),
    "shared": Kind("=", "=", "#7a5ad6"),
}
"""By the names of PageCounts.rows() and Engine.looks(), in the order of legends."""


class Stage(NamedTuple):
    """Where a guest's pages were at one moment. mappings: vm.mappings(); looks: engine.looks()."""

    title: str
    counts: PageCounts
    mappings: Mapping[str, int]
    looks: Sequence[str]


class PagesTable:
    """Pages by kind, a column a stage, and below it KVM's own count of what it maps, in pages too.

    MiB and shares of all stages where there is room, else of the last, else none.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        last = len(self._stages) - 1
        for detailed in (range(last + 1), range(last, last + 1), range(0)):
            table = self._table(console, detailed)
            if Measurement.get(console, options.update(width=1000), table).maximum <= options.max_width:
                break
        yield table

    def _table(self, console: Console, detailed: range) -> Table:
        table = new_table(console, "kind")
        for i, stage in enumerate(self._stages):
            for heading in (stage.title, "MiB", "share")[: 3 if i in detailed else 1]:
                table.add_column(heading, justify="right")
        rows = [_kinds_and_kvm(stage) for stage in self._stages]
        kinds = len(KINDS)
        for number, (name, _) in enumerate(rows[0]):
            cells: list[str] = []
            for i, stage in enumerate(self._stages):
                pages = rows[i][number][1]
                figures = (f"{pages:,}", f"{pages * PAGE_SIZE / MIB:,.1f}", f"{pages / stage.counts.total:.1%}")
                cells += figures[: 3 if i in detailed else 1]
            table.add_row(name, *cells, style="" if any(row[number][1] for row in rows) else "dim")
            if number == kinds - 1:
                table.add_section()
        return table


def _kinds_and_kvm(stage: Stage) -> list[tuple[str, int]]:
    """Names and pages of the table's rows. A 1 GiB mapping is a rarity, and a row of its own would be mostly 0."""
    by_2m = stage.mappings["pages_2m"] * _BLOCK_PAGES + stage.mappings["pages_1g"] * (GIB // PAGE_SIZE)
    return [*stage.counts.rows(), ("KVM by 2M", by_2m), ("KVM by 4K", stage.mappings["pages_4k"])]


class BlockMap:
    """One cell a 2 MiB block, or several blocks: whatever most of them are. A row begins with its guest-physical
    address, RAM behind a hole with a new group of rows. A legend counts the blocks of each kind that occurs."""

    def __init__(self, looks: Sequence[str], regions: Sequence[Region], rows: int = ROWS) -> None:
        self._looks = looks
        self._regions = regions
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        digits = len(f"{max(region.end.value for region in self._regions):#x}")
        across, share = map_shape(self._regions, max(options.max_width - digits - 1, 1), self._rows)
        for before, region in pairwise((None, *self._regions)):
            assert region is not None
            if before is not None:
                yield Text(f"hole up to {region.gpa.value:#x}", "dim")
            for address, cells in map_rows(self._looks, region, across, share):
                line = Text(f"{address:#0{digits}x} ", end="\n")
                for kind, run in groupby(cells):
                    line.append(glyph(console, kind) * len(list(run)), KINDS[kind].colour)
                yield line
        found = Counter(self._looks)
        legend = [
            Text.assemble((glyph(console, kind), KINDS[kind].colour), f" {kind} {found[kind]:,}")
            for kind in KINDS
            if found[kind]
        ]
        unit = f"a cell: what most of {share} blocks are" if share > 1 else "a cell: a block of 2 MiB"
        yield from _flowing([*legend, Text(unit, "dim")], options.max_width, "  ")


def map_shape(regions: Sequence[Region], width: int, rows: int) -> tuple[int, int]:
    """Cells in a row, and blocks in a cell, both powers of two, so that the map has at most `rows` rows (but one for
    each region). Powers of two make addresses round."""
    across = 1 << (width.bit_length() - 1)
    share = 1
    while sum(-(-region.size // (across * share * BLOCK_SIZE)) for region in regions) > max(rows, len(regions)):
        share *= 2
    return across, share


def map_rows(looks: Sequence[str], region: Region, across: int, share: int) -> Iterator[tuple[int, list[str]]]:
    """A region's rows: guest-physical address of the first cell, and what each cell shows."""
    first, count = region.offset // BLOCK_SIZE, -(-region.size // BLOCK_SIZE)
    mine = looks[first : first + count]
    for start in range(0, count, across * share):
        row = mine[start : start + across * share]
        cells = [_most(row[i : i + share]) for i in range(0, len(row), share)]
        yield region.gpa.value + start * BLOCK_SIZE, cells


def _most(looks: Sequence[str]) -> str:
    return looks[0] if len(looks) == 1 else Counter(looks).most_common(1)[0][0]


def glyph(console: Console, kind: str) -> str:
    """The character of a kind that this console can show."""
    return KINDS[kind].glyph if _has_unicode(console) else KINDS[kind].ascii


class Histogram:
    """Bars of counts by powers of two of nanoseconds: counts[b] is of 2^b to 2^(b+1)-1 ns. Empty ends are left out."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = counts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        used = [bucket for bucket, count in enumerate(self._counts) if count]
        if not used:
            return
        shown = range(used[0], used[-1] + 1)
        most = max(self._counts)
        digits = len(f"{most:,}")
        room = max(options.max_width - 22 - digits, 1)
        for bucket in shown:
            count = self._counts[bucket]
            ends = f"{nanoseconds(1 << bucket):>8} to {nanoseconds(2 << bucket):>8}"
            drawn = bar(count / most, room, _has_unicode(console))
            yield Text.assemble(f"{ends} {count:>{digits},}", (f" {drawn}" if drawn else "", "cyan"))


def bar(share: float, width: int, unicode: bool = True) -> str:
    """A bar of share (0 to 1) of `width` cells, to an eighth of a cell. Something, however little, is seen."""
    if share <= 0:
        return ""
    if not unicode:
        return "#" * max(round(share * width), 1)
    eighths = max(round(share * width * 8), 1)
    return "█" * (eighths // 8) + (_BARS[eighths % 8 - 1] if eighths % 8 else "")


def operations_table(console: Console, operations: Mapping[str, Operation]) -> Table:
    """What was done to blocks, how often and for how long: of EngineStats.operations, those that occurred."""
    table = new_table(console, "operation", "done", "failed", "mean", "longest")
    for name, op in operations.items():
        times = op.done + op.failed
        if times:
            mean = nanoseconds(op.nanoseconds / times)
            table.add_row(name, f"{op.done:,}", f"{op.failed:,}", mean, nanoseconds(op.longest))
    return table


def stalls_table(console: Console, stats: EngineStats) -> Table:
    """Who waited for pages, how often and how long. KVM's workers fetch pages for vCPUs, which halt meanwhile: that and
    all other sleep of a vCPU is in its last column."""
    table = new_table(console, "waited", "faults", "in all", "mean", "longest", "vCPU asleep")
    rows: list[tuple[str, Stall]] = [(f"vCPU {i}", stall) for i, stall in enumerate(stats.vcpus)]
    for name, stall in [*rows, ("KVM's workers", stats.workers), ("other threads", stats.others)]:
        if stall.faults or stall.asleep:
            times = (stall.nanoseconds, stall.nanoseconds / max(stall.faults, 1), stall.longest)
            asleep = nanoseconds(stall.asleep) if stall in stats.vcpus else ""
            table.add_row(name, f"{stall.faults:,}", *map(nanoseconds, times), asleep)
    return table


def new_table(console: Console, first: str, *headings: str) -> Table:
    """A table as all are: boxed on a terminal, plain elsewhere; the first column is names, the others are figures."""
    table = Table(first, box=box.ROUNDED if console.is_terminal else None, pad_edge=console.is_terminal)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def nanoseconds(time: float) -> str:
    """A time as people read it: 8192 -> "8.2 us"."""
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if time >= scale:
            return f"{time / scale:.1f} {unit}"
    return f"{time:.0f} ns"


def _has_unicode(console: Console) -> bool:
    return console.encoding.startswith("utf")


def _flowing(items: Sequence[Text], width: int, gap: str) -> Iterator[Text]:
    """Items beside each other, in as many lines as they need; none is broken."""
    line = Text()
    for item in items:
        if line and len(line) + len(gap) + len(item) > width:
            yield line
            line = Text()
        line = Text(gap).join([line, item]) if line else item.copy()
    if line:
        yield line
