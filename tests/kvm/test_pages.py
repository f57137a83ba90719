# test_pages.py: `pyvmm pages` as a user has it: what it says of a guest's pages, and what it does to them.
from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import pyvmm
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "uffd_guest")

DEADLINE = 30
PYVMM = [sys.executable, "-m", "pyvmm"]
SMALL = ["verify", "--mem", "16M", "--seconds", "0.5"]  # 8 blocks; the guest stamps 1 to 7 within milliseconds
HOMES = ("zero", "aside", "file", "swap", "peer", "balloon", "shared")


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(pyvmm.__file__).parents[1]))
    monkeypatch.delenv("COLUMNS", raising=False)


def call(*arguments):
    return subprocess.run(
        [*PYVMM, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False
    )


def report(*arguments, status=0):
    """What --json says; the guest's own output is on stderr."""
    done = call("pages", *arguments, "--json")
    assert done.returncode == status, done.stderr
    found = json.loads(done.stdout)
    for stage in found["stages"]:
        assert sum(stage["pages"].values()) * 4096 == found["memory_bytes"]
        assert len(stage["looks"]) == -(-found["memory_bytes"] // found["block_bytes"])
    return found


def line_of(text, name):
    """The figures of a line of a table."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return line.removeprefix(name).split()


# ---- what it says ----


@needs("large_mappings", "stats_fd")
def test_kvms_counts_agree_when_the_guest_has_touched_all():
    done = call("pages", *SMALL, "--append", "passes=1")
    assert (done.returncode, done.stderr.splitlines()[-1][:7]) == (0, "SUCCESS")
    assert line_of(done.stdout, "large")[0] == line_of(done.stdout, "KVM by 2M")[0] == f"{7 * 512:,}"
    small, in_kvm = (int(line_of(done.stdout, name)[0]) for name in ("small", "KVM by 4K"))
    assert 0 < in_kvm <= small < 512
    assert "▒███████" in done.stdout
    assert "█ large 7  ▒ small 1  a cell: a block of 2 MiB" in done.stdout


@needs("large_mappings", "stats_fd")
def test_split_is_seen_by_us_and_by_kvm():
    found = report(*SMALL, "--do", "split:3-5")
    before, after, later = found["stages"]
    assert [stage["title"] for stage in found["stages"]] == ["before", "after --do", "0.5 s later"]
    assert (before["pages"]["large"], before["kvm"]["pages_2m"]) == (7 * 512, 7)
    for stage in (after, later):
        assert stage["pages"]["large"] == 4 * 512
        assert stage["pages"]["small"] == before["pages"]["small"] + 3 * 512
        assert stage["looks"] == ["small", "large", "large", "small", "small", "small", "large", "large"]
    assert later["kvm"]["pages_2m"] == 4
    assert later["kvm"]["pages_4k"] >= before["kvm"]["pages_4k"] + 3 * 512
    assert found["operations"]["split"]["done"] == 3
    assert found["faults"]["count"] == 0


@needs("large_mappings", "uffd_move_large")
def test_what_was_removed_comes_back_by_faults_as_large_pages():
    found = report(*SMALL, "--cpus", "2", "--do", "remove:2,4-6")
    before, _, later = found["stages"]
    (step,) = found["steps"]
    assert (step["do"], step["blocks"], step["done"], step["pages"]) == ("remove:2,4-6", 4, 4, 4 * 512)
    assert later["pages"] == before["pages"]
    assert found["operations"]["remove"]["done"] == 4
    faults = found["faults"]
    assert faults["count"] >= faults["answers"]["block"] == faults["by_home"]["aside"] == 4
    assert sum(faults["latency_log2_ns"]) == faults["count"]
    waited = [*faults["vcpus"], faults["workers"], faults["others"]]
    assert len(faults["vcpus"]) == 2
    assert sum(who["faults"] for who in waited) == faults["count"]
    assert sum(who["nanoseconds"] for who in waited) == faults["nanoseconds"]


def test_what_nobody_touches_stays_away():
    found = report(*SMALL, "--append", "size=4M", "--do", "remove:5-6")
    assert found["steps"][0]["pages"] == 2 * 512
    for stage in found["stages"][1:]:
        assert stage["pages"]["zero"] == 2 * 512
        assert stage["looks"][5:7] == ["zero", "zero"]


@needs("large_mappings")
def test_operations_are_done_in_the_order_given():
    there = report(*SMALL, "--append", "size=4M", "--do", "remove:5", "--do", "install:5")
    away = report(*SMALL, "--append", "size=4M", "--do", "install:5", "--do", "remove:5")
    assert [found["stages"][1]["pages"]["zero"] for found in (there, away)] == [0, 512]
    broken = report(*SMALL, "--do", "merge:1-7", "--do", "break:3", "--do", "zero:1-7")
    assert broken["stages"][-1]["looks"] == ["small", "large", "large", "small"] + ["large"] * 4
    assert [step["pages"] for step in broken["steps"]] == [0, 0, 0]  # the guest leaves no page of zeros


def test_without_do_it_looks_twice():
    done = call("pages", *SMALL, "--seconds", "0.2")
    assert done.returncode == 0
    assert line_of(done.stdout, "kind")[:2] == ["at", "first"]
    assert "0.2 s later" in done.stdout
    assert "operations" not in done.stdout
    assert "faults answered: 0" in done.stdout


def test_the_report_says_what_was_done_and_how_long_it_took():
    done = call("pages", *SMALL, "--do", "split:3-5", "--do", "remove:1-2,7")
    assert (done.returncode, done.stderr) == (0, "verify: 3584 pages, 1 CPU\n")
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith("split:3-5: 3 blocks in ")
    assert second.startswith("remove:1-2,7: 3 blocks in ")
    assert second.endswith(", 1,536 pages went away")
    assert line_of(done.stdout, "split")[:2] == ["3", "0"]
    assert line_of(done.stdout, "remove")[:2] == ["3", "0"]
    assert "faults answered: " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout


def test_a_block_that_is_not_whole_is_told_of_and_the_others_are_done():
    done = call("pages", "verify", "--mem", "5M", "--do", "split:all", "--seconds", "0.2")
    assert done.returncode == 0
    assert done.stdout.startswith("split:all: 3 blocks in ")
    assert done.stdout.splitlines()[0].endswith(", 1 failed")
    assert done.stdout.splitlines()[1] == "  block 2 is not (wholly) RAM: the VM has 2"


def test_a_picture_of_it():
    done = call("pages", *SMALL, "--do", "split:1", "--seconds", "0.2", "--png", "map.png")
    assert done.returncode == 0, done.stderr
    assert Path("map.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_at_a_terminal_it_is_coloured_and_as_wide_as_that():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    process = subprocess.Popen(
        [*PYVMM, "pages", *SMALL, "--seconds", "0.2", "--do", "split:2"],
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # EIO: it has ended
                break
            seen += data
    finally:
        os.close(ours)
    assert process.wait(DEADLINE) == 0
    text = seen.decode()
    assert "\x1b[38;2;0;158;115m█" in text
    boxes = [line for line in text.splitlines() if line.startswith(("╭", "╰"))]
    assert boxes
    assert max(map(len, boxes)) <= 60


# ---- statuses ----


def test_the_guests_own_status_if_it_ends_by_itself():
    done = call("pages", "hello", "--append", "status=3", "--do", "split:1-3")
    assert (done.returncode, done.stderr) == (3, "hello from a guest\n")
    assert done.stdout.startswith("split:1-3: the guest ended after 0 of 3 blocks\n")
    assert line_of(done.stdout, "kind")[:3] == ["at", "the", "end"]


def test_a_crash_is_125():
    done = call("pages", "faults", "--append", "kind=pf catch=0")
    assert (done.returncode, done.stdout) == (125, "")
    assert "\npyvmm: Triple fault at " in done.stderr


@pytest.mark.parametrize(("timeout", "stages"), [("0.3", 1), ("0.9", 3)])
def test_timeout_is_124_with_what_was_seen(timeout, stages):
    found = report(*SMALL, "--do", "split:3", "--timeout", timeout, status=124)
    assert len(found["stages"]) == stages
    assert found["stages"][-1]["title"] == "at the end"
    assert found["steps"][0]["done"] == (stages == 3)


def test_a_signal_ends_it_with_what_was_seen():
    process = subprocess.Popen(
        [*PYVMM, "pages", *SMALL, "--seconds", "600"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr.readline().startswith("verify: ")
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=DEADLINE)
    assert (process.returncode, stderr) == (130, "")
    assert time.monotonic() - sent < 5
    assert line_of(stdout, "kind")[:3] == ["at", "the", "end"]


def test_a_closed_stdout_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*PYVMM, "pages", "hello"],
            stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "hello from a guest\n")


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--do", "split"], "--do 'split': give an operation and blocks, such as split:3-5"),
        (["--do", "fly:3"], "no operation 'fly': choose one of remove, zero, install, split, merge, break"),
        (["--do", "split:32"], "block 32: the VM has 32 of 2 MiB, 0 to 31; --mem gives it more"),
        (["--do", "split:9-3"], "blocks 9-3: the first is behind the last; give 3-9"),
        (["--do", "split:1", "--do", "merge:x"], "blocks 'x': give numbers and ranges, such as 3,5,8-10, or all"),
        (["--do"], "--do"),
        (["--seconds", "0"], "--seconds 0: give seconds above 0"),
        (["--seconds", "nan"], "--seconds nan: give seconds above 0"),
        (["--timeout", "-1"], "--timeout -1: give seconds above 0"),
        (["--png", "nosuch/map.png"], "--png nosuch/map.png: give a file in a directory that is there"),
        (["--png", "."], "--png .: give a file in a directory that is there"),
        (["--mem", "1M"], "memory 1M is too small"),
        (["--live"], "--live"),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_bad_input_is_one_clear_line_and_status_2(arguments, words):
    done = call("pages", "hello", *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert (done.stderr.count("\n"), "Traceback" in done.stderr) == (1, False), done.stderr
    assert words in done.stderr


def test_hugetlb_memory_has_no_pages_to_show():
    """Where the host has reserved some; else it says that."""
    done = call("pages", "hello", "--hugetlb")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "use --pages 2m" in done.stderr or "huge pages of 2 MiB are not reserved" in done.stderr


def test_a_host_without_userfaultfd_says_so_before_the_guest_runs():
    code = (
        "import sys; from pyvmm.cli import main; from pyvmm.errors import HostError\n"
        "import pyvmm.cli.pages as pages\n"
        "def none(**options): raise HostError('no userfaultfd here')\n"
        "pages.open_uffd = none\n"
        "sys.exit(main(['pages', 'hello', '--do', sys.argv[1]]))"
    )

    def told(do):
        done = subprocess.run(
            [sys.executable, "-c", code, do],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
        return done.returncode, done.stderr

    assert told("remove:1") == (2, "pyvmm: no userfaultfd here\n")
    assert told("split:1") == (0, "hello from a guest\n")
