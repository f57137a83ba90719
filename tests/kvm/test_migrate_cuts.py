# test_migrate_cuts.py: connections of a migration cut, or stalled, at any frame: it goes on where it can, once.
from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
from mover import Stage
from test_migrate_kills import OPTIONS, ask, survivor_check

from pyvmm.migration.frames import BY_TYPE
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "uffd_guest", "uffd_wp", "thp")

AT_ONCE = 6
EACH = 1 if os.environ.get("PYVMM_CUTS") == "all" else 6
"""One of so many cases is tried; PYVMM_CUTS=all: all 79."""
OFFSET = int(os.environ.get("PYVMM_CUTS_SEED", "0"))
SLOW = 0.03
"""Seconds for each block that goes after the switch."""
SILENCE = 3.0
"""Seconds that stand for the protocol's 15, in tests of stalls."""
LARGE = 7
"""Blocks of a guest with 16 MiB that are large pages."""
FRAMES = {kind.name(): number for number, kind in BY_TYPE.items()}
NEXT = count()


def at(frame, what="cut", let=False, gone=0.0, kinds=None):
    return {"at": FRAMES[frame], "pass": let, "do": what, "gone": gone, "kinds": kinds}


def after(size, what="cut", kinds=None, gone=0.0):
    return {"bytes": size, "do": what, "gone": gone, "kinds": kinds}


def some(seed):
    """Bytes within what goes in all."""
    return random.Random(seed).randrange(1 << 10, 6 << 20)


# Who has the guest at the end, and what is cut, in which mode.
BEFORE = [
    *(("source", mode, [at("WELCOME")]) for mode in OPTIONS),
    *(("source", mode, [at("ROUND")]) for mode in ("precopy", "hybrid")),
    *(("source", mode, [at("ROUND_DONE", gone=0.3)]) for mode in ("precopy", "hybrid")),
    *(("source", mode, [at("STATES")]) for mode in OPTIONS),
    *(("source", mode, [at("PREPARE", gone=0.3)]) for mode in OPTIONS),
    *(("source", mode, [at("READY")]) for mode in OPTIONS),
    *(("source", "precopy", [after(some(seed))]) for seed in range(3)),
    *(("source", "hybrid", [after(some(seed), kinds=["pages0"])]) for seed in range(2)),
]
BEHIND = [
    *(("either", mode, [at("READY", let=True)]) for mode in OPTIONS),
    *(("target", mode, [at("COMMIT", gone=0.2)]) for mode in OPTIONS),
    *(("target", mode, [at("COMMIT", let=True)]) for mode in OPTIONS),
    *(("target", mode, [at("TAKEN", gone=0.2)]) for mode in OPTIONS),
    *(("target", mode, [at("COMPLETE", gone=0.2)]) for mode in OPTIONS),
    *(("target", mode, [at("COMPLETE", kinds=["control"])]) for mode in OPTIONS),
    *(("target", mode, [at("DONE")]) for mode in OPTIONS),
    *(("target", "postcopy", [after(some(seed), gone=0.2)]) for seed in range(3)),
    *(("target", "postcopy", [after(some(seed), kinds=["pages0"])]) for seed in range(3)),
    *(("target", "postcopy", [after(some(seed), kinds=["urgent"])]) for seed in range(3)),
    ("target", "postcopy", [after(some(9), kinds=["control"])]),
    ("target", "postcopy", [after(some(9), kinds=["witness"])]),
    ("target", "postcopy", [after(some(9), kinds=["urgent", "witness"])]),
    *(("target", mode, [at("COMMIT"), at("COMMIT")]) for mode in ("precopy", "hybrid")),
    *(("target", mode, [at("COMMIT"), at("TAKEN", gone=0.2)]) for mode in OPTIONS),
    *(("target", mode, [at("TAKEN"), at("RESUMED")]) for mode in OPTIONS),
    *(("target", mode, [at("TAKEN"), at("RESUMED", let=True)]) for mode in OPTIONS),
    *(("target", mode, [at("TAKEN"), at("HAVE")]) for mode in OPTIONS),
    ("target", "postcopy", [after(1 << 20), at("HAVE", let=True)]),
    ("target", "postcopy", [after(1 << 20), after(2 << 20, kinds=["pages0"])]),
]
STALLS = [
    ("source", "precopy", [at("ROUND_DONE", "stall")]),
    ("source", "precopy", [after(1 << 20, "stall", kinds=["pages0"])]),
    ("source", "postcopy", [at("PREPARE", "stall", kinds=["control"])]),
    ("target", "precopy", [at("COMMIT", "stall"), at("RESUMED", "stall")]),
    ("target", "postcopy", [after(1 << 20, "stall")]),
    ("target", "postcopy", [after(1 << 20, "stall", kinds=["pages0"])]),
    ("target", "postcopy", [after(1 << 20, "stall", kinds=["urgent"])]),
    ("target", "hybrid", [at("TAKEN", "stall", kinds=["control"])]),
]


