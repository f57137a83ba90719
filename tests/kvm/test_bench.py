# test_bench.py: each benchmark runs, small and short, and yields what it says. How much that is, no test says.
from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import pytest

import pyvmm
from pyvmm import host
from pyvmm.bench import BETTER, Collected, migrate, qemu, traces
from pyvmm.bench.bare import Touched
from pyvmm.bench.catalogue import BENCHMARKS
from pyvmm.bench.checkpoints import (
    Checkpoint,
    await_work,
    bring,
    checkpoint,
    evict,
    folder,
    large_at_last,
    resident,
    restore_mapped,
    run_task,
    waiting,
    write_raw,
)
from pyvmm.bench.mover import Side
from pyvmm.bench.results import read, results_of
from pyvmm.bench.running import alone, apart, longest_gap, reset_gaps, touching
from pyvmm.cli.bench_tables import show
from pyvmm.errors import HostError
from pyvmm.pytest_plugin import needs
from pyvmm.testing.verify_model import ram_hash

pytestmark = needs("kvm", "dirty_bitmap", "initially_set", "dirty_ring", "uffd_guest", "uffd_wp", "uffd_move_large")

DEADLINE = 60
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(pyvmm.__file__).parents[1]), "COLUMNS": "80"}

# The cheap ones; `make bench-quick` runs all of them, and checks what these tests check.
QUICK = ("exits", "streams", "populate", "save")


def call(*arguments, first=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pyvmm", "bench", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        env=ENVIRONMENT | environment,
        preexec_fn=first,
    )


@cache
def measured():
    """What one run of several has told, line by line."""
    done = call(*QUICK, "--quick", "--json", "--check")
    assert (done.returncode, done.stderr) == (0, "")
    head, *entries = map(json.loads, done.stdout.splitlines())
    return head, {entry["benchmark"]: entry for entry in entries}


def test_the_head_says_where_and_of_what():
    head, entries = measured()
    assert head["host"]["kernel"] == os.uname().release
    assert head["features"]["kvm"] is True
    assert (head["version"], head["quick"]) == (pyvmm.__version__, True)
    assert head["command"].endswith("exits streams populate save --quick --json --check")
    assert list(entries) == list(QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_data(name):
    for each in measured()[1][name]["results"]:
        assert min(each["values"]) <= each["median"] <= max(each["values"])
        assert each["unit"] in BETTER


@pytest.mark.parametrize("name", QUICK)
def test_tables(name, capsys, monkeypatch):
    """Of the same data: measuring it again would take as long again."""
    monkeypatch.setenv("COLUMNS", "80")
    show(name, results_of(measured()[1][name]["results"]), quick=True)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[:2]).startswith(BENCHMARKS[name].text)
    assert max(map(len, lines)) <= 80
    for _, side in BENCHMARKS[name].has:
        assert any(line.startswith(f"│ {side.split()[0]}") for line in lines)
    assert sum(line.startswith("┏") for line in lines) == len(
        {each.get("group") for each in measured()[1][name]["results"]}
    )


def test_what_cannot_be_measured_is_told_and_the_others_go_on(tmp_path):
    """Files may have 1 MiB: too little for snapshots, and enough for the one that makes none."""
    log = tmp_path / "log.json"
    limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    done = call("save", "exits", "--quick", "--output", str(log), first=limited)
    assert done.returncode == 1
    assert done.stderr.startswith("pyvmm: save: not measured: ")
    assert done.stderr.count("\n") == 1
    (run,) = read(str(log))
    assert [(entry.benchmark, bool(entry.reason), len(entry.results)) for entry in run.entries] == [
        ("save", True, 0),
        ("exits", False, 3),
    ]


def test_a_host_without_moves_is_measured_too():
    done = call("faults", "--quick", "--json", PYVMM_WITHOUT="uffd_move")
    assert (done.returncode, done.stderr) == (0, "")
    assert {each["name"] for each in json.loads(done.stdout.splitlines()[1])["results"]} == {
        "copy", "copy, arming", "bare loop", "bare loop, copy", "engine, copy",
    }  # fmt: skip


def test_a_host_without_rings_is_measured_too():
    found = Collected()
    with host.without("dirty_ring"):
        traces._workload(found, "any", "size=4M", traces.QUICK)
    assert {each.name for each in found.results() if each.group == "any: speed"} == traces.SIDES.keys() - {"ring"}


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


# ---- what benchmarks of migration are made of ----


