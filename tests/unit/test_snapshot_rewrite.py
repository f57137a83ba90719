# test_snapshot_rewrite.py: a snapshot in another order, with other blocks, in one file, or with another working set:
# its pages stay the same, whatever ends the change.
from __future__ import annotations

import errno
import os
import signal
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_files import AVAILABLE, BLOCK, PAGES, STATE, pages_in, save, some_ram
from test_snapshot_durable import run

from pyvmm.cli import main
from pyvmm.errors import BadInput, HostError, SnapshotError
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.rewrite import neighbours, pack, set_wset


def chain(folder, depth=3):
    """Files of a chain, and the RAM that the youngest gives: each changes some pages, also to zeros."""
    ram, parent = some_ram(0), None
    for number in range(depth):
        changed = range(number * 3 % 5, PAGES, 1 if number == 0 else 5)
        fresh = some_ram(number)
        for page in changed:
            ram[page * 4096 : (page + 1) * 4096] = fresh[page * 4096 : (page + 1) * 4096]
        save(folder / str(number), ram, changed, AVAILABLE[number % len(AVAILABLE)], BLOCK, parent, wset=[9, 7, 8, 500])
        if parent is not None:
            parent.close()
        parent = Snapshot.open(str(folder / str(number)))
    parent.close()
    return ram


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    wset=st.lists(st.integers(0, PAGES - 1), unique=True, max_size=60),
    codec=st.sampled_from([None, *AVAILABLE]),
    block=st.sampled_from([None, 16 << 10, 64 << 10, 2 << 20]),
    order=st.sampled_from(["address", "touch"]),
    flat=st.booleans(),
    aside=st.booleans(),
    which=st.integers(0, 2),
)
def test_packed_in_any_way(tmp_path_factory, wset, codec, block, order, flat, aside, which):
    folder = tmp_path_factory.mktemp("p")
    ram = chain(folder)
    path = str(folder / str(which))
    set_wset(path, wset)
    with Snapshot.open(path) as old:
        own, id, large = pages_in(path), old.id, old.large
    out = str(folder / "sub" / "out") if aside else path
    os.makedirs(folder / "sub")
    if order == "touch" and not wset:
        with pytest.raises(BadInput, match="keeps no working set"):
            pack(path, out, order=order)
        return
    pack(path, out, order=order, block_size=block, codec=codec, flat=flat)
    with Snapshot.open(out) as new:
        new.check()
        assert (new.wset, new.large, new.states.fields) == (tuple(wset), large, STATE.fields)
        assert (new.id == id) == (not flat)
        assert new.depth == (0 if flat else which)
        if order == "touch":
            homes = [new.page_home(page) for page in wset]
            places = [(home.block, home.slot) for home in homes if home.kind == "block"]
            slots = new.header.block_size // 4096
            assert places == [divmod(number, slots) for number in range(len(places))]
            cold = {page for page, _ in new.read_block(len(places) // slots)} if places and len(places) % slots else {}
            assert set(cold) <= set(wset), "the block that ends the working set has other pages too"
    assert pages_in(out) == own
    if aside or not flat or which == 2:
        assert pages_in(folder / "2") == ram  # children find it still
    else:
        with pytest.raises(SnapshotError, match="another snapshot than the parent"):
            Snapshot.open(str(folder / "2"))


def test_an_ancestor_is_not_replaced_by_its_child(tmp_path):
    chain(tmp_path)
    before = (tmp_path / "0").read_bytes()
    with pytest.raises(BadInput, match="is an ancestor of what is to replace it"):
        pack(str(tmp_path / "2"), str(tmp_path / "0"))
    assert (tmp_path / "0").read_bytes() == before
    pack(str(tmp_path / "2"), str(tmp_path / "0"), flat=True)  # which needs its ancestors no more


def test_a_damaged_file_is_not_packed(tmp_path):
    save(tmp_path / "a", some_ram(1))
    raw = bytearray((tmp_path / "a").read_bytes())
    raw[4096 + 3 * BLOCK] ^= 1
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(SnapshotError, match="checksum of storage block 3"):
        pack(str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == raw
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("copy", ["shared", "refused", "short"])
def test_the_working_set_is_replaced_and_nothing_else(tmp_path, monkeypatch, copy):
    path = str(tmp_path / "a")
    save(path, some_ram(1), wset=[3, 1])
    before = (tmp_path / "a").read_bytes()
    with Snapshot.open(path) as old:
        end = old.header.sections["wset"].offset
    real = os.copy_file_range

    def refused(*args):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def short(old, new, size, *offsets):
        return real(old, new, min(size, 10_001), *offsets)

    if copy != "shared":
        monkeypatch.setattr(os, "copy_file_range", {"refused": refused, "short": short}[copy])
    for wset in ([5, 3, 4], [], range(PAGES - 1, -1, -1)):
        set_wset(path, wset)
        with Snapshot.open(path) as new:
            new.check()
            assert new.wset == tuple(wset)
        assert (tmp_path / "a").read_bytes()[4096:end] == before[4096:end]
    assert os.listdir(tmp_path) == ["a"]


def test_a_working_set_that_cannot_be(tmp_path, monkeypatch):
    path = str(tmp_path / "a")
    save(path, some_ram(1), wset=[3, 1])
    before = (tmp_path / "a").read_bytes()
    for wset in ([1, 1], [PAGES], [-1]):
        with pytest.raises(BadInput, match="names a page twice, or one beyond"):
            set_wset(path, wset)
    monkeypatch.setattr(os, "copy_file_range", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(HostError, match=r"cannot write snapshot .*No space left on device"):
        set_wset(path, [1])
    assert (tmp_path / "a").read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


SETTER = """
import sys
sys.path.insert(0, {folder!r})
from pyvmm.snapshot.rewrite import set_wset
print("ready", flush=True)
for number in range(1 << 30):
    set_wset({path!r}, range(number % 500))
"""


def test_killed_at_any_moment(tmp_path):
    path, seen = str(tmp_path / "a"), set()
    save(path, some_ram(1))
    for number in range(10):
        with subprocess.Popen(run(SETTER, path=path), stdout=subprocess.PIPE) as setter:
            assert setter.stdout.readline() == b"ready\n"
            signal.sigtimedwait([], 0.003 * number)
            setter.kill()
        with Snapshot.open(path) as snapshot:
            snapshot.check()
            assert snapshot.wset == tuple(range(len(snapshot.wset)))
            seen.add(len(snapshot.wset))
    assert pages_in(path) == some_ram(1)
    assert len(seen) > 1, "no working set was ever replaced: nothing was tested"


def test_neighbours():
    assert list(neighbours([])) == []
    assert list(neighbours([3, 4, 5, 9, 8, 0])) == [(3, 3), (9, 1), (8, 1), (0, 1)]


def test_from_the_command_line(tmp_path, capsys):
    ram = chain(tmp_path)
    path, out = str(tmp_path / "2"), str(tmp_path / "out")
    argv = ["snapshot", "pack", path, "--out", out, "--order", "touch", "--block", "32K", "--codec", "raw", "--flat"]
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert pages_in(out) == ram
    with Snapshot.open(out) as snapshot:
        assert (snapshot.depth, snapshot.header.block_size, snapshot.header.codec) == (0, 32 << 10, "raw")
        assert snapshot.page_home(9).block == 0
    assert main(["snapshot", "pack", path]) == 0
    assert pages_in(path) == ram
    for argv, line in (
        (["info", path, "--flat"], "--flat is for pack"),
        (["pack", path, "--block", "3K"], "storage blocks of 3K"),
        (["pack", path, "--codec", "best"], "codec"),
        (["pack", path, "--order", "touch", "--json"], "--json is for info and check"),
    ):
        try:
            status = main(["snapshot", *argv])
        except SystemExit as error:
            status = error.code
        assert status == 2
        assert line in capsys.readouterr().err
