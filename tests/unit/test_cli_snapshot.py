# test_cli_snapshot.py: what `pyvmm snapshot` says of files.
from __future__ import annotations

import json

import pytest
from snapshot_files import PAGES, STATE, save, some_ram

from pyvmm._native import ffi
from pyvmm.cli import main
from pyvmm.errors import StateError
from pyvmm.snapshot import Snapshot
from pyvmm.state import State
from pyvmm.vcpu.registers import saved_registers


def vcpu(number, rip):
    regs, sregs = ffi.new("struct kvm_regs *"), ffi.new("struct kvm_sregs *")
    regs.rip, sregs.cr3, sregs.efer, sregs.cs.l, sregs.ss.dpl, sregs.cr0 = rip, 0x5000, 1 << 10, 1, 3, 1
    return State("vcpu", 1, {"id": number, "regs": bytes(ffi.buffer(regs)), "sregs": bytes(ffi.buffer(sregs))})


@pytest.fixture
def files(tmp_path):
    """Paths of a snapshot with two vCPUs, and of its child."""
    old, new = tmp_path / "old", tmp_path / "new"
    save(old, some_ram(1), states=State("vm", 1, {"vcpus": [vcpu(0, 0xFFFF_FFFF_8000_1234), vcpu(1, 0x77)]}), wset=[4])
    with Snapshot.open(str(old)) as parent:
        save(new, some_ram(2), [3, 5], parent=parent)
    return old, new


def said(capsys, *argv):
    status = main(["snapshot", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_info_for_people(files, capsys):
    status, out, err = said(capsys, "info", files[0])
    assert (status, err) == (0, "")
    assert all(len(line) <= 80 or str(files[0]) in line for line in out.splitlines())
    for part in ("2.0 MiB of RAM", "blocks of 16K, raw", "large pages: 1 of 2", "working set: 1", "0xffffffff80001234"):
        assert part in out
    assert "ancestors" not in out
    status, out, _ = said(capsys, "info", files[1])
    assert "in the parent" in out
    assert "ancestors: 1\n'old': " in out


def test_info_for_programs(files, capsys):
    _, out, _ = said(capsys, "info", files[0], "--json")
    found = json.loads(out)
    assert (found["schema"], found["memory_bytes"], found["depth"]) == (1, PAGES * 4096, 0)
    assert sum(found["pages"].values()) == PAGES
    assert found["file_bytes"] == files[0].stat().st_size
    assert found["raw_bytes"] == found["stored_bytes"] == found["pages"]["stored"] * 4096
    assert [(cpu["id"], cpu["rip"], cpu["cr3"], cpu["ring"], cpu["mode"]) for cpu in found["vcpus"]] == [
        (0, 0xFFFF_FFFF_8000_1234, 0x5000, 3, 64),
        (1, 0x77, 0x5000, 3, 64),
    ]
    found = json.loads(said(capsys, "info", files[1], "--json")[1])
    assert [part["file"] for part in found["chain"]] == [str(files[1]), str(files[0])]
    assert found["chain_error"] is None


def test_info_without_the_parent(files, capsys):
    files[0].unlink()
    status, out, _ = said(capsys, "info", files[1])
    assert status == 0
    assert "its parent is missing" in out
    assert "its parent is missing" in json.loads(said(capsys, "info", files[1], "--json")[1])["chain_error"]


def test_check(files, capsys):
    assert said(capsys, "check", files[0]) == (0, f"{files[0]}: whole\n", "")
    assert said(capsys, "check", files[1]) == (0, f"{files[1]}: whole, and so is all that it builds on (1)\n", "")
    assert json.loads(said(capsys, "check", files[1], "--json")[1])["ok"] is True


def test_check_of_a_damaged_file(files, capsys):
    raw = bytearray(files[0].read_bytes())
    raw[5000] ^= 1
    files[0].write_bytes(raw)
    for file in files:  # an ancestor's damage is the child's too
        status, out, err = said(capsys, "check", file)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{files[0]}: damaged: the checksum of storage block 0 is wrong" in err
    status, out, err = said(capsys, "check", files[0], "--json")
    assert (status, err) == (2, "")
    assert json.loads(out)["ok"] is False
    assert "storage block 0" in json.loads(out)["error"]
    assert said(capsys, "info", files[0])[0] == 0  # looks at no pages


def test_what_is_no_snapshot(tmp_path, capsys):
    (tmp_path / "a").write_text("hello")
    for action in ("info", "check"):
        status, out, err = said(capsys, action, tmp_path / "a")
        assert (status, out, err) == (2, "", f"pyvmm: {tmp_path}/a: not a snapshot of pyvmm\n")


def test_registers_that_are_none():
    with pytest.raises(StateError, match="'regs'"):
        saved_registers(State("vcpu", 1, {"id": 0, "regs": b"x"}))


def test_info_of_registers_that_are_none(tmp_path, capsys):
    save(tmp_path / "a", some_ram(0), states=State("vm", 1, {"vcpu": State("vcpu", 1, {"id": 0})}))
    status, _, err = said(capsys, "info", tmp_path / "a")
    assert (status, err.count("\n")) == (2, 1)
    assert "'regs'" in err


def test_info_of_other_states(tmp_path, capsys):
    save(tmp_path / "a", some_ram(0), states=STATE)
    assert json.loads(said(capsys, "info", tmp_path / "a", "--json")[1])["vcpus"] == []
