# test_migration_witness.py: a side of a migration is killed, and its witness tells what it had decided: real processes.
from __future__ import annotations

import hmac
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import pytest

from pyvmm.errors import HostError, LifecycleError
from pyvmm.migration import decision as decision_module
from pyvmm.migration import witness
from pyvmm.migration.address import parse_address
from pyvmm.migration.capture import Recorder, entries
from pyvmm.migration.connection import Connection
from pyvmm.migration.decision import Decision, Watch
from pyvmm.migration.frames import DECISIONS, Cancel, Died, Join, Joined, Ping, encode
from pyvmm.migration.order import DESTINATION, SOURCE
from pyvmm.migration.proof import DECISIONS_OF, died_proof, join_key, wrong_join
from pyvmm.migration.transport import connect, listen

ID, TOKEN = bytes(range(16)), bytes(range(32))
SECONDS = 20
"""No test waits for that: what is waited for comes at once, or never."""
NULL = {0: "/dev/null", 1: "/dev/null", 2: "/dev/null"}

# One process that has imported all, and forks a side for each line "SIDE HOW": which joins its witness's connection,
# starts the witness, says its pid and that of what it has forked, and decides again and again until it is killed.
SIDES = """
import os, random, signal, sys
from pyvmm.migration.address import parse_address
from pyvmm.migration.decision import Decision
from pyvmm.migration.frames import Join
from pyvmm.migration.proof import join_key
from pyvmm.migration.transport import connect
ID, TOKEN = bytes(range(16)), bytes(range(32))
TABLES = {"source": (("offered",), ("held",), ("offered",), ("given",), ("held", "ready")),
          "destination": (("ready",), ("none",))}
def side(name, how):
    os.setpgrp()
    say = os.fdopen(os.dup(1), "w")
    os.dup2(0, 30)  # inherited
    decision = Decision(name)
    connection = connect(parse_address(sys.argv[1]), witness=True)
    kind = 3 if name == "source" else 4
    connection.send(Join(ID, join_key(TOKEN, kind), kind, 0))
    connection.recv()
    if how == "bare":  # so that descriptors are where the witness wants others
        os.closerange(0, 3)
    decision.start_witness(connection, TOKEN)
    if how == "fork" and not (child := os.fork()):
        signal.alarm(20)
        signal.pause()
    print(os.getpid(), child if how == "fork" else 0, file=say, flush=True)
    if how == "exit":
        decision.set("offered")
        decision.set("given")
        sys.exit()
    if how == "raise":
        decision.set("ready")
        sys.stderr = None
        raise RuntimeError
    if how == "release":
        decision.set("offered")
        signal.pidfd_send_signal = lambda *_: os.kill(os.getpid(), 9)
        decision.release()
    if how == "last":
        decision.set("ready")
        decision.set("taken")
        signal.pause()
    while True:
        for step in TABLES[name]:
            decision.set(*step)
signal.signal(signal.SIGINT, signal.SIG_DFL)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        side(*line.split())
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""


class Side:
    """One that was forked: its pid, its witness's, and that of what it forked; the Watch of the other side."""

    def __init__(self, pid, child, watch):
        self.pid, self.child, self.watch = pid, child, watch
        (self.witness,) = children(pid) - {child}
        page = next(fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "pyvmm decision" in os.readlink(fd))
        self.page = os.open(page, os.O_RDONLY | os.O_CLOEXEC)

    def decided(self):
        """What the shared memory says."""
        number = os.pread(self.page, 1, witness.DECISION)[0]
        return next(name for name, value in DECISIONS.items() if value == number)


