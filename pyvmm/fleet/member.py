# member.py: one VM of a running fleet: asked how it is, told what it may have. Bytes, seconds, pages of 4 KiB.
"""`Member`."""

from __future__ import annotations

import time
from contextlib import suppress

from pyvmm.control.client import Client
from pyvmm.errors import BadInput, ControlError, PyvmmError
from pyvmm.fleet.demand import Demand, WorkingSet, classes_of
from pyvmm.fleet.vmm import Vmm
from pyvmm.layout import BLOCK_SIZE, MIB, PAGE_SIZE
from pyvmm.memory.reclaim.reclaimer import LEAST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.fleet.config import Guest
    from pyvmm.fleet.demand import Classes
    from pyvmm.fleet.folder import Folder
    from pyvmm.fleet.plan import Target

PATIENCE = 2.0
"""For an answer."""
_RETRY, _RARELY = 1.0, 30.0
"""Who is silent is asked again after that, and then after twice as long each time."""
_AIM = 0.995
"""Of its ceiling a VM that wants more is to have so much on average: what it has goes up and down."""
_STEP = MIB // 16
"""A limit that differs by less is not told."""
_ROOM, _GROWING = MIB // 2, 32
"""So much, and one in so many of its pages, a VM may take more without giving up anything."""


_NO_PROCESS = ("refused", "ended", "died")


