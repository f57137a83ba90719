# test_fleet.py: fleets of real guests, which check their memory all the time, in half of what they were promised; the
# kernel says what they take. VMMs and the daemon are killed.
from __future__ import annotations

import json
import os
import signal
import time

import pytest
from control_help import PATIENCE, until
from fleet_help import fleet_in, gone, taken

from pyvmm.layout import MIB
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "uffd_guest")

SETTLING = 20.0
LOOKS = 12


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    with fleet_in(tmp_path, monkeypatch) as made:
        yield made


def names(count):
    return [f"v{number}" for number in range(count)]


@pytest.mark.seconds(120)
def test_four_guests_live_in_half_of_what_they_want(fleet):
    fleet.write("64M", *({"name": name, "append": "order=random"} for name in names(4)))
    fleet.up()
    pids = [vm["pid"] for vm in fleet.running(*names(4)).values()]

    def kept():
        """Is just the budget taken, by the kernel: on average of some looks, and hardly more at any of them?"""
        found = []
        for _ in range(LOOKS):
            found.append(sum(taken(pid) for pid in pids) / (64 * MIB))
            time.sleep(0.02)  # what a guest has goes up and down with each page
        return 0.98 <= sum(found) / LOOKS <= 1 and max(found) <= 1.02

    until(lambda: sum(taken(pid) for pid in pids) > 60 * MIB)
    end = time.monotonic() + SETTLING
    while not kept():
        assert time.monotonic() < end, fleet.status()
    counts = [fleet.count(name) for name in names(4)]
    until(lambda: all(fleet.count(name) > before for name, before in zip(names(4), counts, strict=True)))
    found = fleet.vms()
    assert {vm["entitlement"] for vm in found.values()} == {16 * MIB}
    assert sum(vm["resident"] for vm in found.values()) == pytest.approx(sum(map(taken, pids)), rel=0.05)
    shown = fleet.command("status")
    assert shown.stdout.count("running") == 4, shown.stderr
    one_dies_and_one_is_silent(fleet)
    assert fleet.command("stop").returncode == 0
    assert fleet.ended() == 0
    assert all(map(gone, pids))
    for name in names(4):  # a guest that reads a wrong byte ends with another status, and says so
        assert (fleet.run / f"{name}.vm.log").read_text().count("\n") == 1
    events = [json.loads(line) for line in (fleet.run / "decisions.log").read_text().splitlines()]
    assert {"started", "demand", "targets", "died", "silent", "ended", "stopped"} <= {e["event"] for e in events}
    assert [event["why"] for event in events if event["event"] == "ended"] == ["status 0"] * 3


def one_dies_and_one_is_silent(fleet):
    """It is told of, and the others have its memory."""
    vms = fleet.vms()
    os.kill(vms["v1"]["pid"], signal.SIGKILL)
    until(lambda: fleet.states()["v1"] == "died")
    until(lambda: fleet.vms()["v0"]["entitlement"] > 21 * MIB)
    until(lambda: fleet.vms()["v0"]["resident"] > 17 * MIB)
    found = fleet.vms()
    assert found["v1"]["why"] == "signal 9"
    assert [found[name]["pid"] for name in ("v0", "v2", "v3")] == [vms[name]["pid"] for name in ("v0", "v2", "v3")]
    os.kill(vms["v2"]["pid"], signal.SIGSTOP)
    until(lambda: fleet.states()["v2"] == "silent")
    before = fleet.count("v0")
    until(lambda: fleet.count("v0") > before)
    os.kill(vms["v2"]["pid"], signal.SIGCONT)
    until(lambda: fleet.states()["v2"] == "running")


def test_the_daemon_is_killed_and_the_next_one_finds_the_vms(fleet):
    fleet.write("48M", *({"name": name} for name in names(2)))
    fleet.up()
    vms = fleet.running(*names(2))
    second = fleet.command("up", str(fleet.file), "--detach")
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert "somebody listens there already" in second.stderr
    fleet.process.kill()
    assert fleet.ended() == -signal.SIGKILL
    before = {name: fleet.count(name) for name in vms}
    until(lambda: all(fleet.count(name) > before[name] for name in vms))
    done = fleet.command("up", str(fleet.file), "--detach")
    assert done.returncode == 0, done.stderr
    found = fleet.running(*names(2))
    assert {name: vm["pid"] for name, vm in found.items()} == {name: vm["pid"] for name, vm in vms.items()}
    until(lambda: all(vm["entitlement"] == 24 * MIB for vm in fleet.vms().values()))
    there = json.loads(fleet.command("status", "--json").stdout)
    assert f"process {there['pid']}, in {fleet.run}" in done.stderr
    os.kill(there["pid"], signal.SIGTERM)  # VMs run on after that too
    assert gone(there["pid"])
    fleet.write("48M", {"name": "v0"})
    fleet.up()
    fleet.running("v0")
    fleet.process.terminate()
    assert f"v1: runs in {fleet.run}, and is not in the file" in fleet.process.communicate(timeout=PATIENCE)[1]
    assert fleet.command("status").returncode == 2
    assert fleet.count("v0") >= before["v0"]
    assert fleet.command("stop").returncode == 0
    assert all(gone(vm["pid"]) for vm in vms.values())
    done = fleet.command("stop")
    assert (done.returncode, done.stderr) == (2, f"pyvmm: nothing runs in {fleet.run}\n")


