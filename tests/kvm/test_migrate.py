# test_migrate.py: a running guest moves from one VM to another: all modes, transports, pages; the guest judges.
from __future__ import annotations

import gc
import os
import random
import threading
from contextlib import suppress
from itertools import product

import pytest
from engine_help import until
from test_round_trips import pairwise

from pyvmm import VM
from pyvmm._native import ffi
from pyvmm.errors import BadInput, LifecycleError, MigrationError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, Gpa
from pyvmm.migration import convergence
from pyvmm.migration.control import Control
from pyvmm.migration.events import Broken, Finished, Helped, RoundEnded, Switched
from pyvmm.migration.frames import Commit
from pyvmm.pytest_plugin import needs
from pyvmm.testing.verify_model import check_memory, ram_hash

pytestmark = needs("kvm", "uffd_guest", "uffd_wp", "thp")

SECONDS = 30
WORK = {
    "verify": "order=random zeros=100",
    "touch": "pattern=uniform size=24M",
    "smp": "count=0",
    "timer": "ticks=0 period=500",
}
OPTIONS = {
    "guest": list(WORK),
    "mode": ["precopy", "postcopy", "hybrid"],
    "transport": ["tcp", "tls", "unix", "local"],
    "pages": ["2m", "4k"],
    "cpus": [1, 4],
    "channels": [1, 3],
}
ROWS = pairwise(OPTIONS)


@pytest.fixture
def listens(tmp_path):
    """Where to listen, by the name of a transport."""
    return lambda transport: "tcp:0" if transport in ("tcp", "tls") else f"{transport}:{tmp_path / transport}"


@pytest.fixture
def secured(request):
    """Options of both sides for a transport: source's, destination's."""

    def make(transport):
        if transport != "tls":
            return {}, {}
        tls = request.getfixturevalue("tls")
        return {"tls": tls("source")}, {"tls": tls("destination")}

    return make


