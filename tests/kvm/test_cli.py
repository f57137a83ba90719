# test_cli.py: `pyvmm run` as a user has it: statuses, what is said of bad input, signals, pipes, and what stays behind.
from __future__ import annotations

import fcntl
import os
import re
import select
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

pytestmark = needs("kvm")

DEADLINE = 20
PYVMM = [sys.executable, "-m", "pyvmm"]
GUESTS = Path(pyvmm.__file__).parent / "guests"
STORM = bytes.fromhex("66 ba f8 03  b0 2e  ee  eb fd")  # mov dx, 0x3f8; mov al, '.'; again: out dx, al; jmp again


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    """A directory of the test's own, where all temporary files would be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(pyvmm.__file__).parents[1]))


def call(*arguments, **options):
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": DEADLINE} | options
    return subprocess.run([*PYVMM, *arguments], check=False, **options)


def begin(*arguments, **options):
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*PYVMM, *arguments], **options)


# ---- statuses ----

# arguments; status, stdout
STATUSES = [
    (["run", "hello"], 0, "hello from a guest\n"),
    (["run", "hello", "--append", "status=1 text=one"], 1, "one\n"),
    (["run", "hello", "--append", "status=255"], 255, "hello from a guest\n"),
    (["run", "hello", "--mem", "2M", "--cpus", "4", "--pages", "4k"], 0, "hello from a guest\n"),
    (["run", str(GUESTS / "hello.elf")], 0, "hello from a guest\n"),
    (["run", "hello", "--append", "colour=red"], 2, "hello: unknown option colour=red\n"),
    (["run", "faults", "--append", "kind=zz"], 2, "faults: no such kind=: zz\n"),
    (["run", "smp", "--cpus", "2", "--append", "count=1000"], 0, "SUCCESS: 2 CPUs, 2000 adds\n"),
]


@pytest.mark.parametrize(("arguments", "status", "stdout"), STATUSES)
def test_the_guests_status_is_ours(arguments, status, stdout):
    done = call(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (status, stdout, "")


def test_timeout_is_124():
    begin = time.monotonic()
    done = call("run", "faults", "--append", "kind=hang", "--timeout", "0.3")
    assert (done.returncode, done.stdout) == (124, "")
    assert done.stderr == "pyvmm: the guest did not end within 0.3 s\n"
    assert 0.3 < time.monotonic() - begin < 5


@pytest.mark.parametrize("kind", ["pf", "triple"])
def test_a_crash_is_125_with_a_report(kind):
    done = call("run", "faults", "--append", f"kind={kind} catch=0")
    assert (done.returncode, done.stdout) == (125, "")
    for word in ("What happened", "rip ", "Code", "\npyvmm: Triple fault at "):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_statistics_and_trace_go_to_stderr():
    done = call("run", "hello", "--stats", "--trace", "3")
    assert (done.returncode, done.stdout) == (0, "hello from a guest\n")
    assert "exits: io" in done.stderr
    assert re.search(r"memory: pages of 4 KiB .* 0 large, \d+ small, 16,\d+ untouched", done.stderr)
    assert "pvh_start" in done.stderr


# ---- bad input ----


def elf(bits=64, paddr=0x100000, size=16, entry=18):
    """An ELF file with one segment and Xen's note of the entry; see elf(5)."""
    note = struct.pack("<III4sI", 4, 4, entry, b"Xen\0", paddr & 0xFFFFFFFF)
    if bits == 32:
        header = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, paddr, 52, 0, 0, 52, 32, 1, 0, 0, 0)
        return header + struct.pack("<IIIIIIII", 1, 84, paddr, paddr, 4, size, 5, 1) + b"\xf4" * 4
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, paddr, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    notes = struct.pack("<IIQQQQQQ", 4, 4, 176, 0, 0, len(note), len(note), 4)
    return header + notes + struct.pack("<IIQQQQQQ", 1, 5, 196, paddr, paddr, 4, size, 1) + note + b"\xf4" * 4


