# test_sharing.py: equal pages, counted inside large pages and shared by the kernel, beside a guest that knows how many
# there are and checks all of its memory meanwhile. What is set of KSM is put back.
from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
from engine_help import BLOCK, both_ways, passes, until, way  # noqa: F401 (a fixture)

from pyvmm import BadInput
from pyvmm._native import lib
from pyvmm.cli import main
from pyvmm.control.control import Control
from pyvmm.control.sharing import fetch
from pyvmm.errors import HostError
from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.memory.homes import Home
from pyvmm.memory.reclaim.policies import SharingFirst
from pyvmm.memory.reclaim.policy import View
from pyvmm.memory.sharing import ksm
from pyvmm.memory.sharing.estimate import Estimate
from pyvmm.memory.sharing.scanner import Scanner
from pyvmm.memory.sharing.sharer import Sharer, is_shared, mark, share_blocks, unshare
from pyvmm.memory.sharing.table import NOTHING, UNKNOWN, scan
from pyvmm.pytest_plugin import needs
from pyvmm.testing.dup_model import Dup, between

pytestmark = needs("kvm", "uffd_guest")

SETTINGS = (*ksm.QUICK, "run")


@pytest.fixture(autouse=True)
def ksm_is_as_it_was():
    before = {name: ksm.read(name) for name in SETTINGS}
    yield
    after = {name: ksm.read(name) for name in SETTINGS}
    for name, value in before.items():
        ksm._write(name, value) if after[name] != value else None
    assert after == before


def dup(vm, append="", memory="32M", guest_passes=1, **options):
    """The guest at work, with all of its pages written."""
    machine = vm(memory=memory, **options)
    machine.options = {name: int(value) for name, value in (word.split("=") for word in append.split())}
    machine.load("dup", append)
    machine.start()
    until(lambda: machine.progress().passes >= guest_passes or machine.ended, "the first pass")
    assert not machine.ended
    return machine


def model(machine):
    known = {name: value for name, value in machine.options.items() if name != "seed"}
    return Dup(machine.progress(), **known)


def judge(machine):
    if not machine.paused:
        machine.pause()
    assert model(machine).check(machine.memory) == []
    assert machine.progress().status == "running"


