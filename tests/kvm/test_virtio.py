# test_virtio.py: virtio devices and the guest that drives and checks them: rules kept and broken, pages that are away,
# snapshots and migrations with requests in flight, and what is on the disk when the VMM is killed.
from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from engine_help import BLOCK, SECONDS, Shelf, shelve, until

from pyvmm import VM
from pyvmm.errors import BadInput, FetchError, MigrationError, StateError
from pyvmm.layout import Gpa
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm")

SIZE = 1 << 20
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
WAYS = [
    pytest.param(f"wait={wait} {features}", id=f"{wait} {features}".strip())
    for wait in ("irq", "poll")
    for features in ("", "indirect=1", "event=1", "indirect=1 event=1")
]


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def at_work(vm, disk, append="", **options):
    """A guest that writes and reads a disk for ever, with several requests at a time."""
    machine = vm(memory="16M", devices=["rng", f"block:{disk}"], **options)
    machine.load("virtio", f"device=block count=0 {append}")
    machine.start()
    gets_on(machine)
    return machine


def gets_on(machine, more=200):
    """It works on and finds nothing wrong."""
    begin = machine.progress().count
    until(lambda: machine.progress().count >= begin + more or machine.ended)
    assert not machine.ended, machine.printed


# ---- what guests do ----


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("device", ["rng", "block"])
def test_a_guest_drives_a_device(vm, disk, device, way):
    machine = vm(memory="8M", devices=["rng", f"block:{disk}"])
    machine.load("virtio", f"device={device} {way}")
    assert machine.run(20).ok, machine.printed
    assert "SUCCESS" in machine.printed
    assert [one.broken for one in machine.virtio] == ["", ""]


@pytest.mark.parametrize("way", ["wait=irq", "wait=poll indirect=1 event=1"])
def test_a_guest_breaks_all_rules(vm, way):
    told = []
    machine = vm(memory="8M", devices=["rng"])
    machine.virtio[0].on_broken = told.append
    machine.load("virtio", f"hostile=1 {way}")
    assert machine.run(20).ok, machine.printed
    assert told == ["virtio-rng@0 stands until its driver resets it: descriptor 999 is available in a queue of 64"]


def test_the_same_seed_gives_the_same_bytes(vm):
    printed = []
    for seed in (1, 1, 2):
        machine = vm(memory="8M", devices=[f"rng:seed={seed}"])
        machine.load("virtio", "count=20")
        assert machine.run(20).ok, machine.printed
        printed.append(machine.printed)
    assert printed[0] == printed[1] != printed[2]


@pytest.mark.parametrize("way", WAYS[::3])
def test_a_console_says_what_is_typed(vm, way):
    said = bytearray()
    machine = vm(memory="8M", devices=["console"])
    console = machine.virtio[0].model
    console.output = said.extend
    machine.load("virtio", f"device=console {way}")
    machine.start()
    text = random.Random(1).randbytes(5000).replace(b"\4", b"-") + b"\4"
    at = 0
    while at < len(text):
        at += console.feed(text[at : at + 700])
        until(lambda: len(said) == at or machine.ended)  # noqa: B023
    assert machine.wait(20).ok, machine.printed
    assert said == text


def test_all_places_and_interrupts(vm, tmp_path):
    """Each of the devices that a VM may have is found by its guest, and its interrupts come."""
    paths = [tmp_path / f"disk{n}" for n in range(7)]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    for n in (0, 3, 6):
        machine = vm(memory="8M", devices=[f"block:{path}" for path in paths])
        machine.load("virtio", f"device=block n={n} count=20")
        assert machine.run(20).ok, machine.printed
        assert f"disk{n}" in machine.printed
        machine.close()
    with pytest.raises(BadInput, match="one too many"):
        VM(devices=["rng"] * 8)


def test_a_disk_to_be_read_alone(vm, disk):
    machine = vm(memory="8M", devices=[f"block:{disk},ro"])
    machine.load("virtio", "device=block")
    assert machine.run(20).ok, machine.printed
    assert disk.read_bytes() == bytes(SIZE)


def test_no_two_vms_write_to_one_disk(vm, disk):
    at_work(vm, disk)
    other = vm(memory="8M", devices=[f"block:{disk}"])
    other.load("virtio", "device=block")
    with pytest.raises(BadInput, match="in use"):
        other.start()