@pytest.fixture
def incoming():
    """Makes destinations, and closes them and the VMs that came there."""
    made = []

    def make(listen, **options):
        made.append(VM.receive(listen, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
        if one._vm is not None:
            one._vm.close()


def at_work(vm, guest, append=None, **options):
    """A guest in the midst of its work."""
    machine = vm(**{"memory": "48M", **options})
    machine.load(guest, WORK[guest] if append is None else append)
    machine.start()
    until(lambda: machine.progress().count or machine.ended)
    assert not machine.ended, machine.printed
    return machine


def takes_long(machine):
    """A guest that moves with little bandwidth does so for seconds."""
    machine.memory.write(Gpa(16 << 20), random.Random(1).randbytes(8 << 20))


def moved(source, incoming, address, theirs=None, **options):
    """The VM that has the guest now, all of it, and both reports."""
    into = incoming(address, **(theirs or {}))
    out = source.migrate(into.address, **{"downtime": 0.2, **options})
    sent = out.result(SECONDS)
    target = into.vm(SECONDS)
    return target, sent, into.result(SECONDS)


def gets_on(machine, more=50):
    """The guest works on and finds nothing wrong."""
    begin = machine.progress()
    if begin.guest == "verify":
        until(lambda: machine.progress().passes >= begin.passes + 2 or machine.ended)
    else:
        until(lambda: machine.progress().count >= begin.count + more or machine.ended)
    assert not machine.ended, machine.printed
    assert machine.progress().status == "running", machine.printed
    if begin.guest == "verify":
        machine.pause()
        assert check_memory(machine.memory, machine.progress(), order="random", zeros=100) == []
        machine.resume()


# ---- all that can be combined ----


def test_each_two_values_meet():
    assert 12 <= len(ROWS) < 24


@pytest.mark.parametrize(tuple(OPTIONS), ROWS, ids=["-".join(map(str, row)) for row in ROWS])
def test_moves(vm, incoming, listens, secured, guest, mode, transport, pages, cpus, channels):
    source = at_work(vm, guest, pages=pages, cpus=cpus)
    hashes = []

    def prepared(target):  # all stand: what the source has is here, byte for byte
        if mode == "precopy":
            hashes.append((ram_hash(source.memory), ram_hash(target.memory)))

    ours, theirs = secured(transport)
    count = source.progress().count
    target, sent, got = moved(
        source, incoming, listens(transport), {"prepare": prepared, **theirs}, mode=mode, channels=channels, **ours
    )
    assert source.wait(5).reason == "migrated"
    assert source.ended
    assert all(one == other for one, other in hashes)
    assert len(hashes) == (mode == "precopy")
    assert target.progress().count >= count
    gets_on(target)
    assert (
        (sent.mode, sent.transport, sent.channels)
        == (mode, transport, channels)
        == (got.mode, got.transport, got.channels)
    )
    if pages == "2m" and guest == "verify":
        assert got.large_after == sent.large_before == target.memory.size // BLOCK_SIZE


@pytest.mark.parametrize("transport", ["unix", "local"])
def test_back_and_forth(vm, incoming, tmp_path, transport):
    """Ten times, each in another mode, and it is still the same guest; large pages stay large in KVM's own count."""
    machine = at_work(vm, "verify", memory="32M", cpus=2)
    large = machine.mappings()["pages_2m"]
    modes = ["precopy", "postcopy", "hybrid"]
    for number in range(10):
        machine, _, _ = moved(
            machine, incoming, f"{transport}:{tmp_path / str(number)}", mode=modes[number % 3], throttle=False
        )
    gets_on(machine)
    assert machine.mappings()["pages_2m"] >= large
    assert machine.memory.large_blocks() == 15  # all but the first block, which is of small pages


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "hybrid"])
def test_an_idle_guest_is_the_same_to_the_byte(vm, incoming, listens, mode):
    source = vm(memory="64M", cpus=2)
    source.load("echo", "")
    rng = random.Random(mode)
    for block in range(8, 24, 3):
        source.memory.write(Gpa(block * BLOCK_SIZE + 5 * PAGE_SIZE), rng.randbytes(rng.randrange(1, BLOCK_SIZE)))
    source.start()
    until(lambda: source.serial.listening)
    source.type("awake")
    assert source.expect("awake")
    target, sent, _ = moved(source, incoming, listens("unix"), mode=mode)
    target.pause()
    there, here = source.memory, target.memory
    different = [
        page
        for page in range(512, here.size // PAGE_SIZE)  # not its stack, and what it counts
        if here.read(Gpa(page * PAGE_SIZE), PAGE_SIZE) != there.read(Gpa(page * PAGE_SIZE), PAGE_SIZE)
    ]
    assert different == []
    target.resume()
    target.type("hello")
    assert target.expect("hello")
    assert sent.page_bytes + sent.zero_pages * PAGE_SIZE >= 64 << 20 or mode == "postcopy"


@pytest.mark.parametrize(("mode", "tracker"), [*product(["precopy", "hybrid"], ["bitmap", "manual", "coarse"])])
def test_with_each_tracker(vm, incoming, listens, mode, tracker):
    source = at_work(vm, "verify", cpus=2)
    target, _, _ = moved(source, incoming, listens("unix"), mode=mode, tracker=tracker)
    gets_on(target)


def test_with_dirty_rings(vm, incoming, listens):
    source = at_work(vm, "verify", cpus=2, dirty_ring=4096)
    target, _, _ = moved(source, incoming, listens("unix"), tracker="ring")
    gets_on(target)


@pytest.mark.parametrize("unit", ["adaptive", "page", "block", "large"])
def test_units_of_post_copy(vm, incoming, listens, unit):
    source = at_work(vm, "verify", cpus=2)
    target, sent, got = moved(source, incoming, listens("unix"), {"unit": unit}, mode="postcopy")
    gets_on(target)
    assert got.large_after == sent.large_before == 23


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "hybrid"])
def test_pages_that_are_away_at_the_source(vm, incoming, listens, mode):
    source = at_work(vm, "verify", cpus=2)
    source.memory.engine.remove(6 * 512, 6 * 512)
    target, _, _ = moved(source, incoming, listens("unix"), mode=mode)
    gets_on(target)


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_a_lazily_restored_guest(vm, incoming, listens, tmp_path, mode):
    """Pages that the source itself has not read yet come too."""
    first = at_work(vm, "verify", cpus=2)
    first.snapshot(str(tmp_path / "s"))
    first.close()
    with VM.restore(str(tmp_path / "s"), lazy=True, fill=False, generation=False) as source:
        source.start()
        target, _, _ = moved(source, incoming, listens("unix"), mode=mode)
    gets_on(target)