class Sides:
    def __init__(self, process, listener):
        self.process, self.listener = process, listener

    @contextmanager
    def one(self, side, how="loop"):
        """A side with its witness; ended and waited for, with its witness, when this is left."""
        self.process.stdin.write(f"{side} {how}\n")
        with self.listener.accept(SECONDS) as connection:
            join = connection.recv()
            assert wrong_join(join, connection, ID, TOKEN) == ""
            connection.send(Joined(join.kind, join.index))
            pid, child = map(int, self.process.stdout.readline().split())
            watch = Watch(connection, side, TOKEN)
            one = Side(pid, child, watch) if how not in ("exit", "raise", "release") else None
            try:
                yield one or watch
            finally:
                watch.close()
                if one:
                    os.close(one.page)
                    for process in filter(None, (pid, child)):
                        with suppress(ProcessLookupError):
                            os.kill(process, signal.SIGKILL)
                assert self.process.stdout.readline() == "ended\n"
        if one:
            until(lambda: not running(one.witness))


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    address = parse_address(f"unix:{tmp_path_factory.mktemp('sides')}/s")
    with listen(address) as listener, subprocess.Popen(
        [sys.executable, "-c", SIDES, str(address)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:  # fmt: skip
        yield Sides(process, listener)
        process.stdin.close()


def children(pid):
    return {int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def running(pid):
    """Neither gone nor dead and waiting for init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def nothing_stays(sides):
    def held():
        found = Counter(children(os.getpid()))
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the one that lists them
                found[os.readlink(f"/proc/self/fd/{fd}")] += 1
        return found

    before = held()
    yield
    assert held() == before


@pytest.fixture
def pair():
    ours, theirs = (Connection(sock, "the other side") for sock in socket.socketpair())
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(params=[SOURCE, DESTINATION])
def decision(request):
    with Decision(request.param) as made:
        yield made


# ---- decisions ----


def test_what_may_follow():
    allowed = {
        ("held", "offered"), ("offered", "given"), ("offered", "held"), ("given", "held"),
        ("none", "ready"), ("ready", "taken"), ("ready", "none"), ("held", "held"), ("none", "none"),
    }  # fmt: skip
    ways = {
        "held": (), "offered": ("offered",), "given": ("offered", "given"),
        "none": (), "ready": ("ready",), "taken": ("ready", "taken"),
    }  # fmt: skip
    for first, second in product(DECISIONS, repeat=2):
        one = Decision(SOURCE if first in DECISIONS_OF[SOURCE] else DESTINATION)
        for step in ways[first]:
            one.set(step)
        assert one.value == first
        if (first, second) in allowed:
            one.set(second, other="none")
        else:
            with pytest.raises(LifecycleError, match=f"cannot go from {first} to {second}"):
                one.set(second, other="none")
        assert one.value == (second if (first, second) in allowed else first)
        one.close()


def test_what_was_given_comes_back_only_from_who_never_took_it():
    one = Decision(SOURCE)
    one.set("offered")
    for other in ("none", "ready"):
        one.set("given")
        for wrong in ("", "taken", "held"):
            with pytest.raises(LifecycleError, match="never took it"):
                one.set("held", wrong)
        one.set("held", other)
        one.set("offered")
    one.close()
    one.close()
    assert one.value == "offered"
    with pytest.raises(LifecycleError, match="over"):
        one.set("held")


# ---- killed ----


def test_fifty_kills(sides):
    """At any moment: while the witness is only being started too."""
    told = []
    for number in range(50):
        side = (SOURCE, DESTINATION)[number % 2]
        with sides.one(side) as one:
            time.sleep(random.uniform(0, 0.03))
            assert not one.watch.died()
            os.kill(one.pid, signal.SIGKILL)
            told.append(one.watch.died(SECONDS))
            assert told[-1] == one.decided()
            assert not one.watch.gone
    assert set(told) >= {"held", "offered", "given", "none", "ready"}


def test_the_last_decision(sides):
    with sides.one(DESTINATION, "last") as one:
        until(lambda: one.decided() == "taken")
        os.kill(one.pid, signal.SIGKILL)
        assert one.watch.died(SECONDS) == one.watch.died() == "taken"


def test_killed_in_the_midst_of_a_release(sides):
    with sides.one(SOURCE, "release") as watch:
        assert watch.died(SECONDS) is None
        assert watch.gone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_what_ends_a_whole_group_leaves_the_witness(sides, number):
    with sides.one(SOURCE) as one:
        os.killpg(one.pid, number)
        assert one.watch.died(SECONDS) == one.decided()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_witness_itself(sides, number):
    """As when a whole control group is told to end: the side that migrates has time to do so."""
    with sides.one(SOURCE) as one:
        os.kill(one.witness, number)
        os.kill(one.pid, signal.SIGKILL)
        assert one.watch.died(SECONDS) == one.decided()


@pytest.mark.parametrize(("side", "how", "told"), [(SOURCE, "exit", "given"), (DESTINATION, "raise", "ready")])
def test_who_ends_with_its_decision_open(sides, side, how, told):
    with sides.one(side, how) as watch:
        assert watch.died(SECONDS) == told


def test_what_the_killed_one_had_forked_keeps_nothing_open(sides):
    with sides.one(SOURCE, "fork") as one:
        os.kill(one.pid, signal.SIGKILL)
        assert one.watch.died(SECONDS) == one.decided()
        assert running(one.child)


@pytest.mark.parametrize("how", ["loop", "bare"])
def test_what_a_witness_holds(sides, how):
    with sides.one(SOURCE, how) as one:
        until(lambda: os.readlink(f"/proc/{one.witness}/cwd") == "/")  # which is the last thing before it waits
        found = {int(fd.name): os.readlink(fd) for fd in Path(f"/proc/{one.witness}/fd").iterdir()}
        assert found.pop(witness.PEER).startswith("socket:")
        assert found == NULL | {3: "/memfd:pyvmm decision (deleted)", 4: "anon_inode:[pidfd]"}
        fields = Path(f"/proc/{one.witness}/stat").read_text().rpartition(")")[2].split()
        session, terminal = fields[3:5]
        assert (int(session), terminal) == (one.witness, "0")
        os.kill(one.pid, signal.SIGKILL)
        assert one.watch.died(SECONDS) == one.decided()


def test_the_other_side_closes(sides):
    with sides.one(SOURCE) as one:
        one.watch.close()
        until(lambda: not running(one.witness))
        assert running(one.pid)
        assert one.watch.gone


def test_a_witness_that_is_killed_is_missed(sides):
    with sides.one(SOURCE) as one:
        os.kill(one.witness, signal.SIGKILL)
        assert one.watch.died(SECONDS) is None
        assert one.watch.gone
        assert one.watch.why == "the witness of the source: closed"


# ---- released ----


def test_released(decision, pair):
    ours, theirs = pair
    watch = Watch(theirs, decision.side, TOKEN)
    assert not decision.witnessed
    decision.start_witness(ours, TOKEN)
    assert ours.fileno() == -1
    assert decision.witnessed
    assert len(children(os.getpid())) == 2  # and the one that forks
    assert watch.died() is None
    assert not watch.gone
    decision.set(DECISIONS_OF[decision.side][1])
    decision.release()
    decision.release()
    assert len(children(os.getpid())) == 1
    assert not decision.witnessed
    assert watch.died(SECONDS) is None
    assert watch.gone
    assert decision.value == DECISIONS_OF[decision.side][1]


def test_a_witness_that_ended_is_no_zombie_after_release(decision, pair):
    ours, theirs = pair
    decision.start_witness(ours, TOKEN)
    theirs.close()
    until(lambda: not decision.witnessed)
    decision.release()
    assert len(children(os.getpid())) == 1


def test_whoever_waited_for_it(decision, pair):
    before = children(os.getpid())
    decision.start_witness(pair[0], TOKEN)
    (pid,) = children(os.getpid()) - before
    pair[1].close()
    os.waitpid(pid, 0)
    assert not decision.witnessed
    decision.release()


def test_another_witness(decision, pair):
    """After a break: the first one goes, and the second one speaks on its own connection, if anybody."""
    again = [Connection(sock, "the other side") for sock in socket.socketpair()]
    with again[0], again[1]:
        decision.start_witness(pair[0], TOKEN)
        for number in range(7):
            again[0].send(Ping(number))
            assert again[1].recv() == Ping(number)
        decision.start_witness(again[0], TOKEN)
        first, second = (Watch(each, decision.side, TOKEN) for each in (pair[1], again[1]))
        assert first.died(SECONDS) is None
        assert first.gone
        assert second.died() is None
        assert not second.gone
        shared = os.pread(decision._fd, witness.SIZE, 0)
        assert not shared[witness.RELEASED]
        at = witness.SLOT * DECISIONS[decision.value]
        assert shared[at + 1 : at + 1 + shared[at]] == died(decision.side, decision.value, sequence=7)


def test_none_can_be_started(decision, pair, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/none/such")
    watch = Watch(pair[1], decision.side, TOKEN)
    with pytest.raises(HostError, match="the witness of the migration cannot be started: No such file"):
        decision.start_witness(pair[0], TOKEN)
    assert not decision.witnessed
    assert watch.died(SECONDS) is None
    assert watch.gone


def test_no_descriptors_left(decision, pair, monkeypatch):
    """The witness is there, but could not be released: then it goes at once."""
    calls = []

    def pidfd_open(pid):
        calls.append(pid)
        if len(calls) == 2:
            raise OSError(24, os.strerror(24))
        return real(pid)

    real = os.pidfd_open
    monkeypatch.setattr(decision_module.os, "pidfd_open", pidfd_open)
    watch = Watch(pair[1], decision.side, TOKEN)
    with pytest.raises(HostError, match="Too many open files"):
        decision.start_witness(pair[0], TOKEN)
    assert len(children(os.getpid())) == 1
    assert watch.died(SECONDS) is None


@pytest.mark.parametrize("drained", [True, False])
def test_the_other_side_is_slow(monkeypatch, drained):
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        filled = 0
        with suppress(BlockingIOError):
            while True:
                filled += near.send(bytes(4096))
        monkeypatch.setattr(witness, "PEER", near.fileno())
        monkeypatch.setattr(witness, "PATIENCE", SECONDS if drained else 0.05)
        came = bytearray()

        def drain():
            while len(came) < filled + 9:
                came.extend(far.recv(4096))

        thread = threading.Thread(target=drain)
        if drained:
            thread.start()
        witness.tell(b"last word")
        if drained:
            thread.join(SECONDS)
        else:
            filled -= 9
            drain()
        assert came.strip(b"\0") == (b"last word" if drained else b"")


def test_the_last_word_in_pieces(monkeypatch):
    """What poll() promised need not come true."""
    near, far = socket.socketpair()
    turns = []

    def write(fd, data):
        turns.append(data)
        if len(turns) % 2:
            raise BlockingIOError
        return real(fd, data[:4])

    real = os.write
    with near, far:
        monkeypatch.setattr(witness, "PEER", near.fileno())
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", write)
            witness.tell(b"last word")
        assert far.recv(100) == b"last word"


def test_the_other_side_has_gone_before(monkeypatch):
    near, far = socket.socketpair()
    far.close()
    with near:
        monkeypatch.setattr(witness, "PEER", near.fileno())
        witness.tell(b"x")


# ---- what proves it ----


def died(side, decision, sequence=0, token=TOKEN, proof=None):
    return encode(Died(DECISIONS[decision], proof or died_proof(token, side, decision)), sequence)


def test_the_proofs():
    def mac(text):
        return hmac.new(TOKEN, text, "sha256").digest()

    assert died_proof(TOKEN, SOURCE, "given") == mac(b"pyvmm died\x01\x03")
    assert died_proof(TOKEN, DESTINATION, "none") == mac(b"pyvmm died\x02\x04")
    assert join_key(TOKEN, 3) == mac(b"pyvmm witness join\x03")
    assert join_key(TOKEN, 4) == mac(b"pyvmm witness join\x04")
    assert join_key(TOKEN, 1) == join_key(TOKEN, 2) == TOKEN


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_what_joins(pair, kind):
    connection, _ = pair
    right = Join(ID, join_key(TOKEN, kind), kind, 0)
    for join in (
        Join(bytes(16), right.token, kind, 0),
        Join(ID, bytes(32), kind, 0),
        Join(ID, join_key(TOKEN, 3 if kind != 3 else 4), kind, 0),
        *([Join(ID, TOKEN, kind, 0)] if kind > 2 else []),
    ):
        assert "to no migration" in wrong_join(join, connection, ID, TOKEN)
    assert wrong_join(right, connection, ID, TOKEN) == ""
    connection.plain_witness = True
    assert wrong_join(right, connection, ID, TOKEN) == ("" if kind > 2 else "only a witness may do without TLS")
    connection.plain_witness, connection.secure = False, True
    assert wrong_join(right, connection, ID, TOKEN).startswith("a witness is joined without TLS" if kind > 2 else "")


def test_died_is_believed_however_it_comes(pair, tmp_path):
    ours, theirs = pair
    with Recorder(str(tmp_path / "c")) as recorder:
        theirs.recorder, theirs.channel = recorder, 9
        watch = Watch(theirs, SOURCE, TOKEN)
        for byte in died(SOURCE, "offered"):
            assert watch.died() is None
            ours._socket.send(bytes([byte]))
        assert watch.died() == "offered"
        ours.send(Cancel("no, it was otherwise"))
        ours.close()
        assert watch.died(1) == "offered"
        assert not watch.gone
        watch.close()
        watch.close()
    assert watch.died() == "offered"
    assert watch.fileno() == -1
    (entry,) = entries(str(tmp_path / "c"))
    assert (entry.channel, entry.out, entry.frame.name()) == (9, False, "DIED")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (died(SOURCE, "given", token=bytes(32)), "its proof is wrong"),
        (died(SOURCE, "given", proof=died_proof(TOKEN, SOURCE, "offered")), "its proof is wrong"),
        (died(SOURCE, "given", proof=died_proof(TOKEN, DESTINATION, "given")), "its proof is wrong"),
        (died(DESTINATION, "taken"), "the source cannot have decided 6"),
        (died(SOURCE, "given", sequence=1), "frame 1 comes where 0 should"),
        (died(SOURCE, "given")[:-1] + b"x", "checksum is wrong"),
        (died(SOURCE, "given")[:-1], "closed"),
        (encode(Cancel("x"), 0), "CANCEL cannot come here"),
        (b"\x16\x03\x01", "not a frame"),
        (b"", "closed"),
    ],
    ids=range(10),
)
def test_what_is_not_believed(pair, raw, words):
    ours, theirs = pair
    watch = Watch(theirs, SOURCE, TOKEN)
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    assert not poll.poll(0)
    ours._socket.send(raw)
    ours.close()
    assert poll.poll(0)
    assert watch.died(SECONDS) is None
    assert watch.gone
    assert words in watch.why
    assert watch.why.startswith("the witness of the source: ")
    assert watch.died(SECONDS) is None


def test_a_reset(pair):
    with listen(parse_address("tcp:0", listening=True)) as listener:
        near = connect(listener.address, witness=True)
        watch = Watch(listener.accept(SECONDS), SOURCE, TOKEN)
        near._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        near.close()
        assert watch.died(SECONDS) is None
        assert watch.why == "the witness of the source: Connection reset by peer"
        watch.close()


def test_no_watch_over_tls(pair):
    connection, _ = pair
    connection.secure = True
    with pytest.raises(LifecycleError, match="without TLS"):
        Watch(connection, SOURCE, TOKEN)
    with pytest.raises(LifecycleError, match="cannot be handed to another process"):
        connection.detach()
    connection.secure = False
