# test_reclaim.py: a guest that lives in less memory than it has, by a limit: which it checks itself all the time; the
# kernel's page tables say what is resident, the guest's model whether all of it is right.
from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from engine_help import BLOCK, judge, limit_kept, passes, until, working

import pyvmm
from pyvmm import VM, BadInput
from pyvmm._native import lib
from pyvmm.cli import main
from pyvmm.control.control import Control
from pyvmm.layout import MIB, PAGE_SIZE, Gpa
from pyvmm.pytest_plugin import needs
from pyvmm.testing.dup_model import Dup
from pyvmm.testing.hotcold_model import HotCold

pytestmark = needs("kvm", "uffd_guest")

SECONDS = 0.15
"""Of a guest in each of its limits. Longer: PYVMM_HAMMER=20 pytest ..."""


def work(machine, seconds=None):
    """Lets the guest work for so long; it must get on."""
    before = machine.progress().count
    end = time.monotonic() + (float(os.environ.get("PYVMM_HAMMER", SECONDS)) if seconds is None else seconds)
    until(lambda: time.monotonic() >= end or machine.ended, "time")
    until(lambda: machine.progress().count > before or machine.ended, "work")
    assert not machine.ended, machine.printed


def kept(machine, limit):
    """Is the limit kept, by the engine's words and by the kernel's tables alike?"""
    reclaimer = machine.memory.reclaimer
    assert reclaimer.settled(), reclaimer.counts()
    machine.pause()  # what it was about to touch may still come
    assert reclaimer.settled()
    limit_kept(machine, limit)
    machine.resume()


def settled(machine):
    """The guest stands, and all that is to go has gone."""
    machine.pause()
    swap = machine.memory.reclaimer.swap
    swap.drain()
    until(lambda: swap.stats().live == machine.memory.pages().homes["swap"], "slots that balance")
    judge(machine)

    def whole():  # judge() has brought much back, which goes again
        swap.drain()
        counts = swap.stats()
        return counts.live + counts.kept + counts.free == counts.slots

    until(whole, "slots that are all accounted for")
    assert (swap.stats().errors, machine.memory.reclaimer.trouble) == (0, "")


PAIRS = [
    ("clock", "4k", 2), ("random", "auto", 1), ("sharing-first", "4k", 1), ("activity", "auto", 2),
    pytest.param("clock", "2m", 1, marks=needs("thp")), pytest.param("random", "2m", 2, marks=needs("thp")),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "pages", "cpus"), PAIRS)
