# test_models.py: the guests hotcold and dup, stopped at any instruction, beside what their models say of them; and that
# they see a byte that is wrong.
from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

import pytest

from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, Gpa
from pyvmm.pytest_plugin import needs
from pyvmm.testing.dup_model import Dup, between
from pyvmm.testing.hotcold_model import HotCold, phase

pytestmark = needs("kvm")

WAIT = 20
PAGES = BLOCK_SIZE // PAGE_SIZE


def until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def begun(vm):
    """Starts a guest, which is at work then."""

    def start(guest, append, memory="16M", cpus=1):
        machine = vm(memory=memory, cpus=cpus)
        machine.load(guest, append)
        machine.start()
        until(lambda: machine.progress().status != "booting" and machine.progress().count > 1000)
        return machine

    return start


def phases(machine):
    """At some moment: progress, and the phases that vCPUs are in."""
    progress = machine.progress()
    return progress, {work.passes for work in progress.work}


def fail(machine, gpa):
    """Changes a byte there; the guest must see it."""
    machine.pause()
    right = machine.memory.read(gpa, 1)[0]
    machine.memory.write(gpa, bytes([right ^ 16]))
    machine.resume()
    assert machine.wait(WAIT).status == 1
    progress = machine.progress()
    assert (progress.status, progress.wrong_gpa, progress.wrong_expected, progress.wrong_found) == (
        "failed", gpa.value, right, right ^ 16
    )  # fmt: skip
    assert f"(gpa {gpa.value & -PAGE_SIZE:#x}) byte {gpa.value % PAGE_SIZE:#x}: expected {right:#x}" in machine.printed


# ---- hotcold ----


@pytest.mark.parametrize("cpus", [1, 3])
def test_only_what_the_model_says_is_touched(begun, cpus):
    """All that has another version than before is hot in a phase that a vCPU was in meanwhile."""
    options = {"hot": 30, "pages": 20, "shift": 50}
    machine = begun("hotcold", "hot=30 pages=20 shift=50 read=0 ms=30", "64M", cpus)
    table = Gpa(BLOCK_SIZE)
    machine.pause()
    model = HotCold(machine.progress(), **options)
    size = 4 * model.blocks * PAGES
    assert (model.blocks, len(model.hot_blocks(0)), len(model.hot_pages(0))) == (30, 9, 180)
    seen = set()
    for _ in range(5):
        before, first = memoryview(machine.memory.read(table, size)).cast("I"), phases(machine)[1]
        machine.resume()
        until(lambda first=first: min(phases(machine)[1]) > max(first))
        machine.pause()
        progress, last = phases(machine)
        assert model.check(machine.memory, progress) == []
        after = memoryview(machine.memory.read(table, size)).cast("I")
        changed = {page for page in range(len(after)) if after[page] != before[page]}
        allowed = set().union(*(model.hot_pages(each) for each in range(min(first), max(last) + 1)))
        assert changed
        assert changed <= allowed
        seen |= changed
    assert {page // PAGES for page in seen} >= model.hot_blocks(phase(machine.progress()) - 1)


def test_phases_shift_as_they_are_told(begun):
    machine = begun("hotcold", "hot=20 shift=50 phases=3 touches=3000", "64M")
    assert machine.wait(WAIT).ok
    progress = machine.progress()
    model = HotCold(progress, hot=20, shift=50)
    assert phase(progress) == 2
    assert progress.count == 9000
    assert model.check(machine.memory, progress) == []
    sets = [model.hot_blocks(each) for each in range(3)]
    assert [len(each) for each in sets] == [6] * 3
    assert [len(a & b) for a, b in pairwise(sets)] == [3, 3]


def test_hotcold_sees_a_wrong_byte_of_a_cold_page(begun):
    machine = begun("hotcold", "phases=1 ms=100 hot=10", "64M")
    model = HotCold(machine.progress(), hot=10)
    cold = min(set(range(model.blocks)) - model.hot_blocks(0))
    fail(machine, model.region_gpa + cold * BLOCK_SIZE + 77 * PAGE_SIZE + 1234)


def test_the_model_of_hotcold_sees_what_is_wrong(begun):
    machine = begun("hotcold", "read=0")
    machine.pause()
    progress = machine.progress()
    model = HotCold(progress)
    page = min(set(range(model.blocks * PAGES)) - {work.index for work in progress.work})
    gpa = model.region_gpa + page * PAGE_SIZE
    machine.memory.write(gpa + 8, bytes(8))
    (wrong,) = model.check(machine.memory, progress)
    assert (wrong.page, wrong.gpa, wrong.offset // 8) == (page, gpa, 1)


# ---- dup ----


@pytest.mark.parametrize(
    ("append", "options"),
    [
        ("", {}),
        ("seed=9 dups=400 groups=7 zeros=5 common=0", {"dups": 400, "groups": 7, "zeros": 5, "common": 0}),
        ("write=40 order=random dups=300", {"write": 40, "order": "random", "dups": 300}),
        ("common=1000 dups=0 zeros=0", {"common": 1000, "dups": 0, "zeros": 0}),
    ],
)
def test_the_truth_about_duplicates(begun, append, options):
    """The model's counts are those of the pages' bytes, but for the page that each vCPU may be writing."""
    machine = begun("dup", append, cpus=2)
    until(lambda: machine.progress().passes >= 2)
    machine.pause()
    model = Dup(machine.progress(), **options)
    assert model.check(machine.memory) == []
    truth = model.sharing()
    data = machine.memory.read(Gpa(BLOCK_SIZE), truth.pages * PAGE_SIZE)
    pages = [data[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] for i in range(truth.pages)]
    times, zero = Counter(pages), bytes(PAGE_SIZE)
    again = [page != zero and times[page] > 1 for page in pages]
    slack = 3 * len(machine.progress().work) if "write" in options else 0  # a page, and two that lose or gain a twin
    assert truth.zeros == times[zero]
    assert abs(truth.duplicates - sum(again)) <= slack
    assert abs(truth.freed - (len(pages) - len(times) + (truth.zeros > 0))) <= slack
    for block in range(len(truth.block_zeros)):
        part = slice(block * PAGES, (block + 1) * PAGES)
        assert truth.block_zeros[block] == pages[part].count(zero)
        assert abs(truth.block_duplicates[block] - sum(again[part])) <= slack


def test_what_vms_have_in_common(begun):
    bases, pages = [], []
    for seed, shared in ((1, 5), (2, 5), (3, 6)):
        machine = begun("dup", f"seed={seed} shared={shared} common=300")
        machine.pause()
        progress = machine.progress()
        bases.append(Dup(progress, common=300, shared=shared).bases())
        data = machine.memory.read(Gpa(BLOCK_SIZE), progress.region_size)
        pages.append([data[i : i + PAGE_SIZE] for i in range(0, len(data), PAGE_SIZE)])
    zero = bytes(PAGE_SIZE)
    for one, other in ((0, 1), (1, 0), (0, 2)):
        there = set(pages[other]) - {zero}
        assert between(bases[one], bases[other]) == sum(page in there for page in pages[one])
    assert between(bases[0], bases[1]) > 0.25 * len(pages[0])
    assert between(bases[0], bases[2]) == 0


def test_dup_sees_a_wrong_byte(begun):
    machine = begun("dup", "")
    fail(machine, Gpa(BLOCK_SIZE) + 1000 * PAGE_SIZE + 4095)
