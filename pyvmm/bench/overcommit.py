# overcommit.py: three unlike guests in half of what they were promised, by policy (measure P14). Units: MiB, seconds.
"""Three guests `classes`, mostly free, mostly cache, mostly active, in VMM processes of a fleet, with 47 % of their
memory for all; once with all of it, then once a round with each policy, each time begun anew.

Refaults are pages that a guest touched and the host read from its swap, and pages that the guest had given to its
balloon and read again, however long they had been away: for each 1,000 touches, summed over the guests, since a guest
that waits for pages does less and so asks for fewer in a second. Slowdown: how many times as long a touch takes as with
all memory; the mean of the three, and the worst. Taken: what of the promised memory was not resident, at the end: the
policies must be alike in it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyvmm.bench import Collected, Result
from pyvmm.control.client import Client
from pyvmm.errors import BadInput, ControlError
from pyvmm.fleet.config import Fleet, Guest
from pyvmm.fleet.daemon import Daemon
from pyvmm.fleet.folder import Folder
from pyvmm.fleet.policy import POLICIES
from pyvmm.layout import MIB, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIZE, _QUICK_SIZE = 64 * MIB, 32 * MIB
_SHARE = 0.47
_GUESTS = {
    "mostly free": "fixed=5 heap=15 cache=10 hot=60",
    "mostly cache": "fixed=5 heap=15 cache=75 hot=10",
    "mostly active": "fixed=5 heap=35 cache=50 hot=85",
}
_INTERVAL = 0.2
_STARTING = 30.0
_SETTLING, _QUICK_SETTLING = 5.0, 0.6
_SECONDS, _QUICK_SECONDS = 6.0, 0.3
_ALL = "all memory"


class _Look:
    """What one VM has done so far: touches, refaults of the host's and of the guest's; and what it has now: bytes."""

    def __init__(self, client: Client) -> None:
        status, swap, balloon = client.ask("status"), client.ask("swap"), client.ask("balloon")
        self.touches = int(status["progress"]["count"])
        self.swap = 0 if swap["swap"] is None else int(swap["swap"]["reads"])  # with 4k pages one for each touch
        self.guest = int(balloon["refaults"] or 0)
        self.swapped = int(status["pages"]["homes"]["swap"]) * PAGE_SIZE
        pages = status["pages"]
        self.resident = (pages["large"] + pages["small"] + pages["homes"]["aside"]) * PAGE_SIZE
        self.ballooned = int(balloon["actual"])
        self.at = time.perf_counter()


def _fleet(size: int, policy: str) -> Fleet:
    budget = len(_GUESTS) * size
    fleet = Fleet(budget if policy == _ALL else int(budget * _SHARE), [])
    fleet.interval = _INTERVAL
    if policy != _ALL:
        fleet.policy = policy
    for number, append in enumerate(_GUESTS.values()):
        guest = Guest(f"v{number}", "classes", size)
        guest.append, guest.balloon, guest.options = append, True, ["--pages", "4k"]
        fleet.guests.append(guest)
    return fleet


@contextmanager
def _running(fleet: Fleet) -> Iterator[list[Client]]:
    """The fleet, with a connection to each of its VMs, which have begun their work."""
    path = tempfile.mkdtemp(prefix="pyvmm-bench-")
    clients: list[Client] = []
    try:
        folder = Folder(path)
        daemon = Daemon(fleet, folder, lambda line: None)
        thread = threading.Thread(target=daemon.run, name="fleet", daemon=True)
        thread.start()
        try:
            for guest in fleet.guests:
                clients.append(_begun(folder.of(guest.name, "sock")))
            yield clients
        finally:
            for client in clients:
                client.close()
            with Client(folder.socket) as client:
                client.ask("stop")
            thread.join()
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _begun(path: str) -> Client:
    """Raises ControlError where nothing begins there."""
    end = time.monotonic() + _STARTING
    while time.monotonic() < end:
        try:
            client = Client(path)
        except BadInput:  # not yet
            time.sleep(0.02)
            continue
        while time.monotonic() < end:
            progress = client.ask("status")["progress"]
            if progress is not None and progress["count"]:
                return client
            time.sleep(0.02)
        client.close()
    raise ControlError(f"{os.path.basename(path)}: the guest has not begun")


def _round(found: Collected, policy: str, size: int, settling: float, seconds: float, base: list[float]) -> list[float]:
    """Touches a second of each guest; base: those with all memory."""
    with _running(_fleet(size, policy)) as clients:
        time.sleep(settling)
        before = [_Look(client) for client in clients]
        time.sleep(seconds)
        after = [_Look(client) for client in clients]
    pairs = list(zip(before, after, strict=True))
    speeds = [max(1, new.touches - old.touches) / (new.at - old.at) for old, new in pairs]
    if policy == _ALL:
        return speeds

    def refaults(which: str) -> list[float]:
        each = [(getattr(new, which) - getattr(old, which), max(1, new.touches - old.touches)) for old, new in pairs]
        return [1000 * count / touches for count, touches in each]

    both = [swap + guest for swap, guest in zip(refaults("swap"), refaults("guest"), strict=True)]
    found.add("refaults for 1,000 touches, all guests", policy, "faults", sum(both))
    found.add("of these, by the guests themselves", policy, "faults", sum(refaults("guest")))
    for name, value in zip(_GUESTS, both, strict=True):
        found.add(f"refaults for 1,000 touches, {name}", policy, "faults", value)
    slow = [whole / speed for whole, speed in zip(base, speeds, strict=True)]
    found.add("slowdown, mean", policy, "x", sum(slow) / len(slow))
    found.add("slowdown, worst", policy, "x", max(slow))
    found.add("taken", policy, "MiB", (len(pairs) * size - sum(new.resident for _, new in pairs)) / MIB)
    found.add("in balloons", policy, "MiB", sum(new.ballooned for _, new in pairs) / MIB)
    found.add("in swap", policy, "MiB", sum(new.swapped for _, new in pairs) / MIB)
    return speeds


def measure(quick: bool = False) -> list[Result]:
    """One round; quick: of two policies."""
    found, size = Collected(), _QUICK_SIZE if quick else _SIZE
    settling, seconds = (_QUICK_SETTLING, _QUICK_SECONDS) if quick else (_SETTLING, _SECONDS)
    base = _round(found, _ALL, size, settling, seconds, [])
    for policy in ("class-based", "balloon-only") if quick else POLICIES:
        _round(found, policy, size, settling, seconds, base)
    return found.results()
