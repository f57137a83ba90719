# test_snapshot_durable.py: whatever ends a save, the file that was there is whole, and no half of a new one is.
from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from snapshot_files import BLOCK, PAGES, STATE, pages_in, save, some_ram

from pyvmm.errors import BadInput, HostError
from pyvmm.layout import PAGE_SIZE
from pyvmm.snapshot import Snapshot, pending
from pyvmm.snapshot.writer import Writer

KILLS = 20

# Saves over and over, with other pages and another number each time, until it is killed.
SAVER = """
import sys
sys.path.insert(0, {folder!r})
from snapshot_files import BLOCK, State, Writer, some_ram
print("ready", flush=True)
for number in range(1, 1 << 30):
    ram = some_ram(number % 5)
    with Writer({path!r}, len(ram), BLOCK, "raw") as writer:
        for first in range(0, len(ram) // 4096, 40):
            count = min(40, len(ram) // 4096 - first)
            writer.add_pages([(first, count)], memoryview(ram)[first * 4096 : (first + count) * 4096])
        writer.finish(State("vm", 1, {{"number": number}}))
"""

# Saves once, with no room for all of it.
LIMITED = """
import resource, sys
sys.path.insert(0, {folder!r})
from snapshot_files import save, some_ram
from pyvmm.errors import HostError
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    save({path!r}, some_ram(2))
except HostError as error:
    print(error)
"""


def run(program, **values):
    return [sys.executable, "-c", program.format(folder=os.path.dirname(__file__), **values)]


def partial(folder):
    return [name for name in os.listdir(folder) if name.endswith(".partial")]


def test_killed_at_any_moment(tmp_path):
    path = tmp_path / "a"
    save(path, some_ram(0), states=STATE)
    rng, left, numbers = random.Random(), 0, set()
    for _ in range(KILLS):
        with subprocess.Popen(run(SAVER, path=str(path)), stdout=subprocess.PIPE) as saver:
            assert saver.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.06))
            saver.kill()
            assert saver.wait() == -signal.SIGKILL
        left += len(partial(tmp_path))
        assert len(partial(tmp_path)) <= 1  # the next save removed what the last one left
        with Snapshot.open(str(path)) as snapshot:
            snapshot.check()
            number = snapshot.states.fields.get("number", 0)
        numbers.add(number)
        assert pages_in(path) == some_ram(number % 5)
    save(path, some_ram(0))
    assert os.listdir(tmp_path) == ["a"]
    assert left > 0, "no save was killed midway: nothing was tested"
    assert len(numbers) > 1, "no save ended: nothing was tested"


