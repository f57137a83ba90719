# daemon.py: runs a fleet: starts its VMs or finds them running, and divides memory over them, again and again. Bytes,
# seconds. It may be killed at any moment: VMs run on, each within what it was told last, and the next one finds them.
"""`Daemon`."""

from __future__ import annotations

import os
import select
import signal
import time

from pyvmm.control.server import Server
from pyvmm.errors import BadInput, ControlError, HostError, PyvmmError
from pyvmm.fleet.admission import admit
from pyvmm.fleet.journal import Journal
from pyvmm.fleet.member import Member
from pyvmm.fleet.plan import Planner, plan
from pyvmm.fleet.policy import ClassBased, find
from pyvmm.fleet.vmm import Vmm
from pyvmm.memory.reclaim.policy import broken
from pyvmm.memory.reclaim.reclaimer import LEAST
from pyvmm.sockets import check_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.control.server import Reply
    from pyvmm.control.wire import Request
    from pyvmm.fleet.config import Fleet
    from pyvmm.fleet.demand import Demand
    from pyvmm.fleet.folder import Folder

SCHEMA = 1
ENDING = (5.0, 2.0)
"""A VM that is asked to stop has so long, then so long after SIGTERM; then it is killed."""
_STARTING = 0.05
"""Between two looks while a VM starts."""


