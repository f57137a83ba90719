# test_fuzz_targets.py: the Python targets of tests/fuzz, without a fuzzer: seeds, and some hundred mutations of them,
# so that the targets go on working while what they call changes.
from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz"
sys.path.append(str(FUZZ))

ROUNDS = {"frames": 500, "shape": 800, "capture": 500, "snapshot": 150, "image": 800, "destination": 400, "virtio": 600}


@pytest.fixture(params=ROUNDS)
def target(request):
    """(name, module, seeds) of a target."""
    seeds = importlib.import_module("seeds").SEEDS
    return request.param, importlib.import_module(f"fuzz_{request.param}"), seeds[request.param]()


def test_each_target_is_run_here_and_by_make_fuzz():
    run, seeds = (importlib.import_module(name) for name in ("run", "seeds"))
    python, native = ({path.stem.removeprefix("fuzz_") for path in FUZZ.glob(f"fuzz_*.{kind}")} for kind in ("py", "c"))
    assert python == ROUNDS.keys() == set(run.PYTHON_TARGETS)
    assert native == run.C_TARGETS.keys()
    assert python | native == seeds.SEEDS.keys()


def test_seeds_and_what_is_made_of_them(target):
    name, module, seeds = target
    rng = random.Random(name)
    for seed in seeds:
        assert len(seed) <= module.MAX_SIZE
        module.one_input(seed)
        assert module.repaired(seed) == seed, "a seed is right, and stays as it is"
    pool = list(seeds)
    for _ in range(ROUNDS[name]):
        data = rng.choice(pool)
        if rng.random() < 0.5:
            data = module.mutate(data, rng)
        else:
            raw = bytearray(data)
            for _ in range(rng.randint(1, 3)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            data = bytes(raw[: rng.choice((len(raw), rng.randrange(len(raw)) + 1))])
            data = module.repaired(data) if rng.random() < 0.7 else data
        module.one_input(data)
        if len(data) <= module.MAX_SIZE:
            pool.append(data)


@pytest.mark.parametrize("name", ["stream", "blocks"])
def test_c_targets_take_their_seeds_and_what_they_make_of_them(name, tmp_path):
    """With the compiler that builds all else, and without sanitizers: what they compare is compared all the same."""
    run = importlib.import_module("run")
    flags = ("-O0", "-Wall", "-Wextra", "-Werror", "-Wshadow")
    program = run.build(name, tmp_path, os.environ.get("CC", "gcc"), flags, (), "replay.c")
    files = []
    for number, seed in enumerate(importlib.import_module("seeds").SEEDS[name]()):
        assert len(seed) <= run.C_MAX_SIZE[name]
        files.append(tmp_path / str(number))
        files[-1].write_bytes(seed)
    done = subprocess.run([program, *files], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_whole_migrations_are_whole_for_the_destination(monkeypatch):
    """The seeds of that target get through to the end, where RAM is compared."""
    target, seeds = (importlib.import_module(name) for name in ("fuzz_destination", "seeds"))
    judged = []
    judge = target._judge
    monkeypatch.setattr(target, "_judge", lambda *given: judged.append(judge(*given)))
    made = seeds.destinations()
    for seed in made:
        target.one_input(seed)
    assert len(judged) == len(made)
