# test_fleet_soak.py: eight guests that check their memory, promised four times the host's budget, through all states of
# the host. VMs are killed and stopped, the daemon is killed again and again; the kernel says what VMs take.
# A longer run: PYVMM_FLEET_SECONDS=300 PYVMM_FLEET_SEED=2 pytest ...
from __future__ import annotations

import json
import os
import random
import signal
import time
from functools import partial

import pytest
from control_help import until
from fleet_help import fleet_in, gone, taken

from pyvmm import VM
from pyvmm.control.client import Client
from pyvmm.fleet.states import STATES
from pyvmm.layout import MIB
from pyvmm.pytest_plugin import needs
from pyvmm.testing.classes_model import Classes
from pyvmm.testing.dup_model import Dup
from pyvmm.testing.hotcold_model import HotCold
from pyvmm.testing.verify_model import check_memory

SECONDS = float(os.environ.get("PYVMM_FLEET_SECONDS", "5"))
"""Until the last round begins that there is; there is one at least."""
SEED = int(os.environ.get("PYVMM_FLEET_SEED", "1"))
pytestmark = [needs("kvm", "uffd_guest"), pytest.mark.seconds(SECONDS + 300)]

BUDGET = 128 * MIB
PATIENCE = 40.0
"""For any one thing, and for the budget to be kept: all CPUs may be busy, with these guests alone."""
LOOKS = 3
JUDGED = 3 if SECONDS < 60 else 8
"""So many are compared with their models at the end."""
TRIES = 10
FACTORS = {"high": 1.25, "clear": 1.08, "soft": 1.02, "hard": 0.96, "low": 0.8}
"""A new budget, by what VMs have: the state that it begins in."""
BALLOON = {"guest": "classes", "balloon": True}
VMS = [
    {"name": "seq", "append": "seed=7"},
    {"name": "random", "append": "order=random write=50 zeros=100"},
    {"name": "dup", "guest": "dup", "append": "dups=300 write=10"},
    {"name": "hotcold", "guest": "hotcold", "append": "hot=20 ms=500 stray=20", "options": []},
    {"name": "touch", "guest": "touch", "append": "pattern=zipf"},
    {"name": "swapper", "guest": "swapper", "swap": True, "options": ["--pages", "4k", "--swap-disk", "128M"]},
    {"name": "cache", "append": "fixed=5 heap=15 cache=75 hot=10"} | BALLOON,
    {"name": "heap", "append": "fixed=5 heap=20 cache=30 hot=25 grow=20"} | BALLOON,
]
NAMES = [vm["name"] for vm in VMS]
MODELS = {
    "seq": lambda vm: check_memory(vm.memory, vm.progress()),
    "random": lambda vm: check_memory(vm.memory, vm.progress(), write=50, zeros=100, order="random"),
    "dup": lambda vm: Dup(vm.progress(), dups=300, write=10).check(vm.memory),
    "hotcold": lambda vm: HotCold(vm.progress(), hot=20).check(vm.memory, vm.progress()),
    "cache": lambda vm: Classes(vm.memory, vm.progress(), heap=15, cache=75, hot=10).check(),
    "heap": lambda vm: Classes(vm.memory, vm.progress(), heap=20, cache=30, hot=25).check(),
}