HELLO = (GUESTS / "hello.elf").read_bytes()
FILES = {
    "empty": b"",
    "text": b"this is no image\n",
    "short": HELLO[:40],
    "cut": HELLO[:300],
    "half": HELLO[: len(HELLO) // 2],
    "elf32": elf(32),
    "no-entry": elf(entry=1),
    "beyond": elf(paddr=64 << 20),
    "reaching-out": elf(paddr=63 << 20, size=2 << 20),
    "in-the-hole": elf(paddr=0xC000_0000),
    "wrapping": elf(paddr=(1 << 64) - 8, size=16),
    "huge": elf(size=1 << 62),
    "script": b"#!/bin/sh\nexit 0\n",
}

# arguments; what the one line says
BAD = [
    (["nosuch"], "no guest 'nosuch', and no such file; pyvmm's own guests: classes, dice, dup, echo, faults"),
    (["./nosuch"], "./nosuch: No such file or directory"),
    (["."], ".: a directory, not a file"),
    (["/dev/zero"], "/dev/zero: not a regular file"),
    ([""], "no guest ''"),
    (["./empty"], "./empty: empty file"),
    (["./text"], "./text: not an ELF file and no multiboot header"),
    (["./script"], "./script: not an ELF file"),
    (["./short"], "./short: truncated: ELF header"),
    (["./cut"], "./cut: truncated: segment 0"),
    (["./half"], "./half: truncated: segment 0"),
    (["./elf32"], "./elf32: no PVH note"),
    (["./no-entry"], "./no-entry: no PVH note"),
    (["./beyond"], "needs memory up to 0x4000010, the VM has 64M; try --mem 66M"),
    (["./reaching-out"], "needs memory up to 0x4100000, the VM has 64M; try --mem 66M"),
    (["./in-the-hole", "--mem", "5G"], "0xc0000000"),
    (["./wrapping"], "./wrapping: "),
    (["./huge"], "0x100000"),
    (["hello", "--mem", "1M"], "memory 1M is too small: a VM needs at least 2M"),
    (["hello", "--mem", "0"], "memory 0 is too small"),
    (["hello", "--mem", "2097153"], "memory 2097153 is not a multiple of 4K"),
    (["hello", "--mem", "999999T"], "physical addresses"),
    (["hello", "--mem", "lots"], "'lots' is not a size"),
    (["hello", "--mem=-64M"], "'-64M' is not a size"),
    (["hello", "--mem", "1.5G"], "'1.5G' is not a size"),
    (["hello", "--mem", "3M", "--hugetlb"], "memory 3M is not a multiple of 2M"),
    (["hello", "--hugetlb", "--pages", "4k"], "hugetlb memory is in 2 MiB pages"),
    (["hello", "--cpus", "0"], "0 vCPUs: pyvmm takes 1 to 64"),
    (["hello", "--cpus", "65"], "65 vCPUs: pyvmm takes 1 to 64"),
    (["hello", "--cpus=-1"], "-1 vCPUs"),
    (["hello", "--cpus", "two"], "two"),
    (["hello", "--pages", "1g"], "1g"),
    (["hello", "--timeout", "0"], "--timeout 0: give seconds above 0"),
    (["hello", "--timeout", "nan"], "--timeout nan: give seconds above 0"),
    (["hello", "--timeout", "soon"], "soon"),
    (["hello", "--trace", "0"], "--trace 0"),
    (["hello", "--format", "iso"], "no image format 'iso': choose from pvh, multiboot, flat16, flat64"),
    (["hello", "--at", "0x1000"], "a pvh image says itself where it is loaded"),
    (["./text", "--format", "flat64", "--at", "here"], "--at 'here' is not an address"),
    (["./text", "--format", "flat64", "--at", "0x10000000000000000"], "is not a 64-bit address"),
    (["./text", "--format", "flat64", "--at", "0x4000000"], "needs memory up to 0x4000011"),
    (["./text", "--format", "flat16", "--append", "x"], "a flat16 image takes no command line"),
    (["./text", "--format", "pvh"], "./text: "),
    (["hello", "--initrd", "nosuch"], "initrd nosuch: No such file or directory"),
    (["hello", "--initrd", "/dev/zero"], "initrd /dev/zero: not a regular file"),
    (["hello", "--append", "x" * 5000], "command line: 5000 bytes, at most 4096"),
    (["hello", "--append", "\udcff"], "cannot be encoded as UTF-8"),
    (["hello", "--colour"], "--colour"),
    (["hello", "another"], "another"),
    ([], "GUEST|FILE"),
]


@pytest.fixture
def files(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: " ".join(value)[:40])
def test_bad_input_is_one_clear_line_and_status_2(files, arguments, words):
    done = call("run", *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("pyvmm")
    assert (done.stderr.count("\n"), "Traceback" in done.stderr) == (1, False), done.stderr
    assert words in done.stderr


@pytest.mark.parametrize("arguments", [[], ["nosuch"], ["guests", "nosuch"], ["bench", "nosuch"]])
def test_bad_commands_too(arguments):
    done = call(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


# ---- a host that does not let us ----

OVERRIDE = """
import errno, os, sys
from pyvmm.kvm import system
path, error = sys.argv[1], int(sys.argv[2])
really = os.open
def refuse(file, *rest, **more):
    if error and file == path:
        raise OSError(error, os.strerror(error))
    return really(file, *rest, **more)
os.open = refuse
system.Kvm.__init__.__defaults__ = (path,)
from pyvmm.cli import main
sys.exit(main(["run", "hello"]))
"""


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("/nowhere/kvm", 0, "no /nowhere/kvm: load KVM with 'sudo modprobe kvm_intel'"),
        ("/dev/kvm", 19, "no /dev/kvm: load KVM"),
        ("/dev/kvm", 13, "no permission to open /dev/kvm: "),
        ("/dev/kvm", 16, "cannot open /dev/kvm: Device or resource busy"),
        ("/dev/null", 0, "/dev/null is not KVM"),
    ],
)
def test_without_kvm(path, error, words):
    done = subprocess.run(
        [sys.executable, "-c", OVERRIDE, path, str(error)],
        capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert words in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a mount namespace of its own to hide /dev/kvm in")
@pytest.mark.parametrize(
    ("hide", "words"),
    [
        ("mount -t tmpfs none /dev", "no /dev/kvm: load KVM"),
        ("mount --bind /dev/null /dev/kvm", "/dev/kvm is not KVM"),
        (
            "touch x && chmod 0 x && mount --bind x /dev/kvm && exec setpriv --bounding-set=-dac_override",
            "no permission",
        ),
    ],
)
def test_where_the_device_is_hidden(hide, words):
    command = f'{hide} {"&& exec" if "exec" not in hide else ""} "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, "sh", *PYVMM, "run", "hello"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert words in done.stderr


# ---- signals and pipes ----


@pytest.fixture
def endless():
    """A `pyvmm run` whose guest is at work and will not end."""
    process = begin("run", "verify", "--mem", "4M", "--cpus", "2")
    assert process.stdout.readline().startswith(b"verify: ")
    yield process
    process.kill()
    process.communicate(timeout=DEADLINE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_within_a_second(endless, number):
    sent = time.monotonic()
    endless.send_signal(number)
    assert endless.wait(DEADLINE) == 128 + number
    assert time.monotonic() - sent < 1
    assert endless.stderr.read() == b""


def test_many_signals_are_as_one(endless):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        endless.send_signal(number)
    assert endless.wait(DEADLINE) in (130, 143, 129)
    assert endless.stderr.read() == b""


def test_stopped_and_continued_by_job_control(endless):
    endless.send_signal(signal.SIGSTOP)
    assert os.waitpid(endless.pid, os.WUNTRACED)[1] & 0xFF == 0x7F
    endless.send_signal(signal.SIGCONT)
    endless.send_signal(signal.SIGTERM)
    assert endless.wait(DEADLINE) == 143


def test_kill_leaves_nothing(endless, tmp_path):
    def named():
        sockets = Path("/proc/net/unix").read_text().splitlines()
        return {*os.listdir("/dev/shm")} | {line.split()[-1] for line in sockets if "pyvmm" in line}

    before = named()
    endless.kill()
    assert endless.wait(DEADLINE) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
    assert named() <= before


def test_a_reader_that_leaves_ends_the_guest(tmp_path):
    """As with `pyvmm run ... | head -c 100`."""
    (tmp_path / "storm").write_bytes(STORM)
    process = begin("run", "./storm", "--format", "flat64", "--mem", "2M")
    assert process.stdout.read(100) == b"." * 100
    process.stdout.close()
    assert process.wait(DEADLINE) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize(
    "arguments",
    [["run", "hello"], ["guests"], ["guests", "hello"], ["doctor", "--json"], ["doctor"]],
    ids=lambda value: value[0],
)
def test_a_closed_stdout_is_no_traceback(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = call(*arguments, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


PIPE = 2 * select.PIPE_BUF


def fill(process):
    """Waits until the process has filled its stdout, which nobody reads."""
    full = fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ) - select.PIPE_BUF  # less than which poll(2) finds no room
    while struct.unpack("i", fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4)))[0] < full:
        assert process.poll() is None


@pytest.mark.parametrize(("end", "status"), [("signal", 143), ("timeout", 124)])
def test_a_reader_that_does_not_read_holds_nobody(tmp_path, end, status):
    (tmp_path / "storm").write_bytes(STORM)
    timeout = ["--timeout", "1"] if end == "timeout" else []
    process = begin("run", "./storm", "--format", "flat64", "--mem", "2M", *timeout, pipesize=PIPE)
    fill(process)
    sent = time.monotonic()
    if end == "signal":
        process.terminate()
    assert process.wait(DEADLINE) == status
    assert time.monotonic() - sent < 2
    process.communicate()


def test_a_slow_reader_gets_everything(tmp_path):
    """More than a pipe holds, read only when the guest has long been waiting."""
    code = "66 ba f8 03  b0 2e  b9 00 50 00 00  ee  ff c9  75 fb  66 ba f4 00  b0 00  ee  f4"  # 0x5000 dots
    (tmp_path / "dots").write_bytes(bytes.fromhex(code))
    process = begin("run", "./dots", "--format", "flat64", "--mem", "2M", pipesize=PIPE)
    fill(process)
    dots, errors = process.communicate(timeout=50)
    assert (process.returncode, len(dots), errors) == (0, 0x5000, b"")


def test_input_by_a_pipe():
    done = call("run", "echo", "--append", "until=enough", stdin=None, input="one\ntwo\nenough\n")
    assert (done.returncode, done.stdout) == (0, "one\ntwo\nenough\n")


def test_input_by_a_file_ends_with_the_guest(tmp_path):
    (tmp_path / "typed").write_bytes(b"from a file\n\x04 unread")
    with open(tmp_path / "typed") as file:
        done = call("run", "echo", stdin=file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "from a file\n", "")