def whole(machine):
    return range(1, machine.memory.size // (2 * MIB))


@needs("thp")
def test_the_estimate_is_the_truth_and_breaks_nothing(vm):
    machine = dup(vm, "write=20", "48M", cpus=2)
    machine.pause()
    before, large = machine.memory.engine.stats().faults, machine.memory.large_blocks()
    truth = model(machine).sharing()
    found = Estimate(scan(machine.memory)[BLOCK : BLOCK + truth.pages])
    assert (found.pages, found.scanned) == (truth.pages, truth.pages)
    half = 2 * 2  # each vCPU may be about to write a page, which is one of two others then
    assert (found.zeros, found.across) == (pytest.approx(truth.zeros, abs=half), 0)
    assert found.copies == pytest.approx(truth.duplicates - truth.contents, abs=half)
    assert found.freed == pytest.approx(truth.freed, abs=half)
    counts = [zeros + more for zeros, more in zip(truth.block_zeros, truth.block_duplicates, strict=True)]
    assert sum(abs(one - other) for one, other in zip(found.counts(), counts, strict=True)) <= 2 * half
    assert [found.bits(block).bit_count() for block in range(len(counts))] == found.counts()
    assert machine.memory.large_blocks() == large > 15
    assert machine.memory.engine.stats().faults == before
    assert not machine.memory.pages().armed


class Shelf(Home):
    def __init__(self):
        self.pages, self.fetched = {}, 0

    def store(self, page, data):
        self.pages.update({page + i: data[i * PAGE_SIZE :][:PAGE_SIZE] for i in range(len(data) // PAGE_SIZE)})
        return range(page, page + len(data) // PAGE_SIZE)

    def fetch(self, page, locators):
        self.fetched += len(locators)
        return b"".join(self.pages[locator] for locator in locators)


@both_ways
def test_what_is_away_is_counted_where_it_is_and_not_fetched(vm, way):  # noqa: F811
    machine = dup(vm, "zeros=300", pages="4k")
    machine.pause()
    engine, shelf = machine.memory.engine, Shelf()
    engine.set_home("swap", shelf)
    before = scan(machine.memory)
    assert engine.remove(2 * BLOCK, BLOCK) == BLOCK
    assert engine.remove(3 * BLOCK, BLOCK) == BLOCK
    assert engine.store(3 * BLOCK, BLOCK, "swap") == BLOCK
    gone = engine.remove(4 * BLOCK, BLOCK, what="zero")
    assert gone > 100
    after, away = scan(machine.memory), machine.memory.pages().away
    assert (after[2 * BLOCK : 3 * BLOCK] == before[2 * BLOCK : 3 * BLOCK]).all()
    assert (after[3 * BLOCK : 4 * BLOCK] == UNKNOWN).all()
    assert (after[4 * BLOCK : 5 * BLOCK] == NOTHING).sum() == gone
    assert Estimate(after).scanned == len(after) - BLOCK
    assert machine.memory.pages().away == away
    assert shelf.fetched == 0
    machine.resume()
    passes(machine, 1)
    judge(machine)


def test_to_scan_is_no_write_to_a_trace(vm):
    machine = dup(vm)
    machine.pause()
    with machine.trace("coarse") as trace:
        trace.collect()
        scan(machine.memory)
        assert list(trace.collect()) == []


@needs("ksm")
@both_ways
@pytest.mark.parametrize("pages", [pytest.param("2m", marks=needs("thp")), "4k"])
def test_what_was_estimated_is_freed_and_the_guest_does_not_notice(vm, way, pages):  # noqa: F811
    machine = dup(vm, "write=0", "24M", pages=pages)
    truth = model(machine).sharing()
    estimate = Estimate(scan(machine.memory)[BLOCK:])
    assert estimate.freed == pytest.approx(truth.freed, abs=1)
    found = share_blocks(machine.memory, whole(machine), start_ksm=True)
    assert (found.blocks, found.broken, found.refused) == (11, 11 if pages == "2m" else 0, 0)
    assert found.bytes_freed / PAGE_SIZE == pytest.approx(truth.freed, rel=0.02)
    assert found.zeros == pytest.approx(truth.zeros, abs=1)
    assert found.merging > truth.duplicates
    passes(machine)
    judge(machine)
    # Merged pages go away, are read, come back, and become large pages again.
    engine = machine.memory.engine
    assert engine.remove(2 * BLOCK, 7 * BLOCK) == 7 * BLOCK
    assert engine.remove(10 * BLOCK + 7, 100) == 100
    judge(machine)
    machine.resume()
    passes(machine)
    assert is_shared(machine.memory, 10)
    for block in whole(machine):
        unshare(machine.memory, block)
    assert not any(is_shared(machine.memory, block) for block in whole(machine))
    assert ksm.footprint(machine.memory) > found.after + truth.freed * PAGE_SIZE * 0.9
    if pages == "2m":
        assert machine.memory.engine.looks()[1:] == ["large"] * 11
    passes(machine)
    judge(machine)


CHILD = """
import sys
from pyvmm import VM
from pyvmm.control.control import Control
from pyvmm.memory.sharing.sharer import share_blocks
from pyvmm.testing.dup_model import Dup
with VM(memory="32M") as vm:
    vm.load("dup", "seed=77")
    vm.start()
    while not vm.progress().passes:
        vm.wait(0.01)
    with Control(vm, sys.argv[1]):
        print("ready", flush=True)
        sys.stdin.readline()
        share_blocks(vm.memory, range(1, 16))
        print("shared", flush=True)
        sys.stdin.readline()
        before = vm.progress().passes
        while vm.progress().passes < before + 2 and not vm.ended:
            vm.wait(0.01)
        vm.pause()
        print(len(Dup(vm.progress()).check(vm.memory)), vm.progress().status, flush=True)
"""


def bases_of_the_other(machine):
    """What the guest with seed 77 has, by its model: it writes nothing after its first pass."""
    progress = machine.progress()
    progress.seed = 77
    return Dup(progress).bases()


def total(pid):
    """Bytes of the host's that a process takes, what it shares with others by its part."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss_Anon:"))


@needs("ksm")
def test_two_vms_in_two_processes(vm, tmp_path):
    """The estimate across them, by tables over the control socket, is what the kernel then frees of both together."""
    path = str(tmp_path / "other")
    machine = dup(vm, "seed=5")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "ready\n"
        mine, theirs = scan(machine.memory)[BLOCK:], fetch(path)[BLOCK:]  # without the guests themselves
        both = Estimate(mine, [theirs])
        planted = model(machine).bases()
        assert both.across == between(planted, bases_of_the_other(machine)) > 300
        freed = both.freed + Estimate(theirs).freed
        before = ksm.footprint(machine.memory) + total(child.pid)
        with ksm.ksm_running(start=True):
            child.stdin.write("share\n")
            child.stdin.flush()
            share_blocks(machine.memory, whole(machine))
            assert child.stdout.readline() == "shared\n"
            assert ksm.settled()
            after = ksm.footprint(machine.memory) + total(child.pid)
        assert (before - after) / PAGE_SIZE == pytest.approx(freed, rel=0.02)
        child.stdin.write("check\n")
        child.stdin.flush()
        passes(machine)
        judge(machine)
        assert child.stdout.readline() == "0 running\n"
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


@needs("ksm", "uffd_wp")
@pytest.mark.parametrize("unit", ["4K", "2M", "1G"])
def test_a_trace_sees_writes_to_pages_that_were_merged_meanwhile(vm, unit):
    """A page that is merged loses its write protection: the kernel tells nobody of the next write."""
    machine = vm(memory="16M", pages="4k")
    memory, engine = machine.memory, machine.memory.engine
    for page in range(BLOCK, 3 * BLOCK):
        memory.write(memory.gpa_of(page), (page % 8 + 1).to_bytes(8, "little") * 512)
    with machine.trace("coarse", unit=unit) as trace, ksm.ksm_running(start=True):
        for block in (1, 2):
            mark(engine, block)
        until(lambda: ksm.footprint(memory) < MIB, "merging")
        engine.remove(BLOCK, 2 * BLOCK)
        engine.install(BLOCK, 2 * BLOCK)  # each page has memory of its own again
        trace.collect()
        until(lambda: ksm.footprint(memory) < MIB, "merging once more")
        written = set(range(BLOCK, 3 * BLOCK, 5))
        for page in written:
            lib.pv_poke(memory.base + page * PAGE_SIZE, 0xFF)  # as a vCPU does: no hook of ours hears of it
        found = {page for first, count in trace.collect() for page in range(first, first + count)}
        assert written <= found


@needs("ksm", "uffd_wp")
def test_a_live_save_beside_merging(vm, restored, tmp_path):
    """What KSM does in the meantime is not in the snapshot, and goes on after it."""
    machine = dup(vm, "write=20", "24M", pages="4k")
    with ksm.ksm_running(start=True):
        for block in range(1, 12):
            mark(machine.memory.engine, block)
        for number in range(3):
            path = tmp_path / str(number)
            machine.snapshot(str(path), mode="live")
            copy = restored(path)
            copy.options = machine.options
            assert model(copy).check(copy.memory) == []
            assert is_shared(machine.memory, 5)
    judge(machine)


@needs("thp")
def test_a_block_that_is_large_is_not_the_kernels_to_break(vm):
    machine = dup(vm)
    machine.pause()
    assert machine.memory.engine.call(lib.pv_engine_share, 3, True, equip=False) == -errno.EINVAL
    assert machine.memory.engine.looks()[3] == "large"


@needs("ksm")
def test_under_pressure_the_best_go_first_and_hot_ones_are_spared(vm):
    machine = dup(vm, "zeros=300", pages="2m")
    hot, free = {0, 4, 5}, [1.0]
    sharer = Sharer(machine.memory, lambda block: block in hot, lambda: free[0])
    policy = SharingFirst(View(machine.memory.size // PAGE_SIZE, 100))
    scanner = Scanner(machine.memory, on_block=policy.scanned)
    estimate = scanner.round()
    assert policy._duplicates[3].bit_count() == estimate.counts()[3] > 100
    assert sharer.step(estimate) == 0  # memory is plenty
    counts = estimate.counts()
    best = sorted(set(whole(machine)) - hot, key=lambda block: -counts[block])
    free[0] = (counts[best[2]] + 0.5) / 512 / 8
    assert sharer.step(estimate) == sum(counts[block] >= counts[best[2]] for block in best)
    free[0] = 0.0
    assert sharer.step(estimate) > 0
    assert sharer.shared == set(whole(machine)) - hot
    assert [machine.memory.engine.looks()[block] for block in (4, 5)] == ["large", "large"]
    hot.add(7)
    assert sharer.step(estimate) == 0
    assert machine.memory.engine.looks()[7] == "large"
    assert not is_shared(machine.memory, 7)
    passes(machine)
    judge(machine)


def test_a_block_in_use_stays_whole(vm):
    machine = dup(vm, pages="4k")
    view = machine.memory.view(machine.memory.gpa_of(5 * BLOCK), 10)
    with pytest.raises(HostError, match="in use"):
        mark(machine.memory.engine, 5)
    del view
    machine.pause()


@needs("ksm")
def test_settings_are_put_back_whatever_happens():
    before = {name: ksm.read(name) for name in SETTINGS}

    def fail():
        with ksm.ksm_running(start=True):
            assert ksm.read("run") == 1
            assert ksm.why_not() == ""
            with pytest.raises(HostError, match="another process"), ksm.ksm_running(start=True, patience=0):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {name: ksm.read(name) for name in SETTINGS} == before


def test_the_command_for_a_guest_that_runs(vm, tmp_path, capsys):
    machine = dup(vm)
    path = str(tmp_path / "c")
    with Control(machine, path):
        machine.pause()
        truth = model(machine).sharing()
        assert main(["pages", path, "--sharing", "--with", path, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["sharing"]
        assert 0 <= told["zeros"] - truth.zeros <= 10  # in the guest itself
        assert told["copies"] == truth.duplicates - truth.contents
        assert told["across"] > 5000  # with itself: each content
        assert len(told["blocks"]) == 16
        assert main(["pages", path, "--sharing"]) == 0
        assert "copies within the VM" in capsys.readouterr().out
        assert main(["pages", path]) == 2
        assert main(["pages", path, "--sharing", "--do", "break:3"]) == 2
        assert "--sharing" in capsys.readouterr().err


@needs("ksm")
def test_the_command_for_a_guest_that_it_runs(capsys):
    command = ["pages", "dup", "--mem", "16M", "--seconds", "0.2", "--sharing", "--do", "share:all"]
    assert main([*command, "--ksm", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    before, after = told["shared_bytes"]
    assert (before - after) / PAGE_SIZE == pytest.approx(told["sharing"]["freed"], rel=0.03)
    if ksm.why_not():
        assert main(command) == 2
        assert "sudo tee /sys/kernel/mm/ksm/run" in capsys.readouterr().err


def test_with_goes_with_sharing(capsys):
    assert main(["pages", "dup", "--with", "/nowhere"]) == 2
    with pytest.raises(BadInput, match="nobody listens"):
        fetch("/nowhere/at/all")
