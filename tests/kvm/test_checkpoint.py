# test_checkpoint.py: vm.snapshot(path) and VM.restore(path): a guest goes on in another VM, and its memory is the same.
from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

import pyvmm as package
from pyvmm import VM, BadInput, Snapshot
from pyvmm.errors import FetchError, LifecycleError, SnapshotError
from pyvmm.layout import BLOCK_SIZE, MIB
from pyvmm.pytest_plugin import needs
from pyvmm.snapshot.writer import Writer
from pyvmm.testing.verify_model import check_memory, ram_hash

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from snapshot_files import AVAILABLE

pytestmark = needs("kvm", "uffd_guest")

GUESTS = [
    ("verify", "order=random zeros=100", 1),
    ("verify", "", 4),
    ("smp", "count=8M", 4),
    ("timer", "ticks=400", 1),
    ("timer", "ticks=400 mode=oneshot", 4),
]


@pytest.fixture
def restored():
    made = []

    def make(path, **options):
        made.append(VM.restore(str(path), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("pages", ["2m", "4k"])
@pytest.mark.parametrize(("guest", "append", "cpus"), GUESTS)
def test_a_guest_goes_on(vm, restored, tmp_path, guest, append, cpus, pages):
    source = vm(memory="64M", cpus=cpus, pages=pages)
    source.load(guest, append)
    source.start()
    while source.progress().count == 0:
        os.sched_yield()
    source.pause()
    assert not source.ended, "the guest was too quick to be saved at work"
    source.snapshot(str(tmp_path / "s"), codec="raw")
    target = restored(tmp_path / "s", pages=pages, generation=False)
    assert ram_hash(target.memory) == ram_hash(source.memory)
    if guest == "verify":
        before = target.progress().count
        target.run(timeout=0.5)
        assert target.progress().count > before
        assert target.progress().status == "running"
        zeros = 100 if "zeros" in append else 0
        order = "random" if "random" in append else "seq"
        assert check_memory(target.memory, target.progress(), zeros=zeros, order=order) == []
    else:
        assert target.run(timeout=20).ok
        assert "SUCCESS" in target.printed


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("pages", ["2m", "4k"])
@pytest.mark.parametrize(("guest", "append", "cpus"), GUESTS)
def test_a_guest_goes_on_before_its_memory_is_read(vm, restored, tmp_path, guest, append, cpus, pages, fill):
    source = vm(memory="64M", cpus=cpus, pages=pages)
    source.load(guest, append)
    source.start()
    while source.progress().count == 0:
        os.sched_yield()
    source.pause()
    source.snapshot(str(tmp_path / "s"), codec=AVAILABLE[-1])
    target = restored(tmp_path / "s", lazy=True, fill=fill, pages=pages)
    if guest == "verify":
        passes = target.progress().passes + 2
        while target.progress().passes < passes:
            target.run(timeout=0.05)
        assert target.progress().status == "running"
        zeros, order = 100 if "zeros" in append else 0, "random" if "random" in append else "seq"
        assert check_memory(target.memory, target.progress(), zeros=zeros, order=order) == []
    else:
        assert target.run(timeout=20).ok
        assert "SUCCESS" in target.printed


@pytest.mark.parametrize("fill", [True, False])
def test_lazily_restored_memory_is_the_same(vm, restored, tmp_path, fill):
    source = vm(memory="66M", cpus=2)
    source.load("verify", "zeros=200")
    source.run(timeout=0.5)
    source.snapshot(str(tmp_path / "s"), block_size="16K")
    assert ram_hash(restored(tmp_path / "s", lazy=True, fill=fill, generation=False).memory) == ram_hash(source.memory)


def test_a_chain_is_read_lazily(vm, restored, tmp_path):
    source = vm(memory="64M")
    source.load("verify")
    source.run(timeout=0.3)
    with source.trace("coarse") as trace:
        trace.collect()
        source.snapshot(str(tmp_path / "0"))
        source.run(timeout=0.2)
        with (
            Snapshot.open(str(tmp_path / "0")) as parent,
            Writer(str(tmp_path / "1"), source.memory.size, parent=parent) as writer,
        ):
            for first, count in trace.collect():
                data = source.memory.read(source.memory.gpa_of(first), count * 4096)
                writer.add_pages([(first, count)], data)
            writer.finish(source.save_state())
    target = restored(tmp_path / "1", lazy=True, fill=False, generation=False)
    assert ram_hash(target.memory) == ram_hash(source.memory)
    target.run(timeout=0.3)
    assert check_memory(target.memory, target.progress()) == []


@pytest.mark.parametrize("fill", [True, False])
def test_a_damaged_block_pauses_the_vm(vm, restored, tmp_path, fill):
    """The guest must not see a wrong byte: it waits, and whoever waits for it is told why. Mended, it goes on."""
    path = tmp_path / "s"
    source = vm(memory="32M")
    source.load("verify", "order=random")
    source.run(timeout=0.3)
    source.snapshot(str(path))
    with Snapshot.open(str(path)) as snapshot:
        at = snapshot.header.sections["states"].offset // 2 // 4096 * 4096 + 17  # in the midst of the storage blocks
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    target = restored(path, lazy=True, fill=fill)
    with pytest.raises(
        FetchError, match=r"gfn 0x[0-9a-f]+ cannot be .* 'file': .*s: damaged: the checksum of a storage"
    ):
        target.run(timeout=20)
    assert target.paused or not target.started  # the filler may have come upon it first
    assert target.progress().status == "running"
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(byte)
    passes = target.progress().passes + 2
    while target.progress().passes < passes:
        with suppress(FetchError):  # of a read that began before the file was mended: it is told late, and tried again
            target.run(timeout=0.05)
    assert target.progress().status == "running"
    assert check_memory(target.memory, target.progress(), order="random") == []


@needs("large_mappings")
@pytest.mark.parametrize("lazy", [False, True])
def test_large_pages_are_large_again(vm, restored, tmp_path, lazy):
    source = vm(memory="64M", pages="2m")
    source.load("verify", "zeros=100")
    source.run(timeout=0.5)
    source.snapshot(str(tmp_path / "s"))
    with Snapshot.open(str(tmp_path / "s")) as snapshot:
        assert len(snapshot.large) >= 31
    target = restored(tmp_path / "s", pages="2m", lazy=lazy)
    passes = target.progress().passes + 2
    while target.progress().passes < passes:
        target.run(timeout=0.05)
    assert target.mappings()["pages_2m"] >= source.mappings()["pages_2m"] == 31


def test_a_guest_that_runs_is_paused_meanwhile_and_goes_on(vm, restored, tmp_path):
    source = vm(memory="32M")
    source.load("verify")
    source.start()
    while source.progress().passes < 1:
        threading.Event().wait(0.01)
    source.snapshot(str(tmp_path / "s"))
    assert not source.paused
    count = source.progress().count
    while source.progress().count == count:
        threading.Event().wait(0.001)
    source.pause()
    target = restored(tmp_path / "s")
    target.run(timeout=0.2)
    for machine in (source, target):
        assert check_memory(machine.memory, machine.progress()) == []


def test_what_is_away_is_saved_too(vm, restored, tmp_path):
    source = vm(memory="32M")
    source.load("verify")
    source.run(timeout=0.5)
    before = ram_hash(source.memory)
    source.memory.engine.remove(512, 10 * 512)
    source.snapshot(str(tmp_path / "s"))
    assert ram_hash(restored(tmp_path / "s", generation=False).memory) == before


@pytest.mark.parametrize("backing", ["2m", "4k"])
def test_blocks_of_which_most_is_nothing_are_saved_too(vm, restored, tmp_path, backing):
    """A page of a block whose others are away as zeros, untouched, or in a home."""
    source = vm(memory="16M", pages=backing)
    memory, engine = source.memory, source.memory.engine
    for block, page in ((1, 300), (2, 5), (3, 511)):
        memory.write(memory.gpa_of(512 * block + page), b"here")
    memory.zero(memory.gpa_of(512), 256 * 4096)
    for block in (1, 3):
        engine.break_(block)
    engine.remove(512, 512, what="zero")
    engine.remove(2 * 512, 512)
    engine.remove(3 * 512 + 511, 1)
    source.snapshot(str(tmp_path / "s"))
    for lazy in (False, True):
        assert ram_hash(restored(tmp_path / "s", lazy=lazy).memory) == ram_hash(memory)


def test_memory_that_was_never_touched_takes_no_room(vm, tmp_path):
    source = vm(memory="8G")
    source.load("hello")
    source.run(timeout=10)
    source.snapshot(str(tmp_path / "s"))
    assert os.path.getsize(tmp_path / "s") < 40 * MIB  # maps: 4 + 8 bytes a page
    assert source.memory.pages().large * 4096 < 8 * BLOCK_SIZE  # nor was it populated


def test_what_cannot_be(vm, tmp_path):
    source = vm(memory="4M")
    with pytest.raises(BadInput, match="storage blocks of 4K"):
        source.snapshot(str(tmp_path / "s"), block_size="4K")
    with pytest.raises(BadInput, match="codec"):
        source.snapshot(str(tmp_path / "s"), codec="best")
    assert os.listdir(tmp_path) == []
    with pytest.raises(SnapshotError, match="No such file"):
        VM.restore(str(tmp_path / "s"))
    (tmp_path / "s").write_bytes(b"x" * 8192)
    with pytest.raises(SnapshotError, match="s: "):
        VM.restore(str(tmp_path / "s"))
    source.close()
    with pytest.raises(LifecycleError, match="closed"):
        source.snapshot(str(tmp_path / "t"))


# ---- as a user meets it ----


def pyvmm(*arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1])}
    command = [sys.executable, "-m", "pyvmm", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=50, env=environment)


def test_run_writes_a_snapshot_and_restore_goes_on(tmp_path):
    path = str(tmp_path / "s")
    done = pyvmm("run", "verify", "--append", "passes=100", "--snapshot", path, "--snapshot-at", "progress>=20000")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "verify: 15872 pages, 1 CPU")
    assert done.stderr.startswith(f"pyvmm: {path}: progress ")
    with VM.restore(path) as vm:
        assert 20000 <= vm.progress().count < 100 * 15872
    done = pyvmm("restore", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("SUCCESS: ")  # the rest: the first line was printed before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "hello", "--snapshot-at", "seconds>=1"], "--snapshot-at says when, --snapshot FILE must say where to"),
        (["run", "hello", "--snapshot", "s", "--snapshot-at", "noon"], "--snapshot-at 'noon': give progress>=N or"),
        (["run", "hello", "--snapshot", "/nowhere/s"], "/nowhere"),
        (["restore", "/nowhere/s"], "/nowhere/s: No such file or directory"),
        (["restore", __file__], "test_checkpoint.py: "),
    ],
)
def test_bad_input(arguments, line):
    done = pyvmm(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("pyvmm: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
