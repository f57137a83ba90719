# test_bench.py: each benchmark runs, small and short, and yields what it says. How much that is, no test says.
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

import pyvmm
from pyvmm.bench import Collected, Result, migrate, qemu
from pyvmm.bench.bare import Touched
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
from pyvmm.bench.running import alone, apart, longest_gap, reset_gaps, touching
from pyvmm.cli.bench import BENCHMARKS, QUICK, show
from pyvmm.errors import HostError
from pyvmm.pytest_plugin import needs
from pyvmm.testing.verify_model import ram_hash

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
    "restore": [
        ("VM.restore() to the guest's first work", "16M"),
        ("VM() alone", "8M"),
        ("16M of random data, warm file: exec to the guest's first byte", "pyvmm restore --lazy"),
        ("dense writes, warm file", "pread() of as much"),
        ("1 page in 64, reads, warm file", "lazy, fill none"),
    ],
    "blocks": [
        ("dense, adaptive (2M): warm file", "zstd 256K"),
        ("1 page in 64, by page (2M): reads", "raw 16K"),
    ],
    "streams": [
        ("", "send() and recv(), TCP"),
        ("", "page runs read out of the source"),
        ("", "memcpy()"),
    ],
    "migrate": [
        ("16M of random data: the round", "process_vm_readv()"),
        ("16M of random data: the whole migration", "tcp, post-copy"),
        ("16M of random data: downtime of the idle guest", "local"),
        ("16M of random data: one over another", "tcp, the round / send() and recv()"),
        ("4M written at 10 pages a ms, sequential: stood", "tcp"),
        ("4M written at 10 pages a ms, sequential: gap", "tcp, post-copy"),
        ("4M written as fast as it can: work while it migrates", "4 KiB log (bitmap)"),
        ("16M, 1 % zeros: large pages afterwards / before", "tcp"),
    ],
    "populate": [
        ("4M of large pages: the first pass", "populated"),
        ("4M of small pages: time of populating", "MADV_POPULATE_WRITE"),
    ],
    "save": [
        ("random data", "write() and fsync()"),
        ("half zeros data: size of the file", "raw"),
    ],
    "activity": [
        ("the guest's work, of that while nobody watches", "sampled"),
        ("large pages kept", "broken to small pages"),
    ],
    "reclaim": [
        ("speed", "no limit"),
        ("back from swap", "random"),
        ("large at the end", "activity"),
    ],
    "sharing": [
        ("MiB freed a large page broken", "by count"),
        ("estimated / actual", "all blocks of two VMs"),
        ("estimated / actual", "a guest that runs on"),
    ],
    "doublepaging": [
        ("sequences: read per page written", "naive"),
        ("sequences: reads to bring 64 back", "references"),
        ("the guest swapper: reads for 64 blocks", "replace"),
    ],
    "overcommit": [
        ("refaults for 1,000 touches, all guests", "class-based"),
        ("slowdown, worst", "class-based"),
        ("in balloons", "balloon-only"),
    ],
    "scale": [
        ("guests started a second", "VMM processes"),
        ("a VMM process, of many", "anonymous"),
        ("a VM of one process", "all"),
        ("by RAM: limit, the first", "64M"),
        ("64M / 32M of RAM", "VM()"),
        ("a GiB of RAM more", "snapshot, untouched: its file"),
    ],
    "soak": [
        ("in all", "wrong"),
        ("operations a second", "all, with full checks"),
        ("operations a second, of the time of that kind", "remove block"),
    ],
    "swap": [
        ("out: random data", "swap, unchanged"),
        ("out to the disk: text", "swap"),
        ("in: text", "preadv"),
        ("touched, from the disk: random data", "swap"),
        ("bytes of pages / bytes stored: text", "swap"),
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


@cache
def measured(name):
    done = call(name, "--quick", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", QUICK)
def test_data(name):
    found = measured(name)
    assert found["benchmark"] == name
    results = {(each.get("group", ""), each["name"]): each for each in found["results"]}
    assert set(RESULTS[name]) <= set(results)
    for each in found["results"]:
        if not each["values"]:
            assert (each["name"], each["median"]) == (qemu.MISSING, None)
            assert qemu.QEMU is None
            continue
        assert min(each["values"]) <= each["median"] <= max(each["values"])
        assert each["unit"] in (
            "s",
            "%",
            "bytes",
            "M/s",
            "MiB/s",
            "GB/s",
            "MiB",
            "reads",
            "faults",
            "% large",
            "x",
            "blocks/s",
            "VMs/s",
            "ops/s",
            "operations",
            "checks",
            "pages",
            "seeds",
        )


@pytest.mark.parametrize("name", QUICK)
def test_tables(name, capsys, monkeypatch):
    """Of the same data: measuring it again would take as long again."""
    monkeypatch.setenv("COLUMNS", "80")
    rows = measured(name)["results"]
    show(name, [Result(row["name"], row["unit"], tuple(row["values"]), row.get("group", "")) for row in rows])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == BENCHMARKS[name]
    assert max(map(len, lines)) <= 80
    for group, result in RESULTS[name]:
        assert not group or re.sub(r"\W", "", group) in re.sub(r"\W", "", "".join(lines))  # it may be in two lines
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
