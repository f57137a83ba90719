# test_cli_progress.py: the bar of what takes long: share, rate, time left; nothing where nobody sees it.
from __future__ import annotations

import io
import subprocess
import sys

import pytest

from pyvmm.cli import progress
from pyvmm.cli.progress import Bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch, after):
    """In the test's own phase: pytest sets stderr anew before each."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    monkeypatch.setattr(progress, "_AFTER", after)
    return sys.stderr


def test_share_and_rate(monkeypatch):
    shown = terminal(monkeypatch, 0.0)
    with Bar("saving") as bar:
        for done in range(0, 101, 20):
            bar.told(done << 20, 100 << 20)
    said = shown.getvalue()
    assert "saving" in said
    assert "40.0/100.0 MiB" in said
    assert "/s" in said
    assert said.endswith(("\x1b[2K", "\x1b[?25h", "\x1b[1A\x1b[2K"))  # nothing of it stays


def test_what_ends_soon_shows_nothing(monkeypatch):
    shown = terminal(monkeypatch, 1e9)
    with Bar("saving") as bar:
        bar.told(1, 2)
    assert shown.getvalue() == ""


def interrupted():
    with Bar("saving") as bar:
        bar.told(1, 2)
        raise KeyboardInterrupt


def test_an_error_ends_it(monkeypatch):
    shown = terminal(monkeypatch, 0.0)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "\x1b[?25h" in shown.getvalue()  # the cursor is back


def test_without_a_terminal_nothing_is_shown_or_imported():
    program = """
import sys
from pyvmm.cli import progress
progress._AFTER = 0
with progress.Bar("saving") as bar:
    bar.told(1, 2)
assert "rich" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