def test_onward_before_all_is_there(vm, incoming, tmp_path):
    """Through three VMs by post-copy, each time before the pages have come."""
    source = at_work(vm, "verify", cpus=2)
    sessions = []
    for number in range(3):
        into = incoming(f"unix:{tmp_path / str(number)}")
        sessions += [source.migrate(into.address, mode="postcopy", bandwidth="64M"), into]
        source = into.vm(SECONDS)
    for session in sessions:
        session.result(SECONDS)
    gets_on(source)


def test_console_moves(vm, incoming, listens):
    """What was typed and not read goes along, and no byte of the output is lost or doubled."""
    said = []
    source = vm(memory="32M", output=said.append)
    source.load("echo", "")
    source.start()
    until(lambda: source.serial.listening)
    source.type("awake")
    until(lambda: b"awake" in b"".join(said))
    target, _, _ = moved(source, incoming, listens("unix"), {"output": said.append})
    said.clear()
    target.type("one two")
    until(lambda: b"one two" in b"".join(said))


# ---- events and reports ----


def test_events_tell_what_happens(vm, incoming, listens):
    source = at_work(vm, "verify", cpus=2)
    into = incoming(listens("unix"))
    out = source.migrate(into.address, downtime=0.2)
    events = list(out)
    assert out.done
    rounds = [event for event in events if isinstance(event, RoundEnded)]
    assert [event.round for event in rounds] == list(range(1, len(rounds) + 1))
    assert rounds[0].pages == source.memory.size // PAGE_SIZE
    assert isinstance(events[-1], Finished)
    (switched,) = (event for event in events if isinstance(event, Switched))
    report = out.result()
    assert events[-1].report is report
    assert 0 < switched.downtime == report.total_downtime < 2
    assert list(report.downtime) == ["pause", "last round", "state", "prepare", "commit"]
    assert [event.at for event in events] == sorted(event.at for event in events)
    assert report.seconds >= events[-2].at
    assert list(out) == events  # from the first on, again
    assert report.page_bytes > 30 << 20
    assert report.wire_bytes >= report.page_bytes


def test_pace(vm, incoming, listens):
    source = at_work(vm, "smp", memory="32M", cpus=1)
    takes_long(source)
    target, sent, _ = moved(source, incoming, listens("unix"), bandwidth="32M")
    assert 0.2 < sent.rounds[0].seconds < 2
    _, sent, _ = moved(target, incoming, listens("tcp"), bandwidth="32M", mode="postcopy")  # 16M at a time
    assert 0.4 < sent.seconds < 4


# ---- what does not come about ----


def test_refused_input(vm, listens):
    source = at_work(vm, "smp")
    for options in (
        {"mode": "x"}, {"channels": 0}, {"channels": 9}, {"downtime": 0}, {"bandwidth": 0}, {"rounds": 0},
    ):  # fmt: skip
        with pytest.raises(BadInput):
            source.migrate(listens("unix"), **options)
    for address in ("tcp:0", "unix:", "nowhere", "local"):
        with pytest.raises(BadInput):
            source.migrate(address)
    with pytest.raises(BadInput):
        VM.receive(listens("unix"), unit="x")
    assert not source.paused


def test_nobody_listens(vm, listens):
    source = at_work(vm, "smp")
    out = source.migrate(listens("unix"))
    with pytest.raises(MigrationError, match="nobody listens"):
        out.result(SECONDS)
    gets_on(source)


def test_only_a_running_guest_moves_and_only_once(vm, incoming, listens):
    machine = vm(memory="32M")
    machine.load("smp", WORK["smp"])
    with pytest.raises(LifecycleError, match="running guest"):
        machine.migrate(listens("unix"))
    machine.start()
    machine.pause()
    with pytest.raises(LifecycleError, match="running guest"):
        machine.migrate(listens("unix"))
    machine.resume()
    takes_long(machine)
    into = incoming(listens("unix"))
    out = machine.migrate(into.address, bandwidth="1M")
    with pytest.raises(LifecycleError, match="moving already"):
        machine.migrate(into.address)
    out.cancel()
    with pytest.raises(MigrationError, match="cancelled"):
        out.result(SECONDS)
    gets_on(machine)