class Daemon:
    """Of one fleet, in one run folder. tell: called with each line that people should see.

    Raises BadInput, HostError where another one is there already, or the folder cannot be used.
    """

    def __init__(self, fleet: Fleet, folder: Folder, tell: Callable[[str], None]) -> None:
        self.fleet = fleet
        self.members = [Member(guest, folder) for guest in fleet.guests]
        self._folder = folder
        self._say = tell
        for guest in fleet.guests:
            check_path(folder.of(guest.name, "sock"), f"VM {guest.name}")
        self._planner = Planner(fleet.budget, find(fleet.policy)(), fleet.states)
        self._policy = fleet.policy
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop = False
        self._left = False
        self._replies: list[Reply] = []
        self._picture: dict[str, object] = {}
        self._draw()
        self._journal = Journal(folder.log)
        try:
            self._server = Server(folder.socket, self._serve)  # one daemon at a time
        except BaseException:
            self._journal.close()
            os.close(self._event)
            raise

    # ---- from other threads, and signal handlers ----

    def leave(self) -> None:
        """run() is to return, and VMs run on."""
        self._left = True
        os.eventfd_write(self._event, 1)

    def _serve(self, request: Request, reply: Reply) -> None:
        if request.do == "status":
            reply.result(self._picture)
        elif request.do == "stop":
            self._replies.append(reply)
            self._stop = True
            os.eventfd_write(self._event, 1)
        else:
            raise BadInput(f"a fleet can be asked for status and stop, not for {request.do}: ask a VM's own socket")

    # ---- the loop ----

    def run(self) -> int:
        """Until stop() is asked for, or leave(), or all VMs have ended: 0, or 1 where one of them died or there was no
        room for it."""
        try:
            self._begin()
            while not self._left and not self._stop:
                self._look()
                self._start_what_fits()
                self._divide()
                self._draw()
                if not any(member.alive for member in self.members):
                    break
                self._wait()
            if self._stop:
                end([member for member in self.members if member.alive])
                self._bury()
                self._draw()
                self._journal.write("stopped")
                return 0
            return int(any(member.state in ("died", "refused") for member in self.members))
        except PyvmmError as error:
            for reply in self._replies:
                reply.error(error)
            raise
        finally:
            self._close()

    def _close(self) -> None:
        for reply in self._replies:
            reply.result(self._picture)
        self._server.close()
        for member in self.members:
            member.disconnect()
            member.vmm.close()
        self._journal.close()
        os.close(self._event)

    def _begin(self) -> None:
        """Finds those that run already."""
        ours = {member.guest.name for member in self.members}
        for name in self._folder.names():
            if name not in ours and Vmm(self._folder, name).locked():
                self._journal.write("foreign", vm=name)
                self._say(f"{name}: runs in {self._folder.path}, and is not in the file: its memory is not counted")
        running = [member for member in self.members if member.vmm.locked()]
        for member in running:
            member.state = "starting"
            member.ask()
        for member in running:
            member.hear()
            self._note("adopted", member, f"runs already, process {member.vmm.pid}")

    def _look(self) -> None:
        self._bury()
        alive = [member for member in self.members if member.alive]
        for member in alive:
            member.ask()
        for member in alive:
            before = member.state
            member.hear()
            if member.state == "silent" != before:
                self._note("silent", member, f"does not answer: {member.why}")

    def _bury(self) -> None:
        for member in self.members:
            if member.alive and not member.vmm.running():
                member.over()
                self._note(member.state, member, f"has {member.state}: {member.why}")

    def _start_what_fits(self) -> None:
        """In the order of the file. Who does not fit is tried again when others need less, or have ended."""
        for member in self.members:
            if member.state != "refused":
                continue
            running = [each.demand() for each in self.members if each.alive]
            try:
                admit(running, member.demand(), self.fleet.budget)
                lock = member.vmm.claim()
                if lock is None:
                    raise HostError(f"{member.guest.name}: somebody holds its lock")
                member.vmm.start(member.guest, self._first_limit(running, member), lock)
            except PyvmmError as error:
                if str(error) != member.why:
                    member.why = str(error)
                    self._note("refused", member, f"not started: {error}")
                continue
            member.state, member.why = "starting", ""
            self._note("started", member, f"started, process {member.vmm.pid}")

    def _first_limit(self, running: Sequence[Demand], member: Member) -> int:
        """With all the others that may come counted: else the first would have what is the last one's."""
        coming = [each.demand() for each in self.members if each.state == "refused" and each is not member]
        vms = [member.demand(), *running, *coming]
        try:
            ceiling = plan(vms, max(self.fleet.budget, sum(vm.reservation for vm in vms)), ClassBased(), ())[0].ceiling
        except BadInput:
            ceiling = LEAST
        return max(LEAST, min(ceiling, member.guest.memory))

    def _divide(self) -> None:
        members = [member for member in self.members if member.alive]
        vms = [member.demand() for member in members]
        if not vms:
            return
        before = self._planner.state
        try:
            targets = self._planner(vms)
        except Exception as error:  # a policy of somebody's own: the fleet goes on
            self._replace(error)
            targets = self._planner(vms)
        if self._planner.state != before:
            self._journal.write("state", state=self._planner.state, before=before)
        self._journal.decision(self._planner.state, vms, targets)
        for member, target in zip(members, targets, strict=True):
            member.follow(target)

    def _replace(self, error: Exception) -> None:
        if isinstance(self._planner.policy, ClassBased):
            raise error
        text = str(error) if isinstance(error, BadInput) else f"policy: {broken(error)}"
        self._planner.policy, self._policy = ClassBased(), "class-based"
        self._journal.write("policy", why=text)
        self._say(f"{text}: class-based goes on in its place")

    def _wait(self) -> None:
        """For the next look; a VM that ends is told of at once."""
        starting = any(member.state == "starting" for member in self.members)
        end_at = time.monotonic() + (min(_STARTING, self.fleet.interval) if starting else self.fleet.interval)
        while not self._left and not self._stop and (left := end_at - time.monotonic()) > 0:
            poll = select.poll()
            poll.register(self._event, select.POLLIN)
            for member in self.members:
                if member.alive and member.vmm.pidfd is not None:
                    poll.register(member.vmm.pidfd, select.POLLIN)
            ready = poll.poll(left * 1000)
            if any(descriptor != self._event for descriptor, _ in ready):
                return
            if ready:
                os.eventfd_read(self._event)

    def _draw(self) -> None:
        resident = sum(member.resident for member in self.members)
        self._picture = {
            "schema": SCHEMA,
            "pid": os.getpid(),
            "budget": self.fleet.budget,
            "resident": resident,
            "free": self.fleet.budget - resident,
            "state": self._planner.state,
            "policy": self._policy,
            "interval": self.fleet.interval,
            "vms": [member.as_dict() for member in self.members],
        }

    def _note(self, event: str, member: Member, words: str) -> None:
        self._journal.write(event, vm=member.guest.name, pid=member.vmm.pid, why=member.why)
        self._say(f"{member.guest.name}: {words}")


def end(members: Sequence[Member]) -> None:
    """Ends VMs: asked to, then by SIGTERM, then by SIGKILL."""
    for member in members:
        member.ask_to_stop()
    for seconds, number in zip(ENDING, (signal.SIGTERM, signal.SIGKILL), strict=True):
        if not (members := _still(members, seconds)):
            return
        for member in members:
            member.vmm.signal(number)
    if members := _still(members, ENDING[1]):
        raise ControlError(f"VM {members[0].guest.name} does not end")


def _still(members: Sequence[Member], seconds: float) -> list[Member]:
    """Those that run still after so long."""
    end_at = time.monotonic() + seconds
    while (running := [member for member in members if member.vmm.running()]) and time.monotonic() < end_at:
        for member in running:
            if member.vmm.pidfd is None:  # it began just before us, and did not listen yet
                member.ask_to_stop()
        descriptors = [member.vmm.pidfd for member in running if member.vmm.pidfd is not None]
        select.select(descriptors, [], [], 0.05)
    return running
