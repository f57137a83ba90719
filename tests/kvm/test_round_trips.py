# test_round_trips.py: what a snapshot has to prove: guests go on from it byte for byte, whatever the options; nothing
# that ends a save leaves half of one; no damaged file is taken for a sound one.
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from engine_help import until

import pyvmm as package
from pyvmm import VM, Snapshot
from pyvmm._native import lib
from pyvmm.errors import FetchError, SnapshotError
from pyvmm.layout import BLOCK_SIZE, GIB, MIB, PAGE_SIZE, Gpa
from pyvmm.machine.outcome import PROGRESS_SIZE, Progress
from pyvmm.machine.restoring import restore
from pyvmm.memory import GuestMemory
from pyvmm.pytest_plugin import needs
from pyvmm.testing.balance import populated
from pyvmm.testing.verify_model import check_memory, ram_hash

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from snapshot_files import AVAILABLE

pytestmark = needs("kvm", "uffd_guest", "thp")

KILLS = 50
FLIPS, CUTS = 1000, 200
RUN_EVERY = 25
"""Of the damaged files, each so many is also given to a VM that runs."""
ORDER = "random"

# ---- round trips ----

OPTIONS = {
    "guest": ["verify", "smp", "timer"],
    "cpus": [1, 4],
    "pages": ["2m", "4k"],
    "codec": list(AVAILABLE),
    "block_size": ["16K", "64K", "2M"],
    "lazy": [False, True],
}


def pairs_of(row):
    """Every two options with their values in a row."""
    return {(i, row[i], j, row[j]) for i in range(len(row)) for j in range(i)}


def pairwise(options):
    """Rows in which every two values of two options meet: each time the row that brings most pairs not met yet."""
    rows = list(product(*options.values()))
    left = set().union(*map(pairs_of, rows))
    chosen = []
    while left:
        chosen.append(max(rows, key=lambda row: len(pairs_of(row) & left)))
        left -= pairs_of(chosen[-1])
    return chosen


ROWS = pairwise(OPTIONS)


def test_each_two_values_meet():
    met = set().union(*map(pairs_of, ROWS))
    for (i, one), (j, other) in product(enumerate(OPTIONS.values()), repeat=2):
        assert i <= j or all((i, a, j, b) in met for a, b in product(one, other))
    assert len(ROWS) < 20


def at_work(vm, guest, **options):
    """A VM paused in the midst of a guest's work; with more work where the guest was through too soon."""
    appends = {
        "verify": [f"order={ORDER} zeros=100"],
        "smp": [f"count={count}" for count in ("1M", "16M", "256M")],
        "timer": ["ticks=150 mode=oneshot", "ticks=4000 mode=oneshot"],
    }
    for append in appends[guest]:
        source = vm(**options)
        source.load(guest, append)
        source.start()
        until(lambda source=source: source.progress().count or source.ended)
        source.pause()
        if not source.ended:
            return source
    pytest.fail("the guest was too quick each time to be saved at work")


def goes_on(machine):
    """The guest itself finds nothing wrong, and gets on."""
    if machine.progress().guest != "verify":
        assert machine.run(timeout=30).ok
        assert "SUCCESS" in machine.printed
        return
    passes = machine.progress().passes + 2
    machine.start()
    until(lambda: machine.progress().passes >= passes or machine.ended)
    machine.pause()
    assert machine.progress().status == "running", machine.printed
    assert check_memory(machine.memory, machine.progress(), order=ORDER, zeros=100) == []


@pytest.mark.parametrize(tuple(OPTIONS), ROWS, ids=["-".join(map(str, row)) for row in ROWS])
def test_round_trip(vm, tmp_path, guest, cpus, pages, codec, block_size, lazy):
    path = str(tmp_path / "s")
    source = at_work(vm, guest, memory="64M", cpus=cpus, pages=pages)
    source.snapshot(path, codec=codec, block_size=block_size)
    with Snapshot.open(path) as snapshot:
        snapshot.check()
    with VM.restore(path, lazy=lazy, pages=pages, generation=False) as target:
        assert ram_hash(target.memory) == ram_hash(source.memory)
        goes_on(target)


