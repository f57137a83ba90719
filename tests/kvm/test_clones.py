# test_clones.py: one snapshot restored many times: each VM knows that it is another one, and disturbs no other one.
from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
from engine_help import until

import pyvmm as package
from pyvmm import VM, Gpa
from pyvmm._native import lib
from pyvmm.cli import clones, main
from pyvmm.errors import FetchError
from pyvmm.machine.outcome import PROGRESS_SIZE
from pyvmm.pytest_plugin import needs
from pyvmm.snapshot import Snapshot
from pyvmm.testing.verify_model import check_memory, ram_hash

pytestmark = needs("kvm", "uffd_guest")

PAGE = Gpa(lib.PV_PROGRESS_GPA)
ZEROS = bytes(16)
TOLD = slice(96, 128)
"""Bytes of the progress page that are the host's."""


@pytest.fixture
def restored():
    with ExitStack() as stack:
        yield lambda path, **options: stack.enter_context(VM.restore(str(path), **options))


def at_work(vm, path, guest="dice", append="count=0", **options):
    """A VM whose guest has done some work, paused; it is in the file."""
    source = vm(**options)
    source.load(guest, append)
    source.start()
    until(lambda: source.progress().count)
    source.pause()
    assert not source.ended, "the guest was too quick to be saved at work"
    source.snapshot(str(path))
    return source


