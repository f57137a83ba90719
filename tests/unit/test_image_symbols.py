# test_image_symbols.py: addresses to names and back, from a symbol table made here, and from damaged ones.
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_image_builders import build_elf

from pyvmm.image.symbols import Symbols

NOTYPE, OBJECT, FUNC, FILE = 0, 1, 2, 4
LOCAL, GLOBAL, WEAK = 0, 1, 2
UNDEF, TEXT, ABS = 0, 1, 0xFFF1


def build_symbols(*symbols):
    """An ELF file with one section of code at 0x1000..0x1fff and these (name, value, size, type, binding, section)."""
    names, entries = b"\0", bytes(24)
    for name, value, size, type, binding, section in symbols:
        entries += struct.pack("<IBBHQQ", len(names), binding << 4 | type, 0, section, value, size)
        names += name.encode() + b"\0"
    data = build_elf()
    entries_at = len(data)
    names_at = entries_at + len(entries)
    sections_at = names_at + len(names)

    def section(type, address, offset, size, link, entry_size):
        return struct.pack("<IIQQQQIIQQ", 0, type, 0, address, offset, size, link, 0, 1, entry_size)

    data += entries + names
    data += section(0, 0, 0, 0, 0, 0)
    data += section(1, 0x1000, 0, 0x1000, 0, 0)
    data += section(2, 0, entries_at, len(entries), 3, 24)
    data += section(3, 0, names_at, len(names), 0, 0)
    data = data[:40] + sections_at.to_bytes(8, "little") + data[48:]
    return data[:58] + struct.pack("<HHH", 64, 4, 3) + data[64:]


FILE_DATA = build_symbols(
    ("start.S", 0, 0, FILE, LOCAL, ABS),
    ("_start", 0x1000, 0, NOTYPE, GLOBAL, TEXT),
    ("loop", 0x1008, 0, NOTYPE, LOCAL, TEXT),
    ("main", 0x1100, 0x40, FUNC, GLOBAL, TEXT),
    ("main_again", 0x1110, 0, NOTYPE, LOCAL, TEXT),
    ("main_alias", 0x1100, 0, NOTYPE, GLOBAL, TEXT),
    ("helper", 0x1180, 0x10, FUNC, LOCAL, TEXT),
    ("helper", 0x1200, 0x10, FUNC, GLOBAL, TEXT),
    ("helper", 0x1240, 0x10, FUNC, WEAK, TEXT),
    ("handler", 0x1260, 0x10, FUNC, LOCAL, TEXT),
    ("handler", 0x1280, 0x10, FUNC, WEAK, TEXT),
    ("after_handler", 0x1290, 0, NOTYPE, LOCAL, TEXT),
    ("counter", 0x1300, 8, OBJECT, GLOBAL, TEXT),
    ("tail", 0x1F00, 0, NOTYPE, LOCAL, TEXT),
    ("PORT", 0x1F80, 0, NOTYPE, LOCAL, ABS),
    ("missing", 0x1F90, 4, FUNC, GLOBAL, UNDEF),
    ("_end", 0x2000, 0, NOTYPE, GLOBAL, TEXT),
)


@pytest.fixture(scope="module")
def symbols():
    return Symbols.from_elf(FILE_DATA)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (0xFFF, None),
        (0x1000, "_start"),
        (0x1007, "_start+0x7"),
        (0x1008, "loop"),
        (0x10FF, "loop+0xf7"),
        (0x1100, "main"),
        (0x1112, "main+0x12"),
        (0x113F, "main+0x3f"),
        (0x1140, None),
        (0x1181, "helper+0x1"),
        (0x128F, "handler+0xf"),
        (0x1290, "after_handler"),
        (0x1300, "after_handler+0x70"),
        (0x1F84, "tail+0x84"),
        (0x1F94, "tail+0x94"),
        (0x1FFF, "tail+0xff"),
        (0x2000, None),
        (1 << 70, None),
    ],
)
def test_lookup(symbols, address, name):
    assert symbols.lookup(address) == name


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("main", 0x1100),
        ("main_alias", 0x1100),
        ("helper", 0x1200),
        ("handler", 0x1280),
        ("counter", 0x1300),
        ("PORT", 0x1F80),
    ],
)
def test_address(symbols, name, address):
    assert symbols.address(name) == address


@pytest.mark.parametrize("name", ["missing", "start.S", "", "nowhere"])
def test_names_without_an_address(symbols, name):
    assert symbols.address(name) is None


@pytest.mark.parametrize("data", [b"", b"\x7fELF", build_elf(), FILE_DATA[:-1], b"\0" * 4096])
def test_files_without_a_sound_table_have_no_symbols(data):
    empty = Symbols.from_elf(data)
    assert len(empty) == 0
    assert empty.lookup(0x1000) is None
    assert empty.address("main") is None


@given(st.lists(st.tuples(st.integers(0, len(FILE_DATA) - 1), st.integers(0, 255)), max_size=8))
def test_damage_never_raises(flips):
    data = bytearray(FILE_DATA)
    for position, value in flips:
        data[position] = value
    found = Symbols.from_elf(bytes(data))
    if not flips:
        assert found.address("main") == 0x1100
    found.lookup(0x1100)
