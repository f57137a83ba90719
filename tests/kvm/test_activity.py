# test_activity.py: activity sampling of a guest at work: what it says beside the truth, which the guest hotcold's model
# knows, and that nobody else notices: the guest, its memory, KVM's large mappings, traces, snapshots, a migration.
from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time

import pytest
from engine_help import BLOCK, SECONDS, both_ways, judge, passes, until, way, working

from pyvmm import VM, BadInput, HostError
from pyvmm._native import ffi, lib
from pyvmm.errors import MemoryAccessError
from pyvmm.layout import BLOCK_SIZE, MIB, PAGE_SIZE
from pyvmm.memory.activity import Sampler, WorkingSet
from pyvmm.memory.reclaim.policy import find
from pyvmm.memory.reclaim.simulator import simulate
from pyvmm.memory.reclaim.trace import load
from pyvmm.memory.swap import Swap
from pyvmm.pytest_plugin import needs
from pyvmm.testing.hotcold_model import HotCold

pytestmark = [needs("kvm", "uffd_guest"), needs("thp")]
__all__ = ["way"]

EAGER = {"window": 0.02, "share": 1.0, "budget": 1.0}
"""Little else than sampling."""


def begin(machine, block, limit=0):
    return machine.memory.engine.call(lib.pv_sample_begin, block, limit)


