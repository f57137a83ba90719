# test_engine.py: each operation of the memory engine by itself, judged by the guest, by KVM's statistics and by the
# kernel's page tables.
from __future__ import annotations

import os
import statistics
import subprocess
import time
import weakref
from contextlib import suppress

import pytest
from engine_help import (
    BLOCK,
    Shelf,
    Workers,
    away,
    both_ways,
    judge,
    passes,
    shared_zero_pages,
    shelve,
    until,
    way,
    working,
)  # fmt: skip

from pyvmm import BadInput, Gpa, HostError
from pyvmm.errors import KernelError, MemoryAccessError
from pyvmm.layout import GIB, MIB, PAGE_SIZE
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "uffd_guest", "stats_fd")
__all__ = ["way"]


def sleeps(tid):
    """Does a thread of ours wait for something, by proc(5)?"""
    with open(f"/proc/self/task/{tid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


@both_ways
@needs("large_mappings")
def test_blocks_keep_large(vm, way):
    """Out and in again, 200 of them: each is a large page again, for the host and for KVM. A move is one step, so the
    guest runs on; MADV_COLLAPSE leaves alone what a vCPU has in use just then, so there it is paused."""
    machine = working(vm, "402M", pages="2m")
    engine = machine.memory.engine
    if way == "copy":
        machine.pause()
    gone = 0
    for block in range(1, 201):
        gone += engine.remove(block * BLOCK, BLOCK) == BLOCK
        engine.install(block * BLOCK, BLOCK)
    assert gone == 200
    stats = engine.stats()
    assert (stats.kept_large if way == "move" else stats.collapsed) >= 200
    assert stats.stayed_small == 0
    assert engine.looks()[1:201] == ["large"] * 200
    if machine.paused:
        machine.resume()
    passes(machine)
    assert machine.mappings()["pages_2m"] >= 200
    judge(machine)


@both_ways
@pytest.mark.parametrize("pages", [pytest.param("2m", marks=needs("thp")), "4k"])
def test_runs_of_pages(vm, way, pages):
    machine = working(vm, cpus=2, pages=pages)
    engine = machine.memory.engine
    machine.pause()
    for first, count in (
        (BLOCK, 1),
        (2 * BLOCK + 3, 17),
        (3 * BLOCK - 1, 1),
        (4 * BLOCK, BLOCK),
        (7 * BLOCK - 100, 100),
    ):
        before = away(machine)
        assert engine.remove(first, count) == count
        assert engine.remove(first, count) == 0  # they are away already, and stay where they are
        assert away(machine) == before + count
    assert engine.remove(4 * BLOCK, 2 * BLOCK) == BLOCK
    assert engine.count().homes["aside"] == away(machine)
    machine.resume()
    passes(machine)
    judge(machine)
    engine.install(0, machine.memory.size // PAGE_SIZE)
    assert (away(machine), engine.count().armed) == (0, False)


@both_ways
def test_the_rest_of_a_block_that_is_partly_aside_goes_too(vm, way):
    """UFFDIO_MOVE stops at the first place that is taken."""
    machine = working(vm, pages="4k")
    engine = machine.memory.engine
    machine.pause()
    assert engine.remove(3 * BLOCK + 7, 1) == 1
    assert engine.remove(3 * BLOCK, BLOCK) == BLOCK - 1
    judge(machine)


@both_ways
def test_zeros_go_to_no_place_at_all(vm, way):
    machine = working(vm, append="zeros=1000", pages="auto")
    engine = machine.memory.engine
    machine.pause()
    for block in (2, 3, 4):
        assert engine.remove(block * BLOCK, BLOCK, what="zero") == BLOCK
    assert engine.count().homes == {**engine.count().homes, "zero": 3 * BLOCK, "aside": 0}
    machine.resume()
    passes(machine)
    judge(machine)


@both_ways
@needs("large_mappings")
@pytest.mark.parametrize("count", [BLOCK, 100, 1])
def test_what_is_not_zeros_stays_and_stays_large(vm, way, count):
    machine = working(vm, pages="2m")
    engine = machine.memory.engine
    for block in range(2, 8):
        assert engine.remove(block * BLOCK, count, what="zero") == 0
    assert engine.looks()[2:8] == ["large"] * 6
    judge(machine)


@both_ways
def test_zeros_among_pages_that_are_aside(vm, way):
    """A search for zeros leaves alone what was put aside before, whatever it is."""
    machine = working(vm, append="zeros=300", pages="4k")
    engine = machine.memory.engine
    machine.pause()
    first = 3 * BLOCK
    assert engine.remove(first, 200) == 200
    zeros = engine.remove(first, BLOCK, what="zero")
    assert 40 < zeros < 160  # about 300 per mille of the other 312
    assert engine.count().homes == {**engine.count().homes, "zero": zeros, "aside": 200}
    assert engine.remove(first, BLOCK, what="zero") == 0
    engine.remove(first, BLOCK)
    assert engine.count().homes == {**engine.count().homes, "zero": zeros, "aside": BLOCK - zeros}
    judge(machine)


@both_ways
@pytest.mark.parametrize("pages", [pytest.param("2m", marks=needs("thp")), "4k"])
def test_zeros_come_back_shared_into_small_blocks_and_stored_into_large_ones(vm, way, pages):
    machine = vm(memory="16M", pages=pages)
    engine, at = machine.memory.engine, machine.memory.gpa_of(3 * BLOCK)
    machine.memory.write(at, bytes(2 * MIB))
    assert engine.remove(3 * BLOCK, BLOCK, what="zero") == BLOCK
    assert shared_zero_pages(machine) == 0
    engine.install(3 * BLOCK, 100)
    if pages == "4k":
        assert shared_zero_pages(machine) == 100
        return
    engine.install(3 * BLOCK, BLOCK)
    assert shared_zero_pages(machine) == 0
    engine.remove(3 * BLOCK, BLOCK, what="zero")
    engine.merge(3)
    assert engine.looks()[3] == "large"


@both_ways
def test_blocks_with_shared_zero_pages_can_be_merged_while_faults_are_reported(vm, way):
    machine = vm(memory="16M", pages="auto")
    engine = machine.memory.engine
    machine.memory.write(machine.memory.gpa_of(3 * BLOCK), bytes(MIB) + os.urandom(MIB))
    before = machine.memory.read(machine.memory.gpa_of(3 * BLOCK), 2 * MIB)
    engine.split(3)
    assert engine.remove(3 * BLOCK, BLOCK, what="zero") == BLOCK // 2
    engine.install(3 * BLOCK, BLOCK)
    assert shared_zero_pages(machine) == BLOCK // 2
    engine.remove(5 * BLOCK, 1)  # something else is away: the span stays armed
    view = machine.memory.view(machine.memory.gpa_of(3 * BLOCK), 1)  # which leaves MADV_COLLAPSE as the only way
    engine.merge(3)
    assert engine.looks()[3] == "large"
    assert machine.memory.read(machine.memory.gpa_of(3 * BLOCK), 2 * MIB) == before
    view.release()


@both_ways
def test_untouched_blocks(vm, way):
    """They go to no place, they come back as zeros, and what merely asks about them does not populate them."""
    machine = vm(memory="16M")
    engine = machine.memory.engine
    assert engine.count().untouched == 8 * BLOCK
    for block in range(8):
        engine.merge(block)
        engine.split(block)
        engine.break_(block)
        engine.install(block * BLOCK, BLOCK)
    assert engine.count().untouched == 8 * BLOCK
    assert engine.remove(0, 8 * BLOCK) == 8 * BLOCK
    assert engine.count().homes["zero"] == 8 * BLOCK
    assert machine.memory.read(Gpa(5 * MIB), MIB) == bytes(MIB)
    machine.memory.write(Gpa(6 * MIB), b"here")
    assert machine.memory.read(Gpa(6 * MIB), 8) == b"here\0\0\0\0"
    machine.load("verify", "passes=2")
    assert machine.run(timeout=20).ok


@both_ways
def test_ram_that_ends_within_a_block(vm, way):
    machine = working(vm, 32 * MIB + 5 * PAGE_SIZE, "size=28M", pages="auto")
    engine, last = machine.memory.engine, 16 * BLOCK
    machine.memory.write(machine.memory.gpa_of(last), b"tail" * 5 * 1024)
    assert engine.remove(last, 5) == 5
    assert machine.memory.read(machine.memory.gpa_of(last), 5 * PAGE_SIZE) == b"tail" * 5 * 1024
    assert engine.remove(last + 3, 2) == 2
    machine.memory.write(machine.memory.gpa_of(last), bytes(5 * PAGE_SIZE))
    assert away(machine) == 0
    assert engine.remove(last, 5, what="zero") == 5
    for each in (engine.split, engine.merge, engine.break_):
        with pytest.raises(MemoryAccessError, match="block 16 is not"):
            each(16)
    with pytest.raises(MemoryAccessError):
        engine.remove(last, 6)
    judge(machine)


@both_ways
def test_ram_above_4_gib(vm, way):
    """Armed by GiB, and only there; pages are numbered on behind the hole."""
    machine = vm(memory="5G")
    ram, engine = machine.memory, machine.memory.engine
    places = [Gpa(3 * GIB - 4 * MIB), Gpa(4 * GIB), Gpa(5 * GIB + 6 * MIB), Gpa(6 * GIB - 2 * MIB)]
    data = [os.urandom(2 * MIB) for _ in places]
    for gpa, each in zip(places, data, strict=True):
        ram.write(gpa, each)
        assert engine.remove(ram.block_of(gpa) * BLOCK, BLOCK) == BLOCK
    machine.load("touch", "start=3G size=8M passes=1")  # above the hole, where the second place is
    assert machine.run(timeout=20).ok
    for gpa, each in zip(places[2:], data[2:], strict=True):
        assert ram.read(gpa, 2 * MIB) == each
    assert ram.read(places[0], 2 * MIB) == data[0]
    engine.install(0, ram.size // PAGE_SIZE)
    assert not engine.count().armed


@both_ways
@needs("large_mappings")
def test_mappings_follow_split_merge_and_break(vm, way):
    """By KVM's statistics once the guest has touched the blocks, and by the kernel's page tables."""
    machine = working(vm, "64M", pages="2m")
    engine = machine.memory.engine
    passes(machine, 1)
    whole = machine.mappings()["pages_2m"]
    assert whole >= 31
    for make_small in (engine.split, engine.break_):
        for block in range(4, 12):
            make_small(block)
        passes(machine)
        assert engine.looks()[4:12] == ["small"] * 8
        assert machine.mappings()["pages_2m"] == whole - 8
        assert machine.mappings()["pages_4k"] >= 8 * BLOCK
        for block in range(4, 12):
            engine.merge(block)
        passes(machine)
        assert engine.looks()[4:12] == ["large"] * 8
        assert machine.mappings()["pages_2m"] == whole
    judge(machine)


def descriptors():
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that lists them
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


@both_ways
def test_an_idle_engine_costs_nothing(vm, way):
    """No descriptor, no thread, no registration before something is asked for, and none in force afterwards."""
    machine = working(vm)
    tasks = len(os.listdir("/proc/self/task"))
    engine = machine.memory.engine
    engine.count(), engine.stats(), engine.split(4)
    assert not any("userfaultfd" in each for each in descriptors())
    assert len(os.listdir("/proc/self/task")) == tasks
    assert not engine.count().armed
    machine.pause()
    engine.remove(5 * BLOCK, 2)
    assert engine.count().armed
    engine.install(5 * BLOCK, 1)
    assert engine.count().armed
    machine.resume()
    passes(machine)  # the guest runs on before the thread that has answered it says so
    until(lambda: (away(machine), engine.count().armed) == (0, False), "the end of registration")
    with open("/proc/self/smaps") as smaps:  # "um": watched for absent pages, "uw": for writes
        lines = [line.split()[1:] for line in smaps if line.startswith("VmFlags")]
    assert not any("uw" in flags for flags in lines)
    stats = engine.stats()
    assert stats.arms == stats.disarms > 0
    judge(machine)


def test_an_idle_engine_does_not_slow_the_guest(vm):
    """Alternating pairs; the bound is generous, for a busy host: the figures are for people."""
    plain, engined = working(vm, pages="auto"), working(vm, pages="auto")
    engine = engined.memory.engine
    engine.remove(BLOCK, 8 * BLOCK)
    engine.install(0, engined.memory.size // PAGE_SIZE)
    until(lambda: not engine.count().armed)
    for machine in (plain, engined):
        machine.pause()

    def rate(machine):
        machine.resume()
        begin, before = time.monotonic(), machine.progress().count
        time.sleep(0.1)  # a measurement, not a wait
        count = machine.progress().count - before
        seconds = time.monotonic() - begin
        machine.pause()
        return count / seconds

    ratios = [rate(engined) / rate(plain) for _ in range(9)]
    print(f"pages checked a second with an idle engine, to those without: median {statistics.median(ratios):.3f}")
    assert statistics.median(ratios) > 0.6
    judge(engined)


@both_ways
def test_faults_of_two_vcpus_on_one_block_are_one_fetch(vm, way):
    """Both stand at pages of one block, since they share the pages in turn."""
    machine = working(vm, cpus=2, pages="2m")
    shelf = Shelf()
    machine.pause()
    shelve(machine, shelf)
    until(lambda: len(shelf.pages) == 15 * BLOCK)

    def hold(page):
        """Gives a block once both vCPUs have come to where they need it."""
        until(lambda: all(sleeps(vcpu.native.tid) for vcpu in machine.vcpus), "both vCPUs to wait")

    shelf.fail = hold
    machine.resume()
    passes(machine)
    # Each page once. (A fault that is not read yet when its page comes is never reported, so the count of merged ones
    # may be 0.)
    assert sorted(shelf.fetched) == list(range(BLOCK, 16 * BLOCK))
    until(lambda: not shelf.pages)
    judge(machine)


@both_ways
def test_views_pin_their_blocks(vm, way):
    machine = vm(memory="16M")
    at = machine.memory.gpa_of
    early = machine.memory.view(at(BLOCK + 5), 100)  # before there is an engine
    engine = machine.memory.engine
    machine.memory.write(at(2 * BLOCK), b"x" * 6 * MIB)
    view = machine.memory.view(at(3 * BLOCK - 1), PAGE_SIZE + 1)
    assert [engine.remove(block * BLOCK, BLOCK) for block in range(1, 6)] == [0, 0, 0, BLOCK, BLOCK]
    for block in (1, 2, 3):
        with pytest.raises(HostError, match=f"block {block} is in use"):
            engine.break_(block)
    again = view[1:]
    view.release()
    assert engine.remove(2 * BLOCK, BLOCK) == 0
    assert bytes(again) == b"x" * PAGE_SIZE
    again.release()
    early.release()
    del view, again, early
    assert [engine.remove(block * BLOCK, BLOCK) for block in range(1, 6)] == [BLOCK, BLOCK, BLOCK, 0, 0]
    with machine.memory.view(at(2 * BLOCK), 6 * MIB) as view:  # brings back what it shows
        assert bytes(view) == b"x" * 6 * MIB
    assert int(engine.block_words[2]) >> 32 == 0


@both_ways
@needs("thp")
def test_pages_from_a_file_come_when_they_are_touched(vm, way):
    """A guest at work goes on in another VM, none of whose RAM is there when it starts."""
    first = working(vm, append="order=random zeros=50", pages="2m")
    first.pause()
    state = first.save_state()
    shelf = Shelf()
    ram = first.memory.read(Gpa(0), first.memory.size)
    shelf.pages = {
        page: ram[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] for page in range(first.memory.size // PAGE_SIZE)
    }
    first.close()
    second = vm(memory="32M", pages="2m")
    second.append = first.append
    engine = second.memory.engine
    engine.set_home("file", shelf)
    engine.assign(0, 16 * BLOCK, "file", locator=0)
    assert away(second) == 16 * BLOCK
    second.restore_state(state)
    second.start()
    passes(second)
    judge(second)
    until(lambda: not shelf.pages)
    assert engine.looks()[1:] == ["large"] * 15


def test_only_untouched_pages_can_be_assigned_and_all_or_none(vm):
    machine = vm(memory="16M")
    engine = machine.memory.engine
    machine.memory.write(machine.memory.gpa_of(3 * BLOCK + 9), b"touched")
    for first, count in ((3 * BLOCK + 9, 1), (0, 8 * BLOCK), (3 * BLOCK, 10)):
        with pytest.raises(BadInput, match="not all untouched"):
            engine.assign(first, count, "peer")
        assert away(machine) == 0
    engine.assign(BLOCK, 3, "peer", locator=5)
    with pytest.raises(BadInput, match="not all untouched"):
        engine.assign(BLOCK - 2, 3, "file")
    assert engine.count().homes == {**engine.count().homes, "peer": 3, "file": 0}
    assert [int(word) >> 12 for word in engine.page_words[BLOCK : BLOCK + 4]] == [5, 6, 7, 0]


@both_ways
def test_children_may_be_made_while_pages_move(vm, way):
    """A page that a child shares could not be moved: guest memory stays out of children."""
    machine = working(vm, pages="auto")
    engine = machine.memory.engine

    def move():
        for block in range(1, 16):
            engine.install(block * BLOCK, BLOCK)
            assert engine.remove(block * BLOCK, BLOCK) == BLOCK

    with Workers(move) as workers:
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            subprocess.run(["true"], check=True)
            assert workers.well()
    judge(machine)


@needs("hugetlb", optional=True)
def test_hugetlb_has_no_engine(vm):
    machine = vm(memory="4M", hugetlb=True)
    with pytest.raises(BadInput, match="hugetlb"):
        _ = machine.memory.engine


WRONG = {
    "remove beyond": (lambda e: e.remove(8 * BLOCK, 1), MemoryAccessError, "pages 4096 to 4096 are not all RAM"),
    "remove before": (lambda e: e.remove(-1, 1), MemoryAccessError, "not all RAM"),
    "remove too many": (lambda e: e.remove(1, 8 * BLOCK), MemoryAccessError, "not all RAM"),
    "remove a negative count": (lambda e: e.remove(1, -1), MemoryAccessError, "not all RAM"),
    "remove what": (lambda e: e.remove(1, 1, what="some"), BadInput, "choose aside or zero"),
    "install beyond": (lambda e: e.install(0, 8 * BLOCK + 1), MemoryAccessError, "not all RAM"),
    "store where": (lambda e: e.store(0, 1, "attic"), BadInput, "home 'attic': choose one of file"),
    "store in zero": (lambda e: e.store(0, 1, "zero"), BadInput, "home 'zero'"),
    "store without a home": (lambda e: e.store(0, 1, "swap"), KernelError, "EINVAL"),
    "assign locators": (lambda e: e.assign(0, 2, "file", (1 << 52) - 1), BadInput, "below 2\\^52"),
    "assign beyond": (lambda e: e.assign(8 * BLOCK - 1, 2, "file"), MemoryAccessError, "not all RAM"),
    "assign aside": (lambda e: e.assign(0, 1, "aside"), BadInput, "home 'aside'"),
    "home": (lambda e: e.set_home("present", Shelf()), BadInput, "home 'present'"),
    "split beyond": (lambda e: e.split(8), MemoryAccessError, "block 8 is not"),
    "merge before": (lambda e: e.merge(-1), MemoryAccessError, "block -1 is not"),
    "break beyond": (lambda e: e.break_(1 << 60), MemoryAccessError, "is not"),
    "pin beyond": (lambda e: e.pin(8 * BLOCK, 1), MemoryAccessError, "not all RAM"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_in_one_line(vm, name):
    machine = vm(memory="16M")
    call, kind, words = WRONG[name]
    with pytest.raises(kind, match=words) as caught:
        call(machine.memory.engine)
    assert "\n" not in str(caught.value)
    assert away(machine) == 0


@pytest.mark.parametrize("call", ["remove", "install", "split", "merge", "break_", "count", "stats", "looks", "retry"])
def test_after_close_all_is_refused(vm, call):
    machine = vm(memory="4M")
    engine = machine.memory.engine
    engine.remove(0, 1)
    machine.close()
    with pytest.raises(MemoryAccessError, match="the VM is closed"):
        getattr(engine, call)(*([0] if call in ("remove", "install", "split", "merge", "break_") else []))
    engine.close()
    engine.unpin(0, 1)


def test_the_ram_goes_with_the_vm_and_not_when_the_garbage_collector_comes(vm):
    machine = vm(memory="8M")
    machine.load("touch", "passes=1")
    assert machine.run(timeout=20).ok
    machine.memory.engine.remove(2 * BLOCK, BLOCK)
    mapping = weakref.ref(machine.memory._mapping())
    assert mapping() is not None
    machine.close()
    assert mapping() is None