@pytest.fixture(scope="module")
def stages():
    made = {silence: Stage(silence) for silence in (15, SILENCE)}
    yield made
    for each in made.values():
        each.close()


def happen(stage, folder, case, transport):
    _, mode, rules = case
    number = next(NEXT)
    there, between = (f"unix:{folder}/{number}{name}" if transport == "unix" else "tcp:0" for name in "tb")
    target = stage.actor("destination", listen=there, points={})
    actors = [target]
    try:
        relay = stage.actor("relay", listen=between, to=target.until("address")["address"], rules=rules)
        actors.append(relay)
        to = relay.until("address")["address"]
        options = {"mode": mode, **OPTIONS[mode]}
        source = stage.actor("source", options=options, points={"slow": SLOW})
        actors.append(source)
        assert "ready" in source.until("ready")
        source.order(do="migrate", to=to)
        ends = {"source": source.until("result", seconds=25), "target": target.until("result", seconds=25)}
        done = [relay.until("did", seconds=5)["did"] for _ in rules]
        assert len(done) == len(rules)
        return judge(case, source, target, ends)
    finally:
        for actor in actors:
            actor.close()


def judge(case, source, target, ends):
    who, _, rules = case
    states = {"source": ask(source)["state"], "target": ask(target)["state"]}
    said = f"{case}: {ends}, {states}, source: {source.said}, target: {target.said}"
    assert list(states.values()).count("runs") == 1, said
    winner = "target" if states["target"] == "runs" else "source"
    assert who in (winner, "either"), said
    assert survivor_check(source if winner == "source" else target) == "", said
    if winner == "source":
        assert ends["source"]["result"], said
        assert ends["target"]["result"], said
        return
    assert states["source"] == "ended", said
    assert ends["source"]["result"] == ends["target"]["result"] == "", said
    assert ends["target"]["large"][1] == ends["source"]["large"][0] == LARGE, said
    quiet = all(rule.get("kinds") == ["witness"] or rule.get("at") == FRAMES["DONE"] for rule in rules)
    assert (ends["source"]["breaks"] >= 1) != quiet, said


def all_of(stages, folder, cases, transport, silence):
    cases = cases[OFFSET % EACH :: EACH]

    def one(case):
        try:
            happen(stages[silence], folder, case, transport)
        except AssertionError as error:
            return f"{case}: {error}"
        return ""

    with ThreadPoolExecutor(AT_ONCE) as pool:
        wrong = [text for text in pool.map(one, cases) if text]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(cases)}:", *wrong])


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_cut_before_the_commit_point(stages, tmp_path, transport):
    all_of(stages, tmp_path, BEFORE[transport == "tcp" :: 2], transport, 15)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_cut_behind_it(stages, tmp_path, transport):
    all_of(stages, tmp_path, BEHIND[transport == "tcp" :: 2], transport, 15)


def test_stalled(stages, tmp_path):
    all_of(stages, tmp_path, STALLS, "unix", SILENCE)