def test_what_is_not_here_is_told(tmp_path, monkeypatch, capsys):
    """Neither QEMU nor openssl: their rows say so, or are left out, and the rest is measured."""
    monkeypatch.setattr(migrate, "QEMU", None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    found, path = Collected(), str(tmp_path)
    assert migrate._certificates(path) is None
    size = migrate.QUICK
    size.ways = ("tcp", "tls", "local")
    migrate._speeds(found, size, path, None)
    results = found.results()
    assert {(each.name, each.values) for each in results if not each.values} == {(qemu.MISSING, ())}
    assert {each.name for each in results if "downtime" in each.group} == {"tcp", "local", qemu.MISSING}
    show("migrate", results)
    assert re.search(r"QEMU \(qemu-system-x86\) │ +not here │", capsys.readouterr().out)


def test_a_process_that_is_measured_says_what_went_wrong():
    with Side() as side:
        with pytest.raises(HostError, match="make: no guest 'none'"):
            side.ask("make", memory=8 << 20, guest="none", append="", content="")

        def ends_early():  # while it is made, or looked at
            side.ask("make", memory=8 << 20, guest="touch", append="passes=1 size=1M", content="")
            side.ask("large", passes=10_000_000)

        with pytest.raises(HostError, match="the guest touch ended before"):
            ends_early()
    side.close()
    assert side._process.returncode == 0
    with Side() as side:
        side.tell("make", memory=8 << 20, guest="touch", append="", content="")
        side._process.kill()
        with pytest.raises(HostError, match="has ended by itself"):
            side.answer()


def test_when_a_guest_that_moved_works_again(tmp_path):
    with Side() as source, Side() as target:
        source.ask("make", memory=16 << 20, guest="touch", append="gaps=1 rate=10 size=4M", content="random")
        address = target.ask("listen", at=f"unix:{tmp_path}/in", warm=0, works=True)
        before = time.monotonic()
        moved = source.ask("migrate", to=address, downtime=0.2)
        (worked,) = target.ask("arrived")["worked"]
        assert before < moved["stood"] < worked < time.monotonic()
        assert moved["report"]["total_downtime"] > 0
        assert target.ask("gap") > 0


# ---- what benchmarks of snapshots are made of ----


def test_a_mapped_file_is_the_same_guest(tmp_path):
    with waiting(8 << 20, "size=4M passes=1") as vm:
        before = ram_hash(vm.memory)
        saved = Checkpoint(str(tmp_path / "s"), str(tmp_path / "raw"), 0)
        vm.snapshot(saved.path)
        write_raw(vm.memory, saved.raw)
    with restore_mapped(saved) as vm:
        assert ram_hash(vm.memory) == before
    vm, task = run_task(lambda: restore_mapped(saved))
    with vm:
        assert task.reads is None
        assert 0 < task.restored < task.seconds
        assert vm.run(timeout=20).ok  # the guest has checked what it wrote
    with restore_mapped(saved) as vm:
        assert ram_hash(vm.memory) == before, "the guest wrote into the file"


def test_a_task_reads_what_it_touches(tmp_path):
    with waiting(16 << 20, "size=4M read=1 stride=256K") as vm:
        saved = checkpoint(vm, str(tmp_path / "s"))
    options = {"lazy": True, "fill": False, "pages": "4k"}
    vm, task = run_task(lambda: pyvmm.VM.restore(saved.path, **options))
    with vm:
        assert 16 <= task.reads < 16 << 20 >> 16
        assert task.bytes_read >= 16 * 4096
    vm, task = run_task(lambda: pyvmm.VM.restore(saved.path, lazy=True))
    with vm:
        assert large_at_last(vm) >= saved.large


def test_who_waits_for_work_that_never_comes_is_told(tmp_path):
    with waiting(4 << 20, "passes=1") as vm:
        vm.type("g")
        vm.resume()
        with pytest.raises(HostError, match=r"ended before it had done its work: SUCCESS: 512 writes"):
            await_work(vm, "pass", 2)


def test_files_go_out_of_the_page_cache_and_come_back(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    if not evict(str(path)):
        pytest.skip("the temporary folder is in memory")
    assert resident(str(path)) == 0
    bring(str(path))
    assert resident(str(path)) == 1 << 20


def test_the_folder_goes_however_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(HostError, match=r"fit into .*: set TMPDIR to a folder that has more room"), folder(1 << 60):
        pass
    with suppress(KeyboardInterrupt), folder(1 << 20) as path:
        (Path(path) / "file").write_bytes(b"x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "bench", "restore"], env=ENVIRONMENT | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + DEADLINE
        while not any(tmp_path.iterdir()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130
    finally:
        process.kill()
        process.communicate()
    assert list(tmp_path.iterdir()) == []
