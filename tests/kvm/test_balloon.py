# test_balloon.py: a guest that gives up memory by its balloon, takes it back, and checks all that it has: what the
# kernel and the engine say of that, its classes, snapshots and migrations with a balloon half inflated, a limit beside.
from __future__ import annotations

import json
import time

import pytest
from engine_help import BLOCK, SECONDS, both_ways, limit_kept, resident, until, way

from pyvmm import VM
from pyvmm.cli import main
from pyvmm.control.client import Client
from pyvmm.control.control import Control
from pyvmm.devices.virtio.classes import CLASSES
from pyvmm.errors import BadInput, StateError
from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.memory.activity.sampler import Sampler
from pyvmm.pytest_plugin import needs
from pyvmm.testing.balance import imbalances, populated
from pyvmm.testing.classes_model import Classes

pytestmark = needs("kvm", "uffd_guest")

__all__ = ["way"]

WORK = 300


@pytest.fixture
def begun(vm):
    """The guest at work, with a balloon."""

    def start(append="", memory="64M", **options):
        machine = vm(memory=memory, devices=["balloon"], **options)
        machine.load("classes", append)
        machine.start()
        gets_on(machine)
        return machine

    return start


def gets_on(machine, more=WORK):
    before = machine.progress().count
    until(lambda: machine.progress().count >= before + more or machine.ended, "work")
    assert not machine.ended, machine.printed


def inflate(machine, size):
    """Until the guest has given up so much in all."""
    machine.balloon.target = size
    until(lambda: machine.balloon.actual == size or machine.ended, f"a balloon of {size}: {machine.balloon.actual}")
    assert not machine.ended, machine.printed
    return machine.balloon


def level(machine):
    """Of a guest that stands: what is in the home is what it has given up, but for one request under way."""
    given = set(Classes(machine.memory, machine.progress()).given())
    pages = {
        page for first, count in machine.memory.engine.at_home("balloon").runs() for page in range(first, first + count)
    }
    assert pages <= given
    assert len(given - pages) <= BLOCK, (len(given), len(pages))


def judge(machine, armed=None, **options):
    """Stops the guest: is all that it has right, is what it has given up away, and do all books agree?"""
    if not machine.paused:
        machine.pause()
    until(lambda: not imbalances(machine.memory, armed=armed), f"{imbalances(machine.memory, armed=armed)}")
    model = Classes(machine.memory, machine.progress(), **options)
    given = set(model.given())
    assert not given & set(populated(machine.memory).nonzero()[0].tolist())
    assert model.check() == []  # which reads all of it, and so brings what was given up
    assert machine.progress().status == "running"
    return model


@both_ways
@pytest.mark.usefixtures("way")
def test_half_and_back_many_times(begun):
    machine = begun()
    for turn in range(6):
        balloon = inflate(machine, 32 * MIB)
        gets_on(machine)
        machine.pause()
        level(machine)
        assert balloon.away == balloon.actual > 30 * MIB  # it may have taken back a few
        machine.resume()
        inflate(machine, (turn % 3) * 4 * MIB)
        gets_on(machine)
    judge(machine)
    assert machine.balloon.counts["stayed"] == machine.balloon.counts["strange"] == 0


def test_what_is_resident_falls_at_once(begun):
    """When the guest has been told that its pages are gone, they are, by the kernel's figures."""
    machine = begun("heap=20 cache=30 fixed=1")
    machine.pause()
    machine.memory.zero(machine.memory.regions[0].gpa + 60 * MIB, 4 * MIB)
    machine.resume()
    before = resident(machine)
    machine.balloon.target = 40 * MIB
    until(lambda: machine.balloon.actual == 40 * MIB, "the balloon")
    machine.pause()
    assert resident(machine) <= machine.memory.size // PAGE_SIZE - 40 * MIB // PAGE_SIZE
    assert before - resident(machine) > 0
    judge(machine, heap=20, cache=30)


