# test_fleet_member.py: how one VM of a fleet is asked and told, by a VMM that is none but answers on a real socket.
from __future__ import annotations

import os
import time

import pytest

from pyvmm.cli.host_table import show
from pyvmm.control.server import Server
from pyvmm.devices.virtio.classes import CLASSES
from pyvmm.errors import BadInput
from pyvmm.fleet.config import Guest
from pyvmm.fleet.folder import Folder
from pyvmm.fleet.means import Split
from pyvmm.fleet.member import Member
from pyvmm.fleet.plan import Target
from pyvmm.layout import MIB

PAGE = 4096


class Vmm:
    """Answers for a VM in this process."""

    def __init__(self, folder):
        self.lock = folder.lock("a")
        self.asked = []
        self.homes = {"swap": 256, "shared": 2, "balloon": 512, "aside": 0}
        self.limit, self.resident, self.taken, self.refaults = 16 * MIB, 14 * MIB, 100, 10
        self.inflated, self.actual, self.read_again = 3 * MIB, 2 * MIB, 100
        self.stats = dict.fromkeys(CLASSES, MIB)
        self.has_balloon = True
        self.watched = False
        self._server = Server(folder.of("a", "sock"), self._serve)

    def _serve(self, request, reply):
        self.asked.append((request.do, request.arguments))
        reply.result(getattr(self, request.do)(request.arguments))

    def status(self, arguments):
        return {"pid": os.getpid(), "state": "running", "pages": {"large": 512, "small": 1, "homes": self.homes}}

    def swap(self, arguments):
        if arguments["target"] is not None:
            assert arguments["wait"] is False
            self.limit = arguments["target"]
        swap = None if self.limit is None else {"refaults": self.refaults}
        used = {"low": 3 * MIB, "size": 4 * MIB, "high": 5 * MIB} if self.watched else None
        return {"working_set": used, "limit": self.limit, "resident": self.resident, "taken": self.taken, "swap": swap}

    def balloon(self, arguments):
        if not self.has_balloon:
            raise BadInput("this VM has no balloon")
        if arguments["target"] is not None:
            self.inflated = arguments["target"]
        return {
            "target": self.inflated, "actual": self.actual, "away": MIB, "stats": self.stats,
            "refaults": self.read_again,
        }  # fmt: skip

    def told(self, do):
        return [arguments["target"] for name, arguments in self.asked if name == do]

    def close(self):
        self._server.close()
        os.close(self.lock)


@pytest.fixture
def vmm(tmp_path):
    made = Vmm(Folder(str(tmp_path / "r")))
    yield made
    made.close()


@pytest.fixture
def member(vmm, tmp_path):
    guest = Guest("a", "verify", 32 * MIB)
    guest.balloon = True
    made = Member(guest, Folder(str(tmp_path / "r")))
    made.state = "starting"
    yield made
    made.disconnect()
    made.vmm.close()


def target(ceiling, balloon=0):
    return Target("a", ceiling, ceiling, balloon, Split())


def told(member, target):
    """It is told, and has heard."""
    member.follow(target)
    member._client.ask("status")


def test_what_it_answers_is_what_is_known(vmm, member):
    vmm.has_balloon = False
    member.look()
    assert (member.state, member.vmm.pid) == ("running", os.getpid())
    demand = member.demand()
    assert (demand.resident, demand.swapped, demand.ballooned) == (14 * MIB, MIB, 2 * MIB)
    assert (demand.classes, demand.balloon, demand.wanted, demand.refaults) == (None, False, None, 0.0)
    vmm.refaults += 1000
    time.sleep(0.01)
    member.look()
    assert member.demand().refaults > 0
    assert member.demand().returned > 0
    room = MIB // 2 + 14 * MIB // 32
    assert member.demand().wanted == 14 * MIB + 2 * MIB + room  # it had to give up nothing since: with its balloon's
    vmm.resident += MIB
    member.look()
    assert member.demand().wanted == 15 * MIB + 2 * MIB + 2 * MIB + MIB // 2 + 15 * MIB // 32  # and twice what it grew
    assert member.demand().active is None
    vmm.taken += 1
    vmm.watched = True
    member.look()
    assert member.demand().wanted is None
    assert member.demand().active == 5 * MIB


def test_without_a_limit_what_is_mapped_counts(vmm, member):
    vmm.limit, vmm.homes["aside"] = None, 3
    member.look()
    assert member.demand().resident == (512 + 1 + 3) * PAGE
    told(member, target(16 * MIB))
    assert vmm.limit >= 16 * MIB


def test_who_has_plenty_free_does_not_want_what_its_balloon_holds(vmm, member):
    vmm.stats = vmm.stats | {"free": 16 * MIB}
    for _ in range(2):
        member.look()
    assert member.demand().wanted == 14 * MIB + MIB // 2 + 14 * MIB // 32


def test_a_vm_that_does_not_want_more_is_given_a_block_extra(vmm, member):
    """So far below its limit its VMM would begin; how much it keeps free is seen of a VM at its limit alone."""
    for _ in range(5):
        vmm.resident = 2 * MIB
        member.look()
        told(member, target(16 * MIB))
    assert vmm.limit == 18 * MIB


