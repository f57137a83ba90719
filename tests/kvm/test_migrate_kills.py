# test_migrate_kills.py: kill -9 of either side of a migration, at any moment: the guest runs once, or is told as lost.
from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from mover import Stage

from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "uffd_guest", "uffd_wp", "thp")

KILLS = int(os.environ.get("PYVMM_KILLS", "36"))
SEED = int(os.environ.get("PYVMM_KILLS_SEED", "0"))
AT_ONCE = 4
MODES = ["precopy", "postcopy", "hybrid"]
SLOW = 0.02
"""Seconds for each block that goes after the switch."""
OPTIONS = {
    "precopy": {"downtime": 5, "bandwidth": "128M"},
    "postcopy": {},
    "hybrid": {"downtime": 0.001, "rounds": 2, "bandwidth": "128M", "throttle": False},
}
LONG = {"precopy": 0.45, "postcopy": 0.45, "hybrid": 0.75}
"""Seconds that a migration takes here, and some more."""
FIRST = ["send HELLO", "sent HELLO", "comes WELCOME", "sent LARGE"]
ROUND = ["send ROUND", "sent ROUND", "comes ROUND_DONE", "came ROUND_DONE"]
SWITCH = [
    "decides offered", "decided offered", "sent STATES", "send PREPARE", "sent PREPARE", "comes READY", "decides given",
    "decided given", "sent COMMIT", "comes TAKEN",
]  # fmt: skip
LAST = ["comes COMPLETE", "came COMPLETE", "send DONE", "sent DONE"]
FILLED = ["comes STATES", "comes PREPARE", "decides ready", "decided ready", "sent READY", "comes COMMIT"]
TAKEN = ["decides taken", "decided taken", "send TAKEN", "sent TAKEN"]
POINTS = {
    "source": [*FIRST, *ROUND, *SWITCH, "piece", *LAST],
    "destination": [
        "send WELCOME", "sent WELCOME", "comes ROUND", "send ROUND_DONE", *FILLED, *TAKEN, "piece", "send COMPLETE",
        "sent COMPLETE", "comes DONE",
    ],
}  # fmt: skip
BEGIN = {"source": 13, "destination": 9}
"""The point that comes first: about the commit point, since few kills do not get far."""


@pytest.fixture(scope="module")
def stage():
    with_all = Stage()
    yield with_all
    with_all.close()