class Member:
    """state: refused (there is no room), starting, then what the VM says (running, paused, migrating), silent, ending
    (its guest has ended), and when its process has, ended or died. why: words for that. target: what was decided
    last."""

    def __init__(self, guest: Guest, folder: Folder) -> None:
        self.guest = guest
        self.vmm = Vmm(folder, guest.name)
        self.state, self.why = "refused", ""
        self.target: Target | None = None
        self.resident = self.swapped = self.ballooned = self.shared = 0
        self.refaults = self.returned = 0.0
        self.classes: Classes | None = None
        self.working_set: WorkingSet | None = None
        self.has_balloon = False
        self.limit: int | None = None
        self._folder = folder
        self._path = folder.of(guest.name, "sock")
        self._client: Client | None = None
        self._balloon: int | None = None  # what it was told last; None: not asked yet
        self._asks_balloon = guest.balloon
        self._seen_balloon: tuple[float, int] | None = None  # when, pages that the guest has read again
        self._pressing: bool | None = None  # had it to give up pages lately? None: nobody knows
        self._grown = 0  # by so much since the last look
        self._slack = BLOCK_SIZE
        self._seen: tuple[float, int, int] | None = None  # when, refaults, pages taken
        self._after, self._wait = 0.0, _RETRY
        self._numbers: list[int] = []  # of what was asked

    @property
    def alive(self) -> bool:
        """Has it a process?"""
        return self.state not in _NO_PROCESS

    # ---- looking ----

    def look(self) -> None:
        """Asks, and waits for the answers."""
        self.ask()
        self.hear()

    def ask(self) -> None:
        """Asks it how it is; hear() has the answers. So a fleet is asked all at once: VMMs may be slow to answer, where
        there are many more vCPUs than CPUs."""
        self._numbers = []
        if time.monotonic() < self._after:
            return
        client = self._connected()
        if client is not None:
            self._numbers = [client.send("status"), client.send("swap")]
            if self._asks_balloon:
                self._numbers.append(client.send("balloon"))

    def hear(self) -> None:
        """What it answers. Where it does not it is starting still, or silent; what is known of it stays."""
        client, numbers = self._client, self._numbers
        if client is None or not numbers:
            return
        try:
            self._hear(client, numbers)
            self._wait = _RETRY
        except (ControlError, KeyError, TypeError, AttributeError, ValueError) as error:
            self.disconnect()
            if self.vmm.running():
                self.state, self.why = "silent", str(error) if isinstance(error, ControlError) else "another version"
                self._after, self._wait = time.monotonic() + self._wait, min(2 * self._wait, _RARELY)

    def _connected(self) -> Client | None:
        if self._client is None:
            try:
                self._client = Client(self._path, PATIENCE)
            except BadInput:  # nobody listens: it has just begun, or just ended
                return None
            self._asks_balloon, self._balloon = self.guest.balloon, None
            self._seen = self._seen_balloon = None
        return self._client

    def _hear(self, client: Client, numbers: list[int]) -> None:
        status = client.result(numbers[0])
        if not self.vmm.found(status["pid"]):
            raise ControlError(f"{self._path}: another process answers there")
        state = str(status["state"])
        self.state, self.why = "ending" if state in _NO_PROCESS else state, ""  # a guest has ended before its process
        homes = status["pages"]["homes"]
        self.swapped, self.shared = homes["swap"] * PAGE_SIZE, homes["shared"] * PAGE_SIZE
        self.ballooned = homes["balloon"] * PAGE_SIZE
        self._look_at_swap(client.result(numbers[1]), status["pages"])
        if self._asks_balloon:
            self._look_at_balloon(client, numbers[2])

    def _look_at_swap(self, found: dict[str, Any], pages: dict[str, Any]) -> None:
        now = time.monotonic()
        self.limit, self.refaults, self.returned = found["limit"], 0.0, 0.0
        if found["swap"] is None:
            self.resident = (pages["large"] + pages["small"] + pages["homes"]["aside"]) * PAGE_SIZE
            return
        resident = int(found["resident"])
        self.resident, self._grown = resident, max(0, resident - self.resident)
        used = found.get("working_set")
        self.working_set = None if used is None else WorkingSet(int(used["size"]), int(used["low"]), int(used["high"]))
        refaults, taken = int(found["swap"]["refaults"]), int(found["taken"])
        if self._seen is not None:
            then, before, taken_before = self._seen
            self.refaults = self.returned = max(0, refaults - before) / max(now - then, 1e-3)
            self._pressing = taken > taken_before
        self._seen = (now, refaults, taken)

    def _look_at_balloon(self, client: Client, number: int) -> None:
        """One whose guest has no driver for it, or whose driver says nothing yet, counts as none: nobody would give up
        what it is told to."""
        try:
            found = client.result(number)
        except BadInput:
            self._asks_balloon = self.has_balloon = False  # it was started without
            self.classes = None
            return
        if self._balloon is None:
            self._balloon = int(found["target"])  # what somebody told it before us
        self.ballooned = int(found["actual"])
        self.has_balloon = self.ballooned > 0 or any(size is not None for size in found["stats"].values())
        self.classes = classes_of(found["stats"], self.guest.memory)
        if found["refaults"] is None:
            return
        now, again = time.monotonic(), int(found["refaults"])
        if self._seen_balloon is not None:
            then, before = self._seen_balloon
            self.refaults += max(0, again - before) / max(now - then, 1e-3)
        self._seen_balloon = (now, again)

    def demand(self) -> Demand:
        """For the policy. A VM that has not had to give up pages since the last look would not use much more now than
        it has, what it grows by, and what its guest would take out of the balloon."""
        guest = self.guest
        found = Demand(
            guest.name, guest.memory, guest.shares, guest.reservation, guest.limit, self.resident, self.classes,
            self.has_balloon, guest.swap, self.working_set, self.refaults, None, self.ballooned, self.swapped,
            self.returned,
        )  # fmt: skip
        if self._pressing is False:
            held = 0 if found.content else self.ballooned
            found.wanted = self.resident + held + 2 * self._grown + _ROOM + self.resident // _GROWING
        return found

    # ---- telling ----

    def follow(self, target: Target) -> None:
        """Has it live by what was decided. A VMM begins to give up pages a block and a little below its limit, and so
        its VM has less than that on average; the limit is higher by a block, then by as much as this is seen to be."""
        self.target = target
        if self._client is None:
            return
        if self._pressing:
            error = int(_AIM * target.ceiling) - self.resident
            most = BLOCK_SIZE + target.ceiling // 64
            self._slack = min(most, max(0, self._slack + error // (4 if error > 0 else 2)))
        limit = min(self.guest.memory, max(LEAST, target.ceiling + self._slack))
        with suppress(PyvmmError):  # answers are passed over: the next look says how it is
            if self.limit is None or abs(limit - self.limit) >= _STEP:
                self._client.send("swap", target=limit, wait=False)
                self.limit = limit
            balloon = min(target.balloon, self.guest.memory) // PAGE_SIZE * PAGE_SIZE
            if self.has_balloon and balloon != self._balloon:
                self._client.send("balloon", target=balloon)
                self._balloon = balloon

    def ask_to_stop(self) -> None:
        """The guest is to end."""
        with suppress(PyvmmError):
            client = self._connected()
            if client is not None:
                if self.vmm.pidfd is None:
                    self.vmm.found(client.ask("status")["pid"])
                client.send("stop")

    def over(self) -> None:
        """Its process has ended: why."""
        self.disconnect()
        status = self.vmm.status()
        self.vmm.close()
        self.state = "ended" if not status else "died"
        if status is None:
            self.why = "it ran before this daemon, and its status is not known"
        else:
            self.why = f"signal {-status}" if status < 0 else f"status {status}"
            if status > 0 and (said := self._folder.last_line(self.guest.name)):
                self.why += f": {said}"
        self.resident = self.swapped = self.ballooned = self.shared = 0
        self.refaults, self.returned = 0.0, 0.0
        self.classes, self.working_set, self.target = None, None, None

    def disconnect(self) -> None:
        """What it was told stays."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        target = self.target
        return {
            "name": self.guest.name,
            "state": self.state,
            "why": self.why,
            "pid": self.vmm.pid if self.alive else None,
            "memory": self.guest.memory,
            "shares": self.guest.shares,
            "reservation": self.guest.reservation,
            "resident": self.resident,
            "limit": self.limit if self.alive else None,
            "entitlement": None if target is None else target.entitlement,
            "ceiling": None if target is None else target.ceiling,
            "balloon_target": target.balloon if target is not None and self.has_balloon else None,
            "ballooned": self.ballooned,
            "swapped": self.swapped,
            "shared": self.shared,
            "refaults": self.refaults,
            "working_set": None if self.working_set is None else self.working_set.size,
            "classes": None if self.classes is None else self.classes.as_dict(),
        }