@needs("thp")
def test_what_a_guest_leaves_idle_is_taxed_where_its_vmm_watches_it(fleet):
    """All is touched now and then, an eighth of it at a time: the other guest gets more than half."""
    idle = {"guest": "hotcold", "append": "hot=12 ms=300", "options": ["--policy", "activity"]}
    fleet.write("96M", {"name": "idle", "memory": "64M"} | idle, {"name": "busy", "memory": "64M"})
    fleet.up()
    fleet.running("idle", "busy")
    until(lambda: fleet.vms()["idle"]["working_set"] is not None)
    until(lambda: fleet.vms()["busy"]["entitlement"] > 54 * MIB)
    found = fleet.vms()
    assert found["busy"]["working_set"] is None
    assert fleet.stop() == 0


def test_three_unlike_guests_by_their_classes(fleet):
    """With 45 % of their memory: who has cache that it does not use gives that up by balloon, and who uses most of what
    it has gets most."""
    mixes = {
        "free": "fixed=5 heap=15 cache=10 hot=60",
        "cache": "fixed=5 heap=15 cache=75 hot=10",
        "active": "fixed=5 heap=35 cache=50 hot=85",
    }
    fleet.write(
        "86M",
        *({"name": name, "guest": "classes", "memory": "64M", "balloon": True, "append": append}
          for name, append in mixes.items()),
    )  # fmt: skip
    fleet.up()
    fleet.running(*mixes)
    until(lambda: all(vm["classes"] is not None for vm in fleet.vms().values()))
    until(lambda: fleet.vms()["cache"]["ballooned"] > 24 * MIB)
    until(lambda: fleet.vms()["active"]["entitlement"] > 34 * MIB)
    until(lambda: fleet.vms()["active"]["resident"] > 30 * MIB)
    found = fleet.vms()
    assert found["cache"]["ballooned"] > found["active"]["ballooned"]
    assert sum(vm["resident"] for vm in found.values()) <= 86 * MIB * 1.02
    before = {name: fleet.count(name) for name in mixes}
    until(lambda: all(fleet.count(name) > before[name] for name in mixes))
    assert fleet.stop() == 0
    for name in mixes:  # one that reads a wrong byte says so
        assert "FAIL" not in (fleet.run / f"{name}.vm.log").read_text()


def test_a_vm_that_does_not_fit_comes_when_there_is_room(fleet):
    fleet.write("40M", *({"name": name, "reservation": "16M"} for name in names(3)))
    fleet.up()
    vms = fleet.running("v0", "v1")
    late = fleet.vms()["v2"]
    assert late["state"] == "refused"
    assert late["why"] == (
        "v2 does not fit: it needs 16.0 MiB, and 8.0 MiB are left; of the 40.0 MiB others need 32.0 MiB "
        "(v0 16.0 MiB, v1 16.0 MiB): stop one, or reserve less"
    )
    fleet.ask("v0", "stop", status=7)
    fleet.running("v1", "v2")
    assert fleet.vms()["v0"]["why"].startswith("status 7: verify: ")
    assert gone(vms["v0"]["pid"])
    for name in ("v1", "v2"):
        fleet.ask(name, "stop")
    assert fleet.ended() == 1  # one died


def test_guests_that_end_by_themselves_end_the_fleet(fleet):
    fleet.write("64M", {"name": "a", "guest": "hello"}, {"name": "b", "guest": "hello"})
    fleet.up()
    assert fleet.ended() == 0
    fleet.write("64M", {"name": "a", "guest": "./none.elf"})
    fleet.up()
    text = fleet.process.communicate(timeout=PATIENCE)[1]
    assert fleet.process.returncode == 1
    assert "a: has died: status 2: pyvmm: " in text
    assert "none.elf" in text
