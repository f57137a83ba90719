# control_help.py: a VM and a migration that are none, for tests of the control socket and of what people do with it.
from __future__ import annotations

import threading
import time
from collections import Counter
from queue import SimpleQueue
from types import SimpleNamespace

from pyvmm.errors import LifecycleError, MigrationError
from pyvmm.memory.counts import PageCounts
from pyvmm.memory.homes import HOMES
from pyvmm.migration.events import Connected, Failed, Finished, Moving, Report, RoundEnded, Switched

PATIENCE = 10.0

CONNECTED = Connected(0.001, peer="the destination at unix:/there", mode="precopy", channels=1, local=False)
MOVING = Moving(0.1, round=1, sent=100, pages=16384, bytes=409600, bandwidth=4e8)
ROUND = RoundEnded(0.2, round=1, pages=16384, seconds=0.1, dirty=77, dirty_rate=770.0, bandwidth=6.4e8, expected=0.0123)
SWITCHED = Switched(0.3, downtime=0.0042, away=0)


def report(**fields):
    """What a source says at the end."""
    found = Report("source", "precopy", "unix", 1, 64 << 20)
    found.seconds, found.downtime = 0.3, {"stop": 0.0002, "last round": 0.003, "switch": 0.001}
    found.rounds = [ROUND]
    found.wire_bytes, found.large_before, found.large_after = 5 << 20, 30, 29
    for name, value in fields.items():
        setattr(found, name, value)
    return found


class FakeMigration:
    """Tells what its test has it tell. `to` and `options`: what it was asked for."""

    def __init__(self, to="", **options):
        self.to, self.options = to, options
        self.done = False
        self.reason = None
        self._events = SimpleQueue()
        self._ended = threading.Event()
        self._outcome = None

    def tell(self, *events):
        for event in events:
            if isinstance(event, (Finished, Failed)):
                self._outcome, self.done = event, True
                self._ended.set()
            self._events.put(event)

    def finish(self, **fields):
        self.tell(SWITCHED, Finished(0.4, report=report(**fields)))

    def __iter__(self):
        while True:
            yield (event := self._events.get(timeout=PATIENCE))
            if isinstance(event, (Finished, Failed)):
                return

    def result(self, timeout=None):
        assert self._ended.wait(PATIENCE if timeout is None else timeout)
        if isinstance(self._outcome, Failed):
            raise MigrationError(self._outcome.reason)
        return self._outcome.report

    def cancel(self, reason=""):
        self.reason = reason
        if not self.done:
            self.tell(Failed(0.2, reason=f"cancelled: {reason}", runs=True))


class FakeVm:
    """What a control socket sees of a VM. `asked`: how often it was to do what."""

    def __init__(self):
        self.memory = SimpleNamespace(size=64 << 20, hugetlb=False, pages=self._pages, engine=self)
        self.vcpus = [None, None]
        self.balloon = None
        self.started, self.ended, self.paused = True, False, False
        self.asked = Counter()
        self.stopped = None
        self.made = []
        self.migrations = SimpleQueue()
        self.holding = None
        self.homes = dict.fromkeys(HOMES[1:], 0)

    def _pages(self):
        if self.holding is not None:
            assert self.holding.wait(PATIENCE)
        return PageCounts(16384, 8192, 92, self.homes, False)

    def at_home(self, home):
        return SimpleNamespace(take=lambda first, count: [(first, count)] if self.homes[home] else [])

    def progress(self):
        self.asked["progress"] += 1
        work = [SimpleNamespace(writes=7), SimpleNamespace(writes=8)]
        return SimpleNamespace(
            guest="verify", status="running", detail=0, count=4321, passes=3, longest_gap=0.0015, work=work
        )

    def mappings(self):
        return {"pages_4k": 92, "pages_2m": 16, "pages_1g": 0}

    def pause(self):
        self.asked["pause"] += 1
        self.paused = True
        return 0.001

    def resume(self):
        if not self.paused:
            raise LifecycleError("the VM is not paused")
        self.asked["resume"] += 1
        self.paused = False

    def request_stop(self, status=0):
        self.stopped, self.ended = status, True

    def migrate(self, to, **options):
        self.made.append(FakeMigration(to, **options))
        self.migrations.put(self.made[-1])
        return self.made[-1]

    def migration(self):
        """The next one that is begun."""
        return self.migrations.get(timeout=PATIENCE)


def until(condition, seconds=PATIENCE):
    """Waits for what another thread does soon."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
