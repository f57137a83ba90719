# test_explain_pagewalk.py: page tables of every kind, built here, against what the walk finds; and hostile ones.
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_explain_builders import CODE, NX, PD, PDPT, PML4, PS, PT, RAM, World, make_registers

from pyvmm.errors import MemoryAccessError
from pyvmm.explain.pagewalk import AddressSpace
from pyvmm.layout import Gpa

PG_PE = 0x8000_0011


class Tables:
    """Page tables of one kind as a dict of entries, built from the top by `map`."""

    def __init__(self, shifts, bits, entry_size, **control):
        self.shifts, self.bits, self.entry_size = shifts, bits, entry_size
        self.registers = make_registers(cr0=PG_PE, cr3=0x10_0000, **control)
        self.entries = {}
        self.next_table = 0x10_1000

    def map(self, linear, gpa, leaf_shift, flags=0x7):
        table = 0x10_0000
        for shift, bits in zip(self.shifts, self.bits, strict=True):
            at = table + (linear >> shift & (1 << bits) - 1) * self.entry_size
            if shift == leaf_shift:
                self.entries[at] = gpa | flags
                return
            if at not in self.entries:
                self.entries[at] = self.next_table | 0x7
                self.next_table += 0x1000
            table = self.entries[at] & 0xFFFF_F000

    def read(self, gpa, size):
        if not 0x10_0000 <= gpa.value < self.next_table:
            raise MemoryAccessError("not RAM")
        return self.entries.get(gpa.value, 0).to_bytes(size, "little")

    @property
    def space(self):
        return AddressSpace(self.registers, self.read)


def tables_32bit(cr4=0):
    return Tables((22, 12), (10, 10), 4, cr4=cr4, efer=0)


def tables_pae():
    return Tables((30, 21, 12), (2, 9, 9), 8, cr4=0x20, efer=0x800)


def tables_4level():
    return Tables((39, 30, 21, 12), (9, 9, 9, 9), 8, cr4=0x20, efer=0xD00)


def tables_5level():
    return Tables((48, 39, 30, 21, 12), (9, 9, 9, 9, 9), 8, cr4=0x1020, efer=0xD00)


@pytest.mark.parametrize(
    ("make", "name", "levels", "linear"),
    [
        (tables_32bit, "32-bit paging", ["PD", "PT"], 0xC012_3456),
        (tables_pae, "PAE paging", ["PDPT", "PD", "PT"], 0xC012_3456),
        (tables_4level, "4-level paging", ["PML4", "PDPT", "PD", "PT"], 0xFFFF_8123_4567_8456),
        (tables_5level, "5-level paging", ["PML5", "PML4", "PDPT", "PD", "PT"], 0xFF12_3456_789A_B456),
    ],
)
def test_small_pages(make, name, levels, linear):
    tables = make()
    tables.map(linear, 0x7654_3000, 12)
    walk = tables.space.walk(linear)
    assert tables.space.name == name
    assert [step.level for step in walk.steps] == levels
    assert (walk.gpa, walk.page_size, walk.reason) == (Gpa(0x7654_3000 | linear & 0xFFF), 4096, "")
    absent = tables.space.walk(linear ^ 0x1000)
    assert absent.gpa is None
    assert absent.reason == f"PT entry {absent.steps[-1].index} is not present"


@pytest.mark.parametrize(
    ("make", "shift", "gpa"),
    [
        (lambda: tables_32bit(cr4=0x10), 22, 0x7640_0000),
        (tables_pae, 21, 0x7660_0000),
        (tables_4level, 21, 0x12_3460_0000),
        (tables_4level, 30, 0x12_4000_0000),
        (tables_5level, 30, 0x12_4000_0000),
    ],
)
def test_large_pages(make, shift, gpa):
    tables = make()
    linear = 0xC012_3456
    tables.map(linear, gpa, shift, 0x87)
    walk = tables.space.walk(linear)
    assert (walk.gpa, walk.page_size) == (Gpa(gpa | linear & (1 << shift) - 1), 1 << shift)


def test_large_32bit_pages_reach_above_4_gib_and_need_pse():
    tables = tables_32bit(cr4=0x10)
    tables.map(0x40_0000, 0x7640_0000 | 0x12 << 13, 22, 0x87)  # bits 20:13 are address bits 39:32
    assert tables.space.translate(0x40_0005) == Gpa(0x12_7640_0005)
    tables.registers.cr4 = 0
    assert tables.space.translate(0x40_0005) is None  # without CR4.PSE the entry is a table's, which is not RAM


def test_no_paging_is_identity_in_32_bits():
    space = AddressSpace(make_registers(cr0=0x11, efer=0, cr4=0), World().read)
    assert space.translate(0x1_0000_2345) == Gpa(0x2345)
    assert space.walk(0x2345).steps == ()


def test_flags_are_decoded():
    world = World()
    world.page(CODE, 1 | 4 | 0x20 | 0x40 | NX)
    assert world.scene.space.walk(CODE).steps[-1].flags == ("P", "U", "A", "D", "NX")


@pytest.mark.parametrize(
    ("at", "entry", "reason"),
    [
        (PML4, 0, "PML4 entry 0 is not present"),
        (PDPT, 0x6, "PDPT entry 0 is not present"),
        (PD, RAM | 7, "the PT itself lies outside RAM, at 0x200000"),
        (PML4, 0x000F_FFFF_FFFF_F007, "the PDPT itself lies outside RAM, at 0xffffffffff000"),
        (PML4, PDPT | PS | 7, "PML4 entry 0 has a reserved bit set (PS)"),
        (PD, 0x2000 | PS | 7, "PD entry 0 has a reserved bit set (the address of its 2M page is not aligned)"),
    ],
)
def test_where_a_walk_ends(at, entry, reason):
    world = World()
    world.put(at, entry)
    walk = world.scene.space.walk(CODE)
    assert (walk.gpa, walk.reason) == (None, reason)