def test_a_paused_vm_touches_nothing(vm, disk):
    machine = at_work(vm, disk)
    for _ in range(8):
        machine.pause()
        rings = [machine.memory.read(region.gpa, region.size) for region in machine.memory.regions]
        assert rings == [machine.memory.read(region.gpa, region.size) for region in machine.memory.regions]
        assert not any(device._worker._busy for device in machine.virtio)
        machine.resume()
        gets_on(machine, 5)


# ---- pages that are away ----


@needs("uffd_guest")
def test_pages_that_are_away_come_back(vm, disk):
    machine = at_work(vm, disk)
    blocks = machine.memory.size // (BLOCK * 4096)
    rng = random.Random(1)
    for _ in range(50):
        machine.memory.engine.remove(rng.randrange(blocks) * BLOCK, BLOCK)
        gets_on(machine, 3)


@needs("uffd_guest")
def test_a_page_that_cannot_come_back_holds_the_vm(vm, disk):
    """Here it is always the device that finds it, and it finds it again until the home works again."""
    machine = at_work(vm, disk)
    failed = []
    device = machine.virtio[1]._worker._thread.ident

    def fail(page):
        if threading.get_ident() == device:
            failed.append(page)
            raise OSError(errno.EIO, "disk")

    shelf = Shelf()
    shelf.fail = fail
    machine.pause()
    shelve(machine, shelf, 0, 1)
    machine.resume()
    for _ in range(2):
        with pytest.raises(FetchError, match="cannot be brought back from its home 'swap': EIO"):
            machine.wait(SECONDS)
        assert machine.paused
        assert machine.progress().status == "running"
        machine.resume()
    with pytest.raises(FetchError):
        machine.wait(SECONDS)
    assert len(failed) >= 3
    shelf.fail = lambda page: None
    machine.resume()
    gets_on(machine)
    machine.stop()


# ---- elsewhere ----


@pytest.mark.parametrize("append", ["", "wait=poll indirect=1 event=1"])
def test_snapshots_with_requests_in_flight(vm, disk, tmp_path, append):
    """From VM to VM at random moments; the guest knows what it wrote, and checks all it reads."""
    machine, made = at_work(vm, disk, append), []
    rng = random.Random(1)
    try:
        for hop in range(5):
            time.sleep(rng.random() / 50)
            path = tmp_path / f"snapshot{hop % 2}"
            machine.pause()
            machine.snapshot(str(path))
            machine.close()
            machine = VM.restore(str(path), devices=["rng", f"block:{disk}"], lazy=hop % 2 == 1)
            made.append(machine)
            machine.start()
            gets_on(machine)
    finally:
        for one in made:
            one.close()


@needs("uffd_guest", "uffd_wp")
def test_a_live_snapshot_while_a_device_writes(vm, tmp_path):
    """What the device gives follows from its seed and from how much it gave: both guests end with the same number."""
    machine = vm(memory="16M", devices=["rng:seed=3"])
    machine.load("virtio", "count=1500")
    machine.start()
    gets_on(machine, 20)
    path = str(tmp_path / "s")
    machine.snapshot(path, mode="live")
    assert not machine.ended
    assert machine.wait(SECONDS).ok, machine.printed
    with VM.restore(path, devices=["rng:seed=3"]) as other:
        assert other.run(SECONDS).ok, other.printed
        assert other.printed == machine.printed


def test_a_snapshot_has_requests_in_flight(vm, disk, tmp_path):
    """That the test above tests what it says: requests that were posted and not answered are in what is saved."""
    machine = at_work(vm, disk)
    found = 0
    for _ in range(30):
        machine.pause()
        (queue,) = machine.virtio[1]._queues
        posted = int.from_bytes(machine.memory.read(Gpa(queue.driver + 2), 2), "little")
        found += posted != queue.taken
        machine.resume()
        gets_on(machine, 3)
    assert found


def test_a_console_keeps_what_was_typed(vm, tmp_path):
    said = bytearray()
    machine = vm(memory="8M", devices=["console"])
    machine.load("virtio", "device=console")
    machine.virtio[0].model.feed(b"typed before it ran")
    machine.snapshot(str(tmp_path / "s"))
    machine.close()
    with VM.restore(str(tmp_path / "s"), devices=["console"]) as other:
        other.virtio[0].model.output = said.extend
        other.start()
        other.virtio[0].model.feed(b"\4")
        assert other.wait(20).ok, other.printed
    assert said == b"typed before it ran\4"


