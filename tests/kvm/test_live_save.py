# test_live_save.py: vm.snapshot(path, mode="live"): the file is the VM as it was at the pause, to the byte, whatever
# guest, host and memory engine do while it is written; and what goes wrong leaves the guest unharmed.
from __future__ import annotations

import errno
import os
import resource
import signal
import struct
import threading
from contextlib import contextmanager, suppress

import pytest
from engine_help import BLOCK, SECONDS, Shelf, Workers, away, both_ways, judge, passes, shelve, until, way, working

__all__ = ["way"]  # a fixture

from pyvmm import VM, BadInput, FetchError, HostError, Snapshot, host
from pyvmm._native import ffi, lib
from pyvmm.cli import main
from pyvmm.errors import EXIT_BAD_INPUT, EXIT_TIMEOUT, LifecycleError
from pyvmm.layout import BLOCK_SIZE, MIB, PAGE_SIZE
from pyvmm.machine import live
from pyvmm.pytest_plugin import needs
from pyvmm.testing.balance import imbalances

pytestmark = needs("kvm", "uffd_guest", "uffd_wp")


def ram(memory):
    """All RAM, without touching what holds nothing."""
    holds = memory.engine.holds()
    sizes = [min(BLOCK_SIZE, memory.size - block * BLOCK_SIZE) for block in range(len(holds))]
    return [
        memory.read(memory.gpa_of(block * BLOCK), size) if holds[block] else bytes(size)
        for block, size in enumerate(sizes)
    ]


