# test_incremental.py: vm.snapshot(track=, parent=): what changed since the parent, and that all of it is there.
from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pyvmm as package
from pyvmm import BadInput, Gpa, HostError, Snapshot
from pyvmm.errors import LifecycleError, MemoryAccessError
from pyvmm.layout import MIB
from pyvmm.pytest_plugin import needs
from pyvmm.snapshot.rewrite import pack
from pyvmm.testing.verify_model import check_memory, ram_hash

pytestmark = needs("kvm", "uffd_guest")
HIGH = 5 * MIB
"""What `verify` has written, and finds wrong if it is changed."""
LOW = 0x1C0000
"""Behind the guest's image, before its region: nobody's."""


def run_on(vm, seconds=0.01):
    """Some passes more, and paused again."""
    passes = vm.progress().passes
    while vm.progress().passes == passes:
        vm.run(timeout=seconds)


def same(restored, path, vm):
    """The file restores to just what the VM has, either way."""
    for lazy in (False, True):
        assert ram_hash(restored(path, lazy=lazy).memory) == ram_hash(vm.memory)


def stored(path):
    with Snapshot.open(str(path)) as snapshot:
        snapshot.check()
        return snapshot.info().stored


TRACKERS = [("bitmap", {}), ("manual", {}), ("ring", {"dirty_ring": 4096}), ("coarse", {})]


@pytest.mark.parametrize(("tracker", "options"), TRACKERS, ids=[name for name, _ in TRACKERS])
def test_a_chain_grows_while_the_guest_goes_on(vm, restored, tmp_path, tracker, options):
    source = vm(memory="8M", cpus=2, **options)
    source.load("verify", "zeros=100")
    run_on(source)
    parent = None
    for number in range(4):
        path = str(tmp_path / str(number))
        source.snapshot(path, parent=parent, track=tracker if number < 3 else None)
        same(restored, path, source)
        parent = path
        if number < 3:
            run_on(source)
            source.memory.write(Gpa(LOW + number * 0x1000), b"%d" % number)  # the host's own writes are in it too
            source.memory.zero(Gpa(LOW + (number - 1) * 0x1000), 0x1000)
    last = restored(tmp_path / "3")
    with Snapshot.open(str(tmp_path / "3")) as snapshot:
        assert snapshot.depth == 3
    assert source.base.trace is None  # the last one asked for none
    assert last.progress().count == source.progress().count


def test_only_what_changed_is_written(vm, restored, tmp_path):
    """Of a guest that stands still: what the host wrote, and a page that became zeros."""
    source = vm(memory="8M")
    source.load("verify")
    run_on(source)
    source.snapshot(str(tmp_path / "0"), track="bitmap")
    source.memory.write(Gpa(HIGH), b"one page")
    source.memory.zero(Gpa(HIGH + 0x5000), 0x1000)
    source.snapshot(str(tmp_path / "1"), parent=str(tmp_path / "0"), track="bitmap")
    assert stored(tmp_path / "1") == 1
    source.snapshot(str(tmp_path / "2"), parent=str(tmp_path / "1"))
    assert stored(tmp_path / "2") == 0
    same(restored, tmp_path / "2", source)
    with Snapshot.open(str(tmp_path / "2")) as snapshot:
        assert snapshot.read_page(source.memory.page_of(Gpa(HIGH + 0x5000))) == bytes(4096)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("tracker", ["bitmap", "coarse"])
def test_of_a_restored_vm(vm, restored, tmp_path, tracker, fill):
    source = vm(memory="8M")
    source.load("verify", "order=random")
    run_on(source)
    source.snapshot(str(tmp_path / "0"))
    target = restored(tmp_path / "0", lazy=True, fill=fill, track=tracker)
    target.memory.write(Gpa(LOW), b"one page")
    target.snapshot(str(tmp_path / "1"), parent=str(tmp_path / "0"), track=tracker)
    if not fill:
        assert (
            stored(tmp_path / "1") <= 512
        )  # the parent's pages were left where they are, though coarse marks them all
        assert target.memory.pages().homes["file"] > 500
    same(restored, tmp_path / "1", target)
    target.run(timeout=0.05)
    target.snapshot(str(tmp_path / "2"), parent=str(tmp_path / "1"))
    assert check_memory(target.memory, target.progress(), order="random") == []
    same(restored, tmp_path / "2", target)
    again = restored(tmp_path / "2", track="bitmap")
    run_on(again)
    again.snapshot(str(tmp_path / "3"), parent=str(tmp_path / "2"))
    same(restored, tmp_path / "3", again)


@pytest.mark.parametrize("tracker", ["bitmap", "coarse"])
def test_a_save_that_fails_loses_nothing(vm, restored, tmp_path, tracker):
    source = vm(memory="8M")
    source.load("verify")
    run_on(source)
    source.snapshot(str(tmp_path / "0"), track=tracker)
    run_on(source)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 * MIB, limits[1]))
    try:
        with pytest.raises(HostError, match="File too large"):
            source.snapshot(str(tmp_path / "1"), parent=str(tmp_path / "0"), track=tracker)
        with pytest.raises(HostError, match="File too large"):  # nor does a full one that fails end the trace
            source.snapshot(str(tmp_path / "1"), track=tracker)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    source.snapshot(str(tmp_path / "1"), parent=str(tmp_path / "0"))
    same(restored, tmp_path / "1", source)


