# test_snapshot.py: a guest goes on from a file, eagerly loaded into another VM; and what the file says of it.
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from pyvmm.cli import main
from pyvmm.layout import GIB, PAGE_SIZE, Gpa
from pyvmm.memory.trace import Runs
from pyvmm.pytest_plugin import needs
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.writer import Writer
from pyvmm.testing.verify_model import check_memory, ram_hash

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from snapshot_files import AVAILABLE

pytestmark = needs("kvm")


def save(path, machine, codec=AVAILABLE[-1], parent=None, runs=None):
    """All RAM of a paused VM, or some pages of it; returns the state saved with it, as another has another clock."""
    memory, state = machine.memory, machine.save_state()
    with Writer(str(path), memory.size, codec=codec, parent=parent) as writer:
        for region in memory.regions:
            first = region.offset // PAGE_SIZE
            if runs is None:
                writer.add_pages([(first, region.size // PAGE_SIZE)], memory.view(region.gpa, region.size))
        for first, count in runs or ():
            writer.add_pages([(first, count)], memory.read(memory.gpa_of(first), count * PAGE_SIZE))
        writer.finish(state)
    return state


def load(vm, path, **options):
    """A new VM that is what the file holds."""
    with Snapshot.open(str(path)) as snapshot:
        target = vm(memory=snapshot.memory_size, **options)
        snapshot.load_into(target.memory)
        target.restore_state(snapshot.states)
    return target


@pytest.mark.parametrize("codec", AVAILABLE)
def test_a_guest_goes_on_from_a_file(vm, tmp_path, codec):
    source = vm(memory="64M", cpus=2)
    source.load("verify")
    source.run(timeout=0.3)
    state = save(tmp_path / "a", source, codec)
    with Snapshot.open(str(tmp_path / "a")) as snapshot:
        snapshot.check()
        assert snapshot.states == state
    target = load(vm, tmp_path / "a", cpus=2)
    assert ram_hash(target.memory) == ram_hash(source.memory)
    before = target.progress().count
    target.run(timeout=0.5)
    assert target.progress().count > before
    assert check_memory(target.memory, target.progress()) == []


def test_a_chain_from_a_trace(vm, tmp_path):
    """What was written since the parent, by the trace, is all that the child has to hold."""
    source = vm(memory="64M")
    source.load("verify")
    source.run(timeout=0.3)
    with source.trace("coarse") as trace:
        trace.collect()
        save(tmp_path / "0", source)
        for number in (1, 2):
            source.run(timeout=0.2)
            with Snapshot.open(str(tmp_path / f"{number - 1}")) as parent:
                save(tmp_path / f"{number}", source, parent=parent, runs=Runs(trace.collect()))
    with Snapshot.open(str(tmp_path / "2")) as snapshot:
        snapshot.check()
        assert snapshot.depth == 2
    target = load(vm, tmp_path / "2")
    assert ram_hash(target.memory) == ram_hash(source.memory)
    target.run(timeout=0.3)
    assert check_memory(target.memory, target.progress()) == []


def test_ram_beyond_the_hole(vm, tmp_path):
    source = vm(memory=3 * GIB + (8 << 20))
    source.load("hello")
    assert source.run(timeout=10).ok
    source.memory.write(Gpa(4 * GIB + 5000), b"beyond")
    save(tmp_path / "a", source)
    assert os.path.getsize(tmp_path / "a") < 64 << 20
    target = vm(memory=source.memory.size)
    with Snapshot.open(str(tmp_path / "a")) as snapshot:
        snapshot.load_into(target.memory)
    for gpa, size in ((Gpa(0), 16 << 20), (Gpa(3 * GIB - PAGE_SIZE), PAGE_SIZE), (Gpa(4 * GIB), 8 << 20)):
        assert target.memory.read(gpa, size) == source.memory.read(gpa, size)


def test_info_shows_a_real_guests_registers(vm, tmp_path, capsys):
    source = vm(memory="16M", cpus=2)
    source.load("smp", append="count=900M")
    source.run(timeout=0.1)
    save(tmp_path / "a", source)
    assert main(["snapshot", "info", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(cpu["id"], cpu["rip"], cpu["cr3"]) for cpu in found["vcpus"]] == [
        (number, source.regs(number).rip, source.regs(number).cr3) for number in (0, 1)
    ]
