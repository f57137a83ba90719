# test_trace.py: write traces on KVM: no page that was written is missed, whatever the tracker; and what they cost.
from __future__ import annotations

import threading
import time

import pytest

from pyvmm import Gpa
from pyvmm.errors import BadInput, HostError, KernelError, LifecycleError
from pyvmm.host import without
from pyvmm.kvm import VmFd
from pyvmm.layout import GIB, MIB, PAGE_SIZE
from pyvmm.machine.outcome import gap_gpa
from pyvmm.memory.trace import TRACKERS
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm")


def rows(**options):
    """A test's parameter for each tracker of the table, with the features that it needs."""
    return [pytest.param(row, id=row.name, marks=needs(*row.features), **options) for row in TRACKERS.values()]


SETUPS = [
    pytest.param(row, cpus, pages, id=f"{row.name}-{cpus}-{pages}", marks=needs(*row.features, *large))
    for row in TRACKERS.values()
    for cpus in (1, 2)
    for pages, large in (("4k", ()), ("2m", ("large_mappings",)))
]
EXACT = {"coarse": {"unit": "4K", "refine": 0}}
"""Options with which a tracker that reports more than was written reports that alone."""
LEFT_OVER = 8
"""Pages that a guest writes besides those it is asked to: stacks, progress page, its own variables, page tables."""


def make(vm, row, guest, append, memory="64M", **options):
    machine = vm(memory=memory, **(dict(row.vm_options) | options))
    machine.load(guest, append)
    return machine


def wait_for(machine, done):
    while not done(machine.progress()):  # the watchdog of the tests bounds it
        assert not machine.ended


def run_on(machine, units=1000):
    """Lets every vCPU do so much work more."""
    before = [work.count for work in machine.progress().work]
    wait_for(machine, lambda now: all(w.count >= b + units for w, b in zip(now.work, before, strict=True)))


def pass_on(machine, passes=2):
    """Lets every vCPU complete so many passes more, the first of which may be a part of one."""
    wait_for(machine, lambda now: now.status == "running")
    before = [work.passes for work in machine.progress().work]
    wait_for(machine, lambda now: all(w.passes >= b + passes for w, b in zip(now.work, before, strict=True)))


def ram(machine):
    """A copy of all RAM."""
    return b"".join(machine.memory.read(region.gpa, region.size) for region in machine.memory.regions)


def pages_of(runs):
    return {page for first, count in runs for page in range(first, first + count)}


