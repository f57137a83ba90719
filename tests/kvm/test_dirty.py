# test_dirty.py: `pyvmm dirty` as a user has it.
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
from pathlib import Path

import pytest

import pyvmm
from pyvmm.memory.trace import TRACKERS
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "dirty_bitmap", "initially_set", "dirty_ring")

DEADLINE = 40
DIRTY = [sys.executable, "-m", "pyvmm", "dirty"]
SHORT = ["--seconds", "0.4", "--interval", "50", "--mem", "16M"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(pyvmm.__file__).parents[1]), "COLUMNS": "80"}


def call(*arguments, **environment):
    return subprocess.run(
        [*DIRTY, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        env=ENVIRONMENT | environment,
    )


def test_all_trackers_are_shown_and_compared():
    done = call("touch", *SHORT)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("touch pattern=zipf gaps=1; 16M, 1 vCPU; a look each 50 ms for 0.4 s")
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout  # no colours where no terminal is
    for name in TRACKERS:
        assert any(line.startswith(f"{name}  ") for line in lines)
        assert any(line.startswith(f"│ {name} ") for line in lines)
    assert sum(" longest vCPU stall " in line for line in lines) == len(TRACKERS)
    assert "█" in done.stdout


def test_one_tracker_as_data():
    done = call("touch", *SHORT, "--tracker", "manual", "--cpus", "2", "--append", "size=4M rate=1000", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["guest"], found["append"]) == ("touch", "size=4M rate=1000 gaps=1")
    assert (found["memory_bytes"], found["cpus"], found["interval_seconds"]) == (16 << 20, 2, 0.05)
    (manual,) = found["trackers"]
    assert manual["tracker"] == "manual"
    assert 5 <= len(manual["samples"]) <= 9
    assert manual["different_pages"] in range(1024, 1024 + 10)
    assert manual["pages"] == sum(sample["pages"] for sample in manual["samples"])
    assert 0 < manual["longest_stall_seconds"] < 10
    assert manual["work_per_second_before"] == pytest.approx(2e6, rel=0.5)  # two CPUs of 1000 a millisecond


def test_a_guest_that_keeps_no_gaps():
    done = call("verify", *SHORT, "--tracker", "bitmap", "--pause")
    assert (done.returncode, done.stderr) == (0, "")
    assert "vCPU stalls are measured with the guest touch" in done.stdout


def test_a_terminal_gets_colours_and_its_width():
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment["TERM"] = "xterm"
    command = [*DIRTY, "touch", *SHORT, "--tracker", "bitmap"]
    with subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment) as process:
        os.close(side)
        text = b""
        try:
            while part := os.read(main, 65536):
                text += part
        except OSError:  # EIO: the other side is closed
            pass
        os.close(main)
        assert process.wait(DEADLINE) == 0
    assert b"\x1b[31m" in text
    assert "█".encode() in text


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nothing"], 2, "no guest 'nothing'"),
        (["hello"], 2, "the guest hello ended before it was traced: give one that runs on, such as touch"),
        (["touch", "--append", "colour=red"], 2, "the guest touch ended before it was traced"),
        (["touch", "--mem", "1K"], 2, "memory 1K is too small"),
        (["touch", "--cpus", "0"], 2, "0 vCPUs"),
        (["faults", "--append", "kind=pf catch=0"], 125, "Triple fault at"),
    ],
)
def test_what_cannot_be_measured_is_named_in_one_line(arguments, status, words):
    done = call(*arguments, "--seconds", "0.4")
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"pyvmm: {words}")
    assert done.stderr.count("\n") == 1


def test_a_tracker_that_is_missing_is_named_and_the_others_run():
    done = call("touch", *SHORT, PYVMM_WITHOUT="dirty_ring")
    assert done.returncode == 0
    assert "ring is not here: dirty ring: switched off" in done.stdout
    assert "│ manual " in done.stdout


def test_a_guest_that_ends_while_it_is_traced():
    """50000 writes a second for a second and a half: what was seen by then is shown."""
    done = call(
        "touch", "--mem", "16M", "--tracker", "bitmap", "--seconds", "5", "--interval", "50", "--json",
        "--append", "pattern=uniform rate=50 touches=250000",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (found,) = json.loads(done.stdout)["trackers"]
    assert found["work_per_second_after"] is None
    assert 10 < len(found["samples"]) < 99


def test_ctrl_c_ends_it():
    with subprocess.Popen(
        [*DIRTY, "touch", "--seconds", "100"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)  # it measures
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