def end(machine, block, keep=True):
    """Result, touched pages, state."""
    told = ffi.new("struct pv_sample *")
    result = machine.memory.engine.call(lib.pv_sample_end, block, keep, told)
    return result, {i for i in range(BLOCK) if told.bits[i // 64] >> i % 64 & 1}, told.state


def hotcold(vm, cpus, append="ms=500 shift=100", memory="64M"):
    machine = vm(memory=memory, cpus=cpus)
    machine.load("hotcold", f"hot=25 pages=64 {append}")
    machine.start()
    until(lambda: machine.progress().status == "running" and machine.progress().count > 1000, "hotcold")
    return machine, HotCold(machine.progress())


class Score:
    """Samples beside the truth; those in whose window the phase has changed say nothing."""

    def __init__(self, machine, model, window):
        self.machine, self.model, self.window = machine, model, window
        self.first = machine.memory.block_of(model.region_gpa)
        self.hits = self.false = self.missed = self.cold = 0
        self.changed = 0.0
        self.phase = -1
        self.phases = set()

    def __call__(self, block, touched, active):
        now = {work.passes for work in self.machine.progress().work}
        if now != {self.phase}:
            self.phase, self.changed = max(now), time.monotonic()
        if time.monotonic() < self.changed + 2 * self.window or not 0 <= block - self.first < self.model.blocks:
            return
        self.phases.add(self.phase)
        hot = block - self.first in self.model.hot_blocks(self.phase)
        self.hits += hot and active
        self.false += active and not hot
        self.missed += hot and not active
        self.cold += not hot and not active

    @property
    def precision(self):
        return self.hits / (self.hits + self.false)

    @property
    def recall(self):
        return self.hits / (self.hits + self.missed)


@pytest.mark.parametrize(("cpus", "order"), [(1, "random"), (4, "clock")])
def test_active_blocks_are_the_hot_ones(vm, cpus, order):
    """A threshold that a guest reaches also where it hardly gets a CPU."""
    machine, model = hotcold(vm, cpus)
    score = Score(machine, model, 0.08)
    sampler = Sampler(
        machine.memory, window=0.08, share=0.5, budget=1, threshold=6, cpus=cpus, order=order, seed=1, on_sample=score
    )
    with sampler:
        until(lambda: score.hits >= 12 and score.cold >= 12 and len(score.phases) >= 2, "samples in two phases")
    assert score.precision >= 0.95, vars(score)
    assert score.recall >= 0.95, vars(score)
    assert sampler.counts().begun == sampler.counts().ended
    assert sampler.watched == []
    machine.pause()
    assert model.check(machine.memory, machine.progress()) == []
    assert machine.memory.pages().away == 0


def test_full_samples_have_all_pages_that_the_guest_touches_and_no_others(vm):
    machine, model = hotcold(vm, 1, "ms=1000000")
    first = machine.memory.block_of(model.region_gpa)
    seen = set()

    def note(block, touched, active):
        seen.update((block - first) * BLOCK + i for i in range(BLOCK) if block >= first and touched >> i & 1)

    with Sampler(machine.memory, window=0.1, share=1.0, full=True, budget=1, on_sample=note) as sampler:
        until(lambda: seen >= model.hot_pages(0) and sampler.counts().ended > 2 * model.blocks, "all pages")
    assert seen == model.hot_pages(0)


def test_the_working_set_is_what_the_guest_uses(vm):
    """The interval is right in 95 of 100 cases: with all of its blocks sampled, in all."""
    machine, model = hotcold(vm, 1, "ms=1000000")
    found, seen = WorkingSet(60), set()

    def note(block, touched, active):
        found.add(block, touched.bit_count(), active, time.monotonic())
        seen.add(block)

    with Sampler(machine.memory, window=0.1, share=1.0, budget=1, threshold=6, on_sample=note) as sampler:
        until(lambda: len(seen) >= sampler.population() - 1, "all blocks")
        estimate = found.estimate(sampler.population(), time.monotonic())
    hot = len(model.hot_blocks(0))
    assert hot <= estimate.active <= hot + 2  # with the guest's own: its table of versions, its code
    assert hot * BLOCK <= estimate.high
    assert estimate.low <= (hot + 2) * BLOCK


@both_ways
@pytest.mark.parametrize("cpus", [1, 4])
def test_the_guest_and_its_large_pages_do_not_notice(vm, cpus, way):
    """P7: what KVM maps by large pages, after as before."""
    machine = working(vm, "32M", "order=random zeros=100", cpus=cpus, pages="2m")
    passes(machine, 2)
    machine.pause()
    before = machine.memory.pages().large
    mapped = machine.mappings()["pages_2m"]
    machine.resume()
    with Sampler(machine.memory, **EAGER) as sampler:
        until(
            lambda: sampler.counts().ended > (100 if way == "move" else 30) and sampler.counts().active > 5, "samples"
        )
    counts = sampler.counts()
    assert counts.failed == 0
    passes(machine, 2)
    judge(machine)
    stats = machine.memory.engine.stats()
    assert machine.memory.pages().large == before, (machine.memory.engine.looks(), stats, counts)
    assert machine.mappings()["pages_2m"] == mapped
    assert before == machine.memory.size // PAGE_SIZE


@both_ways
def test_what_a_sample_sees(vm, way):
    """Of a guest that stands, the host's own touches."""
    machine = working(vm, "16M", pages="2m")
    machine.pause()
    engine, memory = machine.memory.engine, machine.memory
    copy = [memory.read(memory.gpa_of(page), PAGE_SIZE) for page in range(2 * BLOCK, 3 * BLOCK)]
    assert begin(machine, 2) == 0
    assert engine.block_words[2] & lib.PV_BLOCK_SAMPLED
    assert begin(machine, 2) == -errno.EALREADY
    assert memory.pages().homes["aside"] == BLOCK
    start = memory.hva(memory.gpa_of(2 * BLOCK)).value
    out = bytearray(8)
    for place in (3, 9, 3):
        lib.pv_copy(ffi.from_buffer(out), ffi.cast("uint8_t *", start + place * PAGE_SIZE), 8)
        assert out == copy[place][:8]
    until(lambda: memory.pages().homes["aside"] == BLOCK - 2, "the word")  # set after whoever waited is woken
    assert end(machine, 2) == (0, {3, 9}, lib.PV_SAMPLE_RUNNING)
    assert end(machine, 2)[0] == -errno.ENOENT
    assert memory.pages().away == 0
    assert engine.looks()[2] == "large"
    assert begin(machine, 2) == 0
    with memory.view(memory.gpa_of(2 * BLOCK), 10) as view:  # finds it as it was
        assert bytes(view) == copy[0][:10]
        assert end(machine, 2) == (0, set(), lib.PV_SAMPLE_BROKEN_OFF)
        assert begin(machine, 2) == -errno.EBUSY
    assert [memory.read(memory.gpa_of(page), PAGE_SIZE) for page in range(2 * BLOCK, 3 * BLOCK)] == copy
    machine.resume()
    passes(machine, 1)
    judge(machine)


def test_cold_blocks_stay_aside_and_go_out_to_swap(vm, tmp_path):
    """decide() says False, and whoever wants memory takes what was not touched; hot blocks stay large."""
    machine, model = hotcold(vm, 1, "ms=1000000")
    first, swap = machine.memory.block_of(model.region_gpa), Swap(machine.memory, str(tmp_path), machine.memory.size)
    hot = {first + block for block in model.hot_blocks(0)}
    gone = {}

    def cold(block, touched):
        return first > block or touched.bit_count() > 0

    def out(block, touched, active):
        if not touched and block >= first:
            gone[block] = swap.out([(block * BLOCK, BLOCK)])

    with Sampler(machine.memory, window=0.05, share=1.0, budget=1, on_sample=out, decide=cold):
        until(lambda: len(gone.keys() - hot) >= 10, "cold blocks")  # a guest that gets no CPU has no hot ones
    swap.drain()
    assert {gone[block] for block in gone.keys() - hot} == {0}  # they were aside already
    assert swap.stats().out >= 10 * BLOCK
    until(lambda: {machine.memory.engine.looks()[block] for block in hot} == {"large"}, "hot blocks that are large")
    looks = machine.memory.engine.looks()
    assert {looks[block] for block in gone.keys() - hot} <= {"swap", "zero"}
    machine.pause()
    assert model.check(machine.memory, machine.progress()) == []
    swap.close()


def test_a_limit_is_kept_while_blocks_are_sampled(vm):
    """What is aside to be watched is neither taken for what goes out, nor for what has come back."""
    machine = working(vm, "48M", "order=random zeros=100", pages="2m")
    machine.memory.limit = 36 * MIB
    reclaimer = machine.memory.reclaimer
    with Sampler(machine.memory, window=0.01, share=0.25, budget=1) as sampler:
        until(lambda: sampler.counts().begun > 30 or machine.ended, "samples")
        passes(machine, 1)
    assert reclaimer.settled()
    assert reclaimer.trouble == ""
    judge(machine)


def test_a_cold_block_with_touched_pages_loses_the_others_alone(vm):
    machine = working(vm, "16M", pages="2m")
    assert begin(machine, 3) == 0
    until(lambda: machine.memory.engine.count().homes["aside"] < BLOCK - 5, "touches")
    result, touched, _ = end(machine, 3, keep=False)
    assert result == 0
    assert touched
    assert machine.memory.engine.block_words[3] & lib.PV_BLOCK_BROKEN
    passes(machine, 1)
    judge(machine)


@pytest.mark.parametrize(("tracker", "cpus"), [("coarse", 4), ("bitmap", 1)])
def test_with_traces_and_snapshots_in_the_midst(vm, tmp_path, restored, tracker, cpus):
    machine = working(vm, "32M", "order=random zeros=100", cpus=cpus)
    path = str(tmp_path / "vm.snap")
    with Sampler(machine.memory, cpus=cpus, paused=lambda: machine.paused, **EAGER) as sampler:
        for mode in ("stop", "live"):
            trace = machine.trace(tracker)
            before = sampler.counts().begun
            until(lambda before=before: sampler.counts().begun > before + 20, "samples")
            trace.start()
            trace.collect()
            passes(machine, 1)
            assert trace.collect().pages > 0
            trace.stop()
            machine.snapshot(path, mode=mode)
            copy = restored(path)
            copy.start()
            passes(copy, 1)
            copy.append = machine.append
            judge(copy)
        machine.snapshot(path)
    passes(machine, 1)
    judge(machine)


@pytest.mark.parametrize(("mode", "cpus"), [("precopy", 4), ("postcopy", 1), ("hybrid", 1)])
def test_a_guest_moves_while_it_is_sampled(vm, tmp_path, mode, cpus):
    """At the source before it leaves, while it does, and after; at the destination from the first moment on."""
    machine = working(vm, "32M", "order=random zeros=100", cpus=cpus, pages="2m")
    into = VM.receive(f"unix:{tmp_path / 'here'}")
    try:
        with Sampler(machine.memory, cpus=cpus, **EAGER) as sampler:
            until(lambda: sampler.counts().begun > 20, "samples")
            out = machine.migrate(into.address, mode=mode, downtime=0.2)
            target = into.vm(SECONDS)
            with Sampler(target.memory, cpus=cpus, **EAGER) as there:
                assert out.result(SECONDS).large_before == 16
                into.result(SECONDS)
                until(lambda: there.counts().ended > 20 or target.ended, "samples there")
        target.append = machine.append
        passes(target, 1)
        judge(target)
        assert target.memory.large_blocks() == target.memory.size // BLOCK_SIZE
    finally:
        into.close()
        if into._vm is not None:
            into._vm.close()


def test_every_written_page_is_traced_while_blocks_are_sampled(vm):
    """A trace is asked between two looks at all of memory, with the sampling on."""
    machine = working(vm, "16M", "write=40 order=random")
    memory = machine.memory
    with Sampler(memory, paused=lambda: machine.paused, **EAGER) as sampler:
        for tracker in ("bitmap", "coarse"):
            trace = machine.trace(tracker)
            trace.start()
            machine.pause()
            before = memory.read(memory.gpa_of(0), memory.size)
            trace.collect()
            machine.resume()
            if tracker == "bitmap":  # with a coarse one nothing begins
                begun = sampler.counts().begun
                until(lambda begun=begun: sampler.counts().begun > begun + 10, "samples")
            passes(machine, 1)
            machine.pause()
            after = memory.read(memory.gpa_of(0), memory.size)
            runs = trace.collect()
            pages = range(0, len(after), PAGE_SIZE)
            written = {at // PAGE_SIZE for at in pages if before[at : at + PAGE_SIZE] != after[at : at + PAGE_SIZE]}
            reported = {page for first, count in runs for page in range(first, first + count)}
            assert written
            assert written <= reported
            machine.resume()
            trace.stop()
    judge(machine)


def test_a_closed_vm_ends_the_sampling(vm):
    machine = working(vm, "16M")
    sampler = Sampler(machine.memory, **EAGER)
    sampler.start()
    with pytest.raises(BadInput, match="runs already"):
        sampler.start()
    until(lambda: sampler.counts().begun > 5, "samples")
    machine.close()
    sampler.stop()
    with pytest.raises(MemoryAccessError):
        sampler.counts()


def test_what_a_callback_raises_is_raised_by_stop(vm):
    machine = working(vm, "16M")

    def fail(block, touched, active):
        raise HostError("enough")

    sampler = Sampler(machine.memory, on_sample=fail, **EAGER)
    sampler.start()
    until(lambda: sampler._error is not None, "the callback")
    with pytest.raises(HostError, match="enough"):
        sampler.stop()
    sampler.stop()
    assert machine.memory.pages().away == 0
    passes(machine, 1)
    judge(machine)


def test_a_guest_that_stands_is_not_called_cold(vm):
    machine = working(vm, "16M")
    seen = []
    sampler = Sampler(machine.memory, paused=lambda: machine.paused, on_sample=lambda *told: seen.append(told), **EAGER)
    sampler.tick()
    time.sleep(0.01)  # something may begin then
    sampler.tick()
    assert sampler.watched
    machine.pause()
    begun = sampler.counts().begun
    end = time.monotonic() + 2 * sampler.window
    while time.monotonic() < end:
        sampler.tick()
    assert seen == []
    assert sampler.counts().begun == begun
    machine.resume()
    until(lambda: sampler.tick() or seen, "samples")
    sampler.stop()
    judge(machine)


def test_a_small_budget_is_kept(vm):
    """Of a guest all of whose memory is hot: sampling pays for each block with `threshold` faults."""
    machine = working(vm, "32M", "order=random")
    begun = time.monotonic()
    with Sampler(machine.memory, window=0.01, share=1.0, budget=0.01) as sampler:
        until(lambda: sampler.counts().held > 20, "the budget")
        spent = time.monotonic() - begun
        counts = sampler.counts()
    assert counts.touches * 100e-6 < 0.01 * spent + 0.02 + len(range(16)) * 32 * 100e-6
    assert counts.waited < 0.05 * spent + 0.05
    judge(machine)


def test_random_order_meets_all_blocks_alike(vm):
    machine = working(vm, "16M", pages="2m")
    seen = [0] * 8
    rng = random.Random(1)
    with Sampler(machine.memory, seed=rng.random(),
                 on_sample=lambda block, *_: seen.__setitem__(block, seen[block] + 1), **EAGER):  # fmt: skip
        until(lambda: sum(seen) >= 64, "samples")
    assert min(seen) >= 4
    assert BLOCK_SIZE * len(seen) == 16 * MIB
    judge(machine)


# ---- the command ----


def command(*arguments, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "activity", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.returncode == status, (done.stdout, done.stderr)
    return done


QUICK = ("--mem", "32M", "--seconds", "0.6", "--window", "0.02", "--share", "0.5", "--budget", "1")


def test_the_command_shows_a_map_and_records_a_trace(tmp_path):
    trace = tmp_path / "a.trace"
    done = command("hotcold", *QUICK, "--append", "ms=100000", "--record-trace", str(trace))
    lines = done.stdout.splitlines()
    assert [line[:11].strip() for line in lines[:4]] == ["watched", "working set", "cost", "guest"]
    assert any(line.startswith("pages touched, when it was last looked:") for line in lines)
    assert "hotcold: 14 blocks, 3 hot" in done.stderr
    found = load(str(trace))
    assert found.pages == 32 * MIB // PAGE_SIZE
    assert len(found) > 0
    assert {event.block for _, event in found.events} <= set(range(16))
    assert simulate(found, find("activity"), 4 * BLOCK).faults > 0


def test_the_command_gives_data():
    found = json.loads(command("hotcold", *QUICK, "--full", "--order", "clock", "--json", "--cpus", "2").stdout)
    assert found["samples"] > 0
    assert found["counts"]["failed"] == 0
    assert found["working_set"]["low"] <= found["working_set"]["pages"] <= found["working_set"]["high"]
    assert len(found["heat"]["touched"]) == 16
    assert found["slower"] is not None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("hello",), "the guest ended before any block was watched: give one that runs on, such as hotcold"),
        (("hotcold", "--share", "2"), "a share of 2 of the blocks: give more than 0, and at most 1"),
        (("hotcold", "--record-trace", "/"), "--record-trace /: give a file in a directory that is there"),
        (("hotcold", "--seconds", "0"), "--seconds 0: give seconds above 0"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, text):
    assert command(*arguments, status=2).stderr.splitlines()[-1] == f"pyvmm: {text}"