def test_nx_is_reserved_until_it_is_enabled():
    world = World()
    world.page(CODE, 7 | NX)
    assert world.scene.space.translate(CODE) == Gpa(CODE)
    world.registers.efer &= ~0x800
    assert "NXE is 0" in world.scene.space.walk(CODE).reason


def test_tables_may_point_at_themselves():
    world = World()
    world.put(PML4 + 8 * 511, PML4 | 7)
    own = 0xFFFF_FFFF_FFFF_F000  # 511 at all four levels: the PML4 itself
    assert world.scene.space.translate(own) == Gpa(PML4)


@pytest.mark.parametrize(
    ("linear", "levels", "canonical"),
    [
        (0x7FFF_FFFF_FFFF, 4, True),
        (0x8000_0000_0000, 4, False),
        (0xFFFF_7FFF_FFFF_FFFF, 4, False),
        (0xFFFF_8000_0000_0000, 4, True),
        (0x8000_0000_0000, 5, True),
        (0x0100_0000_0000_0000, 5, False),
        (0xFF00_0000_0000_0000, 5, True),
    ],
)
def test_canonical(linear, levels, canonical):
    space = (tables_4level() if levels == 4 else tables_5level()).space
    assert space.is_canonical(linear) is canonical
    assert ("not canonical" in space.walk(linear).reason) is not canonical


READ, WRITE, EXECUTE = "read", "write", "execute"
SMEP, SMAP = 1 << 20, 1 << 21


@pytest.mark.parametrize(
    ("flags", "kind", "ring", "changes", "word"),
    [
        (7, WRITE, 3, {}, None),
        (5, WRITE, 3, {}, "read-only (W is 0 in PT entry 16)"),
        (5, WRITE, 0, {}, "read-only"),
        (5, WRITE, 0, {"cr0": 0x8000_0011}, None),  # without WP ring 0 writes everywhere
        (5, WRITE, 3, {"cr0": 0x8000_0011}, "read-only"),
        (5, READ, 3, {}, None),
        (3, READ, 3, {}, "supervisor only (U is 0 in PT entry 16)"),
        (3, READ, 0, {}, None),
        (7 | NX, EXECUTE, 3, {}, "not executable (NX is set in PT entry 16)"),
        (7 | NX, READ, 3, {}, None),
        (7, EXECUTE, 0, {"cr4": 0x20 | SMEP}, "SMEP"),
        (3, EXECUTE, 0, {"cr4": 0x20 | SMEP}, None),
        (7, READ, 0, {"cr4": 0x20 | SMAP}, "SMAP"),
        (7, READ, 0, {"cr4": 0x20 | SMAP, "rflags": 1 << 18}, None),
        (6, READ, 0, {}, "has not mapped (PT entry 16 is not present)"),
    ],
)
def test_access_rights(flags, kind, ring, changes, word):
    world = World(**changes)
    world.page(CODE, flags)
    refusal = world.scene.space.refusal(CODE, kind, ring)
    assert word in refusal if word else refusal is None


def test_rights_of_all_levels_are_combined():
    world = World()
    world.put(PD, PT | 5)
    assert world.scene.space.refusal(CODE, "write", 3) == "is read-only (W is 0 in PD entry 0)"


def test_reading_crosses_pages_and_stops_at_a_hole():
    world = World()
    world.write(0x5FF0, bytes(range(32)))
    world.page(0x7000, 0)
    world.put(PT + 8 * 5, 0x9000 | 7)  # page 5 is elsewhere
    world.write(0x9FF0, b"A" * 16)
    assert world.scene.space.read(0x5FF0, 32) == b"A" * 16 + bytes(range(16, 32))
    assert len(world.scene.space.read(0x6FF0, 32)) == 16
    assert world.scene.space.read(0x7000, 1) == b""
    assert world.scene.space.number(0x6FFC, 4) == 0
    assert world.scene.space.number(0x6FFC, 8) is None


@settings(max_examples=150, deadline=None)
@given(
    st.binary(min_size=16, max_size=64),
    st.integers(0, 2**64 - 1),
    st.sampled_from([make_registers(), *(make().registers for make in (tables_32bit, tables_pae, tables_5level))]),
    st.integers(0, 2**64 - 1),
)
def test_hostile_tables_never_raise(page, linear, registers, cr3):
    def read(gpa, size):
        if gpa.value >= 1 << 40:
            raise MemoryAccessError("not RAM")
        at = gpa.value % len(page)
        return (page[at:] + page * size)[:size]

    registers.cr3 = cr3
    space = AddressSpace(registers, read)
    walk = space.walk(linear)
    assert (walk.gpa is None) == bool(walk.reason)
    assert len(walk.steps) <= len(space.levels)
    space.refusal(linear, "write", 3)
    space.read(linear, 20)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(0, 2**36 - 1), st.integers(0, 2**28 - 1), max_size=8), st.integers(0, 2**36 - 1))
def test_translation_is_the_inverse_of_mapping(pages, other):
    tables = tables_4level()
    for page, frame in pages.items():
        tables.map(page << 12, frame << 12, 12)

    def canonical(page):
        return page << 12 | (0xFFFF << 48 if page >> 35 else 0)

    for page, frame in pages.items():
        assert tables.space.translate(canonical(page) + 0x123) == Gpa((frame << 12) + 0x123)
    if other not in pages:
        assert tables.space.translate(canonical(other)) is None