def test_its_limit_is_higher_by_what_its_vmm_keeps_free(vmm, member):
    """On average a VM is to have its ceiling: its VMM begins below the limit."""
    for _ in range(40):
        vmm.resident, vmm.taken = vmm.limit - 2 * MIB, vmm.taken + 1
        member.look()
        told(member, target(16 * MIB))
    assert vmm.resident == pytest.approx(16 * MIB, rel=0.01)
    assert vmm.limit <= 18.25 * MIB
    for _ in range(40):  # and it comes down where it has more
        vmm.resident, vmm.taken = vmm.limit, vmm.taken + 1
        member.look()
        told(member, target(16 * MIB))
    assert vmm.limit == pytest.approx(16 * MIB, rel=0.01)


def test_a_limit_within_what_a_vmm_takes(vmm, member):
    member.look()
    for ceiling, limit in ((1, 8 * MIB), (100 * MIB, 32 * MIB)):
        told(member, target(ceiling))
        assert vmm.limit == limit
    before = len(vmm.told("swap"))
    told(member, target(100 * MIB))  # nothing new
    assert len(vmm.told("swap")) == before


def test_a_vmm_that_has_no_balloon_is_asked_once(vmm, member):
    vmm.has_balloon = False
    for _ in range(3):
        member.look()
    assert (member.state, member.has_balloon) == ("running", False)
    assert vmm.told("balloon") == [None]


def test_a_balloon_is_left_as_it_is_found_and_then_told(vmm, member):
    member.look()
    assert vmm.told("balloon") == [None]
    demand = member.demand()
    assert (demand.balloon, demand.ballooned, demand.classes.total) == (True, 2 * MIB, 6 * MIB)
    told(member, target(16 * MIB, balloon=3 * MIB))  # what somebody told it already
    assert vmm.told("balloon") == [None]
    told(member, target(16 * MIB, balloon=5 * MIB + 1))
    member.look()
    assert vmm.told("balloon") == [None, 5 * MIB, None]
    assert member.as_dict()["balloon_target"] == 5 * MIB + 1
    told(member, target(16 * MIB, balloon=99 * MIB))
    assert vmm.inflated == 32 * MIB  # there is no more


def test_a_balloon_without_a_driver_counts_as_none(vmm, member):
    vmm.stats, vmm.actual, vmm.read_again = dict.fromkeys(CLASSES), 0, None
    member.look()
    assert (member.state, member.has_balloon, member.classes) == ("running", False, None)
    told(member, target(16 * MIB, balloon=5 * MIB))
    assert vmm.inflated == 3 * MIB
    vmm.stats = dict.fromkeys(CLASSES) | {"free": MIB, "active anonymous": 2 * MIB}  # a stock driver's
    member.look()
    assert (member.has_balloon, member.classes.free, member.classes.total) == (True, MIB, 3 * MIB)
    assert member.demand().active == 2 * MIB


def test_what_the_guest_reads_again_counts_too(vmm, member):
    for limit in (16 * MIB, None, 16 * MIB):  # not added up where there is no limit
        vmm.limit = limit
        member.look()
        assert member.refaults == 0
    vmm.read_again += 1000
    time.sleep(0.01)
    member.look()
    both = member.refaults
    assert both > 0
    member.look()
    assert member.refaults == 0


def test_one_that_answers_nonsense_is_silent_and_not_asked_all_the_time(vmm, member, monkeypatch):
    member._wait = 0.05
    monkeypatch.setattr(vmm, "status", lambda arguments: {"pid": os.getpid(), "state": "running"})
    member.look()
    assert (member.state, member.why) == ("silent", "another version")
    asked = len(vmm.asked)
    member.look()
    assert len(vmm.asked) == asked
    monkeypatch.undo()
    time.sleep(0.06)
    member.look()
    assert (member.state, member.why) == ("running", "")


def test_a_guest_that_has_ended_and_a_process_that_has_not(vmm, member, monkeypatch):
    """The process is waited for, or nobody would tell of its status."""
    said = vmm.status
    monkeypatch.setattr(vmm, "status", lambda arguments: said(arguments) | {"state": "ended"})
    member.look()
    assert (member.state, member.alive) == ("ending", True)
    assert member.as_dict()["pid"] == os.getpid()


def test_another_process_at_its_socket_is_not_believed(vmm, member, monkeypatch):
    member.look()
    monkeypatch.setattr(vmm, "status", lambda arguments: {"pid": 1, "state": "running"})
    member.look()
    assert "another process answers there" in member.why


def test_nobody_there(tmp_path):
    member = Member(Guest("b", "verify", 32 * MIB), Folder(str(tmp_path / "r")))
    member.look()
    assert (member.state, member.vmm.running()) == ("refused", False)
    member.follow(target(MIB))
    member.ask_to_stop()


def test_the_table(member, vmm, capsys):
    member.look()
    told(member, target(16 * MIB, 3 * MIB))
    silent = Member(Guest("b", "verify", 32 * MIB), Folder(os.path.dirname(member._path)))
    silent.why = "b does not fit"
    head = {"state": "soft", "resident": 14 * MIB, "budget": 64 * MIB, "policy": "class-based", "pid": 7}
    show(head | {"vms": [member.as_dict(), silent.as_dict()]})
    out = capsys.readouterr().out
    assert out.startswith("soft: 14.0 of 64M, policy class-based, process 7; MiB\n")
    lines = [line.split() for line in out.splitlines()]
    assert ["a", "running", "32.0", "14.0", "-", "16.0", "18.0", "2.0", "3.0", "1.0", "0.0", "0"] in lines
    assert ["a", *["1.0"] * 6] in lines
    assert "b: b does not fit" in out