def differing(memory, wanted):
    """Numbers of the pages that are not as they were."""
    return [
        block * BLOCK + page
        for block, (is_there, was) in enumerate(zip(ram(memory), wanted, strict=True))
        if is_there != was
        for page in range(BLOCK)
        if is_there[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] != was[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
    ]


def told(machine):
    """What the C side says of a save that runs."""
    out = ffi.new("struct pv_live_progress *")
    assert machine.memory.engine.call(lib.pv_live_wait, 0, out) == lib.PV_LIVE_SAVING
    return out


class Instant:
    """Sees the VM at the pause of a live save: its RAM. `first` is called before that, `then` after it, still before
    the save gets hold of the RAM; `after` when it has."""

    def __init__(self, machine, monkeypatch, first=lambda: None, then=lambda: None, after=lambda: None):
        self.ram, self.count, self.taken = [], 0, None
        save_state, resume, stream = machine.save_state, machine.resume, live.stream

        def seen():
            first()
            self.ram, self.count = ram(machine.memory), machine.progress().count
            then()
            return save_state()

        def goes_on():
            after()
            resume()

        def streamed(*arguments):
            self.taken = stream(*arguments)
            return self.taken

        monkeypatch.setattr(machine, "save_state", seen)
        monkeypatch.setattr(machine, "resume", goes_on)
        monkeypatch.setattr(live, "stream", streamed)


def touching(vm, memory="32M", append="", **options):
    """The guest `touch`, at full speed, through with its first pass."""
    machine = vm(memory=memory, **options)
    machine.load("touch", append)
    machine.start()
    until(lambda: machine.progress().count > machine.memory.size // PAGE_SIZE or machine.ended, "a pass")
    return machine


class Stuck(Shelf):
    """A home that block 1 is in, which it keeps back from the save until let go; what is written meanwhile is copied
    before. To be used within `with`, and with a guest that leaves block 1 alone."""

    def __init__(self, machine, monkeypatch, then=lambda: None):
        super().__init__()
        self._machine = machine
        self.held, self.go = False, threading.Event()
        self.fail = lambda page: self._wait()
        self._then = then
        machine.memory.write(machine.memory.gpa_of(BLOCK), b"stuck" * 1000)
        self.instant = Instant(machine, monkeypatch, then=self._hold)

    def _hold(self):
        shelve(self._machine, self, 1, 2)
        assert len(self.pages) > 0
        self._then()
        self.held = True

    def _wait(self):
        assert not self.held or self.go.wait(SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.go.set()


def runs_on(machine):
    count = machine.progress().count
    until(lambda: machine.progress().count > count + 1000, "the guest")
    assert not machine.ended
    assert not machine.paused


def nothing_left(machine, folder, names=()):
    """The guest runs, no half file is there, and no span is registered for nothing."""
    runs_on(machine)
    assert sorted(os.listdir(folder)) == sorted(names)
    assert machine.memory.engine.count().armed == bool(away(machine))


# ---- exact ----


@pytest.mark.parametrize("buffers", [1, 32])
@pytest.mark.parametrize(("pages", "cpus"), [("2m", 1), ("auto", 4), ("4k", 4)])
def test_it_is_the_vm_at_the_pause(vm, restored, tmp_path, monkeypatch, pages, cpus, buffers):
    """The guest writes 8 bytes into every page, as fast as it can, while the save is held up near its beginning."""
    monkeypatch.setattr(live, "BUFFERS", buffers)
    machine = touching(vm, "32M", cpus=cpus, pages=pages, append="start=4M size=24M")
    with Stuck(machine, monkeypatch) as stuck:

        def written(done, size):
            if not stuck.go.is_set():
                until(lambda: told(machine).waits > 0 if buffers == 1 else told(machine).copied > 8, "the guest")
                stuck.go.set()

        saved = machine.snapshot(str(tmp_path / "s"), mode="live", progress=written)
    assert saved.pages == 32 * MIB // PAGE_SIZE
    assert saved.stored_bytes == os.path.getsize(tmp_path / "s")
    assert 0 < saved.pause_seconds < saved.seconds
    assert saved.copied_blocks == stuck.instant.taken.copied > 0
    assert buffers > 1 or stuck.instant.taken.waits > 0
    nothing_left(machine, tmp_path, ["s"])
    with Snapshot.open(str(tmp_path / "s")) as snapshot:
        snapshot.check()
    target = restored(tmp_path / "s", pages=pages)
    assert differing(target.memory, stuck.instant.ram) == []
    assert target.progress().count == stuck.instant.count
    target.start()
    runs_on(target)


def put_away(machine, where, shelf):
    """Blocks 3 to 8 of a guest: aside, as zeros, in a home in Python, or each somewhere else."""
    engine = machine.memory.engine
    if where in ("aside", "mixed"):
        engine.remove(3 * BLOCK, 4 * BLOCK)
        engine.remove(7 * BLOCK + 5, 100)
    if where in ("zero", "mixed"):
        for block in range(5, 9):
            engine.remove(block * BLOCK, BLOCK, "zero")
    if where in ("python", "mixed"):
        shelve(machine, shelf, 8, 12)


@both_ways
@pytest.mark.parametrize("where", ["aside", "zero", "python", "mixed"])
def test_what_is_away_at_the_pause(vm, restored, tmp_path, monkeypatch, way, where):
    """The guest, which checks all its memory again and again, brings it back while it is saved."""
    shelf = Shelf()
    machine = working(vm, memory="32M", append="order=random zeros=300 write=50")
    if where in ("python", "mixed"):
        machine.memory.engine.set_home("swap", shelf)
    instant = Instant(machine, monkeypatch, then=lambda: put_away(machine, where, shelf))
    machine.snapshot(str(tmp_path / "s"), mode="live")
    target = restored(tmp_path / "s")
    assert differing(target.memory, instant.ram) == []
    target.append = machine.append
    target.start()
    passes(target)
    judge(target)
    passes(machine)
    judge(machine)


def populated(machine):
    pages = machine.memory.pages()
    return pages.large + pages.small


@pytest.mark.parametrize("pages", ["auto", "4k"])
def test_memory_that_nobody_has_touched(vm, restored, tmp_path, monkeypatch, pages):
    """It takes no room, and what the guest populates while the save is held up is not in it."""
    machine = vm(memory="256M", pages=pages)
    machine.load("touch", "start=4M rate=10")  # a block in 51 ms
    machine.start()
    until(lambda: machine.progress().count > 50)
    with Stuck(machine, monkeypatch) as stuck:

        def written(done, size):
            if not stuck.go.is_set():
                before = populated(machine)
                until(lambda: populated(machine) > before, "the guest")
                stuck.go.set()

        machine.snapshot(str(tmp_path / "s"), mode="live", progress=written)
    target = restored(tmp_path / "s")
    assert differing(target.memory, stuck.instant.ram) == []
    held = sum(block != bytes(BLOCK_SIZE) for block in stuck.instant.ram)
    assert populated(target) <= held * BLOCK


@pytest.mark.parametrize("python_homes", [False, True])
def test_the_host_writes_too(vm, restored, tmp_path, monkeypatch, python_homes):
    """By write(), by zero(), and through a view that was held before, or was made meanwhile."""
    machine = touching(vm, "64M", "start=20M size=10M")
    memory, lock, number = machine.memory, threading.Lock(), iter(range(1, 1 << 40))
    views = [memory.view(memory.gpa_of(4 * BLOCK + 7), 3 * BLOCK_SIZE)]

    def write():
        with lock:
            value = struct.pack("<Q", next(number))
            memory.write(memory.gpa_of(8 * BLOCK + next(number) % 1024), value * 600)
            memory.zero(memory.gpa_of(24 * BLOCK + next(number) % 1024), 5000)
            at = next(number) * 4096 % (3 * BLOCK_SIZE)
            views[0][at : at + 8] = value
            with memory.view(memory.gpa_of(26 * BLOCK), 4 * PAGE_SIZE) as fresh:
                fresh[4090:4098] = value

    shelf = Shelf()
    if python_homes:
        memory.engine.set_home("swap", shelf)
        shelve(machine, shelf, 27, 30)
    instant = Instant(machine, monkeypatch, first=lock.acquire, after=lock.release)
    with Workers(write, write):
        until(
            lambda: any(memory.read(memory.gpa_of(block * BLOCK), BLOCK_SIZE) != bytes(BLOCK_SIZE) for block in (8, 9))
        )
        machine.snapshot(str(tmp_path / "s"), mode="live", block_size="2M")
    views.clear()
    target = restored(tmp_path / "s")
    assert differing(target.memory, instant.ram) == []
    assert any(block != bytes(BLOCK_SIZE) for block in instant.ram[8:10])
    runs_on(machine)


def test_writes_of_the_host_are_in_order(vm, tmp_path):
    """A thread that is not paused writes here, then there: no snapshot has the second write without the first."""
    machine = touching(vm, append="start=12M size=8M")
    memory = machine.memory
    views = [memory.view(memory.gpa_of(block * BLOCK), 8) for block in (15, 3)]
    numbers = iter(range(1, 1 << 40))

    def write():
        value = struct.pack("<Q", next(numbers))
        for view in views:
            view[:] = value

    seen = []
    with Workers(write):
        for _ in range(6):
            machine.snapshot(str(tmp_path / "s"), mode="live")
            with VM.restore(str(tmp_path / "s"), lazy=True, fill=False, generation=False) as target:
                words = [target.memory.read(memory.gpa_of(block * BLOCK), 8) for block in (15, 3)]
                seen.append([struct.unpack("<Q", word)[0] for word in words])
    views.clear()
    assert all(first - second in (0, 1) for first, second in seen), seen
    assert seen[0] < seen[-1], "the host did not write: nothing was tested"


def test_a_lazily_restored_vm_is_saved_while_it_is_filled(vm, restored, tmp_path):
    working(vm, append="order=random").snapshot(str(tmp_path / "a"))
    second = restored(tmp_path / "a", lazy=True)
    second.start()
    second.snapshot(str(tmp_path / "b"), mode="live")
    third = restored(tmp_path / "b", lazy=True)
    for machine in (second, third):
        machine.append = "order=random"
        if not machine.started:
            machine.start()
        passes(machine)
        judge(machine)


def test_operations_on_memory_meanwhile(vm, restored, tmp_path, monkeypatch):
    """Each of the engine's, on each block, over and over."""
    machine = working(vm, append="order=random zeros=100")
    engine, numbers = machine.memory.engine, iter(range(1 << 40))
    operations = (
        engine.split, engine.merge, engine.break_, engine.merge, lambda block: engine.remove(block * BLOCK, BLOCK),
        lambda block: engine.remove(block * BLOCK + 3, 9), lambda block: engine.install(block * BLOCK, BLOCK),
        lambda block: engine.remove(block * BLOCK, BLOCK, "zero"),
    )  # fmt: skip
    lock, blocks = threading.Lock(), machine.memory.size // BLOCK_SIZE

    def operate():
        number = next(numbers)
        with lock, suppress(HostError):  # in use for the moment
            operations[number % len(operations)](number // len(operations) * 5 % blocks)

    instant = Instant(machine, monkeypatch, first=lock.acquire, after=lock.release)
    for name in ("a", "b", "c"):
        with Workers(operate):
            machine.snapshot(str(tmp_path / name), mode="live")
        target = restored(tmp_path / name)
        assert differing(target.memory, instant.ram) == []
    target.append = machine.append
    target.start()
    for one in (target, machine):
        passes(one)
        judge(one)


@needs("large_mappings")
def test_large_pages_stay_large(vm, tmp_path):
    machine = touching(vm, pages="2m")
    machine.snapshot(str(tmp_path / "a"), mode="live")
    runs_on(machine)
    machine.pause()
    machine.snapshot(str(tmp_path / "b"), mode="stop")
    with Snapshot.open(str(tmp_path / "a")) as one, Snapshot.open(str(tmp_path / "b")) as other:
        assert list(one.large) == list(other.large)
        assert len(one.large) == 16


def test_a_vm_that_stands_still_is_saved_as_it_stands(vm, restored, tmp_path):
    machine = touching(vm, memory="16M")
    machine.pause()
    saved = machine.snapshot(str(tmp_path / "a"), mode="live")
    assert (saved.pause_seconds, saved.copied_blocks, machine.paused) == (0, 0, True)
    assert differing(restored(tmp_path / "a").memory, ram(machine.memory)) == []


# ---- what goes wrong ----


def test_a_full_disk(vm, tmp_path):
    machine = touching(vm)
    (tmp_path / "s").write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MIB, hard))
    try:
        with pytest.raises(HostError, match=r"cannot write snapshot .*s: File too large; free some space"):
            machine.snapshot(str(tmp_path / "s"), mode="live")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    nothing_left(machine, tmp_path, ["s"])
    assert (tmp_path / "s").read_bytes() == b"before"
    machine.snapshot(str(tmp_path / "s"), mode="live")


@pytest.mark.parametrize("where", ["the drain", "a write"])
def test_a_page_that_does_not_come(vm, tmp_path, monkeypatch, where):
    machine = touching(vm, "64M", "start=4M size=10M")
    memory, shelf = machine.memory, Shelf()
    with Stuck(machine, monkeypatch, lambda: where == "a write" and peer(machine, shelf)) as stuck:

        def fail(page):
            raise OSError(errno.EIO, "broken")

        shelf.fail = fail

        def pin(done, size):
            if where == "a write" and not stuck.go.is_set():
                with pytest.raises(FetchError):
                    memory.write(memory.gpa_of(20 * BLOCK), b"x")
                stuck.go.set()

        if where == "a write":
            machine.memory.engine.set_home("peer", shelf)
            memory.write(memory.gpa_of(20 * BLOCK), b"here")
        else:
            stuck.fail = lambda page: (stuck.held and fail(page)) or None
        with pytest.raises(FetchError, match=r"s is not saved: gfn 0x\w+ cannot be brought back .*EIO") as caught:
            machine.snapshot(str(tmp_path / "s"), mode="live", progress=pin)
        assert caught.value.page // BLOCK == (1 if where == "the drain" else 20)
        nothing_left(machine, tmp_path)
        stuck.fail = shelf.fail = lambda page: None
        stuck.held = False
        machine.snapshot(str(tmp_path / "s"), mode="live")


def peer(machine, shelf):
    machine.memory.engine.remove(20 * BLOCK, BLOCK)
    machine.memory.engine.store(20 * BLOCK, BLOCK, "peer")


@contextmanager
def in_thread(function):
    errors = []

    def run():
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield errors
    thread.join(SECONDS)
    assert not thread.is_alive(), "it hangs"


@pytest.mark.parametrize("how", ["close", "stop"])
def test_the_vm_ends_meanwhile(vm, restored, tmp_path, monkeypatch, how):
    machine = touching(vm, append="start=4M size=24M")
    with Stuck(machine, monkeypatch) as stuck:
        begun = threading.Event()
        with in_thread(
            lambda: machine.snapshot(str(tmp_path / "s"), mode="live", progress=lambda done, size: begun.set())
        ) as errors:
            assert begun.wait(SECONDS)
            if how == "stop":
                machine.stop()
            with in_thread(machine.close if how == "close" else lambda: None) as others:
                if how == "close":
                    until(lambda: machine.memory.engine._native is None, "close()")
                stuck.go.set()
        assert others == []
    if how == "stop":
        assert errors == []
        assert differing(restored(tmp_path / "s").memory, stuck.instant.ram) == []
    else:
        assert [(type(error), str(error)) for error in errors] == [
            (LifecycleError, f"snapshot {tmp_path / 's'} is not saved: the VM was closed meanwhile")
        ]
        assert os.listdir(tmp_path) == []


def test_interrupted(vm, tmp_path, monkeypatch):
    machine = touching(vm, append="start=4M size=24M")
    with Stuck(machine, monkeypatch) as stuck:

        def interrupt(done, size):
            threading.Timer(0, stuck.go.set).start()
            signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            machine.snapshot(str(tmp_path / "s"), mode="live", progress=interrupt)
    nothing_left(machine, tmp_path)
    assert imbalances(machine.memory, 0) == []
    machine.snapshot(str(tmp_path / "s"), mode="live")


def test_what_cannot_be(vm, tmp_path, monkeypatch):
    machine, path = touching(vm, append="start=4M size=10M"), str(tmp_path / "s")
    with pytest.raises(BadInput, match="mode='warm': choose stop or live"):
        machine.snapshot(path, mode="warm")
    with machine.trace("coarse"), pytest.raises(BadInput, match="a coarse trace runs"):
        machine.snapshot(path, mode="live")
    for feature in ("uffd_wp", "uffd_guest"):
        with host.without(feature), pytest.raises(HostError, match=r"no live snapshot here: .*mode 'stop'"):
            machine.snapshot(path, mode="live")
    nothing_left(machine, tmp_path)
    with Stuck(machine, monkeypatch) as stuck:

        def both(done, size):
            if not stuck.go.is_set():
                with pytest.raises(HostError, match="a live snapshot is being saved"):
                    machine.trace("coarse").start()
                with pytest.raises(LifecycleError, match="another live snapshot"):
                    machine.snapshot(str(tmp_path / "t"), mode="live")
                with machine.trace("bitmap") as trace:
                    runs_on(machine)
                    assert trace.collect().pages > 0
                stuck.go.set()

        machine.snapshot(path, mode="live", progress=both)
    nothing_left(machine, tmp_path, ["s"])
    with machine.trace("coarse") as trace:
        runs_on(machine)
        assert trace.collect().pages > 0


def test_the_command(tmp_path, capsys):
    path = str(tmp_path / "s")
    arguments = ["run", "verify", "--timeout", "0.5", "--snapshot-mode", "live"]
    assert main([*arguments, "--snapshot", path, "--snapshot-at", "progress>=20000"]) == EXIT_TIMEOUT
    assert "the guest paused for" in capsys.readouterr().err
    assert main(["restore", path, "--timeout", "0.3"]) == EXIT_TIMEOUT  # it would end where its memory is wrong
    assert main(arguments) == EXIT_BAD_INPUT
    assert "--snapshot FILE must say where to" in capsys.readouterr().err
