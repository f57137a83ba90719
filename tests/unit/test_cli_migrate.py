# test_cli_migrate.py: `pyvmm migrate` and `pyvmm status` as people have them, with a VM that is none.
from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress

import pytest
from control_help import CONNECTED, MOVING, PATIENCE, ROUND, SWITCHED, FakeVm, report
from rich.console import Console

from pyvmm.cli import main
from pyvmm.cli.moving import Journey, print_report
from pyvmm.control.client import Client
from pyvmm.control.control import Control
from pyvmm.control.server import Server
from pyvmm.errors import ControlError
from pyvmm.migration.events import Broken, Failed, Finished, Helped, Resumed


@pytest.fixture
def vm():
    return FakeVm()


@pytest.fixture
def path(vm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    with Control(vm, str(tmp_path / "c")):
        yield str(tmp_path / "c")


@contextmanager
def meanwhile(vm, act):
    """Something that is done with the migration, on another thread, when it has begun."""
    thread = threading.Thread(target=lambda: act(vm.migration()))
    thread.start()
    yield
    thread.join(PATIENCE)
    assert not thread.is_alive()


def succeed(migration):
    migration.tell(CONNECTED, MOVING, ROUND)
    migration.finish()


# ---- migrate ----


def test_a_report_at_the_end(vm, path, capsys):
    with meanwhile(vm, succeed):
        assert main(["migrate", path, "--to", "unix:there"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0] == ("64.0 MiB by precopy over unix, 1 channel, in 300.0 ms; the guest stood for 4.2 ms")
    for words in ("last round", "3.0 ms", "5.0 MiB", "30 of 32", "29 of 32", "16,384", "12.3 ms"):
        assert words in out


def test_what_was_asked_for(vm, path, tmp_path):
    with meanwhile(vm, succeed):
        main(
            ["migrate", path, "--to", "unix:there", "--mode", "postcopy", "--downtime", "5", "--channels", "3",
             "--bandwidth", "500M", "--no-throttle", "--capture", "file", "--json"]
        )  # fmt: skip
    (migration,) = vm.made
    assert migration.to == f"unix:{tmp_path}/there"  # the VM may work in another folder
    assert migration.options == {
        "mode": "postcopy", "downtime": 0.005, "channels": 3, "bandwidth": 500 << 20, "throttle": False, "tls": None,
        "capture": f"{tmp_path}/file",
    }  # fmt: skip


def test_json_is_one_object(vm, path, capsys):
    with meanwhile(vm, succeed):
        assert main(["migrate", path, "--to", "unix:there", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert found["report"] == report().as_json()
    assert [event["event"] for event in found["events"]] == ["connected", "moving", "round", "switched"]


@pytest.mark.parametrize("runs", [True, False])
def test_a_failure_is_one_line_and_1(vm, path, capsys, runs):
    failed = Failed(1.0, reason="the destination has gone", runs=runs)
    for more in ([], ["--json"]):
        with meanwhile(vm, lambda migration: migration.tell(failed)):
            assert main(["migrate", path, "--to", "unix:there", *more]) == 1
        out, err = capsys.readouterr()
        assert err == f"pyvmm: the destination has gone{': the guest runs on' if runs else ''}\n"
        if more:
            found = json.loads(out)
            assert found["report"] is None
            assert found["events"][0]["reason"] == "the destination has gone"
        else:
            assert out == ""


def test_the_vm_goes_in_the_midst_of_it(vm, tmp_path, capsys):
    control = Control(vm, str(tmp_path / "c"))

    def end(migration):
        migration.cancel = lambda reason: migration.tell(Failed(1.0, reason=reason, runs=False))
        control.close()

    with meanwhile(vm, end):
        assert main(["migrate", str(tmp_path / "c"), "--to", "unix:/there"]) == 1
    assert capsys.readouterr().err == "pyvmm: the source ends\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels(vm, path, capsys, number):
    before = signal.getsignal(number)
    with meanwhile(vm, lambda migration: os.kill(os.getpid(), number)):
        assert main(["migrate", path, "--to", "unix:there"]) == 128 + number
    assert capsys.readouterr().err == "pyvmm: cancelled: the guest runs on\n"
    assert vm.made[0].reason == "whoever asked for it has cancelled it"
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_too_late_says_so(vm, path, capsys):
    def late(migration):
        asked = threading.Event()
        migration.cancel = lambda reason: asked.set()  # it may not be cancelled any more
        migration.tell(CONNECTED)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(PATIENCE)
        migration.finish()

    with meanwhile(vm, late):
        assert main(["migrate", path, "--to", "unix:there"]) == 0
    assert capsys.readouterr().err == "pyvmm: too late to cancel: the guest has moved\n"


def test_a_second_signal_ends_the_command_alone(vm, path):
    def twice(migration):
        asked = threading.Event()
        migration.cancel = lambda reason: asked.set()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(PATIENCE)
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(vm, twice):
        assert main(["migrate", path, "--to", "unix:there"]) == 130
    vm.made[0].finish()


BAD = [
    (["--to", "unix:"], "'unix:': give the path of a socket"),
    (["--to", "there"], "'there' is no address: give tcp:HOST:PORT, unix:PATH or local:PATH"),
    (["--to", "tcp:1:0"], "port 0 is for listening alone"),
    ([], "give --to ADDRESS: tcp:HOST:PORT, unix:PATH or local:PATH"),
    (["--to", "unix:s", "--channels", "9"], "--channels 9: give 1 to 8"),
    (["--to", "unix:s", "--channels", "0"], "--channels 0: give 1 to 8"),
    (["--to", "unix:s", "--downtime", "0"], "--downtime 0: give milliseconds"),
    (["--to", "unix:s", "--downtime", "nan"], "--downtime nan: give milliseconds"),
    (["--to", "unix:s", "--bandwidth", "fast"], "'fast' is not a size"),
    (["--to", "unix:s", "--bandwidth", "0"], "--bandwidth 0: give 1 to"),
    (["--to", "tcp:4444", "--tls-cert", "x"], "TLS needs all three"),
    (["--to", "tcp:4444", "--tls-cert", "x", "--tls-key", "x", "--tls-ca", "x"], "TLS: x: No such file"),
    (["--to", "unix:s", "--tls-cert", "x"], "TLS needs all three"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_input_is_one_line_and_2(vm, path, capsys, arguments, words):
    assert main(["migrate", path, *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not vm.made


def test_nobody_listens(tmp_path, capsys):
    path = str(tmp_path / "c")
    for command in (["status", path], ["migrate", path, "--to", "unix:s"]):
        assert main(command) == 2
        expected = f"pyvmm: nobody listens at {path}: start the guest with --control {path}\n"
        assert capsys.readouterr().err == expected


def test_a_warning_where_all_would_be_read(vm, path, capsys):
    with meanwhile(vm, succeed):
        assert main(["migrate", path, "--to", "tcp:192.0.2.1:4444"]) == 0
    assert "is not on this host, and nothing is encrypted" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_it_go(vm, path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with meanwhile(vm, succeed):
        assert main(["migrate", path, "--to", "unix:there"]) == 0
    said = shown.getvalue()
    assert "precopy with the destination at unix:/there" in said
    assert "round 1: 100 of 16,384 pages (1%), 381.5 MiB/s, 400.0 KiB so far" in said
    assert "770" in said
    assert said.endswith(("\x1b[2K", "\x1b[?25h"))


# ---- what is drawn ----

EVENTS = [
    CONNECTED, MOVING, ROUND, Helped(1.0, help="throttle", share=0.4), Helped(1.0, help="postcopy", share=0.0),
    SWITCHED, Broken(1.0, reason="reset"), Resumed(1.0, epoch=2, missing=5), Failed(1.0, reason="no", runs=True),
    Finished(1.0, report=report()),
]  # fmt: skip


def drawn(draw):
    console = Console(file=io.StringIO(), width=80)
    draw(console)
    return console.file.getvalue()


def test_each_event_is_drawn():
    journey = Journey()
    texts = []
    for event in EVENTS:
        journey.told(event.as_json())
        texts.append(drawn(lambda console: console.print(journey)))
    assert len(set(texts)) == len(EVENTS)
    assert all(max(map(len, text.splitlines())) <= 80 for text in texts)
    assert "throttle, 40% of the time" in texts[3]


def test_many_rounds_stay_on_the_screen():
    journey = Journey()
    for number in range(1, 1000):
        fields = ROUND.as_json() | {"round": number}
        journey.told(fields)
        journey.told(EVENTS[3].as_json())
    assert len(drawn(lambda console: console.print(journey)).splitlines()) < 20


def test_a_report_with_all_in_it():
    fields = report(
        mode="hybrid", channels=4, faults=12, fault_seconds=0.012, throttled=0.3, breaks=2, zero_pages=12345,
        resent_pages=4567, state_bytes=9999, populate_seconds=0.5, populate_inside=0.001,
    ).as_json()  # fmt: skip
    text = drawn(lambda console: print_report(console, fields))
    for words in ("4 channels", "12 pages, 1.0 ms each", "30% of the time", "2 times", "12,345", "4,567", "9.8 KiB"):
        assert words in text
    assert "500.0 ms, 1.0 ms while it stood" in text


# ---- status ----


def test_status_for_people(vm, path, capsys):
    assert main(["status", path]) == 0
    out = capsys.readouterr().out
    assert f"verify: running, process {os.getpid()}, 64M, 2 vCPUs" in out
    assert "work: 4,321 in 3 passes, running; longest time without any: 1.5 ms" in out
    assert "8,192" in out
    assert "migration" not in out


@pytest.mark.parametrize("event", EVENTS)
def test_status_of_a_migration(vm, path, capsys, event):
    with Client(path) as client:
        stream = client.stream("migrate", to="unix:/there")
        migration = vm.migration()  # which it has begun then; another client's request may overtake this one's
        assert main(["status", path]) == 0
        assert "migration to unix:/there: has just begun" in capsys.readouterr().out
        migration.tell(event)
        with suppress(ControlError):
            list(stream) if migration.done else next(stream)
        assert main(["status", path]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("migration"))
        assert len(line) > len("migration to unix:/there: goes on: ")
        if not migration.done:
            migration.finish()


def test_status_as_json(vm, path, capsys):
    vm.memory.hugetlb = True
    assert main(["status", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cpus"] == 2
    assert main(["status", path]) == 0


def test_a_status_of_another_version(tmp_path, capsys):
    server = Server(str(tmp_path / "c"), lambda request, reply: reply.result({"version": "99"}))
    assert main(["status", str(tmp_path / "c")]) == 1
    assert capsys.readouterr().err.endswith("the status is of another version (99): use --json\n")
    server.close()
