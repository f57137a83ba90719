# test_control.py: guests with a control socket: `pyvmm run --control`, `status`, and `receive` with a migration that is
# none but brings a real VM.
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from control_help import CONNECTED, PATIENCE, SWITCHED, FakeMigration, report, until

import pyvmm
from pyvmm import VM, RunResult
from pyvmm.cli import main
from pyvmm.control.client import Client
from pyvmm.errors import BadInput, ControlError, FetchError
from pyvmm.migration.events import Failed, Finished
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm")

PYVMM = [sys.executable, "-m", "pyvmm"]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(pyvmm.__file__).parents[1]))
    return str(tmp_path / "c")


def connected(path):
    """A client, as soon as somebody listens."""
    found = []

    def there():
        try:
            found.append(Client(path))
        except BadInput:
            return False
        return True

    until(there)
    return found[0]


def command(*arguments):
    return subprocess.run(
        [*PYVMM, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.fixture
def guest(path):
    """A `pyvmm run --control` whose guest is at work and will not end."""
    process = subprocess.Popen(
        [*PYVMM, "run", "verify", "--mem", "8M", "--cpus", "2", "--control", path],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline().startswith("verify: ")
    yield process
    process.kill()
    process.communicate(timeout=PATIENCE)


# ---- run --control ----


def test_a_running_guest_is_looked_at_paused_and_stopped(guest, path):
    with Client(path) as client:

        def count():
            return client.ask("status")["progress"]["count"]

        found = client.ask("status")
        assert found["pid"] == guest.pid
        assert (found["state"], found["memory"], found["cpus"]) == ("running", 8 << 20, 2)
        assert sum(found["pages"][kind] for kind in ("large", "small", "untouched")) == found["pages"]["total"] == 2048
        assert sum(found["mappings"].values()) > 0
        first = count()
        until(lambda: count() > first)
        client.ask("pause")
        paused = client.ask("status")
        assert paused["state"] == "paused"
        assert client.ask("status")["progress"] == paused["progress"]
        client.ask("resume")
        until(lambda: count() > paused["progress"]["count"])
        done = command("status", path)
        assert done.stdout.startswith(f"verify: running, process {guest.pid}, 8M, 2 vCPUs"), done.stderr
        client.ask("stop", status=7)
    assert guest.wait(PATIENCE) == 7
    assert guest.stderr.read() == ""
    assert not os.path.exists(path)


def test_what_listens_already_is_left_alone(guest, path):
    done = command("run", "hello", "--control", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pyvmm: control socket {path}: somebody listens there already\n"
    with Client(path) as client:
        assert client.ask("status")["pid"] == guest.pid


def test_a_signal_ends_it_with_clients_there(guest, path):
    with Client(path) as client:
        client.ask("pause")
        guest.send_signal(signal.SIGTERM)
        assert guest.wait(PATIENCE) == 143
    assert not os.path.exists(path)
    assert guest.stderr.read() == ""


def test_a_socket_of_one_that_was_killed_is_replaced(guest, path):
    guest.kill()
    assert guest.wait(PATIENCE) == -9
    assert command("status", path).returncode == 2
    done = command("run", "hello", "--control", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not os.path.exists(path)


def test_a_restored_guest_has_one_too(path, tmp_path):
    assert command("run", "hello", "--snapshot", "f").returncode == 0
    assert command("restore", "f", "--count", "2", "--control", path).returncode == 2
    done = command("restore", "f", "--control", "no/such/folder")
    assert done.returncode == 2
    assert "control socket no/such/folder: cannot listen there: No such file" in done.stderr


def test_a_guest_that_moves_ends_run(path, monkeypatch, capfd):
    """The VM is real and its migration is not: it ends the guest as one does that has moved."""
    migrations = []

    def migrate(vm, to, **options):
        migrations.append(FakeMigration(to, **options))
        migrations[0].tell(CONNECTED, SWITCHED)
        vm._life.end(RunResult("migrated", 0))
        return migrations[0]

    monkeypatch.setattr(VM, "migrate", migrate, raising=False)
    found = []

    def move():
        with connected(path) as client:
            stream = client.stream("migrate", to="unix:/there")
            found.extend(event["event"] for event in stream if event["event"] == "connected" or tell_end())
            found.append(stream.result["side"])

    def tell_end():
        migrations[0].tell(Finished(1.0, report=report()))
        return True

    mover = threading.Thread(target=move)
    mover.start()
    assert (
        main(["run", "verify", "--mem", "4M", "--control", path, "--snapshot", "f", "--snapshot-at", "seconds>=99"])
        == 0
    )
    mover.join(PATIENCE)
    assert found == ["connected", "switched", "source"]
    assert capfd.readouterr().err == (
        "pyvmm: f: not written: the guest has moved before it was to be saved\n"
        "pyvmm: the guest has moved to unix:/there\n"
    )
    assert not os.path.exists("f")


def test_a_guest_that_was_killed_where_it_moved_to(path, monkeypatch, capfd):
    """It ran there and did not come through: `run` has not moved it."""

    def migrate(vm, to, **options):
        migration = FakeMigration(to, **options)
        migration.tell(SWITCHED)
        vm._life.end(RunResult("migrated", 0))
        migration.tell(Failed(1.0, reason="the destination was killed (it had decided: taken)", runs=False))
        return migration

    monkeypatch.setattr(VM, "migrate", migrate, raising=False)

    def move():
        with connected(path) as client:
            stream = client.stream("migrate", to="unix:/there")
            with pytest.raises(ControlError, match="killed"):
                list(stream)

    mover = threading.Thread(target=move)
    mover.start()
    assert main(["run", "verify", "--mem", "4M", "--control", path]) == 1
    mover.join(PATIENCE)
    assert capfd.readouterr().err == "pyvmm: the destination was killed (it had decided: taken)\n"


# ---- receive ----


class Incoming(FakeMigration):
    """Brings a guest that prints at once, when act() says so."""

    guest, append = "hello", ""

    def __init__(self, address, output=None, built=None, **options):
        super().__init__(address, **options)
        self.address = address
        self._built = built
        self._here = threading.Event()
        self._vm = None
        self.closed = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            self.act()
        except Exception as error:
            self.tell(Failed(1.0, reason=str(error), runs=False))
            if self._vm is not None:
                self._vm.request_stop(99)
        self._here.set()

    def build(self):
        self._vm = VM(memory="4M")
        self._vm.load(self.guest, self.append)
        self._built(self._vm)

    def act(self):
        self.tell(CONNECTED)
        self.build()
        self._vm.start()
        self.tell(SWITCHED, Finished(1.0, report=report(side="destination")))

    def vm(self, timeout=None):
        assert self._here.wait(PATIENCE)
        if self.done:
            self.result(0)
        return self._vm

    def close(self):
        if not self.done:
            self.cancel("closed")
        self.thread.join(PATIENCE)
        self.closed = True


@pytest.fixture
def receive(path, monkeypatch):
    """Calls `pyvmm receive` with what one of these classes brings."""
    made = []

    def call(kind, *arguments):
        monkeypatch.setattr(
            VM, "receive", lambda *a, **options: made.append(kind(*a, **options)) or made[0], raising=False
        )
        return main(["receive", "--listen", "unix:s", *arguments])

    yield call
    assert all(each.closed for each in made)


class TestReceive:
    def test_no_byte_is_lost(self, receive, capfd):
        assert receive(Incoming, "--unit", "block") == 0
        assert capfd.readouterr() == ("hello from a guest\n", "pyvmm: listening at unix:s\n")

    def test_the_guests_status_is_ours(self, receive, capfd):
        class Seven(Incoming):
            append = "status=7"

        assert receive(Seven, "--json") == 7
        out, err = capfd.readouterr()
        found = json.loads(out)
        assert [event["event"] for event in found["events"]] == ["connected", "switched", "finished"]
        assert found["report"]["side"] == "destination"
        assert err == "pyvmm: listening at unix:s\nhello from a guest\n"

    def test_one_that_comes_to_nothing_is_1(self, receive, capfd):
        class Refused(Incoming):
            def act(self):
                raise ControlError("memory: 64M there, 32M here")

        assert receive(Refused) == 1
        assert capfd.readouterr().err == "pyvmm: listening at unix:s\npyvmm: memory: 64M there, 32M here\n"

    def test_one_that_fails_when_the_vm_is_there(self, receive, capfd):
        class Late(Incoming):
            def act(self):
                self.build()
                self.tell(Failed(1.0, reason="the source has gone", runs=False))

        assert receive(Late) == 1
        assert capfd.readouterr().err.endswith("pyvmm: the source has gone\n")

    def test_pages_that_are_lost_later(self, receive, capfd, monkeypatch):
        class Lost(Incoming):
            guest = "verify"

            def act(self):
                self.build()
                self._vm.start()
                self.tell(type(SWITCHED)(0.1, downtime=0.1, away=5))
                self._vm.hold(FetchError("gfn 0x5 cannot be brought back from its home 'peer': gone", 5, 5))

        assert receive(Lost) == 1
        assert capfd.readouterr().err.endswith("pyvmm: gfn 0x5 cannot be brought back from its home 'peer': gone\n")

    @pytest.mark.parametrize("when", ["before", "between", "after"])
    def test_a_signal(self, receive, capfd, when):
        class Interrupted(Incoming):
            guest = "verify"

            def cancel(self, reason=""):
                super().cancel(reason)
                self._cancelled.set()

            def act(self):
                self._cancelled = threading.Event()
                # To this thread: the one that waits is not woken by it, as when it comes just before.
                if when == "before":
                    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
                    assert self._cancelled.wait(PATIENCE)
                    return
                self.build()
                if when == "between":
                    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
                    assert self._cancelled.wait(PATIENCE)
                    return
                self._vm.start()
                self.tell(SWITCHED, Finished(1.0, report=report()))
                self._here.set()
                until(lambda: self._vm.progress().count)
                signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

        assert receive(Interrupted) == 143
        assert capfd.readouterr().err == "pyvmm: listening at unix:s\n"

    def test_its_control_socket(self, receive, path, capfd):
        class Watched(Incoming):
            guest = "verify"

            def act(self):
                self.tell(CONNECTED)
                self.build()
                with connected(path) as client:
                    states.append(client.ask("status")["state"])
                    self._vm.start()
                    self.tell(SWITCHED, Finished(1.0, report=report()))
                    self._here.set()
                    until(lambda: client.ask("status")["state"] == "running")
                    until(lambda: client.ask("status")["progress"]["count"])
                    until(lambda: client.ask("status")["migration"]["last"]["event"] == "finished")
                    client.ask("stop", status=9)

        states = []
        assert receive(Watched, "--control", path) == 9
        assert states == ["migrating"]
        assert not os.path.exists(path)

    def test_a_control_socket_that_cannot_be_ends_it_before_the_guest_runs(self, receive, capfd):
        class Built(Incoming):
            def act(self):
                self.build()
                ran.append(self)

        ran = []
        assert receive(Built, "--control", "no/such/folder") == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert ran == []
        assert err.endswith("pyvmm: control socket no/such/folder: cannot listen there: No such file or directory\n")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "give --listen ADDRESS"),
            (["--listen", "here"], "'here' is no address"),
            (["--listen", "unix:s", "--tls-key", "x"], "TLS needs all three"),
            (["--listen", "unix:s", "--timeout", "0"], "--timeout 0: give seconds above 0"),
        ],
    )
    def test_bad_input_is_one_line_and_2(self, path, capsys, arguments, words):
        assert main(["receive", *arguments]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
