# test_migrate_failures.py: what goes wrong before the commit point leaves the guest where it was, and says why.
from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_help import until
from mover import Stage
from test_migrate_cuts import after, at, happen
from test_migrate_kills import OPTIONS, ask, survivor_check

import pyvmm
from pyvmm.control.client import Client
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "uffd_guest", "uffd_wp", "thp")

PATIENCE = 20
PYVMM = [sys.executable, "-m", "pyvmm"]


@pytest.fixture(scope="module")
def stage():
    made = Stage(3.0)
    yield made
    made.close()


@pytest.fixture
def actors():
    made = []
    yield made
    for actor in made:
        actor.close()


def attempt(stage, actors, folder, theirs=None, ours=None, mode="precopy", role="destination"):
    """Both sides of one that is told to begin."""
    address = f"unix:{folder}/s"
    target = stage.actor(role, listen=address, **({} if role == "silent" else {"points": {}}), **(theirs or {}))
    actors.append(target)
    options = {"mode": mode, **OPTIONS[mode], **(ours or {}).pop("options", {})}
    source = stage.actor("source", points={}, options=options, **(ours or {}))
    actors.append(source)
    assert "address" in target.until("address")
    assert "ready" in source.until("ready")
    source.order(do="migrate", to=address)
    return source, target


def goes_on(source):
    """Why it came to nothing, and the guest runs on at the source."""
    found = source.until("result")
    assert "\n" not in found["result"]
    assert found["state"] == "runs", found
    assert survivor_check(source) == ""
    return found["result"]


# ---- the destination ----


def still_listens(target):
    """Who is refused is in nobody's way; until the destination is ended."""
    target.order(do="cancel")
    found = target.until("result")
    assert (found["result"], found["state"]) == ("enough", "none")


def test_it_has_no_memory_for_the_guest(stage, actors, tmp_path):
    source, target = attempt(stage, actors, tmp_path, {"limits": {"memory": 48 << 20}}, {"memory": "128M"})
    assert "refuses" in (why := goes_on(source))
    assert "memory" in why.lower()
    still_listens(target)


def test_it_says_nothing(stage, actors, tmp_path):
    source, _ = attempt(stage, actors, tmp_path, role="silent")
    assert "does not answer" in goes_on(source)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"cpus": 4096}, "4096 vCPUs"),
        ({"xsave_size": 64}, "XSAVE"),
        ({"memory": 4096}, "RAM|memory"),
        ({"states": {"vcpu": 99}}, "vcpu"),
    ],
)
def test_a_shape_that_it_cannot_be(stage, actors, tmp_path, shape, why):
    source, target = attempt(stage, actors, tmp_path, ours={"shape": shape})
    told = goes_on(source)
    assert "refuses" in told
    assert any(word in told for word in why.split("|")), told
    still_listens(target)


# ---- what comes is not of the protocol ----


GARBAGE = [
    *(("source", "precopy", [at(frame, "garbage")]) for frame in ("WELCOME", "LARGE", "ROUND", "ROUND_DONE")),
    *(("source", "postcopy", [at(frame, "garbage")]) for frame in ("STATES", "PREPARE", "READY")),
    ("source", "hybrid", [at("AWAY", "garbage")]),
    ("source", "precopy", [after(1 << 20, "garbage")]),
    # a connection that does not work is made anew from here on
    *(("target", mode, [at(frame, "garbage")]) for mode, frame in (("precopy", "COMMIT"), ("postcopy", "TAKEN"))),
    ("target", "postcopy", [at("COMPLETE", "garbage")]),
]


def test_garbage(stage, tmp_path):
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda case: happen(stage, tmp_path, case, "unix"), GARBAGE))


# ---- the host ----


@pytest.mark.parametrize("mode", list(OPTIONS))
def test_no_room_for_the_capture(stage, actors, tmp_path, mode):
    """A migration never fails for that."""
    theirs = {"limits": {"file": 4096}, "options": {"capture": str(tmp_path / "there")}}
    ours = {"limits": {"file": 4096}, "options": {"capture": str(tmp_path / "here")}}
    source, target = attempt(stage, actors, tmp_path, theirs, ours, mode)
    assert source.until("result")["result"] == target.until("result")["result"] == ""
    assert survivor_check(target) == ""
    assert ask(source)["state"] == "ended"
    assert (tmp_path / "here").stat().st_size == (tmp_path / "there").stat().st_size == 4096


# ---- the guest ----


def test_the_guest_crashes_meanwhile(stage, actors, tmp_path):
    source, target = attempt(stage, actors, tmp_path, ours={"options": {"bandwidth": "8M"}})
    source.until("event")
    source.order(do="crash")
    assert "ended meanwhile" in source.until("result")["result"]
    source.order(do="wait", seconds=5)
    assert source.until("waited")["kind"] == "GuestCrash"
    assert "ended meanwhile" in target.until("result")["result"]


# ---- signals to the commands ----


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Runs `pyvmm`; what is left of it is killed at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(pyvmm.__file__).parents[1]))
    made = []

    def start(*arguments):
        pipe = subprocess.PIPE
        made.append(
            subprocess.Popen([*PYVMM, *arguments], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
        )
        return made[-1]

    yield start
    for one in made:
        one.kill()
        one.communicate(timeout=PATIENCE)


@pytest.fixture
def moving(commands):
    """run, receive, migrate, in the midst of the first round or, mode postcopy, behind the switch."""

    def begin(*options):
        there = commands("receive", "--listen", "unix:s")
        assert there.stderr.readline() == "pyvmm: listening at unix:s\n"
        here = commands("run", "verify", "--mem", "64M", "--control", "c")
        assert here.stdout.readline().startswith("verify: ")
        asked = commands("migrate", "c", "--to", "unix:s", *options)

        def begun():
            with Client("c") as client:
                last = (client.ask("status")["migration"] or {}).get("last") or {}
                return last.get("event") == "moving"

        until(begun)
        return here, there, asked

    return begin


def runs_on():
    with Client("c") as client:
        begin = client.ask("status")["progress"]["passes"]
        until(lambda: client.ask("status")["progress"]["passes"] > begin + 1)
        assert client.ask("status")["state"] == "running"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_migrate_is_interrupted(moving, number):
    _, there, asked = moving("--bandwidth", "8M")
    asked.send_signal(number)
    assert asked.wait(PATIENCE) == 128 + number
    assert "cancelled: the guest runs on" in asked.stderr.read()
    assert there.wait(PATIENCE) == 1
    assert "cancelled" in there.stderr.read()
    runs_on()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_receive_is_interrupted(moving, number):
    _, there, asked = moving("--bandwidth", "8M")
    there.send_signal(number)
    assert there.wait(PATIENCE) == 128 + number
    assert asked.wait(PATIENCE) == 1
    assert "interrupted: the guest runs on" in asked.stderr.read()
    runs_on()


def test_run_is_interrupted(moving):
    here, there, asked = moving("--bandwidth", "8M")
    here.send_signal(signal.SIGTERM)
    assert here.wait(PATIENCE) == 128 + signal.SIGTERM
    assert asked.wait(PATIENCE) == 1
    assert there.wait(PATIENCE) == 1
    assert there.stderr.read().count("\n") == 1


def test_receive_is_killed(moving):
    _, there, asked = moving("--bandwidth", "8M")
    there.kill()
    assert asked.wait(PATIENCE) == 1
    assert "the guest runs on" in asked.stderr.read()
    runs_on()
