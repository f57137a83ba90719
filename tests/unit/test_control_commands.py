# test_control_commands.py: what is asked on a control socket is done to the VM; what must not be meanwhile is refused.
from __future__ import annotations

import os
import threading

import pytest
from control_help import CONNECTED, MOVING, PATIENCE, ROUND, SWITCHED, FakeMigration, FakeVm, report, until

from pyvmm import __version__
from pyvmm.control.client import Client
from pyvmm.control.control import Control
from pyvmm.control.moving import Moving
from pyvmm.errors import BadInput, ControlError, FetchError
from pyvmm.migration.events import Failed, Finished


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "c")


@pytest.fixture
def vm():
    return FakeVm()


@pytest.fixture
def control(vm, path):
    with Control(vm, path) as made:
        yield made


@pytest.fixture
def client(control, path):
    with Client(path) as made:
        yield made


def refused(client, words, do, **arguments):
    with pytest.raises(ControlError, match=words):
        client.ask(do, **arguments)


# ---- one VM ----


def test_status_says_all(client):
    assert client.ask("status") == {
        "schema": 1,
        "version": __version__,
        "pid": os.getpid(),
        "state": "running",
        "memory": 64 << 20,
        "cpus": 2,
        "progress": {
            "guest": "verify", "status": "running", "detail": 0, "count": 4321, "writes": 15, "passes": 3,
            "longest_gap": 0.0015,
        },
        "pages": {
            "total": 16384, "large": 8192, "small": 92, "untouched": 8100, "armed": False,
            "homes": dict.fromkeys(("zero", "aside", "file", "swap", "peer", "balloon", "shared"), 0),
        },
        "mappings": {"pages_4k": 92, "pages_2m": 16, "pages_1g": 0},
        "balloon": None,
        "migration": None,
    }  # fmt: skip


def test_states(client, vm):
    def state():
        return client.ask("status")["state"]

    vm.started = False
    assert state() == "not started"
    vm.started = True
    assert state() == "running"
    assert client.ask("pause") == {"seconds": 0.001}
    assert state() == "paused"
    assert client.ask("resume") == {}
    assert state() == "running"
    refused(client, "the VM is not paused", "resume")
    assert client.ask("stop", status=3) == {}
    assert vm.stopped == 3
    assert state() == "ended"


def test_hugetlb_has_no_counts(client, vm):
    vm.memory.hugetlb = True
    assert client.ask("status")["pages"] is None


def test_a_page_at_the_source_is_not_waited_for(client, vm):
    vm.homes["peer"] = 5
    assert client.ask("status")["progress"] is None
    assert not vm.asked["progress"]


def test_a_page_that_cannot_be_brought_is_no_error(client, vm):
    def fail():
        raise FetchError("lost", 16, 5)

    vm.progress = fail
    assert client.ask("status")["progress"] is None


def test_one_status_that_takes_long_holds_nobody(client, vm, path):
    vm.holding = threading.Event()
    client.send("status")
    with Client(path) as other:
        assert other.ask("pause")
    vm.holding.set()


# ---- a migration ----


def begun(client, vm, **arguments):
    stream = client.stream("migrate", to="unix:/there", **arguments)
    return stream, vm.migration()


def test_a_migration_is_told_as_it_goes(client, vm, control, path):
    stream, migration = begun(client, vm, mode="hybrid", downtime=0.05, channels=4, bandwidth=1000, throttle=False)
    assert migration.to == "unix:/there"
    assert migration.options == {
        "mode": "hybrid", "downtime": 0.05, "channels": 4, "bandwidth": 1000, "throttle": False, "tls": None,
        "capture": None,
    }  # fmt: skip
    with Client(path) as other:
        for event in (CONNECTED, MOVING, ROUND):
            migration.tell(event)
            assert next(stream) == event.as_json()
            found = other.ask("status")
            assert found["state"] == "migrating"
            assert found["migration"] == {
                "side": "source", "to": "unix:/there", "going": True, "last": event.as_json(),
            }  # fmt: skip
        migration.finish()
        assert [event["event"] for event in stream] == ["switched"]
        assert stream.result == migration.result().as_json()
        last = other.ask("status")["migration"]["last"]
    assert last["event"] == "finished"
    assert last["report"] == stream.result
    assert control.moved_to() == "unix:/there"


def test_one_that_fails_ends_with_its_reason(client, vm):
    stream, migration = begun(client, vm)
    migration.tell(Failed(1.0, reason="the destination has no room", runs=True))
    assert next(stream)["runs"] is True
    with pytest.raises(ControlError, match="the destination has no room"):
        next(stream)
    again, migration = begun(client, vm)  # and another one may begin
    migration.finish()
    assert len(list(again)) == 1