class Soak:
    """over: names of VMs that we have ended. seen: states of the host."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.budget = BUDGET
        self.over = []
        self.seen = set()

    def events(self, start=0):
        try:
            found = (self.fleet.run / "decisions.log").read_bytes()
        except FileNotFoundError:  # not yet
            return []
        return [json.loads(line) for line in found[start:].split(b"\n")[:-1]]

    def kill_daemon(self):
        self.fleet.process.kill()
        assert self.fleet.ended() == -signal.SIGKILL

    def daemon(self, budget):
        """Finds the VMs that run, and starts those that are missing. The state that it sees first."""
        self.budget = budget
        self.fleet.write(str(budget), *({"memory": "64M"} | vm for vm in VMS))
        log = self.fleet.run / "decisions.log"
        start = log.stat().st_size if log.exists() else 0
        self.fleet.up()
        until(lambda: any(event["event"] == "targets" for event in self.events(start)), PATIENCE)
        return next(event["state"] for event in self.events(start) if event["event"] == "targets")

    def enter(self, state):
        """The daemon is killed, and the next one has a budget with which the host is in this state: what the VMs have
        meanwhile goes up and down, so that it may need another one. None of them has noticed."""
        for _ in range(TRIES):
            before = {name: vm["pid"] for name, vm in self.vms().items()}
            self.kill_daemon()
            found = self.daemon(int(self.resident(before) * FACTORS[state]))
            self.seen.add(found)
            there = self.fleet.running(*before)
            assert {name: there[name]["pid"] for name in before} == before
            if found == state:
                return
        raise AssertionError(f"the host never was {state}")

    def vms(self):
        """Those that run."""
        return {name: vm for name, vm in self.fleet.vms().items() if vm["state"] == "running"}

    def resident(self, names):
        """As the VMs see it."""
        return sum(self.fleet.ask(name, "swap")["resident"] for name in names)

    def share(self):
        """Of the budget, by the kernel: the mean of some looks, since what a guest has goes up and down with each
        page."""
        pids = [vm["pid"] for vm in self.vms().values()]
        found = []
        for _ in range(LOOKS):
            found.append(sum(map(taken, pids)) / self.budget)
            time.sleep(0.03)
        return sum(found) / LOOKS

    def settle(self):
        """The budget comes to be used, but for what a heap that grows and shrinks leaves free, and then is kept."""
        end = time.monotonic() + PATIENCE
        while not 0.95 <= (share := self.share()) <= 1.02:
            assert time.monotonic() < end, (share, self.fleet.status())
        assert (share := self.share()) <= 1.02, (share, self.fleet.status())

    def get_on(self):
        """All that run do work."""
        names = list(self.vms())
        counts = {name: self.fleet.count(name) for name in names}
        until(lambda: all(self.fleet.count(name) > counts[name] for name in names), PATIENCE)

    def kill(self, name):
        pid = self.vms()[name]["pid"]
        self.over.append(name)
        os.kill(pid, signal.SIGKILL)
        until(lambda: self.fleet.states()[name] in ("died", "ended"), PATIENCE)
        assert gone(pid)

    def stop(self, name):
        pid = self.vms()[name]["pid"]
        self.over.append(name)
        self.fleet.ask(name, "stop")
        until(lambda: self.fleet.states()[name] == "ended", PATIENCE)
        assert gone(pid)

    def verdict(self):
        """None has ended but by us, and none has read a wrong byte."""
        found = [event["vm"] for event in self.events() if event["event"] in ("died", "ended")]
        assert sorted(found) == sorted(self.over)
        self.right()

    def right(self):
        """None has read a wrong byte: it would say so."""
        for name in NAMES:
            assert "FAIL" not in (self.fleet.run / f"{name}.vm.log").read_text()

    def judge(self, name, path):
        """All its memory, by its model: it moves here."""
        devices = ["balloon"] if "balloon" in next(vm for vm in VMS if vm["name"] == name) else []
        with VM.receive(f"unix:{path}", devices=devices) as into:
            with Client(str(self.fleet.run / f"{name}.vm.sock")) as client:
                client.ask("resume")
                client.ask("migrate", to=into.address)
            with into.vm(PATIENCE) as vm:
                into.result(PATIENCE)
                vm.pause()
                assert MODELS[name](vm) == [], name


@pytest.fixture
def soak(tmp_path, monkeypatch):
    with fleet_in(tmp_path, monkeypatch) as fleet:
        fleet.patience = PATIENCE
        yield Soak(fleet)


def test_eight_guests_in_a_quarter_of_what_they_were_promised(soak, tmp_path):
    chance = random.Random(SEED)
    end = time.monotonic() + SECONDS
    while soak.seen != set(STATES) or time.monotonic() < end:
        if soak.fleet.process:
            soak.kill_daemon()
        soak.daemon(BUDGET)
        soak.fleet.running(*NAMES)
        soak.settle()
        killed, stopped = chance.sample(NAMES, 2)
        acts = [partial(soak.kill, killed), partial(soak.stop, stopped), None, None, None]
        for state, act in zip(chance.sample(STATES, len(STATES)), chance.sample(acts, len(acts)), strict=True):
            soak.enter(state)
            if act:
                act()
            soak.settle()
            soak.get_on()
        soak.verdict()
    there = list(soak.vms())
    soak.kill_daemon()
    for name in there:  # they would only be in each other's way
        soak.fleet.ask(name, "pause")
    modelled = [name for name in there if name in MODELS]
    judged = chance.sample(modelled, min(JUDGED, len(modelled)))
    for name in there:
        if name in judged:
            soak.judge(name, tmp_path / "s")
        else:
            soak.fleet.ask(name, "resume")
    soak.right()
    assert soak.fleet.command("stop").returncode == 0