def damage(path, at):
    """Changes a byte."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def told(machine):
    progress = machine.progress()
    return progress.generation, progress.restores, progress.random_seed


def test_a_vm_that_boots_has_a_seed_and_no_generation(vm):
    seeds = set()
    for _ in range(2):
        machine = vm(memory="4M")
        machine.load("dice")
        assert told(machine)[:2] == (ZEROS, 0)
        seed = told(machine)[2]
        assert machine.progress().status == "booting"
        assert machine.run(timeout=10).ok
        assert told(machine) == (ZEROS, 0, seed)
        assert machine.progress().seed == seed
        seeds.add(seed)
    assert len(seeds - {0}) == 2


@pytest.mark.parametrize("lazy", [False, True])
def test_each_restore_is_another_one(vm, restored, tmp_path, lazy):
    source = at_work(vm, tmp_path / "0", memory="4M")
    before = source.memory.read(PAGE, PROGRESS_SIZE)
    found = [told(source)]
    for number in range(1, 4):
        clone = restored(tmp_path / "0", lazy=lazy)
        assert told(clone)[1] == 1
        found.append(told(clone))
        page = clone.memory.read(PAGE, PROGRESS_SIZE)
        assert page[TOLD] != before[TOLD]
        assert (page[: TOLD.start], page[TOLD.stop :]) == (before[: TOLD.start], before[TOLD.stop :])
        clone.snapshot(str(tmp_path / f"{number}"))
        again = restored(tmp_path / f"{number}", lazy=lazy)
        assert told(again)[1] == 2
        found.append(told(again))
    assert len({generation for generation, _, _ in found}) == len({seed for _, _, seed in found}) == 7


def test_memory_is_as_it_was_where_that_is_asked_for(vm, restored, tmp_path):
    source = at_work(vm, tmp_path / "s", memory="4M")
    for lazy in (False, True):
        assert ram_hash(restored(tmp_path / "s", lazy=lazy, generation=False).memory) == ram_hash(source.memory)
        assert ram_hash(restored(tmp_path / "s", lazy=lazy).memory) != ram_hash(source.memory)


def test_a_vm_saved_before_it_started_has_clones_with_seeds_of_their_own(vm, restored, tmp_path):
    source = vm(memory="4M")
    source.load("dice", "check=1 count=200000")
    source.snapshot(str(tmp_path / "s"))
    one, other = restored(tmp_path / "s"), restored(tmp_path / "s")
    assert len({told(machine)[2] for machine in (source, one, other)}) == 3
    for machine in (source, one, other):
        before = told(machine)
        assert machine.run(timeout=10).ok
        assert told(machine) == before
        assert machine.progress().seed == before[2]


@pytest.mark.parametrize("what", [b"", b"\xff" * 4096, PAGE.value.to_bytes(8, "little"), "another version"])
def test_what_is_no_progress_page_is_left_alone(vm, restored, tmp_path, what):
    source = vm(memory="4M")
    if what == "another version":
        what = lib.PV_PROGRESS_MAGIC.to_bytes(8, "little") + (lib.PV_PROGRESS_VERSION + 1).to_bytes(4, "little")
    source.memory.write(PAGE, what)
    source.snapshot(str(tmp_path / "s"))
    for lazy in (False, True):
        assert ram_hash(restored(tmp_path / "s", lazy=lazy).memory) == ram_hash(source.memory)


def test_a_lazily_restored_vm_reads_one_storage_block_for_it(vm, restored, tmp_path):
    at_work(vm, tmp_path / "s", "verify", "", pages="4k")
    without, with_ = (
        restored(tmp_path / "s", lazy=True, fill=False, pages="4k", generation=generation).restored.reads
        for generation in (False, True)
    )
    assert with_ <= without + 1


def test_a_page_that_is_damaged_is_refused(vm, tmp_path):
    """That of the progress: it is read before the guest runs."""
    path = tmp_path / "s"
    at_work(vm, path)
    with Snapshot.open(str(path)) as snapshot:
        stored = snapshot.read_page(PAGE.value // 4096)
    damage(path, path.read_bytes().index(stored) + 5)
    with pytest.raises(FetchError, match=r"gfn 0x10 cannot be brought back .*s: damaged: the checksum of a storage"):
        VM.restore(str(path), lazy=True, fill=False)


# ---- the guest is the judge ----


def test_clones_throw_differently(vm, restored, tmp_path):
    """The guest checks itself that what it was told is consistent; restored exactly, it throws as the source."""
    source = at_work(vm, tmp_path / "s", "dice", "count=20M check=1", cpus=1)
    before = source.printed
    source.resume()
    assert source.wait(20).ok
    ends = [source.printed.removeprefix(before)]
    for options in ({}, {"lazy": True}, {"lazy": True, "fill": False}, {"pages": "4k"}):
        clone = restored(tmp_path / "s", **options)
        assert clone.run(timeout=20).ok
        line, end = clone.printed.splitlines(keepends=True)
        assert line.startswith("restored, after ")
        assert (clone.progress().passes, clone.progress().seed) == (1, clone.progress().random_seed)
        ends.append(end)
    assert len(set(ends)) == 5
    assert all(end.startswith("SUCCESS: 20971520 throws: ") for end in ends)
    for lazy in (False, True):
        exact = restored(tmp_path / "s", lazy=lazy, generation=False)
        assert exact.run(timeout=20).ok
        assert exact.printed == ends[0]


def test_eight_clones_at_once(vm, tmp_path):
    """Lazily, of one file, all at work; some are closed while others run, whose memory nobody else touches."""
    source = at_work(vm, tmp_path / "s", "verify", "order=random zeros=100", memory="32M", cpus=2)
    before = ram_hash(source.memory)
    made = [VM.restore(str(tmp_path / "s"), lazy=True, fill=number % 2 == 0) for number in range(8)]
    try:
        for machine in made:
            machine.start()
        for number in (1, 4, 6):
            made[number].close()
        left = [machine for number, machine in enumerate(made) if number not in (1, 4, 6)]
        for machine in left:
            passes = machine.progress().passes + 2
            until(lambda m=machine, p=passes: m.progress().passes >= p or m.ended, "two more passes")
        for machine in left:
            machine.pause()
            assert machine.progress().status == "running"
            assert check_memory(machine.memory, machine.progress(), order="random", zeros=100) == []
    finally:
        for machine in made:
            machine.close()
    assert ram_hash(source.memory) == before


# ---- as a user meets it ----


def command(*arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1])}
    return {"args": [sys.executable, "-m", "pyvmm", "restore", *arguments], "env": environment, "text": True}


def test_the_command(vm, tmp_path, capfd):
    at_work(vm, tmp_path / "s", "dice", "count=2M check=1", memory="4M")
    assert main(["restore", str(tmp_path / "s"), "--count", "12", "--lazy", "--stats"]) == 0
    out, err = capfd.readouterr()
    for number in range(1, 13):
        line, end = (each[4:] for each in out.splitlines() if each.startswith(f"{number:2}: "))
        assert line.startswith("restored, after ")
        assert end.startswith("SUCCESS: 2097152 throws: ")
    assert len(set(out.splitlines())) == 24
    rows = [line.split() for line in err.splitlines() if "exit" in line]
    assert [row[1:6:2] for row in rows] == [[str(number), "exit", "0"] for number in range(1, 13)]


def test_clones_that_end_badly_do_not_disturb_the_others(vm, tmp_path, capfd, monkeypatch):
    """Two of four are made to fail before they start: one by a triple fault, one by a fault that its guest reports."""
    at_work(vm, tmp_path / "s", "dice", "count=2M", memory="4M")
    numbers, real = count(1), clones.restore

    def restore(args):
        machine, number = real(args), next(numbers)
        if number == 2:
            machine.set_regs(rip=0)
        if number == 3:
            machine.set_regs(cr3=1 << 30)
        return machine

    monkeypatch.setattr(clones, "restore", restore)
    assert main(["restore", str(tmp_path / "s"), "--count", "4", "--stats"]) == 1
    out, err = capfd.readouterr()
    assert [line[0] for line in out.splitlines() if "SUCCESS" in line] in (["1", "4"], ["4", "1"])
    (line,) = [line for line in err.splitlines() if line.startswith("pyvmm: ")]
    assert line.startswith("pyvmm: clone 3: Triple fault")
    assert "2: FAIL" in out or "2: dice: " in out
    rows = [line.split()[1:6:2] for line in err.splitlines() if line.startswith("│")]
    assert rows[:4] == [["1", "exit", "0"], ["2", "exit", "1"], ["3", "crash", "125"], ["4", "exit", "0"]]


def test_a_damaged_block_ends_its_clone_alone(vm, tmp_path, capfd, monkeypatch):
    at_work(vm, tmp_path / "s", "verify", "passes=40 order=random", memory="16M")
    (tmp_path / "bad").write_bytes((tmp_path / "s").read_bytes())
    with Snapshot.open(str(tmp_path / "s")) as snapshot:
        at = snapshot.header.sections["states"].offset // 2
    damage(tmp_path / "bad", at)
    numbers, real = count(1), clones.restore

    def restore(args):
        if next(numbers) == 1:
            args.__dict__["file"] = str(tmp_path / "bad")
            try:
                return real(args)
            finally:
                args.__dict__["file"] = str(tmp_path / "s")
        return real(args)

    monkeypatch.setattr(clones, "restore", restore)
    assert main(["restore", str(tmp_path / "s"), "--count", "2", "--lazy", "--fill", "none"]) == 2
    out, err = capfd.readouterr()
    assert out.startswith("2: SUCCESS")
    assert err.startswith("pyvmm: clone 1: gfn 0x")
    assert err.count("\n") == 1


def test_time_is_up_for_all(vm, tmp_path, capfd):
    at_work(vm, tmp_path / "s", memory="4M")
    assert main(["restore", str(tmp_path / "s"), "--count", "3", "--timeout", "0.1"]) == 124
    assert capfd.readouterr().err == "pyvmm: 3 of 3 clones did not end within 0.1 s\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all(vm, tmp_path, number):
    at_work(vm, tmp_path / "s", memory="4M")
    arguments = command(str(tmp_path / "s"), "--count", "5", "--lazy")
    with subprocess.Popen(**arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        begun = {process.stdout.readline()[0] for _ in range(5)}  # "restored, after ..."
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert begun == set("12345")
    assert (process.returncode, out, err) == (128 + number, "", "")


def test_whoever_reads_has_gone(vm, tmp_path):
    at_work(vm, tmp_path / "s", memory="4M")
    with subprocess.Popen(**command(str(tmp_path / "s"), "--count", "3"), stdout=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(20) == 128 + signal.SIGPIPE


def test_bad_input(vm, tmp_path):
    at_work(vm, tmp_path / "s", memory="4M")
    for options, line in (
        (["--count", "0"], "pyvmm: --count 0: give a number of clones from 1 to 256\n"),
        (["--count", "1000"], "pyvmm: --count 1000: give a number of clones from 1 to 256\n"),
    ):
        done = subprocess.run(**command(str(tmp_path / "s"), *options), check=False, capture_output=True, timeout=20)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    missing = subprocess.run(**command("/nowhere/s", "--count", "2"), check=False, capture_output=True, timeout=20)
    assert missing.returncode == 2
    assert missing.stderr == "pyvmm: /nowhere/s: No such file or directory\n"