def test_cancelled_by_either_side(vm, incoming, listens):
    for side in ("source", "destination"):
        source = at_work(vm, "verify", cpus=2)
        into = incoming(f"{listens('unix')}{side}")
        out = source.migrate(into.address, bandwidth="4M")
        until(lambda out=out: len(out._events) > 1)
        (out if side == "source" else into).cancel("enough")
        for end in (out, into):
            with pytest.raises(MigrationError, match="enough"):
                end.result(SECONDS)
        with pytest.raises(MigrationError):
            into.vm(1)
        assert not source.paused
        gets_on(source)


def test_after_a_failure_it_can_be_tried_again(vm, incoming, listens):
    source = at_work(vm, "verify", cpus=2)
    first = incoming(listens("unix"))
    out = source.migrate(first.address, bandwidth="4M")
    until(lambda: len(out._events) > 1)
    first.cancel("no room")
    with pytest.raises(MigrationError, match="no room"):
        out.result(SECONDS)
    target, _, _ = moved(source, incoming, listens("tcp"))
    gets_on(target)


def test_it_does_not_get_done(vm, incoming, listens):
    """A guest that writes faster than the connection takes, with no help allowed: it is told, and the guest runs on."""
    source = at_work(vm, "verify", cpus=2)
    into = incoming(listens("unix"))
    out = source.migrate(into.address, downtime=0.004, bandwidth="40M", throttle=False, rounds=3)
    with pytest.raises(MigrationError, match=r"not done after 3 rounds: the guest writes \d+ MB/s"):
        out.result(SECONDS)
    gets_on(source)


def test_hybrid_ends_in_post_copy(vm, incoming, listens):
    source = at_work(vm, "verify", cpus=2)
    target, sent, got = moved(
        source, incoming, listens("unix"), mode="hybrid", downtime=0.001, throttle=False, rounds=2
    )
    assert len(sent.rounds) <= 2
    gets_on(target)
    assert got.large_after == sent.large_before


def test_a_destination_that_is_closed_before_anybody_comes(incoming, listens):
    into = incoming(listens("unix"))
    threading.Timer(0.05, into.close).start()
    with pytest.raises(MigrationError):
        into.vm(SECONDS)


def test_a_vm_that_is_closed_meanwhile(vm, incoming, listens):
    source = at_work(vm, "verify", cpus=2)
    into = incoming(listens("unix"))
    out = source.migrate(into.address, bandwidth="4M")
    until(lambda: len(out._events) > 1)
    source.close()
    with pytest.raises(MigrationError, match="closed"):
        out.result(SECONDS)
    with pytest.raises(MigrationError):
        into.result(SECONDS)


def test_the_guest_ends_meanwhile(vm, incoming, listens):
    source = vm(memory="32M")
    source.load("timer", "ticks=100 period=1000")
    source.start()
    takes_long(source)
    into = incoming(listens("unix"))
    out = source.migrate(into.address, bandwidth="8M")
    with pytest.raises(MigrationError, match="ended"):
        out.result(SECONDS)
    assert source.wait(SECONDS).ok


def test_another_guest_is_refused_meanwhile(vm, incoming, listens):
    first, second = at_work(vm, "smp"), at_work(vm, "smp")
    takes_long(first)
    into = incoming(listens("unix"))
    out = first.migrate(into.address, bandwidth="2M")
    until(lambda: len(out._events) > 1)
    with pytest.raises(MigrationError, match="another guest"):
        second.migrate(into.address).result(SECONDS)
    out.cancel()
    gets_on(second)
    gets_on(first)


def test_nobody_runs_it_twice(vm, incoming, listens):
    """After it has left, the source can be neither resumed nor moved; its memory can be read still."""
    source = at_work(vm, "verify", cpus=2)
    moved(source, incoming, listens("unix"))
    with pytest.raises(LifecycleError):
        source.resume()
    with pytest.raises(LifecycleError):
        source.migrate(listens("unix"))
    assert source.progress().guest == "verify"