def test_what_cannot_begin_is_said(client, vm):
    def migrate(to, **options):
        raise BadInput(f"{to!r} is no address")

    vm.migrate = migrate
    with pytest.raises(BadInput, match="'nowhere' is no address"):
        list(client.stream("migrate", to="nowhere"))
    with pytest.raises(BadInput, match="TLS needs all three"):
        list(client.stream("migrate", to="tcp:1", tls_cert="x"))
    with pytest.raises(BadInput, match="TLS: /none: No such file"):
        list(client.stream("migrate", to="tcp:1", tls_cert="/none", tls_key="/none", tls_ca="/none"))
    assert client.ask("status")["migration"] is None


def test_cancel(client, vm, path):
    refused(client, "no migration goes on: there is nothing to cancel", "cancel")
    stream, migration = begun(client, vm)
    client.send("cancel", reason="because")  # on the same connection, while it is told
    with pytest.raises(ControlError, match="cancelled: because"):
        list(stream)
    assert migration.reason == "because"
    with Client(path) as other:
        refused(other, "nothing to cancel", "cancel")


def test_meanwhile_nobody_else_has_a_say(client, vm, path):
    stream, migration = begun(client, vm)
    with Client(path) as other:
        for do in ("pause", "resume", "stop"):
            refused(other, "a migration goes on: cancel it first", do)
        refused(other, "a migration goes on already", "migrate", to="unix:/elsewhere")
        migration.tell(SWITCHED)
        assert next(stream)["event"] == "switched"
        refused(other, "the guest runs at the destination already: it is too late to cancel", "cancel")
        migration.tell(Finished(1.0, report=report()))
        assert list(stream) == []
        refused(other, "the guest has moved to unix:/there", "resume")
    assert not vm.asked
    assert len(vm.made) == 1


def test_it_goes_on_without_whoever_asked(client, vm, path):
    _, migration = begun(client, vm)
    client.close()
    migration.tell(CONNECTED)
    with Client(path) as other:
        until(lambda: other.ask("status")["migration"]["last"] is not None)
    assert migration.reason is None
    migration.finish()


def test_an_observer_that_does_not_read_holds_no_event(client, vm, path):
    """Its answers wait for it, until there are too many; what status says is up to date."""
    _, migration = begun(client, vm)
    many = 20_000
    for number in range(many):
        migration.tell(type(MOVING)(0.1, round=number, sent=1, pages=2, bytes=3, bandwidth=4.0))
    with Client(path) as other:
        until(lambda: other.ask("status")["migration"]["last"] is not None)
        until(lambda: other.ask("status")["migration"]["last"]["round"] == many - 1)
    migration.finish()


def test_the_end_of_the_vm_cancels(vm, path):
    control = Control(vm, path)
    with Client(path) as client:
        stream, migration = begun(client, vm)
        closing = threading.Thread(target=control.close)
        closing.start()
        with pytest.raises(ControlError, match="the source ends"):
            list(stream)
        closing.join(PATIENCE)
    assert migration.reason == "the source ends"


def test_the_end_waits_for_pages_that_the_other_side_needs(vm, path, monkeypatch):
    monkeypatch.setattr("pyvmm.control.control._CANCELLING", 0.01)
    monkeypatch.setattr("pyvmm.control.server._CLOSING", 0.01)
    control = Control(vm, path)
    with Client(path) as client:
        stream, migration = begun(client, vm)
        migration.tell(SWITCHED)
        assert next(stream)
        closing = threading.Thread(target=control.close)
        closing.start()
        closing.join(0.05)
        assert closing.is_alive()
        migration.tell(Finished(1.0, report=report()))
        assert list(stream) == []
        assert stream.result["side"] == "source"
        closing.join(PATIENCE)
        assert not closing.is_alive()
    assert migration.reason is None


# ---- at the destination ----


def test_a_guest_that_comes(vm, path):
    moving, incoming = Moving(), FakeMigration()
    moving.begin(lambda: incoming, side="destination")
    vm.started = False
    with Control(vm, path, moving), Client(path) as client:
        refused(client, "a migration goes on", "resume")
        moving.told(CONNECTED)
        assert client.ask("status")["migration"]["side"] == "destination"
        vm.started = True
        moving.told(SWITCHED)
        assert client.ask("pause")  # it runs here now, while pages are still coming
        assert client.ask("status")["state"] == "migrating"
        incoming.finish()
        moving.told(Finished(1.0, report=report()))
        assert client.ask("status")["state"] == "paused"
        assert client.ask("resume") == {}
        stream, migration = begun(client, vm)  # and on it goes
        assert client.ask("status")["migration"]["side"] == "source"
        refused(client, "a migration goes on", "pause")
        migration.finish()
        assert len(list(stream)) == 1
