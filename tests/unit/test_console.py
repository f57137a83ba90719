# test_console.py: the console on pipes, files and pseudo-terminals, whose settings it gives back on every way out.
from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

import pyvmm.console as console_module
from pyvmm.console import HINT, Console
from pyvmm.devices.serial import DATA, IER, LSR, QUEUE_SIZE, Serial

DEADLINE = 10
"""Seconds until a test that waits has failed."""


def until(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def read_exactly(fd, size):
    data = b""
    while len(data) < size:
        assert select.select([fd], [], [], DEADLINE)[0], f"got only {data!r}"
        data += os.read(fd, size - len(data))
    return data


def guest_reads(serial, size):
    """What a guest that polls LSR receives."""
    data = bytearray()

    def read():
        while len(data) < size and serial.read(LSR, 1) & 0x01:
            data.append(serial.read(DATA, 1))
        return len(data) == size

    until(read)
    return bytes(data)


def listen(serial):
    serial.write(IER, 0x01, 1)


@pytest.fixture
def serial():
    return Serial(lambda data: None, lambda level: None)


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    close_all(ends)


@pytest.fixture
def terminal():
    """(the person's end, our end)"""
    ends = os.openpty()
    yield ends
    close_all(ends)


def close_all(fds):
    for fd in fds:
        os.close(fd)


def hang_up(fd):
    """Closes what `fd` is, and keeps its number from being given to another file within the test."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, fd)
    os.close(null)


def is_raw(fd):
    return not termios.tcgetattr(fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


# Input


def test_a_pipe_passes_through_to_its_end(serial, pipe):
    source, sink = pipe
    with Console(serial, source) as console:
        os.write(sink, b"all bytes: \x00\x1d\x04\xff\r\n")
        assert guest_reads(serial, 17) == b"all bytes: \x00\x1d\x04\xff\r\n"
        os.write(sink, b"last")
        hang_up(sink)
        assert guest_reads(serial, 4) == b"last"
        until(lambda: not console._thread.is_alive())


def test_a_file_longer_than_the_queue_arrives_whole(serial, tmp_path):
    path = tmp_path / "input"
    data = os.urandom(3 * QUEUE_SIZE)
    path.write_bytes(data)
    with path.open("rb") as file, Console(serial, file.fileno()):
        until(lambda: not serial.room())
        assert guest_reads(serial, len(data)) == data


def test_a_full_queue_costs_no_processor_time(serial, pipe):
    source, sink = pipe
    serial.feed(bytes(QUEUE_SIZE))
    os.write(sink, b"x")
    with Console(serial, source) as console:
        waits = []
        wait = console._wait
        console._wait = lambda stdin: (waits.append(time.monotonic()), wait(stdin))[1]
        until(lambda: len(waits) >= 4)
        assert waits[-1] - waits[1] > 0.05
        assert select.select([source], [], [], 0)[0], "what has no room stays in the pipe"
        guest_reads(serial, QUEUE_SIZE)
        assert guest_reads(serial, 1) == b"x"


def test_a_closed_stdin_is_the_end_of_input(serial, pipe):
    with Console(serial, max(pipe) + 1000) as console:
        until(lambda: not console._thread.is_alive())


def test_stdin_stays_blocking(serial, pipe):
    with Console(serial, pipe[0]):
        assert os.get_blocking(pipe[0])


def test_close_ends_a_wait_for_input(serial, pipe):
    with Console(serial, pipe[0]) as console:
        console.close()
        console.close()
        until(lambda: not console._thread.is_alive())
    console.close()


def test_no_fd_is_left_behind(serial, pipe):
    before = set(os.listdir("/proc/self/fd"))
    with Console(serial, pipe[0]):
        pass
    assert set(os.listdir("/proc/self/fd")) == before


# Terminals


def test_a_terminal_is_left_alone_until_the_guest_listens(serial, terminal, capfd):
    person, ours = terminal
    before = termios.tcgetattr(ours)
    with Console(serial, ours):
        os.write(person, b"line\n")
        assert read_exactly(person, 6) == b"line\r\n", "the terminal echoes"
        until(lambda: serial.waiting == 5)
        assert termios.tcgetattr(ours) == before
        listen(serial)
        until(lambda: is_raw(ours))
        assert guest_reads(serial, 5) == b"line\n"
        os.write(person, b"\x03\x1a\r")
        assert guest_reads(serial, 3) == b"\x03\x1a\r"
        after = termios.tcgetattr(ours)
        assert after[1] == before[1], "output is processed as before"
    assert termios.tcgetattr(ours) == before
    assert capfd.readouterr().err == HINT.decode()


def test_a_guest_that_listens_already(serial, terminal):
    listen(serial)
    with Console(serial, terminal[1]):
        until(lambda: is_raw(terminal[1]))


def test_the_escape_leaves(serial, terminal):
    person, ours = terminal
    before = termios.tcgetattr(ours)
    left = threading.Event()
    found = []
    console = Console(serial, ours)
    console.on_leave = lambda: (found.append(termios.tcgetattr(ours)), left.set())
    with console:
        listen(serial)
        until(lambda: is_raw(ours))
        os.write(person, b"bye\x1dnot the guest's")
        assert left.wait(DEADLINE)
        assert found == [before]
        assert guest_reads(serial, 3) == b"bye"
        until(lambda: not console._thread.is_alive())
        assert not serial.waiting


def test_the_escape_leaves_a_guest_that_reads_nothing(serial, terminal):
    person, ours = terminal
    serial.feed(bytes(QUEUE_SIZE))
    left = threading.Event()
    console = Console(serial, ours)
    console.on_leave = left.set
    with console:
        listen(serial)
        until(lambda: is_raw(ours))
        os.write(person, b"hello?\x1d")
        assert left.wait(DEADLINE)


def test_the_end_of_file_key_of_a_cooked_terminal_is_a_key(serial, terminal):
    person, ours = terminal
    with Console(serial, ours):
        os.write(person, b"\x04")
        assert guest_reads(serial, 1) == b"\x04"
        os.write(person, b"\n")
        assert guest_reads(serial, 1) in b"\r\n"


def test_a_terminal_that_hangs_up_ends_input(serial, terminal):
    person, ours = terminal
    with Console(serial, ours) as console:
        listen(serial)
        until(lambda: is_raw(ours))
        hang_up(person)
        until(lambda: not console._thread.is_alive())


def test_keys_for_the_guest_do_not_become_commands_of_the_shell(serial, terminal, monkeypatch):
    person, ours = terminal
    with Console(serial, ours) as console:
        listen(serial)
        until(lambda: is_raw(ours))
        monkeypatch.setattr(console, "_foreground", lambda: threading.current_thread() is not console._thread)
        os.write(person, b"reboot\r\n")
        until(lambda: select.select([ours], [], [], 0)[0])
    assert not select.select([ours], [], [], 0)[0]
    assert not serial.waiting


def test_a_read_that_another_process_robbed_does_not_hold_the_exit(serial, pipe, monkeypatch):
    source, sink = pipe
    monkeypatch.setattr(console_module, "JOIN_SECONDS", 0.01)
    robbed = threading.Event()
    console = Console(serial, source)
    wait = console._wait

    def wait_and_rob(stdin):
        events = wait(stdin)
        os.read(source, 1)
        monkeypatch.setattr(console, "_foreground", lambda: not robbed.set())
        return events

    monkeypatch.setattr(console, "_wait", wait_and_rob)
    with console:
        os.write(sink, b"x")
        assert robbed.wait(DEADLINE)
    assert console._thread.is_alive()
    os.write(sink, b"y")
    console._thread.join(DEADLINE)
    assert not console._thread.is_alive()
    os.close(console._event)


def test_an_exception_restores_the_terminal(serial, terminal):
    before = termios.tcgetattr(terminal[1])

    def body():
        with Console(serial, terminal[1]):
            listen(serial)
            until(lambda: is_raw(terminal[1]))
            raise ValueError("something else went wrong")

    with pytest.raises(ValueError, match="something else"):
        body()
    assert termios.tcgetattr(terminal[1]) == before


def test_in_the_background_the_terminal_is_neither_set_nor_read(serial, terminal, monkeypatch):
    person, ours = terminal
    before = termios.tcgetattr(ours)
    group = os.getpgrp() + 1
    monkeypatch.setattr(os, "tcgetpgrp", lambda fd: group)
    with Console(serial, ours) as console:
        listen(serial)
        os.write(person, b"for the shell\n")
        looks = []
        wait = console._wait
        console._wait = lambda stdin: (looks.append(stdin), wait(stdin))[1]
        until(lambda: len(looks) >= 3)
        assert not any(looks)
        assert termios.tcgetattr(ours) == before
        assert serial.waiting == 0
        group = os.getpgrp()
        until(lambda: is_raw(ours))
        assert guest_reads(serial, 14) == b"for the shell\n"
        group = os.getpgrp() + 1
        console.close()
        assert is_raw(ours), "it is the shell's now"
        group = os.getpgrp()
        console.close()
        assert termios.tcgetattr(ours) == before


CHILD = """
import os, signal, sys, termios, time
from pyvmm.console import Console
from pyvmm.devices.serial import IER, Serial

serial = Serial(lambda data: None, lambda level: None)
console = Console(serial)

def stop(number, frame):
    console.close()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)