def test_a_vm_with_other_devices_is_refused_by_name(vm, disk, tmp_path):
    machine = at_work(vm, disk)
    path = str(tmp_path / "s")
    machine.snapshot(path)
    machine.close()
    block = f"block:{disk}"
    for devices, words in [
        ([], "virtio-block@1, virtio-rng@0; this one has exit, serial"),
        ([block, "rng"], "virtio-block@1, virtio-rng@0; this one has .*virtio-block@0, virtio-rng@1"),
        (["rng", block + ",ro"], "virtio-block@1: the state is of one with features"),
        (["rng:seed=1", block], "seed"),
    ]:
        with pytest.raises(StateError, match=words):
            VM.restore(path, devices=devices).close()
    disk.write_bytes(bytes(2 * SIZE))
    with pytest.raises(StateError, match="virtio-block@1: the state is of a device of another size"):
        VM.restore(path, devices=["rng", block]).close()


@needs("uffd_guest", "uffd_wp")
@pytest.mark.parametrize("mode", ["precopy", "postcopy", "hybrid"])
def test_a_guest_moves_with_its_disk(vm, disk, tmp_path, mode):
    """The disk is the destination's from the moment when the guest is; requests in flight are answered there."""
    machine = at_work(vm, disk, "indirect=1 event=1")
    with VM.receive(f"unix:{tmp_path / 'socket'}", devices=["rng", f"block:{disk}"]) as into:
        machine.migrate(into.address, mode=mode).result(SECONDS)
        target = into.vm(SECONDS)
        with target:
            gets_on(target)
            into.result(SECONDS)
            gets_on(target)
            assert machine.wait(1).reason == "migrated"
            with pytest.raises(BadInput, match="in use"):
                machine.virtio[1].model.activate()


@needs("uffd_guest", "uffd_wp")
def test_a_guest_that_cannot_move_keeps_its_disk(vm, disk, tmp_path):
    machine = at_work(vm, disk)
    with VM.receive(f"unix:{tmp_path / 'a'}") as into:
        with pytest.raises(MigrationError, match="states of virtio-block@1: version 1 there, none here"):
            machine.migrate(into.address).result(SECONDS)
        gets_on(machine)

    def no(target):
        raise MigrationError("not now")

    with VM.receive(f"unix:{tmp_path / 'b'}", devices=["rng", f"block:{disk}"], prepare=no) as into:
        with pytest.raises(MigrationError, match="not now"):
            machine.migrate(into.address).result(SECONDS)
        until(lambda: not machine.paused)
        gets_on(machine)
    other = vm(memory="8M", devices=[f"block:{disk}"])
    other.load("virtio", "device=block")
    with pytest.raises(BadInput, match="in use"):
        other.start()


# ---- killed ----


def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def record(n):
    """What the guest's log writes as its n-th."""
    return b"".join((_mix(n * GOLDEN + word & MASK) if word else n).to_bytes(8, "little") for word in range(64))


def test_what_was_flushed_is_there_after_a_kill(disk):
    """The guest says the number of each record when its flush was answered; the VMM is killed at random moments."""
    rng = random.Random(1)
    for moment in range(10):
        disk.write_bytes(bytes(SIZE))
        process = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", "run", "virtio", "--mem", "8M", "--disk", str(disk), "--append",
             "device=block log=1 count=0"],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        with process, process.stdout:
            process.stdout.readline()
            time.sleep(rng.random() / 10)
            process.send_signal(signal.SIGKILL)
            said = b"1\n" + process.stdout.read()
        last = int(said.rpartition(b"\n")[0].split()[-1])
        raw = disk.read_bytes()
        for n in range(max(1, last - 62), last + 1):  # the one after the last may be half written
            assert raw[n % 64 * 512 : n % 64 * 512 + 512] == record(n), (moment, n, last)
        assert process.returncode == -signal.SIGKILL


def test_a_killed_vmm_leaves_no_lock(vm, disk):
    process = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "run", "virtio", "--disk", str(disk), "--append", "device=block log=1 count=0"],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    with process, process.stdout:
        process.stdout.readline()
        done = subprocess.run(
            [sys.executable, "-m", "pyvmm", "run", "virtio", "--disk", str(disk), "--append", "device=block"],
            capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (
            2,
            f"pyvmm: disk {disk} is in use: another VM uses it, end that first\n",
        )
        process.kill()
    machine = vm(memory="8M", devices=[f"block:{disk}"])
    machine.load("virtio", "device=block count=5")
    assert machine.run(20).ok