def differing(before, after):
    """The pages in which two copies of RAM differ."""
    return {
        page
        for page in range(len(before) // PAGE_SIZE)
        if before[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] != after[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
    }


# ---- nothing is missed ----


@pytest.mark.parametrize(("row", "cpus", "pages"), SETUPS)
@pytest.mark.parametrize("guest", ["touch", "verify"])
def test_each_page_that_changed_is_reported(vm, row, cpus, pages, guest):
    """By comparison of RAM before and after, with the guest paused for both."""
    append = "pattern=uniform seed=3" if guest == "touch" else "write=20 order=random"
    machine = make(vm, row, guest, append, cpus=cpus, pages=pages)
    machine.start()
    wait_for(machine, lambda now: now.status == "running" and all(work.count for work in now.work))
    with machine.trace(row.name) as trace:
        for _ in range(3):
            machine.pause()
            trace.collect()
            before = ram(machine)
            machine.resume()
            run_on(machine)
            machine.pause()
            reported, changed = pages_of(trace.collect()), differing(before, ram(machine))
            assert len(changed) > 100
            assert changed <= reported
            assert not trace.collect()  # nothing ran meanwhile
            machine.resume()


@pytest.mark.parametrize(("row", "cpus", "pages"), SETUPS)
def test_only_pages_that_were_written_are_reported(vm, row, cpus, pages):
    """`touch` in 2 MiB of the 64: what is reported lies there, but for a handful."""
    machine = make(vm, row, "touch", "start=30M size=2M", cpus=cpus, pages=pages)
    machine.start()
    wait_for(machine, lambda now: now.passes >= 1)
    first = 32 * MIB // PAGE_SIZE
    region = set(range(first, first + 512))
    with machine.trace(row.name, **EXACT.get(row.name, {})) as trace:
        for _ in range(3):
            machine.pause()
            trace.collect()
            machine.resume()
            pass_on(machine)
            machine.pause()
            reported = pages_of(trace.collect())
            assert region <= reported
            assert len(reported - region) <= LEFT_OVER + cpus
            machine.resume()


@pytest.mark.parametrize(("row", "cpus", "pages"), SETUPS)
def test_copying_in_rounds_while_it_runs_ends_in_the_same_ram(vm, row, cpus, pages):
    """As pre-copy does: all RAM, then rounds of what was written, the last one paused; no page may be older."""
    machine = make(vm, row, "verify", "write=30 order=random seed=9", cpus=cpus, pages=pages)
    machine.start()
    wait_for(machine, lambda now: now.status == "running" and now.passes >= 1)
    memory = machine.memory
    with machine.trace(row.name) as trace:
        shadow = bytearray(ram(machine))

        def copy(runs):
            for gpa, size in runs.gfns(memory):
                shadow[gpa.value : gpa.value + size] = memory.read(gpa, size)
            return runs.pages

        copied = 0
        for _ in range(6):
            copied += copy(trace.collect())
            run_on(machine, 200)
        machine.pause()
        last = copy(trace.collect())
        assert differing(bytes(shadow), ram(machine)) == set()
        assert copied > 1000
        assert last > 0
        machine.resume()
    run_on(machine)  # the guest checks its pages all the while
    assert machine.progress().status == "running"


@needs("dirty_ring")
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_full_ring_is_emptied_by_its_vcpu(vm, cpus):
    """The smallest ring, and nobody who collects meanwhile: still no page is missed."""
    machine = make(vm, TRACKERS["ring"], "touch", "", memory="64M", cpus=cpus, dirty_ring=1024)
    machine.start()
    wait_for(machine, lambda now: now.passes >= 1)
    with machine.trace("ring") as trace:
        machine.pause()
        trace.collect()
        before, taken = ram(machine), trace.entries_taken
        machine.resume()
        pass_on(machine)
        machine.pause()
        full = sum(vcpu.exits().get(31, 0) for vcpu in machine.vcpus)
        assert full >= 62 * MIB // PAGE_SIZE // 1024 // 2  # KVM_EXIT_DIRTY_RING_FULL
        reported = pages_of(trace.collect())
        assert differing(before, ram(machine)) <= reported
        assert set(range(512, 16384)) <= reported
        assert trace.entries_taken - taken >= len(reported)
        assert machine.stats()["exits"]["dirty_ring_full"] == full


@pytest.mark.parametrize("row", rows())
def test_ram_above_the_hole(vm, row):
    """Two memory slots: 3 GiB below, 64 MiB above 4 GiB."""
    machine = make(vm, row, "touch", "start=3066M size=8M", memory=3 * GIB + 64 * MIB, pages="4k")
    machine.start()
    wait_for(machine, lambda now: now.passes >= 1)
    with machine.trace(row.name) as trace:
        trace.collect()
        pass_on(machine)
        machine.pause()
        runs = trace.collect()
    # The guest's memory begins at 2 MiB, and its last 2 MiB below the hole are page tables for what is above.
    low, high = 3068 * MIB // PAGE_SIZE, 3 * GIB // PAGE_SIZE
    assert {*range(low, low + 512), *range(high, high + 1536)} <= pages_of(runs)
    ranges = [(gpa.value, gpa.value + size) for gpa, size in runs.gfns(machine.memory)]
    assert any(end > 4 * GIB for _, end in ranges)
    assert all(end <= 3 * GIB or start >= 4 * GIB for start, end in ranges)


# ---- bits are not lost ----


@pytest.mark.parametrize("row", rows())
def test_the_hosts_writes_are_reported(vm, row):
    machine = make(vm, row, "hello", "")
    machine.memory.zero(Gpa(40 * MIB), 2 * MIB)  # untouched memory comes by 2 MiB
    with machine.trace(row.name, **EXACT.get(row.name, {})) as trace:
        assert not trace.collect()
        machine.memory.write(Gpa(40 * MIB), b"host")
        machine.memory.zero(Gpa(41 * MIB), PAGE_SIZE)
        assert pages_of(trace.collect()) == {40 * MIB // PAGE_SIZE, 41 * MIB // PAGE_SIZE}
        assert trace.stats.host_pages == 2


@pytest.mark.parametrize("row", rows())
def test_what_is_put_back_is_reported_again(vm, row):
    machine = make(vm, row, "touch", "size=2M")
    machine.start()
    wait_for(machine, lambda now: now.passes >= 1)
    with machine.trace(row.name) as trace:
        run_on(machine)
        machine.pause()
        runs = trace.collect()
        assert runs.pages > 100
        trace.put_back(runs)
        assert trace.collect() == runs
        assert not trace.collect()


@pytest.mark.parametrize(
    ("name", "call", "slot"),
    [
        pytest.param("bitmap", "get_dirty_log", 1, marks=needs("dirty_bitmap")),
        pytest.param("manual", "get_dirty_log", 1, marks=needs("initially_set")),
        pytest.param("manual", "clear_dirty_log", 0, marks=needs("initially_set")),
        pytest.param("manual", "clear_dirty_log", 1, marks=needs("initially_set")),
    ],
)
def test_a_failure_midway_loses_nothing(vm, monkeypatch, name, call, slot):
    """The ioctl of one memory slot fails, after that of the first one has cleared its log."""
    machine = make(vm, TRACKERS[name], "touch", "start=3066M size=8M", memory=3 * GIB + 64 * MIB, pages="4k")
    machine.start()
    wait_for(machine, lambda now: now.passes >= 1)
    real = getattr(VmFd, call)
    failures = []

    def failing(self, number, *rest):
        if number == slot and not failures:
            failures.append(number)
            raise KernelError(5, "injected")
        return real(self, number, *rest)

    with machine.trace(name) as trace:
        machine.pause()
        trace.collect()
        before = ram_of(machine, 3066 * MIB)
        machine.resume()
        pass_on(machine)
        machine.pause()
        monkeypatch.setattr(VmFd, call, failing)
        with pytest.raises(KernelError, match="injected"):
            trace.collect()
        assert failures == [slot]
        reported = pages_of(trace.collect())
        start = 3066 * MIB // PAGE_SIZE
        changed = {start + page for page in differing(before, ram_of(machine, 3066 * MIB))}
        assert len(changed) == 2048
        assert changed <= reported


def ram_of(machine, offset):
    """RAM from an offset in it to the end, in both regions."""
    low, high = machine.memory.regions
    return machine.memory.read(Gpa(offset), low.size - offset) + machine.memory.read(high.gpa, high.size)


@needs("dirty_bitmap")
def test_a_start_that_fails_midway_is_undone(vm, monkeypatch):
    machine = make(vm, TRACKERS["bitmap"], "hello", "", memory=3 * GIB + 64 * MIB)
    real, flags_set = VmFd.set_user_memory_region, []

    def failing(self, slot, gpa, size, hva, flags=0):
        if slot == 1 and flags:
            raise KernelError(12, "injected")
        flags_set.append((slot, flags))
        return real(self, slot, gpa, size, hva, flags)

    monkeypatch.setattr(VmFd, "set_user_memory_region", failing)
    trace = machine.trace("bitmap")
    with pytest.raises(KernelError, match="injected"):
        trace.start()
    assert flags_set == [(0, 1), (0, 0)]
    assert not trace.running
    monkeypatch.undo()
    with trace:
        assert not trace.collect()


# ---- while others do things ----


@pytest.mark.parametrize("row", rows())
def test_a_thread_may_start_and_collect(vm, row):
    """The vCPUs run on; other threads pause, resume and look at the guest meanwhile."""
    machine = make(vm, row, "verify", "write=30", cpus=2)
    machine.start()
    wait_for(machine, lambda now: now.passes >= 1)
    collected, over = [], threading.Event()

    def collect():
        with machine.trace(row.name) as trace:
            while not over.is_set():
                collected.append(trace.collect().pages)

    thread = threading.Thread(target=collect)
    thread.start()
    for _ in range(50):
        machine.pause()
        machine.regs(1)
        machine.resume()
        run_on(machine, 1)
    over.set()
    thread.join()
    assert len(collected) > 5
    assert sum(collected) > 0
    run_on(machine)
    assert machine.progress().status == "running"


@pytest.mark.parametrize("row", rows())
def test_a_collector_does_not_outlive_its_vm(vm, row):
    """Closing the VM while another thread collects: that thread is told, and nothing is touched that has gone."""
    for _ in range(5):
        machine = make(vm, row, "touch", "", memory="16M", cpus=2)
        machine.start()
        wait_for(machine, lambda now: now.passes >= 1)
        trace, ended, first = machine.trace(row.name), [], threading.Event()

        def collect(trace=trace, ended=ended, first=first):
            trace.start()
            while True:
                try:
                    trace.collect()
                except LifecycleError as error:
                    ended.append(str(error))
                    return
                first.set()

        thread = threading.Thread(target=collect)
        thread.start()
        assert first.wait(20)
        machine.close()
        thread.join()
        assert ended == ["the VM is closed"]
        trace.stop()


@pytest.mark.parametrize("row", rows())
@needs("large_mappings")
def test_large_mappings_come_back(vm, row):
    """By KVM's own statistics, once the guest has touched all after stop()."""
    machine = make(vm, row, "touch", "", pages="2m")
    machine.start()

    pass_on(machine)
    before = machine.mappings()["pages_2m"]
    assert before >= 30
    for _ in range(2):
        with machine.trace(row.name) as trace:
            pass_on(machine)
            machine.pause()  # one that runs on makes the blocks of `coarse` large again, one by one
            trace.collect()
            assert machine.mappings()["pages_2m"] < before // 2
            machine.resume()
        pass_on(machine)
        assert machine.mappings()["pages_2m"] >= before - 1


@needs("dirty_bitmap", "initially_set")
def test_one_tracker_after_the_other(vm):
    """`manual` leaves no mode behind in which `bitmap` would report the same pages for ever."""
    machine = make(vm, TRACKERS["bitmap"], "touch", "size=2M")
    machine.start()
    wait_for(machine, lambda now: now.passes >= 1)
    for name in ("manual", "bitmap", "manual", "bitmap"):
        with machine.trace(name) as trace:
            run_on(machine)
            machine.pause()
            assert trace.collect().pages > 100
            assert not trace.collect()
            machine.resume()


@needs("initially_set")
@pytest.mark.parametrize("chunk", ["256K", "1M", 64 * MIB, "1G"])
def test_chunks_of_any_size(vm, chunk):
    machine = make(vm, TRACKERS["manual"], "touch", "", memory=33 * MIB + PAGE_SIZE)
    machine.start()
    wait_for(machine, lambda now: now.passes >= 1)
    with machine.trace("manual", chunk=chunk) as trace:
        machine.pause()
        trace.collect()
        before = ram(machine)
        machine.resume()
        run_on(machine, 10000)
        machine.pause()
        assert differing(before, ram(machine)) <= pages_of(trace.collect())
        assert not trace.collect()


# ---- what cannot be ----


@pytest.mark.parametrize("entries", [1, 255, 128, 3000, 1 << 20, -4096])
@needs("dirty_ring")
def test_rings_of_a_size_that_cannot_be(vm, entries):
    with pytest.raises(BadInput, match=f"dirty_ring={entries}: give a power of two from 256 to 65536"):
        vm(dirty_ring=entries)


@needs("dirty_ring")
def test_a_ring_is_the_only_tracker_of_its_vm(vm):
    machine = vm(memory="4M", dirty_ring=1024)
    for name in ("bitmap", "manual"):
        with pytest.raises(HostError, match="a VM with a dirty ring has no dirty bitmap: use tracker ring, or"):
            machine.trace(name)
    with pytest.raises(HostError, match=r"this VM has no dirty ring: make it with VM\(dirty_ring=8192\)"):
        vm(memory="4M").trace("ring")


def test_trackers_that_are_not_there(vm):
    machine = vm(memory="4M")
    with pytest.raises(BadInput, match="no tracker 'fine': choose one of bitmap, manual, ring"):
        machine.trace("fine")
    with without("dirty_bitmap"), pytest.raises(HostError, match="no tracker bitmap here: dirty bitmap: switched off"):
        machine.trace()
    with without("initially_set"), pytest.raises(HostError, match="no tracker manual here: log initially set"):
        machine.trace("manual")


def test_two_traces_of_one_vm(vm):
    machine = vm(memory="4M")
    one, two = machine.trace(), machine.trace()
    with one:
        with pytest.raises(LifecycleError, match="another trace of this VM is started already"):
            two.start()
        with pytest.raises(LifecycleError, match="the trace was started already"):
            one.start()
    with pytest.raises(LifecycleError, match="not started"):
        one.collect()
    with two:
        pass
    machine.close()
    with pytest.raises(LifecycleError, match="the VM is closed"):
        one.start()


# ---- the guest's side ----


def test_the_guest_keeps_its_longest_gap(vm):
    machine = vm(memory="16M", cpus=2)
    machine.load("touch", "gaps=1")
    machine.start()
    wait_for(machine, lambda now: now.passes >= 2)
    machine.pause()
    time.sleep(0.3)  # the gap that is to be seen
    machine.resume()
    run_on(machine)
    assert 0.3 <= machine.progress().longest_gap < 3
    for cpu in (0, 1):
        machine.memory.write(gap_gpa(cpu), bytes(8))
    run_on(machine)
    assert 0 < machine.progress().longest_gap < 0.3
    machine.pause()
    machine.memory.write(gap_gpa(1), (1 << 60).to_bytes(8, "little"))
    work = machine.progress().work
    assert work[0].longest_gap < work[1].longest_gap == 1 << 60


def test_a_guest_that_keeps_no_gaps_says_so(vm):
    machine = vm(memory="16M")
    machine.load("touch", "passes=1")
    assert machine.run(timeout=20).ok
    assert machine.progress().longest_gap is None


@needs("uffd_wp", "uffd_guest")
@pytest.mark.parametrize(("first", "second"), [("coarse", "manual"), ("coarse", "bitmap"), ("manual", "coarse")])
def test_one_trace_takes_over_from_another(vm, first, second, monkeypatch):
    """What the first one knew, and nobody had asked for, the second one reports; where it cannot start, the first runs
    on."""
    machine = vm(memory="32M")
    machine.load("verify", "")
    machine.start()
    one, other = machine.trace(first), machine.trace(second)
    one.start()
    machine.memory.write(Gpa(9 << 20), b"x")
    with monkeypatch.context() as broken:
        broken.setattr(type(other), "_arm", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.start(one)
    assert one.running
    assert not other.running
    machine.memory.write(Gpa(11 << 20), b"x")
    other.start(one)
    assert other.running
    assert not one.running
    machine.memory.write(Gpa(13 << 20), b"x")
    machine.pause()
    found = other.collect()
    for gpa in (9 << 20, 11 << 20, 13 << 20):
        assert machine.memory.page_of(Gpa(gpa)) in found
    with pytest.raises(LifecycleError):
        one.start(one)
    other.stop()
