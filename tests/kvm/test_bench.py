# test_bench.py: each benchmark runs, small and short, and yields what it says. How much that is, no test says.
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyvmm
from pyvmm.bench.bare import Touched
from pyvmm.bench.running import alone, apart, longest_gap, reset_gaps, touching
from pyvmm.cli.bench import BENCHMARKS, QUICK
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "dirty_bitmap", "initially_set", "dirty_ring", "uffd_guest", "uffd_wp", "uffd_move_large")

DEADLINE = 60
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(pyvmm.__file__).parents[1]), "COLUMNS": "80"}

# name -> some (group, result) that must be there
RESULTS = {
    "traces": [
        ("sequential, as fast as it can: speed", "coarse, never refined"),
        ("zipf, 10 pages a ms: reported", "ring"),
        ("16M of small pages: longest stall of a vCPU", "stop-all 4 KiB"),
        ("16M of large pages: time to install", "helper-thread 4 KiB"),
    ],
    "faults": [
        ("large block: removed, touched by the guest", "move"),
        ("KVM's 2 MiB mappings afterwards / before", "copy"),
        ("small page, touched by the guest: the vCPU's stall", "bare loop"),
        ("small page, touched by a thread: its wait", "engine, move"),
    ],
    "idle": [
        ("a guest writes to all its memory: writes a second", "idle engine"),
        ("memory of the page map, of the guest's", "process grown by"),
        ("a block, while the guest writes to all memory", "break"),
    ],
}


def call(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pyvmm", "bench", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        env=ENVIRONMENT | environment,
    )


@pytest.mark.parametrize("name", QUICK)
def test_data(name):
    done = call(name, "--quick", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["benchmark"] == name
    results = {(each["group"], each["name"]): each for each in found["results"]}
    assert set(RESULTS[name]) <= set(results)
    for each in results.values():
        assert each["values"]
        assert min(each["values"]) <= each["median"] <= max(each["values"])
        assert each["unit"] in ("s", "%", "M/s", "MiB/s")


@pytest.mark.parametrize("name", QUICK)
def test_tables(name):
    done = call(name, "--quick")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == BENCHMARKS[name]
    assert max(map(len, lines)) <= 80
    for group, result in RESULTS[name]:
        assert any(line.rstrip() == group for line in lines)
        assert any(line.startswith(f"│ {result.split()[0]}") for line in lines)


def test_a_host_without_moves_and_rings_is_measured_too():
    done = call("faults", "--quick", "--json", PYVMM_WITHOUT="uffd_move")
    assert (done.returncode, done.stderr) == (0, "")
    assert {each["name"] for each in json.loads(done.stdout)["results"]} == {
        "copy", "copy, arming", "bare loop", "bare loop, copy", "engine, copy",
    }  # fmt: skip
    done = call("traces", "--quick", "--json", PYVMM_WITHOUT="dirty_ring")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ring" not in {each["name"] for each in json.loads(done.stdout)["results"]}


@pytest.mark.parametrize(("name", "words"), [("exits", "benchmark exits is quick anyway"), ("none", "no benchmark")])
def test_what_has_no_quick(name, words):
    done = call(name, "--quick")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"pyvmm: {words}")


def test_those_without_groups_are_one_table():
    done = call("exits")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == BENCHMARKS["exits"]
    assert sum(line.startswith("┏") for line in lines) == 1
    assert [line.split()[1] for line in lines if line.startswith("│")] == ["bare", "C", "Python"]


def test_a_pause_is_no_gap_and_affinity_is_given_back():
    with touching(16 << 20, "gaps=1") as vm:
        vm.pause()
        vm.wait(0.3)
        before = os.sched_getaffinity(0)
        with alone(vm):
            reset_gaps(vm)
            with apart(vm):
                assert os.sched_getaffinity(0) < before or len(before) == 1
            assert longest_gap(vm) < 0.3
        assert os.sched_getaffinity(0) == before
        assert os.sched_getaffinity(vm.vcpus[0].native.tid) == before


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("move", [True, False])
def test_all_pages_that_are_touched_were_away(bare, move):
    with Touched(bare, move) as touched:
        for _ in range(2):
            waited, answered = touched.measure(20)  # of the bare loop: returns when so many faults were answered
            assert waited > 0
            assert answered > 0  # it may be longer: who waited goes on before the answer is through