signal.signal(signal.SIGTERM, stop)
console.__enter__()
serial.write(IER, 1, 1)
while termios.tcgetattr(0)[3] & termios.ICANON:
    time.sleep(0.001)
print("raw", flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("sys.exit(3)", 3),
        ("raise SystemError('unforeseen')", 1),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM),
    ],
    ids=["atexit", "exception", "signal"],
)
def test_the_end_of_the_process_restores_the_terminal(terminal, end, status):
    ours = terminal[1]
    before = termios.tcgetattr(ours)
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(end=end)],
        stdin=ours,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert child.stdout == b"raw\n"
    assert child.returncode == status
    assert termios.tcgetattr(ours) == before


# Output


def test_output_reaches_a_slow_reader_whole(serial, pipe):
    source, sink = pipe
    os.set_blocking(sink, False)
    data = os.urandom(1 << 20)
    console = Console(serial, source, sink)
    writer = threading.Thread(target=console.output, args=(data,))
    writer.start()
    assert read_exactly(source, len(data)) == data
    writer.join()


@pytest.mark.parametrize("blocking", [False, True])
def test_broken_output_is_reported_once(serial, pipe, blocking):
    source, sink = pipe
    os.set_blocking(sink, blocking)
    hang_up(source)
    broken = []
    console = Console(serial, sink, sink)
    console.on_broken = lambda: broken.append(True)
    for _ in range(3):
        console.output(b"nobody reads this")
    assert broken == [True]


def test_a_reader_that_leaves_breaks_output_that_waits(serial, pipe):
    source, sink = pipe
    os.set_blocking(sink, False)
    broken = threading.Event()
    console = Console(serial, sink, sink)
    console.on_broken = broken.set
    writer = threading.Thread(target=console.output, args=(bytes(1 << 20),))
    writer.start()
    read_exactly(source, 1)
    hang_up(source)
    assert broken.wait(DEADLINE)
    writer.join()


def test_an_interrupted_write_goes_on(serial, pipe):
    source, sink = pipe
    data = os.urandom(1 << 20)
    console = Console(serial, source, sink)
    received = []
    reader = threading.Thread(target=lambda: received.append(read_exactly(source, len(data))))
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        reader.start()
        console.output(data)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    reader.join()
    assert received == [data]
