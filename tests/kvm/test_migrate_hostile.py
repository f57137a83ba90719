# test_migrate_hostile.py: either end of a migration against a peer that keeps to the protocol up to one message: no
# crash, no hang, one line that says why; the destination's VM goes, the source's guest runs on.
from __future__ import annotations

import os
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from engine_help import until
from hostile_peers import Saboteur, ScriptedDestination, ScriptedSource, Template, until_end

from pyvmm import VM
from pyvmm.errors import MigrationError, PyvmmError
from pyvmm.layout import PAGE_SIZE
from pyvmm.migration import frames
from pyvmm.migration.accepting import Acceptor
from pyvmm.migration.events import Broken
from pyvmm.migration.pages import PageChannel
from pyvmm.pytest_plugin import needs
from pyvmm.snapshot.states import encode
from pyvmm.testing.verify_model import check_memory, ram_hash

pytestmark = needs("kvm", "uffd_guest", "uffd_wp")

EXAMPLES = int(os.environ.get("PYVMM_HOSTILE", "75"))
"""Of each side. They follow from PYVMM_SEED."""
SEED = int(os.environ.get("PYVMM_SEED", "1"))
AT_ONCE = 12
MEMORY = "4M"
SECONDS = 10
MODES = ["precopy", "postcopy", "hybrid"]
SAID = [
    frames.Hello, frames.Join, frames.Large, frames._Run, frames.End, frames.States, frames.Prepare, frames.Commit,
    frames.Done,
]  # fmt: skip
"""What a source says, whatever the mode."""
NEEDED = (frames.Join, frames.Round, frames.Away, frames.Prepare)
FATAL = ("byte", "cut", "drop", "close", "garbage")
"""Without these frames, each bit of which matters, no guest may move."""
ANSWERS = [
    frames.Welcome, frames.Joined, frames.RoundDone, frames.Ready, frames.Taken, frames.Request, frames.Complete,
]  # fmt: skip
"""What a destination says."""
ROUNDS = [frames.Round, frames.Zeros, frames.Bytes]
CONTENT = (frames.States, frames.Prepare, frames.Source, frames._Run)
"""A guest may move all the same, and not be what it was: nobody can tell what a source's pages and states should be."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Time limits that are for networks and busy hosts."""
    monkeypatch.setattr(Acceptor.joined, "__defaults__", (0.4, *Acceptor.joined.__defaults__[1:]))
    monkeypatch.setattr(PageChannel.__init__, "__defaults__", (0.8,))
    for module in ("connection", "control"):
        monkeypatch.setattr(f"pyvmm.migration.{module}.SILENCE", 0.8)
    for module in ("opening", "accepting", "link"):
        monkeypatch.setattr(f"pyvmm.migration.{module}.HANDSHAKE", 0.4)


@pytest.fixture(scope="module")
def template():
    with VM(memory=MEMORY) as machine:
        machine.load("timer", "ticks=0 period=1000")  # that leaves the CPU to others
        machine.start()
        until(lambda: machine.progress().count)
        machine.pause()
        for page in range(300, 900, 7):  # so that there is something to be sent
            machine.memory.write(machine.memory.gpa_of(page), page.to_bytes(4, "little") * 1024)
        ram = b"".join(machine.memory.read(region.gpa, region.size) for region in machine.memory.regions)
        made = Template(ram, encode(machine.save_state()), machine.shape().encode())
        made.hash = ram_hash(machine.memory)
        return made


def one_line(error):
    text = str(error)
    assert text.isprintable(), text
    assert 0 < len(text) <= 1000


# ---- a destination, and a source that is hostile ----