@pytest.mark.parametrize("lazy", [False, True])
def test_round_trip_of_4g(vm, tmp_path, lazy):
    """Above the hole too. What was never touched is not read or populated: so no hash is made of all RAM."""
    path = str(tmp_path / "s")
    source = vm(memory="4G", cpus=4)
    source.load("verify", f"order={ORDER} zeros=100 size=48M")
    for gpa in (3 * GIB - PAGE_SIZE, 4 * GIB, 5 * GIB - 5 * PAGE_SIZE):
        source.memory.write(Gpa(gpa), random.Random(gpa).randbytes(PAGE_SIZE))
    source.start()
    until(lambda: source.progress().passes)
    source.pause()
    source.snapshot(path, codec=AVAILABLE[-1])
    with VM.restore(path, lazy=lazy, fill=False, generation=False) as target:
        there = populated(source.memory)
        if lazy:
            in_file = target.memory.engine.page_words & lib.PV_PAGE_HOME != lib.PV_HOME_ZERO
            assert not (in_file & ~there).any()
        else:
            in_file = populated(target.memory)
        blocks = sorted({int(page) * PAGE_SIZE // BLOCK_SIZE for page in (there | in_file).nonzero()[0]})
        assert 24 <= len(blocks) < 40
        for block in blocks:
            gpa = source.memory.gpa_of(block * BLOCK_SIZE // PAGE_SIZE)
            assert target.memory.read(gpa, BLOCK_SIZE) == source.memory.read(gpa, BLOCK_SIZE)
        goes_on(target)
        assert target.memory.pages().large * PAGE_SIZE < 128 * MIB


# ---- what ends a save ----

# Forks a child for each line that it reads. The child runs a guest, and saves it over and over until it is killed.
SAVER = """
import os, sys
import pyvmm.machine.saving, pyvmm.memory.engine, pyvmm.snapshot.states
from pyvmm import VM
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        vm = VM("6M")
        vm.load("verify", "order=random zeros=100")
        vm.start()
        while vm.progress().passes == 0:
            os.sched_yield()
        print(os.getpid(), flush=True)
        while True:
            vm.snapshot(sys.argv[1], codec=sys.argv[2])
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def python(program, *arguments, prefix=(), **options):
    environment = os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1])}
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, **options,
    )  # fmt: skip


def partial(folder):
    return [name for name in os.listdir(folder) if name.endswith(".partial")]


def is_whole(path):
    """All of the file is sound, and the RAM in it is that of one moment. Returns the guest's work."""
    with Snapshot.open(str(path)) as snapshot:
        snapshot.check()
        memory = GuestMemory(snapshot.memory_size, "4k")
        snapshot.load_into(memory)
    try:
        progress = Progress(memory.read(Gpa(lib.PV_PROGRESS_GPA), PROGRESS_SIZE))
        assert check_memory(memory, progress, order=ORDER, zeros=100) == []
        return progress.seed, progress.count
    finally:
        memory.close()


def test_killed_at_any_moment_of_a_save(vm, tmp_path):
    path, rng = tmp_path / "s", random.Random()
    source = vm(memory="6M")
    source.load("verify", f"order={ORDER} zeros=100")
    source.run(timeout=0.1)
    source.snapshot(str(path))
    before, left, replaced = is_whole(path), 0, 0
    with python(SAVER, str(path), "raw") as saver:
        for _ in range(KILLS):
            print(file=saver.stdin, flush=True)
            child = int(saver.stdout.readline())
            time.sleep(rng.uniform(0, 0.03))  # no moment of a save is like another
            os.kill(child, signal.SIGKILL)
            assert saver.stdout.readline() == "ended\n"
            assert len(partial(tmp_path)) <= 1, "the next save removes what the last one left"
            left += len(partial(tmp_path))
            now = is_whole(path)
            replaced += now != before
            before = now
        saver.stdin.close()
    source.snapshot(str(path))
    assert os.listdir(tmp_path) == ["s"]
    assert left > 0, "no save was killed midway: nothing was tested"
    assert replaced > 0, "no save ended: nothing was tested"
    with VM.restore(str(path)) as target:
        goes_on(target)


# Saves a guest that runs where there is room for one file and not for two.
CROWDED = """
import json, os, resource, sys, time
from pyvmm import VM
from pyvmm.errors import HostError
folder, way = sys.argv[1:]
path, result = os.path.join(folder, "s"), {}
with VM("16M") as vm:
    vm.load("verify", "order=random zeros=100")
    vm.start()
    while vm.progress().passes == 0:
        os.sched_yield()
    vm.snapshot(path)
    with open(path, "rb") as file:
        before = file.read()
    if way != "tmpfs":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    for codec in ("raw", *sys.argv[3:]):
        try:
            vm.snapshot(path, codec=codec)
        except HostError as error:
            result["error"] = str(error)
        result["paused"] = vm.paused
        count = vm.progress().count
        while vm.progress().count == count and not vm.ended:
            os.sched_yield()
        result["status"] = vm.progress().status
        with open(path, "rb") as file:
            result["same"] = file.read() == before
        result["files"] = os.listdir(folder)
    if way != "tmpfs":
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    os.unlink(path)
    vm.snapshot(path)
print(json.dumps(result))
"""


def own_namespace():
    """How to begin a command in a mount namespace of its own; None where that is forbidden."""
    for flags in ("-m", "-rm"):
        prefix = ["unshare", flags, "sh", "-c", 'mount -t tmpfs -o size=24m tmpfs "$0" && exec "$@"']
        try:
            if subprocess.run([*prefix, "/mnt", "true"], check=False, capture_output=True, timeout=20).returncode == 0:
                return prefix
        except FileNotFoundError:
            break
    return None


NAMESPACE = own_namespace()
CROWDING = "tmpfs" if NAMESPACE else "file-size-limit-as-namespaces-are-forbidden"


@pytest.mark.parametrize("way", [CROWDING])
def test_no_room(tmp_path, way):
    """A full disk: the guest runs on, the old file is whole, nothing else is left; with room again, a save is well."""
    prefix = [*NAMESPACE, str(tmp_path)] if NAMESPACE else []
    with python(CROWDED, str(tmp_path), way, prefix=prefix, stderr=subprocess.PIPE) as saver:
        out, err = saver.communicate(timeout=50)
    assert saver.returncode == 0, err
    found = json.loads(out)
    reason = "No space left on device" if NAMESPACE else "File too large"
    assert found.pop("error").startswith(f"cannot write snapshot {tmp_path}/s: {reason}; free some space")
    assert found == {"paused": False, "status": "running", "same": True, "files": ["s"]}


# ---- damaged files ----


class Shell:
    """What restore() needs of a VM: memory with its engine, and no KVM, which takes longer than all else."""

    def __init__(self, memory, **options):
        self.memory = GuestMemory(memory, "4k")
        self.states = self.trouble = None

    def restore_state(self, states):
        self.states = states

    def hold(self, trouble):
        self.trouble = trouble

    def close(self):
        self.memory.close()


def outcome(path, lazy):
    """(hash of RAM, states) of what is restored, all of it touched; None where that was refused."""
    try:
        shell = restore(Shell, str(path), lazy=lazy, fill=False, generation=False)
    except SnapshotError:
        return None
    try:
        return ram_hash(shell.memory), shell.states
    except FetchError:
        assert lazy
        return None
    finally:
        shell.close()


def stops_or_is_right(path):
    """A guest runs on from it: paused with the reason, or all it sees is right."""
    try:
        with VM.restore(str(path), lazy=True, fill=False) as machine:
            passes = machine.progress().passes + 2
            while machine.progress().passes < passes:
                assert machine.run(timeout=0.02).reason == "timeout", machine.printed
            assert check_memory(machine.memory, machine.progress(), order=ORDER, zeros=100) == []
            return True
    except (SnapshotError, FetchError):
        return False


@pytest.fixture
def small(vm, tmp_path):
    """(path, its bytes) of a small VM at work."""
    source = vm(memory="4M")
    source.load("verify", f"order={ORDER} zeros=100 size=400K")
    source.run(timeout=0.1)
    assert source.progress().passes
    source.snapshot(str(tmp_path / "s"), codec=AVAILABLE[-1], block_size="16K")
    return tmp_path / "s", (tmp_path / "s").read_bytes()


def test_no_changed_byte_is_taken_for_right(small):
    path, raw = small
    right = outcome(path, lazy=False)
    assert right == outcome(path, lazy=True) != None  # noqa: E711
    rng, refused, ran, stopped = random.Random(), 0, 0, 0
    with Snapshot.open(str(path)) as snapshot:
        tail = snapshot.header.sections["states"].offset
    for number in range(FLIPS):
        # Half of them anywhere, half where no page's bytes are: in header, maps and checksums.
        at = rng.randrange(len(raw)) if number % 2 else rng.choice((rng.randrange(330), rng.randrange(tail, len(raw))))
        with open(path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), bytes([raw[at] ^ rng.choice((1 << rng.randrange(8), rng.randrange(1, 256)))]), at)
            found = outcome(path, lazy=number % 4 < 2)
            assert found in (None, right), f"other content by byte {at}"
            refused += found is None
            if number % RUN_EVERY == 0:
                ran += 1
                stopped += not stops_or_is_right(path)
            os.pwrite(file.fileno(), raw[at : at + 1], at)
    assert refused > FLIPS * 0.7, "what is not refused: large pages, working set, what fills up"
    assert 0 < stopped <= ran == FLIPS // RUN_EVERY
    assert outcome(path, lazy=True) == right


def test_no_part_of_a_file_is_taken_for_all_of_it(small):
    path, raw = small
    rng = random.Random()
    for number in range(CUTS):
        path.write_bytes(raw[: rng.randrange(len(raw))])
        for lazy in (False, True):
            assert outcome(path, lazy) is None
        if number % RUN_EVERY == 0:
            with pytest.raises(SnapshotError, match=r"truncated|not a snapshot"):
                VM.restore(str(path))