@needs("thp")
def test_blocks_go_whole_and_come_back_as_large_pages(begun):
    machine = begun("fixed=1 heap=10 cache=10", pages="auto")
    balloon = inflate(machine, 40 * MIB)
    assert balloon.counts["blocks"] == 20
    looks = machine.memory.engine.looks()
    assert looks.count("balloon") == 20
    assert "small" not in looks[1:]
    inflate(machine, 0)
    assert machine.memory.engine.looks().count("balloon") == 0
    assert not machine.memory.pages().away
    judge(machine, heap=10, cache=10)


def test_it_gives_free_pages_first_then_clean_ones(begun):
    machine = begun("fixed=5 heap=25 cache=40 hot=20 dirty=0", memory="32M")
    free = machine.balloon.classes(5)["free"]
    inflate(machine, free // 2 // PAGE_SIZE * PAGE_SIZE)
    assert machine.balloon.classes(5)["inactive anonymous"] > 0
    assert machine.balloon.refaults() == 0
    inflate(machine, 14 * MIB)
    until(lambda: machine.balloon.stats(5) and machine.balloon.refaults() > 0, "pages that are read again")
    model = judge(machine, hot=20)
    sizes = model.sizes()
    assert sizes["active anonymous"] + sizes["inactive anonymous"] == model.pages * 25 // 100 * PAGE_SIZE  # never heap


def test_it_takes_pages_back_where_it_has_none_left(begun):
    """Deflate-on-oom: the heap grows beyond what the balloon leaves."""
    machine = begun("fixed=1 heap=20 cache=5 grow=40 hot=50", memory="32M")
    machine.balloon.target = 22 * MIB
    until(lambda: machine.balloon.actual > 15 * MIB or machine.ended, "the balloon")
    until(lambda: machine.balloon.counts["deflated"] > 2000 or machine.ended, "pages that are taken back")
    gets_on(machine)
    assert machine.balloon.actual < 22 * MIB
    judge(machine, heap=20, cache=5, hot=50)


def test_it_says_what_it_has(begun):
    machine = begun("hot=30")
    inflate(machine, 20 * MIB)
    told = machine.balloon.classes(5)
    sampled = machine.balloon.sample(4000, seed=1, timeout=5)
    sizes = judge(machine, hot=30).sizes()
    assert set(told) == set(sampled) == set(CLASSES)
    assert sum(told.values()) == machine.memory.size - 20 * MIB
    for name in CLASSES:  # it was at work meanwhile, and the sample is one
        assert told[name] == pytest.approx(sizes[name], abs=2 * MIB), name
        assert sampled[name] == pytest.approx(sizes[name], abs=4 * MIB), name


def test_every_page_is_of_the_class_that_the_guest_says(begun):
    machine = begun("touches=0", memory="16M")
    machine.pause()
    model = Classes(machine.memory, machine.progress())
    machine.resume()
    of = model.classes()
    still = [
        page for page in range(0, model.pages, 37) if model.kinds[page] in (1, 2)
    ]  # fixed, and heap: these stay so
    frames = [machine.memory.gpa_of(model.first + page).value // PAGE_SIZE for page in still]
    assert machine.balloon.classify(frames[:256], 5) == [int(of[page]) for page in still[:256]]
    assert machine.balloon.classify([0, 1, 511], 5) == [0, 0, 0]


def test_a_driver_with_standard_statistics_alone(begun):
    machine = begun("standard=1")
    told, exact = machine.balloon.classes(5), judge(machine).sizes()
    assert (told["unreclaimable"], told["inactive anonymous"]) == (None, None)
    assert told["free"] == pytest.approx(exact["free"], abs=2 * MIB)
    assert told["inactive buffer"] <= exact["inactive buffer"] + MIB  # never more than can be had


@needs("thp")
def test_free_pages_are_reported(begun):
    machine = begun("fixed=1 heap=10 cache=10 report=1", memory="32M")
    machine.pause()
    machine.memory.write(machine.memory.regions[0].gpa + 24 * MIB, b"x" * 4 * MIB)
    machine.resume()
    before = machine.balloon.counts["reported"]
    inflate(machine, 8 * MIB)
    inflate(machine, 0)
    gets_on(machine, 2000)
    assert before + machine.balloon.counts["reported"] > 0
    assert (machine.balloon.actual, machine.balloon.away) == (0, 0)
    judge(machine, heap=10, cache=10)


# ---- elsewhere ----


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("mode", ["stop", "live"])
def test_snapshots_with_a_balloon_half_inflated(begun, tmp_path, mode, lazy):
    machine, made = begun(), []
    machine.balloon.target = 40 * MIB
    until(lambda: machine.balloon.away > 8 * MIB, "the balloon")
    path = str(tmp_path / "s")
    try:
        for _ in range(2):
            machine.snapshot(path, mode=mode)
            machine.pause()
            level(machine)
            with pytest.raises(StateError, match="virtio-balloon@0; this one has"):
                VM.restore(path).close()
            made.append(VM.restore(path, devices=["balloon"], lazy=lazy))
            machine.close()
            machine = made[-1]
            assert machine.balloon.target == 40 * MIB
            machine.start()
            assert machine.balloon.away > 4 * MIB
            gets_on(machine)
        inflate(machine, 20 * MIB)
        if lazy:
            until(lambda: not machine.memory.pages().homes["file"], "all that is in the file")
        machine.pause()
        level(machine)  # who fills all of RAM leaves what was given up
        judge(machine)
    finally:
        for one in made:
            one.close()


@needs("uffd_wp")
def test_incremental_snapshots_have_what_was_given_up_as_zeros(begun, tmp_path, restored):
    machine = begun(memory="32M")
    machine.pause()
    machine.snapshot(str(tmp_path / "a"), track="coarse")
    machine.resume()
    inflate(machine, 12 * MIB)
    machine.pause()
    level(machine)
    machine.snapshot(str(tmp_path / "b"), parent=str(tmp_path / "a"))
    level(machine)
    other = restored(tmp_path / "b", devices=["balloon"])
    given = Classes(other.memory, other.progress()).given()
    assert given
    for page in given:
        assert not any(other.memory.read(other.memory.gpa_of(page), PAGE_SIZE))
    assert Classes(other.memory, other.progress()).check() == []


@needs("uffd_wp")
@pytest.mark.parametrize("mode", ["precopy", "postcopy", "hybrid"])
def test_a_guest_moves_with_a_balloon_half_inflated(begun, tmp_path, mode):
    """Once it is at rest at the source, and once it is inflated on the way."""
    machine = begun(memory="48M")
    inflate(machine, 16 * MIB)
    with VM.receive(f"unix:{tmp_path / 'socket'}", devices=["balloon"]) as into:
        migration = machine.migrate(into.address, mode=mode)
        machine.balloon.target = 20 * MIB
        migration.result(SECONDS)
        assert machine.balloon.away >= 16 * MIB  # to send them has not brought them
        target = into.vm(SECONDS)
        with target:
            until(lambda: target.balloon.actual == 20 * MIB or target.ended, "the balloon")
            into.result(SECONDS)
            gets_on(target)
            target.pause()
            level(target)
            target.resume()
            inflate(target, 4 * MIB)
            judge(target)


# ---- with all else ----


def test_a_balloon_and_a_limit(begun):
    machine = begun("heap=40 cache=40 hot=60")
    machine.memory.limit = 40 * MIB
    assert machine.memory.reclaimer.settled()
    for size in (8, 24, 16, 0, 24):
        inflate(machine, size * MIB)
        gets_on(machine)
        assert machine.memory.reclaimer.settled()
    machine.pause()
    level(machine)
    assert machine.memory.reclaimer.settled()
    limit_kept(machine, 40 * MIB)
    judge(machine, heap=40, cache=40, hot=60)
    machine.memory.reclaimer.swap.drain()
    until(lambda: machine.memory.reclaimer.swap.stats().live == machine.memory.pages().homes["swap"], "slots")
    machine.memory.limit = None
    machine.resume()
    inflate(machine, 0)
    judge(machine, heap=40, cache=40, hot=60)


@needs("thp", "uffd_move")
def test_a_balloon_and_sampling(begun):
    machine = begun()
    with Sampler(machine.memory, window=0.01, share=0.5, seed=1):
        for size in (16, 32, 8, 24):
            inflate(machine, size * MIB)
            gets_on(machine)
    judge(machine)


@needs("uffd_wp")
@pytest.mark.parametrize("tracker", ["coarse", "bitmap"])
def test_a_balloon_and_a_write_trace(begun, tracker):
    """What was given up, and what came of it, is reported: a copy that is kept up by the trace is right."""
    machine = begun(memory="32M")
    trace = machine.trace(tracker)
    trace.start()
    machine.pause()
    copy = bytearray(machine.memory.read(machine.memory.regions[0].gpa, machine.memory.size))
    trace.collect()
    machine.resume()
    for size in (8, 16, 4):
        inflate(machine, size * MIB)
        gets_on(machine)
    machine.pause()
    ram = machine.memory.regions[0].gpa
    for first, count in trace.collect():
        at = first * PAGE_SIZE
        copy[at : at + count * PAGE_SIZE] = machine.memory.read(ram + at, count * PAGE_SIZE)
    assert copy == machine.memory.read(ram, machine.memory.size)
    trace.stop()


# ---- asked for from elsewhere ----


@pytest.fixture
def listening(begun, tmp_path):
    def start(append="", **options):
        machine = begun(append, **options)
        path = str(tmp_path / "vm.sock")
        opened.append(Control(machine, path))
        return machine, path

    opened = []
    yield start
    for one in opened:
        one.close()


def test_pyvmm_balloon(listening, capsys):
    machine, path = listening("fixed=1 heap=10 cache=10")
    assert main(["balloon", path, "24M", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["target"], found["actual"], found["away"]) == (24 * MIB, 24 * MIB, 24 * MIB)
    assert sum(found["stats"].values()) == 40 * MIB
    assert found["refaults"] == 0
    assert main(["balloon", path]) == 0
    text = capsys.readouterr().out
    assert "24M" in text
    assert "inactive buffer" in text
    with Client(path) as client:
        assert client.ask("status")["balloon"] == {"target": 24 * MIB, "actual": 24 * MIB, "away": 24 * MIB}
    assert main(["balloon", path, "0"]) == 0
    assert machine.balloon.away == 0


def test_pyvmm_balloon_says_how_far_it_got(listening, capsys):
    _, path = listening("fixed=50 heap=20 cache=0", memory="16M")
    assert main(["balloon", path, "16M", "--wait", "0.3"]) == 1
    assert "of 16M so far" in capsys.readouterr().out
    for wrong, why in [("1G", "the VM has 16M"), ("some", "not a size")]:
        assert main(["balloon", path, wrong]) == 2
        assert why in capsys.readouterr().err


def test_a_vm_without_a_balloon(vm, tmp_path):
    machine = vm(memory="8M")
    assert machine.balloon is None
    path = str(tmp_path / "vm.sock")
    with Control(machine, path), Client(path) as client:
        assert client.ask("status")["balloon"] is None
        with pytest.raises(BadInput, match="start it with --balloon"):
            client.ask("balloon")
    with pytest.raises(BadInput, match="a second balloon"):
        VM(devices=["balloon", "balloon"])


def test_a_guest_that_stands_is_not_asked(listening):
    machine, path = listening()
    machine.balloon.stats(5)
    machine.pause()
    begin = time.monotonic()
    with Client(path) as client:
        assert client.ask("balloon")["stats"]["free"] > 0
    assert time.monotonic() - begin < SECONDS


def test_a_guest_without_a_balloon_ends_in_a_line(vm):
    machine = vm(memory="16M")
    machine.load("classes")
    assert machine.run(SECONDS).status == 2
    assert "there is no balloon" in machine.printed


def test_all_pages_are_right_at_the_end(vm):
    machine = vm(memory="16M", devices=["balloon"])
    machine.balloon.target = 6 * MIB
    machine.load("classes", "touches=30000 report=1")
    result = machine.run(SECONDS)
    assert result.ok, machine.printed
    assert "SUCCESS" in machine.printed
    assert machine.balloon.away == 6 * MIB
    assert machine.balloon.counts["blocks"] >= 6 * MIB // (BLOCK * PAGE_SIZE) - 2
