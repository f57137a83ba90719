# test_migrate_hostile.py: either end of a migration against a peer that keeps to the protocol up to one message: no
# crash, no hang, one line that says why; the destination's VM goes, the source's guest runs on.
from __future__ import annotations

import gc
import os
import random
import socket
import threading
from contextlib import suppress

import pytest
from engine_help import until
from hostile_peers import Saboteur, ScriptedDestination, ScriptedSource, Template, until_end

from pyvmm import VM
from pyvmm.errors import MigrationError, PyvmmError
from pyvmm.layout import PAGE_SIZE
from pyvmm.migration import control, frames
from pyvmm.migration.accepting import Acceptor
from pyvmm.migration.connection import Connection
from pyvmm.migration.events import Broken
from pyvmm.migration.pages import PageChannel
from pyvmm.pytest_plugin import needs
from pyvmm.snapshot.states import encode
from pyvmm.testing.verify_model import check_memory, ram_hash

pytestmark = needs("kvm", "uffd_guest", "uffd_wp")

EXAMPLES = int(os.environ.get("PYVMM_HOSTILE", "160"))
"""Of each side. They follow from PYVMM_SEED."""
SEED = int(os.environ.get("PYVMM_SEED", "1"))
BATCHES = 4
MEMORY = "4M"
SECONDS = 10
MODES = ["precopy", "postcopy", "hybrid"]
CONTENT = (frames.States, frames.Prepare, frames.Source, frames._Run)
"""A guest may move all the same, and not be what it was: nobody can tell what a source's pages and states should be."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Time limits that are for networks and busy hosts."""
    monkeypatch.setattr(Acceptor.joined, "__defaults__", (0.4,))
    monkeypatch.setattr(Connection.send, "__defaults__", (0.8,))
    monkeypatch.setattr(Connection.recv, "__defaults__", (0.8,))
    monkeypatch.setattr(PageChannel.__init__, "__defaults__", (0.8,))
    monkeypatch.setattr(control, "SILENCE", 0.8)
    monkeypatch.setattr("pyvmm.migration.opening.HANDSHAKE", 0.4)
    monkeypatch.setattr("pyvmm.migration.accepting.HANDSHAKE", 0.4)


@pytest.fixture(scope="module")
def template():
    with VM(memory=MEMORY) as machine:
        machine.load("smp", "count=0")
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
        if not until_end(lambda: into.done or isinstance(into.last, Broken)):
            raise AssertionError(f"the destination hangs: {into.last!r}")
        if not into.done:  # ready or taken, and cut off: it stands, and waits for the source until somebody ends it
            assert into._decision.value in ("ready", "taken")
            into.close()
        try:
            into.result(SECONDS)
        except PyvmmError as error:
            one_line(error)
            return False
        finally:
            if into._vm is not None and not isinstance(fault.said, CONTENT):
                self._look(template)
            into.close()
        return True

    def _look(self, template):
        """If the guest runs here it is the one that was sent."""
        vm, source = self.into._vm, self.source
        if not self.into._runs_here():
            return
        if source.mode == "precopy":
            assert self.hash == template.hash
        if self.into.done and not vm.paused and not vm.ended:
            before = vm.progress().count
            until(lambda: vm.progress().count > before or vm.ended)
            assert not vm.ended, vm.printed


def options_of(rng):
    return {"mode": rng.choice(MODES), "channels": rng.choice((1, 2)), "local": rng.random() < 0.3}


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_scripted_source_is_right(template, tmp_path, mode, local):
    against = Against(template, tmp_path, Saboteur(), mode=mode, channels=2, local=local)
    against.source.play()
    assert against.source.whole, against.source.ended
    assert against.judge(template)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_hostile_source(template, tmp_path, batch):
    rng = random.Random(SEED * 100 + batch)
    lengths = {}
    moved = 0
    for number in range(EXAMPLES // BATCHES):
        options = options_of(rng)
        key = (options["mode"], options["channels"])
        how, seed = rng.choice(Saboteur.HOWS), rng.getrandbits(32)
        saboteur = Saboteur(rng.randrange(lengths.get(key, 60)), how, seed)
        against = Against(template, tmp_path, saboteur, **options)
        against.source.play()
        lengths[key] = max(lengths.get(key, 20), saboteur.count)
        try:
            moved += against.judge(template)
        except BaseException as error:
            error.add_note(f"batch {batch} example {number}: {options} message {saboteur.at} {how} {seed}: "
                           f"{saboteur.said!r:.200}, told {saboteur.told!r:.100}; script: {against.source.ended}")  # fmt: skip
            against.into.close()
            raise
    assert moved < EXAMPLES // BATCHES * 0.7
    gc.collect()


def test_a_source_that_stalls(template, tmp_path):
    """At any message: the destination gives up by itself, all of them at once."""
    rng = random.Random(SEED)
    all_of_them = []
    for at in rng.sample(range(40), 10):
        against = Against(template, tmp_path, Saboteur(at, "stall"), mode="hybrid", channels=1)
        thread = threading.Thread(target=against.source.play)
        thread.start()
        all_of_them.append((against, thread))
    for against, thread in all_of_them:
        thread.join(SECONDS)
        assert not thread.is_alive()
    for against, _ in all_of_them:
        assert against.source.saboteur.said is not None, against.source.ended
        assert not against.judge(template)
        against.source.close()


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

    def __init__(self):
        self.vm = None

    def get(self):
        if self.vm is None:
            self.vm = VM(memory="8M", cpus=1)
            self.vm.load("verify", "order=random")
            self.vm.start()
            until(lambda: self.vm.progress().passes > 0 or self.vm.ended)
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
    if not out.done:  # given away, and cut off: it stands until somebody says that nobody waits any more
        assert script.ready
        out.end("nobody waits any more")
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


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_hostile_destination(sender, tmp_path, batch):
    rng = random.Random(SEED * 100 + batch)
    stayed = 0
    for number in range(EXAMPLES // BATCHES):
        options = {"mode": rng.choice(MODES), "channels": rng.choice((1, 2))}
        how, seed = rng.choice(Saboteur.HOWS), rng.getrandbits(32)
        saboteur = Saboteur(rng.randrange(11), how, seed)
        try:
            script, error = send_to(sender, tmp_path, saboteur, **options)
            runs = owner(sender.vm, script, error)
        except BaseException as error:
            error.add_note(f"batch {batch} example {number}: {options} message {saboteur.at} {how} {seed}: "
                           f"{saboteur.said!r:.200}, told {saboteur.told!r:.100}")  # fmt: skip
            raise
        stayed += runs
        if not runs:
            sender.close()
    assert stayed > EXAMPLES // BATCHES * 0.3
    vm = sender.get()
    vm.pause()
    assert check_memory(vm.memory, vm.progress(), order="random") == []


def owner(vm, script, error):
    """Does the guest run on at its source? It must, if the destination never said READY, or sent no TAKEN and gave back;
    and it must not once the destination can run it."""
    if error is None or script.taken:
        assert vm.ended or vm.paused, "it runs here, and may run there"
        return False
    if vm.paused:
        assert script.ready, "the guest stands, and was never given away"
        return False
    before = vm.progress().count
    until(lambda: vm.progress().count > before or vm.ended)
    assert not vm.ended, vm.printed
    return True