class Against:
    """A destination that takes a template from a script, and what came of it."""

    def __init__(self, template, tmp_path, saboteur, **options):
        local = options.get("local", False)
        path = str(tmp_path / f"d{os.urandom(6).hex()}")
        self.hash = None
        self.source = ScriptedSource(template, path, saboteur, **options)
        self.into = VM.receive(f"{'local' if local else 'unix'}:{path}", prepare=self._prepared)

    def _prepared(self, vm):
        if self.source.mode == "precopy":  # else pages are away
            self.hash = ram_hash(vm.memory)

    def judge(self, template):
        """After the script: did the guest move here?"""
        into, fault = self.into, self.source.saboteur
        try:
            if not self.source.welcomed:  # it listens on
                into.close()
            elif not until_end(lambda: into.done or isinstance(into.last, Broken) or self._has_all()):
                raise AssertionError(f"the destination hangs: {into.last!r}")
            if not into.done:  # ready or taken, and cut off: it stands, and waits for the source until somebody ends it
                assert into._decision.value in ("ready", "taken")
                into.close()
            into.result(SECONDS)
            if not isinstance(fault.said, CONTENT):
                self._look(template)
            return True
        except PyvmmError as error:
            one_line(error)
            return False
        finally:
            into.release()

    def _has_all(self):
        """The guest runs here and misses nothing; only the source may not know that yet."""
        return self.into._taking is not None and self.into._taking._complete

    def _look(self, template):
        """The guest that runs here is the one that was sent."""
        vm = self.into._vm
        if self.source.mode == "precopy":
            assert self.hash == template.hash
        before = vm.progress().count
        until(lambda: vm.progress().count > before or vm.ended)
        assert not vm.ended, vm.printed