def test_a_first_save_that_fails_leaves_no_trace(vm, tmp_path):
    source = vm(memory="4M")
    source.load("hello")
    with pytest.raises(BadInput, match="storage blocks"):
        source.snapshot(str(tmp_path / "0"), block_size="3K", track="bitmap")
    with source.trace("bitmap"):
        pass
    assert source.base is None


def test_a_snapshot_aside_does_not_disturb(vm, restored, tmp_path):
    """Without parent and track: a full one, and the next incremental still builds on the one before."""
    source = vm(memory="8M")
    source.load("verify")
    run_on(source)
    source.snapshot(str(tmp_path / "0"), track="bitmap")
    run_on(source)
    source.snapshot(str(tmp_path / "aside"))
    run_on(source)
    source.snapshot(str(tmp_path / "1"), parent=str(tmp_path / "0"), track="coarse")  # from now on another tracker
    same(restored, tmp_path / "1", source)
    run_on(source)
    source.snapshot(str(tmp_path / "full"), track="coarse")  # which is the new base
    with pytest.raises(BadInput, match="1 is another snapshot than the one since which writes are traced"):
        source.snapshot(str(tmp_path / "2"), parent=str(tmp_path / "1"))
    source.memory.write(Gpa(HIGH), b"x")
    source.snapshot(str(tmp_path / "2"), parent=str(tmp_path / "full"))
    assert stored(tmp_path / "2") <= 512
    same(restored, tmp_path / "2", source)


def test_a_parent_that_was_packed_is_the_same_one(vm, restored, tmp_path):
    source = vm(memory="8M")
    source.load("verify")
    run_on(source)
    source.snapshot(str(tmp_path / "0"), track="bitmap")
    pack(str(tmp_path / "0"), block_size=16 << 10)
    run_on(source)
    source.snapshot(str(tmp_path / "1"), parent=str(tmp_path / "0"))
    same(restored, tmp_path / "1", source)


def test_what_cannot_be(vm, tmp_path):
    source = vm(memory="4M")
    source.load("hello")
    path, other = str(tmp_path / "0"), str(tmp_path / "1")
    source.snapshot(path)
    with pytest.raises(
        BadInput, match="0 cannot be the parent: no write trace has run since it was taken; save it with"
    ):
        source.snapshot(other, parent=path)
    with pytest.raises(BadInput, match="no tracker 'best'"):
        source.snapshot(other, track="best")
    with source.trace("bitmap"), pytest.raises(LifecycleError, match=r"cannot trace .* another trace of this VM is"):
        source.snapshot(other, track="coarse")
    source.snapshot(path, track="bitmap")
    with pytest.raises(LifecycleError, match="another trace of this VM"):
        source.trace("bitmap").start()
    with pytest.raises(BadInput, match="is an ancestor of what is to replace it"):
        source.snapshot(path, parent=path)
    source.snapshot(other)
    os.replace(other, path)  # the parent is another file now
    with pytest.raises(BadInput, match="0 is another snapshot than the one since which"):
        source.snapshot(other, parent=path)
    with pytest.raises(BadInput, match="no order 'random'"):
        source.snapshot(other, order="random")
    assert sorted(os.listdir(tmp_path)) == ["0"]


def test_saving_is_no_write(vm, tmp_path):
    """A trace of the user's own hears nothing of it."""
    source = vm(memory="8M")
    source.load("verify")
    run_on(source)
    with source.trace("bitmap") as trace:
        trace.collect()
        source.snapshot(str(tmp_path / "s"), order="accessed")
        assert trace.collect().pages == 0
        with source.memory.reading(3, 2) as data:
            assert bytes(data) == source.memory.read(Gpa(0x3000), 0x2000)
            assert data.readonly
        assert trace.collect().pages == 0
    with pytest.raises(MemoryAccessError, match="the VM has 2048"), source.memory.reading(2047, 2):
        pass


# ---- as a user meets it ----


def pyvmm(*arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1])}
    command = [sys.executable, "-m", "pyvmm", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=50, env=environment)


def test_from_the_command_line(tmp_path):
    base, child = str(tmp_path / "base"), str(tmp_path / "child")
    options = ["--snapshot-block", "16K", "--snapshot-order", "accessed"]
    done = pyvmm(
        "run", "verify", "--append", "passes=200", "--snapshot", base, "--snapshot-at", "progress>=1", *options
    )
    assert (done.returncode, done.stderr.startswith(f"pyvmm: {base}: progress ")) == (0, True)
    done = pyvmm(
        "restore", base, "--lazy", "--snapshot", child, "--snapshot-at", "progress>=50000", "--snapshot-incremental"
    )
    assert (done.returncode, done.stderr.startswith(f"pyvmm: {child}: progress ")) == (0, True)
    with Snapshot.open(base) as first, Snapshot.open(child) as second:
        assert first.header.block_size == 16 << 10
        assert (second.depth, second.header.parent_id) == (1, first.id)
    done = pyvmm("restore", child)
    assert (done.returncode, done.stdout[:9]) == (0, "SUCCESS: ")
    done = pyvmm("restore", base, "--snapshot-incremental")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--snapshot FILE must say where to" in done.stderr