def test_a_guest_runs_right_in_a_half_a_quarter_an_eighth(vm, policy, pages, cpus):
    machine = working(vm, "64M", "order=random zeros=100", cpus=cpus, pages=pages)
    machine.memory.reclaim(policy=policy, seed=5)
    for share in (2, 4, 8):
        machine.memory.limit = machine.memory.size // share
        work(machine)
        kept(machine, machine.memory.size // share)
    counts = machine.memory.reclaimer.counts()
    assert counts.policy == policy
    assert counts.taken > 0
    settled(machine)
    machine.memory.limit = None
    machine.resume()
    passes(machine, 1)
    settled(machine)


@pytest.mark.parametrize("policy", ["activity", "sharing-first"])
def test_a_guest_with_hot_blocks_and_one_with_duplicates(vm, policy):
    """Each checks what it touches; then its model checks all of it."""
    hot, dup = vm(memory="64M", cpus=2), vm(memory="48M")
    hot.load("hotcold", "hot=30 pages=100 shift=50 ms=100 stray=2")
    dup.load("dup", "dups=500 write=10 order=random")
    for machine in (hot, dup):
        machine.start()
        until(lambda: machine.progress().status == "running", "its work")  # noqa: B023 (at once)
        machine.memory.reclaim(policy=policy, seed=3)
        for share in (2, 4):
            machine.memory.limit = machine.memory.size // share
            work(machine)
            kept(machine, machine.memory.size // share)
        machine.pause()
    assert HotCold(hot.progress(), hot=30, pages=100, shift=50).check(hot.memory, hot.progress()) == []
    assert Dup(dup.progress(), dups=500, write=10, order="random").check(dup.memory) == []


@needs("thp")
def test_a_guest_that_needs_less_keeps_its_large_pages_and_loses_no_time(vm):
    """What it does not touch goes, by whole blocks; what it touches stays, and no fault is left."""
    machine = vm(memory="64M")
    machine.load("touch", "size=16M passes=0")
    machine.start()
    until(lambda: machine.progress().passes > 3, "passes")
    machine.memory.limit = 32 * MIB
    assert machine.memory.reclaimer.settled()
    until(lambda: machine.progress().passes > 10, "passes")
    faults = machine.memory.engine.stats().faults
    goal = machine.progress().passes + 20
    until(lambda: machine.progress().passes > goal, "passes")
    assert machine.memory.engine.stats().faults - faults <= 1
    assert machine.mappings()["pages_2m"] >= 7


def test_pages_that_nobody_touched_are_counted_when_they_come(vm):
    """The limit is there before the guest, and all its memory comes one fault after the other."""
    machine = vm(memory="64M", cpus=2)
    machine.append = "order=random"
    machine.load("verify", "order=random")
    machine.memory.limit = 16 * MIB
    machine.start()
    until(lambda: machine.progress().passes > 0 or machine.ended, "the first pass")
    kept(machine, 16 * MIB)
    settled(machine)


def test_a_limit_can_be_lowered_raised_and_taken_away_again_and_again(vm):
    machine = working(vm, "48M", "order=random zeros=100", cpus=2)
    for limit in (40, 8, 24, None, 12, 64, None, 16):
        machine.memory.limit = None if limit is None else limit * MIB
        assert machine.memory.limit == (None if limit is None else limit * MIB)
        work(machine, 0.1)
        if limit is not None:
            kept(machine, limit * MIB)
    settled(machine)


def test_what_the_host_holds_stays_and_the_rest_goes(vm):
    machine = working(vm, "32M", "order=random")
    view = machine.memory.view(Gpa(16 * MIB), 4 * MIB)
    machine.memory.limit = 8 * MIB
    work(machine)
    assert machine.memory.reclaimer.settled()
    machine.pause()
    words = machine.memory.engine.page_words[8 * BLOCK : 10 * BLOCK]
    assert not (words & 15).any()
    machine.resume()
    del view
    settled(machine)


def test_the_host_reads_and_writes_all_of_it(vm):
    machine = vm(memory="32M")
    machine.load("hello")
    machine.memory.limit = 8 * MIB
    data = {at: os.urandom(PAGE_SIZE) for at in range(4 * MIB, 32 * MIB, 64 << 10)}
    for at, page in data.items():
        machine.memory.write(Gpa(at), page)
    assert machine.memory.reclaimer.settled()
    for at, page in data.items():
        assert machine.memory.read(Gpa(at), PAGE_SIZE) == page
    assert machine.memory.reclaimer.swap.stats().out > 0


# ---- where it goes wrong ----


def test_a_swap_that_is_full_keeps_the_rest_in_memory(vm):
    machine = working(vm, "32M", "order=random")
    told = []
    reclaimer = machine.memory.reclaim(size=4 * MIB)
    reclaimer.on_trouble = told.append
    machine.memory.limit = 8 * MIB
    until(lambda: told, "trouble")
    assert told[0] == "the swap file is full, all 4M of it: pages that did not fit stay in memory"
    assert reclaimer.counts().trouble == told[0]
    assert not reclaimer.settled(0.2)
    work(machine)
    assert machine.memory.engine.stats().answers["failed"] == 0
    assert reclaimer.counts().overruns == 0
    judge(machine)


def test_a_disk_that_fails_for_a_while(vm, monkeypatch):
    """By a limit on the size of files, as a full disk would: what could not go stays, and goes later."""
    import resource

    machine = working(vm, "32M", "order=random")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    told = []
    reclaimer = machine.memory.reclaim()
    reclaimer.on_trouble = told.append
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, before[1]))
        machine.memory.limit = 8 * MIB
        until(lambda: told, "trouble")
        assert "cannot be written: EFBIG" in told[0]
        work(machine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert reclaimer.swap.stats().error == errno.EFBIG
    kept(machine, 8 * MIB)
    until(lambda: not reclaimer.trouble, "the end of trouble")
    judge(machine)


BROKEN = {
    "raises": ("def victims(self, wanted):\n        return 1 / 0", "line 4: ZeroDivisionError: division by zero"),
    "none": ("def victims(self, wanted):\n        yield -1", "-1 is no page in memory, and cannot leave it"),
    "text": ("def victims(self, wanted):\n        yield 'x'", "'x' is no page in memory, and cannot leave it"),
    "block": (
        "def victims(self, wanted):\n"
        "        from pyvmm.memory.reclaim.policy import Block\n"
        "        yield Block(1 << 40)",
        "block 1099511627776: the VM has 16",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_policy_that_fails_is_told_and_replaced(vm, tmp_path, name):
    code, text = BROKEN[name]
    path = tmp_path / "mine.py"
    path.write_text(f"from pyvmm.memory.reclaim.policy import Policy\nclass Mine(Policy):\n    {code}\n")
    machine = working(vm, "32M", "order=random")
    told = []
    reclaimer = machine.memory.reclaim(policy=f"{path}:Mine")
    reclaimer.on_trouble = told.append
    machine.memory.limit = 8 * MIB
    kept(machine, 8 * MIB)
    assert told == [f"policy {path}:Mine: {text}: clock goes on in its place"]
    assert reclaimer.counts().policy == "clock"
    judge(machine)


def test_a_policy_that_cannot_be_made_is_refused(vm, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from pyvmm.memory.reclaim.policy import Policy\nclass Mine(Policy):\n"
        "    def __init__(self, view):\n        raise ValueError('no')\n"
        "    def victims(self, wanted):\n        return []\n"
    )
    machine = working(vm, "32M", "")
    with pytest.raises(BadInput, match=r"mine.py:Mine: line \d: ValueError: no$"):
        machine.memory.reclaim(policy=f"{path}:Mine")
    assert machine.memory.reclaimer is machine.memory.swap is None


WATCHER = """
from pyvmm.memory.reclaim.policy import Block, Policy

class Watcher(Policy):
    "Gives blocks, of which a part may be away: it is told of what was there, and of nothing else."
    def __init__(self, view):
        super().__init__(view)
        self.here = set()
    def came(self, page):
        assert page not in self.here
        self.here.add(page)
    def left(self, page):
        self.here.remove(page)
    def victims(self, wanted):
        while self.here:
            yield Block(self.view.random.choice(list(self.here)) // 512)
"""


def test_a_policy_is_told_of_just_the_pages_that_left(vm, tmp_path):
    path = tmp_path / "watcher.py"
    path.write_text(WATCHER)
    machine = working(vm, "32M", "order=random", pages="4k")
    machine.memory.engine.remove(1024, 100)
    reclaimer = machine.memory.reclaim(policy=f"{path}:Watcher")
    machine.memory.limit = 16 * MIB
    work(machine)
    kept(machine, 16 * MIB)
    assert (reclaimer.trouble, reclaimer.policy) == ("", f"{path}:Watcher")
    judge(machine)


def test_once_the_limit_is_lifted_nothing_more_goes(vm):
    """Not even what was chosen already."""
    machine = working(vm, "64M", "order=random", pages="4k")
    machine.memory.reclaim(policy="clock")
    machine.pause()
    for round_ in range(3):
        machine.memory.limit = 8 * MIB
        until(lambda: machine.memory.engine.count().away > 1000 * round_, "pages that go")  # noqa: B023 (at once)
        machine.memory.limit = None
        machine.memory.engine.install(0, machine.memory.size // PAGE_SIZE)
        end = time.monotonic() + 0.05
        until(lambda: machine.memory.engine.count().away or time.monotonic() > end, "time to go wrong")  # noqa: B023
        assert machine.memory.engine.count().away == 0
    judge(machine)


def answering(monkeypatch, machine, what, answer):
    """Has a function of the engine's answer that, while the list it returns has something in it."""
    engine, answers = machine.memory.engine, [answer]
    call = engine.call
    monkeypatch.setattr(
        engine, "call", lambda do, *rest, **named: answer if do is what and answers else call(do, *rest, **named)
    )
    return answers


def test_a_kernel_that_refuses_is_told_and_faults_do_not_wait_for_it(vm, monkeypatch):
    machine = working(vm, "64M", "order=random", pages="4k")
    reclaimer = machine.memory.reclaim(policy="clock")
    told = []
    reclaimer.on_trouble = told.append
    refuse = answering(monkeypatch, machine, lib.pv_engine_remove_runs, -errno.ENOMEM)
    machine.memory.limit = 16 * MIB
    until(lambda: reclaimer.trouble, "trouble")
    assert told == [reclaimer.trouble]
    assert "UFFDIO_MOVE" in told[0]
    passes(machine, 2)
    assert reclaimer.policy == "clock"
    refuse.clear()
    kept(machine, 16 * MIB)
    until(lambda: not reclaimer.trouble, "the end of trouble")
    judge(machine)


def test_trouble_is_over_with_the_limit_and_who_is_told_may_fail(vm, monkeypatch):
    machine = working(vm, "32M", "order=random", pages="4k")
    reclaimer = machine.memory.reclaim(policy="clock")
    reclaimer.on_trouble = lambda text: 1 / 0
    refuse = answering(monkeypatch, machine, lib.pv_engine_remove_runs, -errno.ENOMEM)
    machine.memory.limit = 16 * MIB
    until(lambda: reclaimer.trouble, "trouble")
    machine.memory.limit = None
    until(lambda: not reclaimer.trouble, "the end of trouble")
    refuse.clear()
    machine.memory.limit = 16 * MIB
    kept(machine, 16 * MIB)
    judge(machine)


def test_a_kernel_that_cannot_sample_leaves_the_policy_without(vm, monkeypatch):
    machine = working(vm, "32M", "order=random")
    answering(monkeypatch, machine, lib.pv_sample_begin, -errno.EOPNOTSUPP)
    reclaimer = machine.memory.reclaim(policy="activity")
    machine.memory.limit = 16 * MIB
    until(lambda: "cannot be sampled" in reclaimer.trouble, "the news")
    work(machine)
    kept(machine, 16 * MIB)
    machine.memory.limit = None
    judge(machine)


def test_a_policy_of_ones_own(vm, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        Path(__file__).parents[2].joinpath("docs/reclaim.md").read_text().split("```python\n")[1].split("```")[0]
    )
    machine = working(vm, "32M", "order=random")
    machine.memory.reclaim(policy=f"{path}:Fifo")
    machine.memory.limit = 16 * MIB
    work(machine)
    kept(machine, 16 * MIB)
    settled(machine)


@pytest.mark.parametrize(
    ("do", "text"),
    [
        (lambda memory: setattr(memory, "limit", 4 * MIB), "a limit of 4M: a VM needs at least 8M of memory"),
        (lambda memory: memory.reclaim(policy="best"), "no policy 'best': choose one of"),
        (lambda memory: memory.reclaim("/nowhere/x"), "no swap file can be made in /nowhere/x"),
        (lambda memory: [memory.reclaim(), memory.reclaim()], "has a policy and a swap already"),
    ],
)
def test_what_cannot_be(vm, do, text):
    machine = vm(memory="16M")
    with pytest.raises(BadInput, match=text):
        do(machine.memory)


def test_a_vm_with_a_limit_is_closed_in_the_midst_of_it(vm):
    for _ in range(5):
        machine = VM(memory="32M", cpus=2)
        machine.load("verify", "order=random")
        machine.memory.limit = 8 * MIB
        counts = machine.memory.reclaimer.counts
        machine.start()
        until(lambda: counts().taken > 0, "work")  # noqa: B023 (called at once)
        machine.close()


# ---- with all else that is done to memory ----


@pytest.mark.parametrize("mode", ["stop", "live"])
def test_a_snapshot_of_a_vm_with_a_limit(vm, restored, tmp_path, mode):
    machine = working(vm, "48M", "order=random zeros=100", cpus=2)
    machine.memory.limit = 16 * MIB
    work(machine)
    machine.snapshot(str(tmp_path / "s"), mode=mode)
    kept(machine, 16 * MIB)
    copy = restored(tmp_path / "s", lazy=True)
    copy.append = machine.append
    copy.memory.limit = 16 * MIB
    copy.start()
    work(copy)
    kept(copy, 16 * MIB)
    settled(copy)
    settled(machine)


@pytest.mark.parametrize("tracker", ["coarse", "manual"])
def test_a_trace_of_a_vm_with_a_limit(vm, tracker):
    machine = working(vm, "32M", "order=random zeros=100")
    machine.memory.limit = 8 * MIB
    trace = machine.trace(tracker)
    trace.start()
    for _ in range(3):
        work(machine, 0.1)
        assert sum(count for _, count in trace.collect()) > 0
    kept(machine, 8 * MIB)
    trace.stop()
    settled(machine)


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "hybrid"])
def test_a_migration_from_a_limit_to_a_limit(vm, tmp_path, mode):
    machine = working(vm, "48M", "order=random zeros=100", cpus=2)
    machine.memory.limit = 16 * MIB
    work(machine)

    with VM.receive(f"unix:{tmp_path}/s") as incoming:
        out = machine.migrate(incoming.address, mode=mode, downtime=0.2)
        other = incoming.vm(20)
        other.memory.limit = 16 * MIB
        out.result(20)
        incoming.result(20)
        try:
            other.append = machine.append
            work(other)
            kept(other, 16 * MIB)
            settled(other)
        finally:
            other.close()


# ---- what people type ----


def test_the_command_sets_the_limit_of_a_running_guest(vm, tmp_path, capsys):
    machine = working(vm, "48M", "order=random")
    path = str(tmp_path / "c")
    with Control(machine, path):
        assert main(["swap", path]) == 0
        assert capsys.readouterr().out.split() == ["limit", "none", "of", "48M"]
        assert main(["swap", path, "--target", "16M", "--policy", "random"]) == 0
        assert capsys.readouterr().out.startswith("limit")
        assert machine.memory.limit == 16 * MIB
        assert main(["swap", path, "--target", "1M"]) == 2
        assert capsys.readouterr().err == "pyvmm: a limit of 1M: a VM needs at least 8M of memory\n"
        assert main(["swap", path, "--policy", "clock"]) == 2
        assert "has the policy random" in capsys.readouterr().err
        assert main(["swap", path, "--target", "none", "--json"]) == 0
        assert '"limit": null' in capsys.readouterr().out
    assert machine.memory.limit is None
    judge(machine)


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "pyvmm", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=30, check=False, env=os.environ | {"PYTHONPATH": str(Path(pyvmm.__file__).parents[1])}, **options,
    )  # fmt: skip


def test_run_with_a_limit(tmp_path):
    done = run(
        "run", "verify", "--mem", "32M", "--append", "passes=2 order=random", "--limit", "16M", "--swap", str(tmp_path)
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "SUCCESS" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--limit", "1M"], "--limit 1M: a VM needs at least 8M of memory"),
        (["--limit", "x"], "'x' is not a size"),
        (["--policy", "clock"], "--policy says who chooses what goes, --limit SIZE must say how much may stay"),
        (["--limit", "16M", "--policy", "best"], "no policy 'best'"),
        (["--limit", "16M", "--swap", "/nowhere/file"], "no swap file can be made in /nowhere/file"),
        (["--limit", "16M", "--swap", "/var/tmp,0"], "a swap of 0"),
    ],
)
def test_bad_options(capsys, options, text):
    assert main(["run", "hello", *options]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


def test_nothing_is_left_of_a_vmm_that_is_killed(tmp_path):
    """No swap file has a name, so kill -9 leaves none; and the disk has its space back."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "run", "verify", "--mem", "48M", "--append", "order=random", "--limit", "8M",
         "--swap", str(tmp_path), "--control", str(tmp_path / "c")],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(pyvmm.__file__).parents[1])},
    )  # fmt: skip
    try:

        def swaps():
            for fd in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(FileNotFoundError):  # one that was closed just then
                    path = os.readlink(fd)
                    if path.startswith(str(tmp_path)) and "(deleted)" in path and os.stat(fd).st_blocks > 1000:
                        return True
            return False

        until(swaps, "a swap file with pages in it")
    finally:
        process.kill()
        process.wait(20)
    assert [each.name for each in tmp_path.iterdir()] in ([], ["c"])
