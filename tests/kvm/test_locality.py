# test_locality.py: pages that a guest used lie together at the front of a snapshot; what lies anywhere is restored.
from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from pyvmm import VM, Gpa, Snapshot
from pyvmm.layout import GIB, MIB, PAGE_SIZE
from pyvmm.machine import locality
from pyvmm.machine.locality import accessed
from pyvmm.pytest_plugin import needs
from pyvmm.snapshot.rewrite import pack, set_wset
from pyvmm.testing.verify_model import check_memory, ram_hash

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from snapshot_files import AVAILABLE

pytestmark = needs("kvm", "uffd_guest")

P, W, A, PS = 1, 2, 1 << 5, 1 << 7
PG, PE, PAE, PSE, LA57, LME, LMA = 1 << 31, 1, 1 << 5, 1 << 4, 1 << 12, 1 << 8, 1 << 10
ROOT = 0x100000


def tables(machine, entries, size=8):
    """Writes page tables: (table, index) -> value."""
    for (table, index), value in entries.items():
        machine.memory.write(Gpa(table + index * size), value.to_bytes(size, "little"))


def paging(machine, mode, cr3=ROOT):
    """Register values that turn paging on; of a vCPU that never runs. `mode`: of the table below."""
    cr4 = {"32": PSE, "32 without PSE": 0, "pae": PAE, "4": PAE, "5": PAE | LA57}[mode]
    efer = LME | LMA if mode in ("4", "5") else 0
    registers = machine.regs(0)
    for name, value in {"cr0": PG | PE, "cr3": cr3, "cr4": cr4, "efer": efer}.items():
        setattr(registers, name, value)
    return registers


def found(machine, mode, cr3=ROOT):
    walk = locality._Walk(machine.memory)
    walk.add(paging(machine, mode, cr3))
    return walk.found


def test_four_levels(vm):
    machine = vm(memory="16M")
    tables(machine, {
        (ROOT, 0): 0x101000 | P | A, (ROOT, 1): 0x109000 | P,  # not accessed, nor what is below
        (0x101000, 3): 0x102000 | P | A, (0x101000, 4): 0 | P,
        (0x102000, 0): 0x103000 | P | A, (0x102000, 1): 0x800000 | P | A | PS, (0x102000, 2): 0xA00000 | P | PS,
        (0x103000, 0): 0x305000 | P | A, (0x103000, 1): 0x306000 | P, (0x103000, 2): 0x304000 | P | A,
        (0x103000, 9): 0x305000 | P | A, (0x103000, 10): 0x306000 | A,  # again; not present
        (0x109000, 0): 0x101000 | P | A,
    })  # fmt: skip
    assert found(machine, "4") == [
        (0x100, 1), (0x101, 1), (0x102, 1), (0x103, 1), (0x305, 1), (0x304, 1), (0x800, 512),
    ]  # fmt: skip
    tables(machine, {(0x10A000, 0): ROOT | P | A})
    assert found(machine, "5", 0x10A000)[:2] == [(0x10A, 1), (0x100, 1)]


def test_two_and_three_levels_of_32_bits(vm):
    machine = vm(memory="16M")
    tables(
        machine,
        {
            (ROOT, 0): 0x101000 | P | A,
            (ROOT, 1): 0xC00000 | 1 << 13 | P | A | PS,  # at 4 GiB + 12 MiB: no RAM
            (ROOT, 2): 0x400000 | P | A | PS,
            (ROOT, 3): 0x101000 | P,
            (0x101000, 1023): 0x30F000 | P | A,
        },
        4,
    )
    assert found(machine, "32") == [(0x100, 1), (0x101, 1), (0x30F, 1), (0x400, 1024)]
    # Without PSE the third entry names a table, of zeros.
    assert found(machine, "32 without PSE") == [(0x100, 1), (0x101, 1), (0x30F, 1), (0xC02, 1), (0x400, 1)]
    tables(machine, {
        (0x200020, 0): 0x201000 | P, (0x200020, 1): 0x202000, (0x201000, 5): 0x600000 | P | A | PS,
        (0x202000, 5): 0x800000 | P | A | PS,
    })  # fmt: skip
    assert found(machine, "pae", 0x200020) == [(0x200, 1), (0x201, 1), (0x600, 512)]  # a PDPT has no accessed bits


