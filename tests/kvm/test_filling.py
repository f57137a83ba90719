# test_filling.py: `pyvmm restore --lazy --map`: the map while RAM comes, at a terminal and without one.
from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

import pyvmm as package
from pyvmm.cli.filling import Printed
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "uffd_guest")

DEADLINE = 30
PYVMM = [sys.executable, "-m", "pyvmm"]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(package.__file__).parents[1]), "COLUMNS": "80", "TERM": "xterm", "PYTHONUTF8": "1",
}  # fmt: skip


@pytest.fixture
def saved(vm, tmp_path):
    def make(guest, append="", memory="64M"):
        source = vm(memory=memory)
        source.load(guest, append)
        source.start()
        while source.progress().status != "running" or (guest == "verify" and source.progress().passes < 1):
            threading.Event().wait(0.001)
        source.snapshot(str(tmp_path / "s"))
        return str(tmp_path / "s")

    return make


def restore(*arguments):
    return subprocess.run(
        [*PYVMM, "restore", *arguments],
        check=False, capture_output=True, text=True, timeout=DEADLINE, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def at_terminal(*arguments):
    """(status, all that a terminal got)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PYVMM, "restore", *arguments], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=ENVIRONMENT
    )
    os.close(theirs)
    seen = b""
    try:
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # EIO: it has ended
                break
    finally:
        os.close(ours)
    return process.wait(DEADLINE), seen.decode()


@needs("large_mappings")
def test_without_a_terminal_there_are_three_maps(saved):
    done = restore(saved("verify", "passes=20"), "--lazy", "--map")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SUCCESS: ")
    assert done.stdout.count("\n") == 1
    away = [int(number.replace(",", "")) for number in re.findall(r"s: ([\d,]+) of 16,384 pages are", done.stderr)]
    assert len(away) == 3
    assert away[0] >= away[1] >= away[2] == 0
    assert done.stderr.count("a cell: a block of 2 MiB") == 3
    assert "█ large 31" in done.stderr.splitlines()[-2]
    assert re.fullmatch(
        r"pyvmm: first work after [\d.]+ m?s; 64M came within .*: [\d,]+ reads of storage blocks, \d+ faults",
        done.stderr.splitlines()[-1],
    )
    assert "\x1b" not in done.stderr


def test_at_a_terminal_the_map_is_redrawn_and_the_guests_lines_stay(saved):
    status, seen = at_terminal(saved("verify", "passes=20"), "--lazy", "--map")
    assert status == 0
    assert "\x1b[1A" in seen  # up again, over the map before
    assert re.search(r"0x0000000 .*█", seen)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", seen)
    assert len(re.findall(r"pages are in the file", plain)) >= 2
    assert plain.count("pyvmm: first work after") == 1
    assert [line for line in plain.splitlines() if line.startswith("SUCCESS: ")]
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1  # the cursor is there again


def test_a_guest_that_sleeps_brings_little_until_its_time_is_up(saved):
    file = saved("echo", memory="16M")
    done = restore(file, "--lazy", "--map", "--fill", "none", "--timeout", "0.5")
    assert done.returncode == 124
    *_, told, end = done.stderr.splitlines()
    assert re.match(r"pyvmm: no work yet; \d+[KM] came within ", told)
    assert end == "pyvmm: the guest did not end within 0.5 s"
    status, seen = at_terminal(file, "--lazy", "--map", "--fill", "none", "--timeout", "0.5")
    assert status == 124
    assert "no work yet" in seen


def test_a_map_is_for_lazy_restore(saved):
    done = restore("/nowhere", "--map")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pyvmm: --map shows how RAM comes while the guest runs: give --lazy too\n"


class Port:
    """Of a serial port, where its bytes go."""

    def __init__(self):
        self.got = b""
        self.output = self.take

    def take(self, data):
        self.got += data


def test_lines_go_above_the_map_and_the_rest_is_given_back():
    console, port = Console(file=io.StringIO(), width=20), Port()
    take = port.output
    with Printed(console, port) as printed:
        late = port.output
        port.output(b"one\ntwo ")
        port.output(b"three\nlogin: ")
        assert [line.plain for line in printed.line()] == ["login: "]
        assert port.got == b""
    assert port.output == take
    late(b"x")  # by a vCPU that had looked before
    assert port.got == b"login: x"
    assert console.file.getvalue() == "one\ntwo three\n"


def test_where_the_guest_prints_elsewhere_nothing_is_taken():
    with Printed(Console(file=io.StringIO()), None) as printed:
        assert printed.line() == []