def all_at_once(call, examples):
    """What call(*example) returns for each of them. Some at a time, since they wait more than they work."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [future.result() for future in [pool.submit(call, *example) for example in examples]]


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_scripted_source_is_right(template, tmp_path, mode, local):
    against = Against(template, tmp_path, Saboteur(), mode=mode, channels=2, local=local)
    against.source.play()
    assert against.source.whole, against.source.ended
    assert against.judge(template)


def test_a_hostile_source(template, tmp_path):
    rng = random.Random(SEED)

    def example():
        options = {"mode": rng.choice(MODES), "channels": rng.choice((1, 2)), "local": rng.random() < 0.3}
        kinds = [
            *SAID,
            *([frames.Source] if options["local"] else []),
            *(ROUNDS if options["mode"] != "postcopy" else []),
        ]
        kinds += [frames.Away] * (options["mode"] == "hybrid")
        return options, Saboteur(
            rng.choice(kinds), rng.choice((0, 0, 1, 2)), rng.choice(Saboteur.HOWS), rng.getrandbits(32)
        )

    def one(options, saboteur):
        against = Against(template, tmp_path, saboteur, **options)
        try:
            against.source.play()
            moved = against.judge(template)
            fatal = saboteur.how in FATAL and isinstance(saboteur.said, NEEDED)
            assert not (moved and fatal), "the guest moved all the same"
            return moved
        except BaseException as error:
            error.add_note(f"{options} {saboteur!r}; script: {against.source.ended}")
            against.into.close()
            raise

    moved = all_at_once(one, [example() for _ in range(EXAMPLES)])
    assert 0 < sum(moved) < 0.6 * EXAMPLES


def test_a_source_that_stalls(template, tmp_path):
    """At any message: the destination gives up by itself."""

    def one(kind, nth):
        against = Against(template, tmp_path, Saboteur(kind, nth, "stall"), mode="hybrid", channels=1)
        try:
            against.source.play()
            assert against.source.saboteur.said is not None, against.source.ended
            assert not against.judge(template)
        finally:
            against.source.close()
            against.into.close()

    all_at_once(one, [(kind, 0) for kind in (*SAID, *ROUNDS, frames.Away) if kind is not frames.Done])


def test_connections_in_masses(template, tmp_path):
    """Idle ones, wrong JOINs, other HELLOs: the guest that moves meanwhile does not notice."""
    against = Against(template, tmp_path, Saboteur(), mode="precopy")
    strangers = []
    end = threading.Event()

    def flood():
        rng = random.Random(5)
        while not end.is_set():
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(0.2)
            with suppress(OSError):
                sock.connect(against.source.path)
                join = frames.Join(rng.randbytes(16), bytes(range(32)), rng.randint(1, 4), 0)
                right_id = frames.Join(bytes(range(16)), rng.randbytes(32), rng.randint(1, 4), 0)
                sock.send(rng.choice((frames.encode(join, 0), frames.encode(right_id, 0), b"GET /", b"")))
            strangers.append(sock)
            if len(strangers) > 20:
                strangers.pop(0).close()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        against.source.play()
    finally:
        end.set()
        thread.join()
        for sock in strangers:
            sock.close()
    assert against.source.whole, against.source.ended
    assert against.judge(template)


# ---- a source, and a destination that is hostile ----


class Sender:
    """A guest at work, made anew where it was given away."""

    def __init__(self, guest="verify"):
        self.vm = None
        self.guest = guest

    def get(self):
        if self.vm is None:
            self.vm = VM(memory="8M", cpus=1)
            self.vm.load(self.guest, "order=random" if self.guest == "verify" else "ticks=0 period=1000")
            self.vm.start()
            until(lambda: self.vm.progress().count > 0 or self.vm.ended)
        return self.vm

    def close(self):
        if self.vm is not None:
            self.vm.close()
        self.vm = None


@pytest.fixture
def sender():
    one = Sender()
    yield one
    one.close()


def send_to(sender, tmp_path, saboteur, **options):
    """Moves the guest to a script. Returns that, and how the migration ended: an error, or None."""
    path = str(tmp_path / f"s{os.urandom(6).hex()}")
    vm = sender.get()
    script = ScriptedDestination(path, vm.memory.size // PAGE_SIZE, saboteur)
    thread = threading.Thread(target=script.play)
    thread.start()
    out = vm.migrate(f"unix:{path}", downtime=1.0, **options)
    thread.join(SECONDS)
    assert not thread.is_alive(), "the script hangs"
    if not until_end(lambda: out.done or isinstance(out.last, Broken)):
        raise AssertionError(f"the source hangs: {out.last!r}")
    # Given away, and cut off, it stands until nobody waits any more. One that stays goes on saying so to a destination
    # that was ready.
    assert out.done or script.ready
    out.release()
    try:
        out.result(SECONDS)
        return script, None
    except MigrationError as error:
        one_line(error)
        return script, error


@pytest.mark.parametrize("mode", MODES)
def test_the_scripted_destination_is_right(sender, tmp_path, mode):
    script, error = send_to(sender, tmp_path, Saboteur(), mode=mode, channels=2)
    assert error is None
    assert script.whole, script.ended
    ram = b"".join(sender.vm.memory.read(region.gpa, region.size) for region in sender.vm.memory.regions)
    assert script.ram == ram


@pytest.mark.parametrize("senders", [4])
def test_a_hostile_destination(tmp_path, senders):
    """Some guests at once, each of which moves again and again, as long as it stays: one that checks its memory, and
    some that leave the CPU to others."""

    def some(seed):
        rng, stayed = random.Random(seed), 0
        sender = Sender("timer" if seed % 4 else "verify")
        try:
            for _ in range(EXAMPLES // senders):
                options = {"mode": rng.choice(MODES), "channels": rng.choice((1, 2))}
                how, nth = rng.choice(Saboteur.HOWS), rng.choice((0, 0, 1))
                stayed += one(sender, options, Saboteur(rng.choice(ANSWERS), nth, how, rng.getrandbits(32)))
            vm = sender.get()
            vm.pause()
            assert vm.progress().status == "running"
            assert seed % 4 or check_memory(vm.memory, vm.progress(), order="random") == []
        finally:
            sender.close()
        return stayed

    def one(sender, options, saboteur):
        try:
            script, error = send_to(sender, tmp_path, saboteur, **options)
            runs = owner(sender.vm, script, error)
        except BaseException as error:
            error.add_note(f"{options} {saboteur!r}")
            raise
        if not runs:
            sender.close()
        return runs

    stayed = sum(all_at_once(some, [(SEED * 100 + number,) for number in range(senders)]))
    assert 0.3 * EXAMPLES < stayed < EXAMPLES


def owner(vm, script, error):
    """Does the guest run on at its source? It must, if the destination never said READY, or gave back; and it must not
    once the destination can run it."""
    fault = script.saboteur
    gave_back = isinstance(fault.said, frames.Taken) and isinstance(fault.told, frames.Cancel)
    if error is None or (script.taken and not gave_back):
        assert vm.ended or vm.paused, "it runs here, and may run there"
        return False
    if vm.paused:
        assert script.ready, "the guest stands, and was never given away"
        return False
    before = vm.progress().count
    until(lambda: vm.progress().count > before or vm.ended)
    assert not vm.ended, vm.printed
    return True