@pytest.mark.parametrize("limit", [0, 100, 4096, 4097, 100_000, "whole - 100", "whole - 1"])
def test_no_room(tmp_path, limit):
    path = tmp_path / "a"
    save(path, some_ram(2))
    whole = path.stat().st_size
    save(path, some_ram(1))
    before = path.read_bytes()
    limit = eval(limit, {"whole": whole}) if isinstance(limit, str) else limit  # noqa: S307 (of the rows above)
    done = subprocess.run(
        run(LIMITED, path=str(path), limit=limit), capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.startswith(f"cannot write snapshot {path}: File too large; free some space")
    assert done.stdout.count("\n") == 1
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


class Stop(BaseException):
    """As KeyboardInterrupt, of which nothing but our `with` knows."""


def test_an_interrupt_at_each_step(tmp_path, monkeypatch):
    """Each call that the writer makes of the system or of C is interrupted once."""
    path = tmp_path / "a"
    save(path, some_ram(1))
    before, new = path.read_bytes(), some_ram(2)
    calls = 0
    targets = [(os, name) for name in ("open", "fsync", "rename", "fstat", "listdir", "close")]

    def interrupted(at):
        nonlocal calls
        calls = 0

        def wrap(function):
            def called(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == at:
                    raise Stop
                return function(*args, **kwargs)

            return called

        with monkeypatch.context() as patch:
            for module, name in targets:
                patch.setattr(module, name, wrap(getattr(module, name)))
            try:
                save(path, new)
            except Stop:
                return True
        return False

    at = 1
    while interrupted(at):
        assert path.read_bytes() == before or pages_in(path) == new
        save(path, some_ram(1))
        before = path.read_bytes()
        assert partial(tmp_path) == []
        at += 1
    assert at > 8
    assert pages_in(path) == new


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_fails_at_the_end(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    save(path, some_ram(1))
    before = path.read_bytes()

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(HostError, match=r"cannot write snapshot .*/a: Input/output error; what was there"):
            save(path, some_ram(2))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(fd):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def noted_rename(old, new):
        done.append(f"{os.path.basename(old)} to {os.path.basename(new)}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    save(tmp_path / "a", some_ram(0))
    assert done == [done[0], f"{done[0]} to a", tmp_path.name]
    assert done[0].endswith(".partial")


def test_two_writers_do_not_disturb_each_other(tmp_path):
    path = str(tmp_path / "a")
    with Writer(path, PAGES * PAGE_SIZE, BLOCK) as one:
        one.add_pages([(0, 100)], some_ram(1, 100))
        save(path, some_ram(2))  # looks for leftovers, and leaves the other's file alone
        assert pages_in(path) == some_ram(2)
        one.finish(STATE)
    assert pages_in(path) == some_ram(1, 100) + bytes((PAGES - 100) * PAGE_SIZE)
    assert os.listdir(tmp_path) == ["a"]


def test_leftovers_are_only_what_looks_like_one(tmp_path):
    os.symlink("/etc/passwd", tmp_path / ".pyvmm-0.partial")
    os.mkdir(tmp_path / ".pyvmm-1.partial")
    os.mkfifo(tmp_path / ".pyvmm-2.partial")
    for name in (".pyvmm-3.partial", ".pyvmm-4", "x.partial"):
        (tmp_path / name).touch()
    save(tmp_path / "a", some_ram(0))
    assert sorted(os.listdir(tmp_path)) == [
        ".pyvmm-0.partial", ".pyvmm-1.partial", ".pyvmm-2.partial", ".pyvmm-4", "a", "x.partial",
    ]  # fmt: skip
    assert os.path.exists("/etc/passwd")


def test_a_file_taken_for_a_leftover_is_made_anew(tmp_path, monkeypatch):
    """Between a writer's open() and its lock, another one may remove its file."""
    taken, lock = [], pending._lock

    def late(fd):
        if not taken:
            taken.append(partial(tmp_path))
            os.unlink(tmp_path / taken[0][0])
        return lock(fd)

    monkeypatch.setattr(pending, "_lock", late)
    save(tmp_path / "a", some_ram(0))
    assert taken
    assert pages_in(tmp_path / "a") == some_ram(0)
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink("real/a", tmp_path / "link")
    save(tmp_path / "link", some_ram(0))
    assert os.readlink(tmp_path / "link") == "real/a"
    assert pages_in(tmp_path / "real" / "a") == some_ram(0)


@pytest.mark.parametrize(
    ("place", "error", "named"),
    [
        ("folder", BadInput, "that is there, and no file"),
        ("fifo", BadInput, "that is there, and no file"),
        ("nowhere/a", HostError, "No such file or directory"),
        ("file/a", HostError, "Not a directory"),
    ],
)
def test_places_that_cannot_be(tmp_path, place, error, named):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(error, match=named):
        Writer(str(tmp_path / place), PAGES * PAGE_SIZE)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "folder"]


def test_a_save_that_failed_holds_no_memory(tmp_path, monkeypatch):
    """Who gives a view of guest memory and takes it back sees our error, not that the view is in use."""
    with (
        memoryview(bytearray(some_ram(1))) as view,
        Writer(str(tmp_path / "a"), PAGES * PAGE_SIZE, BLOCK) as writer,
    ):
        with pytest.raises(BadInput, match="is given twice") as error:
            writer.add_pages([(0, 1), (0, PAGES - 1)], view)
        view.release()
        del error
