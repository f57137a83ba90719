# symbols.py: an ELF file's symbol table, so that crash reports and debuggers can say main+0x12. Off the fast path.
"""`Symbols`: addresses to names and back."""

from __future__ import annotations

import bisect
import io
import itertools

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_SYMBOLS = 1 << 19
"""More are not read: this is about twice what a distribution's vmlinux has."""

_CODE_TYPES = ("STT_FUNC", "STT_NOTYPE")
_BINDING_RANK = {"STB_GLOBAL": 0, "STB_WEAK": 1}


class Symbol:
    """One symbol: `size` is 0 where the file has none, as for assembly labels; `end` is that of its section."""

    __slots__ = ("address", "end", "is_code", "name", "rank", "size")

    def __init__(self, name: str, address: int, size: int, end: int, is_code: bool, rank: int) -> None:
        self.name = name
        self.address = address
        self.size = size
        self.end = end
        self.is_code = is_code
        self.rank = rank


class Symbols:
    """The symbols of one guest image, at the addresses that it was linked for.

    A damaged or missing table is an empty one: crash reports must not crash.
    """

    def __init__(self, symbols: Iterable[Symbol] = ()) -> None:
        """Of several symbols at one address, sized ones win, then global ones; by name, global ones."""
        ordered = sorted(symbols, key=lambda symbol: (symbol.address, not symbol.size, symbol.rank, symbol.name))
        self._by_name: dict[str, int] = {}
        for symbol in sorted(ordered, key=lambda symbol: symbol.rank):
            self._by_name.setdefault(symbol.name, symbol.address)
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._names: list[str] = []
        self._cover(symbol for symbol in ordered if symbol.is_code)

    def _cover(self, ordered: Iterable[Symbol]) -> None:
        """Lists the ranges for `lookup`. A symbol without a size reaches to the next one or its section's end, and
        has no range inside a sized one."""
        sized_end = 0
        for symbol in ordered:
            if not symbol.size and symbol.address < sized_end:
                continue
            if self._starts and symbol.address == self._starts[-1]:
                continue
            if symbol.size:
                sized_end = max(sized_end, symbol.address + symbol.size)
            self._starts.append(symbol.address)
            self._ends.append(symbol.address + symbol.size if symbol.size else symbol.end)
            self._names.append(symbol.name)

    @classmethod
    def from_elf(cls, data: bytes) -> Symbols:
        """The symbols of an ELF file; empty where it has none, is damaged or is no ELF file. Raises nothing."""
        try:
            return cls(_read(data))
        except Exception:  # whatever the bytes made the parser stumble over
            return cls()

    def __len__(self) -> int:
        return len(self._by_name)

    def lookup(self, address: int) -> str | None:
        """The code at a linked address as "name" or "name+0x12" (bytes), or None where no symbol covers it."""
        place = bisect.bisect_right(self._starts, address) - 1
        if place < 0 or address >= self._ends[place]:
            return None
        distance = address - self._starts[place]
        return f"{self._names[place]}+{distance:#x}" if distance else self._names[place]

    def address(self, name: str) -> int | None:
        """The linked address of a function, label or variable, or None."""
        return self._by_name.get(name)


def _read(data: bytes) -> list[Symbol]:
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    found = []
    elf = ELFFile(io.BytesIO(data))
    sections = list(elf.iter_sections())
    tables = [section for section in sections if isinstance(section, SymbolTableSection)]
    entries = itertools.chain.from_iterable(table.iter_symbols() for table in tables)
    for entry in itertools.islice(entries, MAX_SYMBOLS):
        kind, index = entry["st_info"]["type"], entry["st_shndx"]
        if not entry.name or index == "SHN_UNDEF" or kind not in (*_CODE_TYPES, "STT_OBJECT"):
            continue
        in_section = isinstance(index, int) and index < len(sections)  # else a constant, SHN_ABS
        end = sections[index]["sh_addr"] + sections[index]["sh_size"] if in_section else 0
        rank = _BINDING_RANK.get(entry["st_info"]["bind"], 2)
        is_code = in_section and kind in _CODE_TYPES
        found.append(Symbol(entry.name, entry["st_value"], entry["st_size"], end, is_code, rank))
    return found