class Kill:
    """One of them: what follows from its number."""

    def __init__(self, number):
        rng = random.Random(number)
        self.mode = MODES[number % 3]
        self.side = ("source", "destination")[number // 3 % 2]
        self.transport = rng.choice(("unix", "tcp", "local"))
        self.delay = rng.uniform(0, LONG[self.mode])
        points = [
            point
            for point in POINTS[self.side]
            if not (self.mode == "postcopy" and "ROUND" in point) and not (self.mode == "precopy" and point == "piece")
        ]
        self.point = points[(BEGIN[self.side] + number // 12) % len(points)] if number // 6 % 2 else None
        # touches may bring all but the first piece of what a destination is sent
        self.count = rng.randrange(1, 8) if self.point == "piece" and self.side == "source" else 1
        self.text = f"{number}: {self.mode}, {self.transport}, the {self.side} killed " + (
            f"after {self.delay:.3f} s" if self.point is None else f"at '{self.point}' ({self.count})"
        )


def happen(stage, folder, number):
    """What is wrong after it, and what became of the guest."""
    kill = Kill(number)
    listen = "tcp:0" if kill.transport == "tcp" else f"{kill.transport}:{folder}/{number}"
    death = {"die": kill.point, "count": kill.count}
    points = {
        side: {"slow": SLOW if side == "source" else 0.0, **(death if side == kill.side else {})}
        for side in ("source", "destination")
    }
    target = stage.actor("destination", listen=listen, points=points["destination"])
    source = stage.actor("source", options={"mode": kill.mode, **OPTIONS[kill.mode]}, points=points["source"])
    try:
        assert "ready" in source.until("ready")
        source.order(do="migrate", to=target.until("address")["address"])
        victim, survivor = (source, target) if kill.side == "source" else (target, source)
        if kill.point is None:
            victim.ended(kill.delay)
        else:
            assert victim.ended(15), f"{kill.text}: it did not come there: {so_far(victim)}, {so_far(survivor)}"
        victim.kill()
        assert victim.ended()
        victim.until()
        if kill.side == "source" and not victim.told("hello"):
            found = nobody_came(survivor)
        else:
            found = survivor.until("result")
        assert "result" in found, f"{kill.text}: the survivor has gone too: {survivor.said}"
        return fate(kill, victim, survivor, found)
    finally:
        source.close()
        target.close()


def so_far(actor):
    """All that it has said."""
    actor.order(do="state")
    actor.until("state")
    return actor.said


def nobody_came(target):
    """What the destination ends with: it need not have heard of the source at all, and then it goes on listening."""
    try:
        return target.until("result", seconds=2)
    except AssertionError:
        target.order(do="cancel")
    found = target.until("result")
    assert found["result"] == "enough"
    return found


def fate(kill, victim, survivor, found):
    state = ask(survivor)
    check = survivor_check(survivor) if state["state"] == "runs" else None
    judge = source_killed if kill.side == "source" else destination_killed
    told = judge(kill, victim, survivor, found["result"], state)
    all_of_it = f"{kill.text}: {told or check}: {found}, {state}; killed: {victim.said}; survived: {survivor.said}"
    assert not told, all_of_it
    assert not check, all_of_it
    assert "\n" not in found["result"]
    return state["state"]


def ask(actor):
    actor.order(do="state")
    return actor.until("state")


def survivor_check(actor):
    actor.order(do="check")
    return actor.until("check")["check"]


def wait_error(actor):
    """What whoever waits for the guest hears."""
    actor.order(do="wait", seconds=5)
    return actor.until("waited")["waited"]


def destination_killed(kill, victim, source, result, state):
    taken = "taken" in victim.decided
    if not result:
        return "" if taken and state["state"] == "ended" else "the source ends as if all was well"
    if not taken and "taken" not in victim.told("decides"):
        return "" if state["state"] == "runs" else "the source should run it"
    if state["state"] == "runs":  # killed while it was deciding
        return "the source runs a stale guest" if taken else ""
    if "killed" not in result:
        return "the source does not say why"
    why = wait_error(source)
    told = "killed" in why or (why == "migrated" and "switched" in source.told("event"))
    return "" if told else f"whoever waits for it at the source hears: {why}"


def source_killed(kill, victim, target, result, state):
    away = kill.mode != "precopy"
    if "taken" in target.decided:
        if "given" not in victim.told("decides") and (away or "offered" not in victim.told("decides")):
            return "it was taken before it was given"
        if not result:
            return "" if state["state"] == "runs" else "all is there, and it does not run"
        if not away or state["state"] == "runs" or "pages" not in result or "lost" not in result:
            return "the destination has lost it"
        return "" if "lost" in (why := wait_error(target)) else f"whoever waits for it hears: {why}"
    if not result or state["state"] != "none":
        return "the destination has a guest that it never took"
    if not away and "given" in victim.decided:
        return "it was given, and the destination does not run it"
    if not away and "offered" in victim.decided and "ready" in target.decided:
        return "the destination was ready, and does not run it"
    return ""


@pytest.mark.parametrize("part", range(3))
def test_kills(stage, tmp_path, part):
    """PYVMM_KILLS=200 PYVMM_KILLS_SEED=1 pytest ...: so many, others than with another seed."""
    numbers = range(SEED * KILLS + part, (SEED + 1) * KILLS, 3)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        fates = list(pool.map(lambda number: _tried(stage, tmp_path, number), numbers))
    wrong = [text for text, _ in fates if text]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(numbers)}:", *wrong])
    ends = [end for _, end in fates]
    assert {"runs"} < set(ends)


def _tried(stage, folder, number):
    try:
        return "", happen(stage, folder, number)
    except AssertionError as error:
        return str(error), ""
