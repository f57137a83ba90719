# test_kvm_console.py: `pyvmm run` at a terminal: typing, Ctrl-], and the terminal's settings on every way out.
from __future__ import annotations

import os
import pty
import select
import signal
import sys
import termios
import time
from pathlib import Path

import pytest

import pyvmm
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm")

DEADLINE = 20
ESCAPE = b"\x1d"


class Terminal:
    """A `pyvmm run` in the foreground of a terminal of its own; here is the person's end."""

    def __init__(self, *arguments):
        self.seen = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["PYTHONPATH"] = str(Path(pyvmm.__file__).parents[1])
            try:
                os.execv(sys.executable, [sys.executable, "-m", "pyvmm", "run", *arguments])
            finally:
                os._exit(99)
        self.end = os.pidfd_open(self.pid)
        self.before = termios.tcgetattr(self.fd)

    def expect(self, text):
        deadline = time.monotonic() + DEADLINE
        while text not in self.seen:
            assert select.select([self.fd], [], [], max(deadline - time.monotonic(), 0))[0], f"only {self.seen!r}"
            self.seen += os.read(self.fd, 4096)
        self.seen = self.seen.partition(text)[2]

    def type(self, keys):
        assert os.write(self.fd, keys) == len(keys)

    def status(self):
        """Waits for the end, while reading on: a terminal holds whoever writes to it."""
        while not select.select([self.end], [], [], 0)[0]:
            if select.select([self.fd, self.end], [], [], DEADLINE)[0] == [self.fd]:
                self.seen += self._read()
        settings = termios.tcgetattr(self.fd)
        while rest := self._read():
            self.seen += rest
        status, self.pid = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), 0
        assert settings == self.before, "the terminal is not as it was"
        return status

    def _read(self):
        try:
            return os.read(self.fd, 4096)
        except OSError:  # EIO: nobody has the other end open any more
            return b""

    def close(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.end)
        os.close(self.fd)


@pytest.fixture
def terminal():
    made = []

    def make(*arguments):
        made.append(Terminal(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def echo(terminal):
    """The guest echo, listening, the terminal raw."""
    one = terminal("echo", "--append", "until=end")
    one.expect(b"Ctrl-] leaves")
    return one


def raw(one):
    return not termios.tcgetattr(one.fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


def test_typing(echo):
    assert raw(echo)
    echo.type(b"typed")
    echo.expect(b"typed")  # by the guest: the terminal itself no longer echoes
    echo.type(b"X\x7f\x03\r")  # also what would be a signal in a shell
    echo.expect(b"X\b \b\x03\r")
    echo.type(b"end\r")
    assert echo.status() == 0


def test_end_of_file_reaches_the_guest(echo):
    echo.type(b"\x04")
    assert echo.status() == 0


def test_the_escape_leaves(echo):
    echo.type(b"unfinished" + ESCAPE + b"not for the shell")
    assert echo.status() == 0
    assert b"Traceback" not in echo.seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal(echo, number):
    os.kill(echo.pid, number)
    assert echo.status() == 128 + number
    assert b"Traceback" not in echo.seen


def test_a_timeout(terminal):
    one = terminal("echo", "--timeout", "0.5")
    one.expect(b"Ctrl-] leaves")
    assert one.status() == 124
    assert b"did not end within 0.5 s\r\n" in one.seen


def test_a_crash_reports_on_a_sane_terminal(terminal):
    one = terminal("faults", "--append", "kind=pf catch=0")
    assert one.status() == 125
    assert b"\r\npyvmm: Triple fault at write_to_unmapped_page" in one.seen


def test_a_crash_of_a_guest_that_listens(terminal, tmp_path):
    """in al, dx of the receiver, then a triple fault: ud2 with the IDT that a flat64 image has: none."""
    (tmp_path / "listens").write_bytes(bytes.fromhex("66 ba f8 03  ec  b9 00 00 08 00  ff c9  75 fc  0f 0b"))
    one = terminal(str(tmp_path / "listens"), "--format", "flat64")
    one.expect(b"Ctrl-] leaves")
    assert one.status() == 125
    assert b"\r\nWhat happened" in one.seen


def test_a_guest_that_does_not_listen_is_ended_by_ctrl_c(terminal):
    one = terminal("verify", "--mem", "4M")
    one.expect(b"verify: ")
    assert not raw(one)
    one.type(b"\x03")
    assert one.status() == 128 + signal.SIGINT


def test_the_end_of_a_guest_that_only_prints(terminal):
    one = terminal("hello", "--append", "status=3")
    assert one.status() == 3
    assert one.seen == b"hello from a guest\r\n"


def test_the_terminal_goes_away(echo):
    """As when its window is closed: SIGHUP to the foreground."""
    os.close(echo.fd)
    assert select.select([echo.end], [], [], DEADLINE)[0]
    assert os.waitstatus_to_exitcode(os.waitpid(echo.pid, 0)[1]) == 128 + signal.SIGHUP
    echo.pid, echo.fd = 0, os.open(os.devnull, os.O_RDONLY)