def test_tables_that_lead_anywhere(vm, monkeypatch):
    machine = vm(memory="4M")
    rng = random.Random(1)
    everywhere = [ROOT, 0x101000, 0x102000, 1 << 40, 0x3FF000, 3 * GIB, (1 << 52) - 0x1000, 0x400000]
    for _ in range(3):
        for table in (*everywhere[:3], 0x3FF000):  # loops among them, large pages of any size, no RAM
            values = (
                rng.choice(everywhere) | rng.choice([P | A, P | A | PS, P, A, P | A | 1 << 63]) for _ in range(512)
            )
            machine.memory.write(Gpa(table), b"".join(value.to_bytes(8, "little") for value in values))
        for mode in ("32", "32 without PSE", "pae", "4", "5"):
            for cr3 in everywhere:
                runs = found(machine, mode, cr3)
                assert all(first >= 0 and count > 0 and first + count <= 1024 for first, count in runs)
                pages = [page for first, count in runs for page in range(first, first + count)]
                assert len(set(pages)) == len(pages)
    monkeypatch.setattr(locality, "MAX_TABLES", 3)
    reads = []
    read = machine.memory.read
    monkeypatch.setattr(machine.memory, "read", lambda gpa, size: reads.append(gpa) or read(gpa, size))
    found(machine, "5")
    assert len(reads) <= 3


def test_ram_on_both_sides_of_the_hole(vm):
    """A large page of 1 GiB that begins below it, and one behind it."""
    machine = vm(memory="4G")
    tables(machine, {
        (ROOT, 0): 0x101000 | P | A, (0x101000, 0): 3 * GIB | P | A | PS, (0x101000, 1): 4 * GIB | P | A | PS,
    })  # fmt: skip
    assert found(machine, "4") == [(0x100, 1), (0x101, 1), (3 * GIB // PAGE_SIZE, GIB // PAGE_SIZE)]


def test_a_guest_that_runs_says_what_it_uses(vm, tmp_path):
    """It maps all its RAM, and has used the first MiBs of it."""
    source = vm(memory="32M", cpus=2)
    source.load("touch", "size=4M")
    while source.progress().count == 0:
        source.run(timeout=0.05)
    hot = {page for first, count in accessed(source) for page in range(first, first + count)}
    assert source.memory.page_of(Gpa(0x10000)) in hot  # its progress page
    assert len(hot) < 32 * MIB // PAGE_SIZE
    source.memory.write(Gpa(28 * MIB), b"cold")
    source.snapshot(str(tmp_path / "s"), order="accessed")
    source.snapshot(str(tmp_path / "t"), order="address")
    with Snapshot.open(str(tmp_path / "s")) as snapshot:
        snapshot.check()
        blocks = [{page for page, _ in snapshot.read_block(block)} for block in range(snapshot.blocks)]
    kinds = ["hot" if pages <= hot else "cold" if not pages & hot else "both" for pages in blocks]
    assert kinds == sorted(kinds, reverse=True), "hot blocks first, then cold ones, and none of both kinds"
    assert {"hot", "cold"} == set(kinds)
    for name in "st":
        with VM.restore(str(tmp_path / name), lazy=True, generation=False) as target:
            assert ram_hash(target.memory) == ram_hash(source.memory)


def test_before_paging_is_on_it_is_by_address(vm, tmp_path):
    source = vm(memory="4M")
    source.load("hello")
    assert accessed(source) == []
    source.snapshot(str(tmp_path / "s"), order="accessed")
    with Snapshot.open(str(tmp_path / "s")) as snapshot:
        pages = [page for block in range(snapshot.blocks) for page, _ in snapshot.read_block(block)]
    assert pages == sorted(pages)


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("codec", [AVAILABLE[0], AVAILABLE[-1]])
@pytest.mark.parametrize("pages", ["2m", "4k"])
def test_a_guest_goes_on_from_any_order(vm, tmp_path, codec, pages, fill):
    """Storage blocks with pages of many 2 MiB blocks, some of them zeros: read when they are touched."""
    source = vm(memory="8M", cpus=2)
    source.load("verify", "order=random zeros=100")
    while source.progress().passes < 1:
        source.run(timeout=0.05)
    path, wset = str(tmp_path / "s"), list(range(2048))
    source.snapshot(path)
    random.Random(codec).shuffle(wset)
    set_wset(path, wset[:1500])
    pack(path, order="touch", block_size=128 << 10, codec=codec)
    with Snapshot.open(path) as snapshot:
        assert len({page // 512 for page, _ in snapshot.read_block(0)}) >= 3
    with VM.restore(path, lazy=True, fill=fill, pages=pages, generation=False) as target:
        passes = target.progress().passes + 2
        while target.progress().passes < passes:
            target.run(timeout=0.02)
        assert target.progress().status == "running"
        assert check_memory(target.memory, target.progress(), zeros=100, order="random") == []