def test_who_is_refused_is_in_nobodys_way(vm, incoming, listens, monkeypatch):
    """A guest of a shape that cannot be here; then another one moves to the same place."""
    into = incoming(listens("unix"))
    strange = at_work(vm, "smp")
    with monkeypatch.context() as patched:
        shape = strange.shape()
        shape.states["flux capacitor"] = 3
        patched.setattr(strange, "shape", lambda: shape)
        with pytest.raises(MigrationError, match="states of flux capacitor: version 3 there, none here"):
            strange.migrate(into.address).result(SECONDS)
    until(lambda: into.troubles)
    assert "flux capacitor" in into.troubles[-1]
    gets_on(strange)
    strange.migrate(into.address, downtime=0.2).result(SECONDS)
    gets_on(into.vm(SECONDS))


def test_a_finer_trace_takes_over(vm, incoming, listens, monkeypatch):
    """Coarse traces give way to KVM's log where they do not get nearer to the end; no write is lost in between."""
    monkeypatch.setattr(convergence, "SHRINKS", 0.0)  # as if no round did
    monkeypatch.setattr(convergence, "STATE_COST", 1.0)
    source = at_work(vm, "verify", cpus=2)
    into = incoming(listens("unix"))
    out = source.migrate(into.address, mode="hybrid", downtime=0.5, throttle=False)
    events = list(out)
    out.result()
    assert [event.help for event in events if isinstance(event, Helped)][:2] == ["hot pages last", "small pages traced"]
    gets_on(into.vm(SECONDS))


def test_a_guest_that_was_given_away_and_is_not_heard_of_can_be_taken_back(vm, incoming, listens, monkeypatch):
    """The cut comes with COMMIT, and for ever: nobody runs the guest, until somebody says that the destination is
    dead."""
    source = at_work(vm, "verify", cpus=2)
    into = incoming(listens("unix"))
    with pytest.raises(LifecycleError, match="nothing to abandon"):
        source.migrate(into.address, bandwidth="1M").abandon()
    source.leaving.cancel()
    with suppress(MigrationError):
        source.leaving.result(SECONDS)
    into = incoming(listens("local"))
    send = Control.send

    def cut(control, frame):
        if isinstance(frame, Commit):
            os.unlink(into.address.partition(":")[2])  # nobody can connect there again
            control.connection.end()
        send(control, frame)

    monkeypatch.setattr(Control, "send", cut)
    out = source.migrate(into.address, downtime=0.2)
    until(lambda: any(isinstance(event, Broken) for event in out._events))
    assert source.paused
    with pytest.raises(LifecycleError, match="handed over"):
        source.resume()
    out.cancel("too late")
    assert not out.done
    until(lambda: out._handover._apart)
    out.abandon()
    with pytest.raises(MigrationError, match="by somebody's word"):
        out.result(SECONDS)
    gets_on(source)
    into.close()
    assert not into._runs_here()
    into._decision.close()  # else its witness would wait for the end of this process, to say that it never ran here


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_the_memory_of_closed_vms_is_given_back_at_once(vm, listens, mode):
    """Whatever of a migration somebody still holds."""

    def mapped(address):
        with open("/proc/self/maps") as file:
            ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in file]
        return any(start <= address < end for start, end in ranges)

    gc.collect()
    gc.disable()
    try:
        source = at_work(vm, "verify", cpus=2)
        into = VM.receive(listens("unix"))
        out = source.migrate(into.address, mode=mode, downtime=0.2)
        out.result(SECONDS)
        target = into.vm(SECONDS)
        into.result(SECONDS)
        addresses = [int(ffi.cast("uintptr_t", one.memory.base)) for one in (source, target)]
        assert all(map(mapped, addresses))
        source.close()
        into.close()
        target.close()
        assert not any(map(mapped, addresses))
    finally:
        gc.enable()


def test_bandwidth_holds_after_the_switch_too(vm, incoming, listens):
    """And who cancels at the destination, where the guest runs by then, ends nothing."""
    source = at_work(vm, "smp", memory="32M", cpus=1)
    source.memory.write(Gpa(16 << 20), random.Random(1).randbytes(8 << 20))
    into = incoming(listens("unix"))
    out = source.migrate(into.address, mode="postcopy", bandwidth="16M")
    target = into.vm(SECONDS)
    into.cancel("too late")
    assert into.result(SECONDS).seconds > 0.25
    assert out.result(SECONDS).seconds > 0.25
    gets_on(target)
