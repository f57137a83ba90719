# mover.py: processes that migrate a guest, or stand between the two, for tests that kill and cut. Run as a script it is
# the one that they are all forked from, so that none of them has to import pyvmm. Units: seconds.
"""`Stage` has the processes, `Actor` is one of them. An actor says lines of JSON, and takes them as orders."""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

SECONDS = 30
"""Until something that must happen has not."""


# ---- at the test ----


class Actor:
    """A process. said: all that it has said, without `pop`."""

    def __init__(self, pid, channel, name):
        self.pid, self.name = pid, name
        self.pidfd = os.pidfd_open(pid)
        self.said = []
        self.decided = []
        self._channel = channel
        self._lines = channel.makefile("r")
        self._news = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        with suppress(OSError, ValueError):
            for line in self._lines:
                self._news.put(json.loads(line))
        self._news.put({"gone": True})

    def order(self, **words):
        with suppress(OSError):  # it has been killed: what it said before tells
            self._channel.sendall((json.dumps(words) + "\n").encode())

    def until(self, *keys, seconds=SECONDS):
        """The next that it says with one of these keys, or {"gone"}."""
        end = time.monotonic() + seconds
        while True:
            try:
                found = self._news.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{self.name} did not say {keys} in {seconds} s, but {self.said}") from None
            self.said.append(found)
            if "gone" in found:
                self._news.put(found)
                return found
            if "decided" in found:
                self.decided.append(found["decided"])
            if any(key in found for key in keys):
                return found

    def told(self, key):
        """All that it has said by that key so far."""
        return [one[key] for one in self.said if key in one]

    def kill(self):
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def ended(self, seconds=SECONDS):
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self):
        self.kill()
        assert self.ended()
        self._channel.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._lines.close()
        self._channel.close()
        os.close(self.pidfd)


class Stage:
    """Where actors come from. `silence`: seconds that stand for the protocol's 15."""

    def __init__(self, silence=15.0):
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(silence)], pass_fds=[theirs.fileno()]
            )
        self._socket = ours
        self._lock = threading.Lock()

    def actor(self, role, **options):
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            socket.send_fds(self._socket, [json.dumps({"role": role, **options}).encode()], [theirs.fileno()])
            return Actor(int(self._socket.recv(32)), ours, role)

    def close(self):
        self._socket.close()
        assert self._process.wait(SECONDS) == 0


# ---- in the processes ----


def main():
    place = socket.socket(fileno=int(sys.argv[1]))
    quicken(float(sys.argv[2]))
    import pyvmm.machine.migrating.incoming
    import pyvmm.machine.migrating.outgoing  # noqa: F401
    from pyvmm.testing.verify_model import check_memory, expected_page

    expected_page(1, 1, 1)
    assert check_memory
    ended = []
    while True:
        raw, fds, _, _ = socket.recv_fds(place, 1 << 16, 1)
        for pid in ended[:]:  # no sooner: the test has its pidfd by now
            if os.waitpid(pid, os.WNOHANG)[0]:
                ended.remove(pid)
        if not raw:
            return
        pid = os.fork()
        if pid:
            os.close(fds[0])
            ended.append(pid)
            place.send(str(pid).encode())
            continue
        place.close()
        options = json.loads(raw)
        try:
            limit(**options.pop("limits", {}))
            ROLES[options.pop("role")](Voice(socket.socket(fileno=fds[0])), **options)
        finally:
            os._exit(0)


def quicken(silence):
    """What takes 15 s, 10 s and 5 s by the protocol."""
    from pyvmm.migration import connection

    connection.SILENCE = silence
    from pyvmm.migration import control, transport

    control._PING = silence / 3
    transport.HANDSHAKE = silence * 2 / 3


def limit(memory=None, file=None):
    """memory: bytes more than there are now; file: bytes of each."""
    import resource

    if memory is not None:
        with open("/proc/self/statm") as statm:
            memory += int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))


class Voice:
    def __init__(self, channel):
        self._channel = channel
        self._lock = threading.Lock()
        self.orders = channel.makefile("r")

    def say(self, **words):
        with self._lock, suppress(OSError):
            self._channel.sendall((json.dumps(words) + "\n").encode())


class Points:
    """What the migration comes by: frames, decisions, pieces of the rest. At one of them, the n-th time, it is killed.
    slow: seconds for each piece of post-copy, so that there is a time to be killed in."""

    def __init__(self, voice, die=None, count=1, slow=0.0):
        self._voice, self._die, self._left, self._slow = voice, die, count, slow
        from pyvmm.machine.migrating import arriving
        from pyvmm.migration import peer
        from pyvmm.migration.control import Control
        from pyvmm.migration.decision import Decision

        peer.PIECE, arriving._STEP = 1, 128
        self._around(Control, "_send", lambda me, frame: frame.name(), "send ", "sent ")
        self._around(Control, "_take", lambda me, frame: frame.name(), "comes ", "came ")
        self._around(Decision, "set", lambda me, name, other="": name, "decides ", "decided ")
        self._around(peer.Served, "send_rest", lambda *_: "", "piece", "")
        self._around(peer.PeerHome, "receive", lambda *_: "", "piece", "")

    def _around(self, owner, name, called, before, after):
        inner = getattr(owner, name)

        def method(me, *arguments):
            what = called(me, *arguments)
            self._by(before + what)
            result = inner(me, *arguments)
            self._by(after + what)
            return result

        setattr(owner, name, method)

    def _by(self, point):
        if point == "piece" and self._slow:
            time.sleep(self._slow)
        if point.startswith("decide"):  # what a side says and does not do is no lie: what it does and does not say is
            self._voice.say(**dict([point.split()]))
        if point == "sent HELLO":
            self._voice.say(hello=True)
        if point == self._die:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


def source(voice, options, points, memory="16M", cpus=1, shape=None):
    from pyvmm import VM

    Points(voice, **points)
    vm = VM(memory=memory, cpus=cpus)
    told = vm.shape()
    for name, value in (shape or {}).items():
        setattr(told, name, value)
    vm.shape = lambda: told
    vm.load("verify", "order=random zeros=100")
    vm.start()
    while not vm.progress().passes:
        time.sleep(0.001)
    voice.say(ready=True)
    session = None
    for line in voice.orders:
        order = json.loads(line)
        if order["do"] == "migrate":
            session = vm.migrate(order["to"], **options)
            _follow(voice, session, lambda: vm)
        else:
            _obey(voice, order, session, lambda: vm)


def destination(voice, listen, points, options=None):
    from pyvmm import VM

    Points(voice, **points)
    session = VM.receive(listen, **(options or {}))
    voice.say(address=session.address)
    _follow(voice, session, lambda: session._vm)
    for line in voice.orders:
        _obey(voice, json.loads(line), session, lambda: session._vm)


def _follow(voice, session, vm):
    def follow():
        for event in session:
            told = event.as_json()
            if told["event"] != "moving":
                voice.say(event=told["event"], told={} if told["event"] == "finished" else told)
        try:
            report = session.result()
            voice.say(result="", breaks=report.breaks, large=[report.large_before, report.large_after], **_state(vm()))
        except Exception as error:
            voice.say(result=f"{error}", kind=type(error).__name__, **_state(vm()))

    threading.Thread(target=follow, daemon=True).start()


def _state(vm):
    """ "runs": here; "stands"; "ended"; "none": there is none."""
    if vm is None or vm._life._closed or not vm.started:
        return {"state": "none"}
    why = "" if vm._life.trouble is None else str(vm._life.trouble)
    outcome = getattr(vm._life.outcome, "reason", "")
    return {"state": "ended" if vm.ended else "stands" if vm.paused else "runs", "why": why, "outcome": outcome}


def _obey(voice, order, session, vm):
    what = order["do"]
    if what == "state":
        voice.say(**_state(vm()))
    elif what == "wait":
        try:
            voice.say(waited=vm().wait(order["seconds"]).reason)
        except Exception as error:
            voice.say(waited=f"{error}", kind=type(error).__name__)
    elif what == "check":
        voice.say(check=_check(vm()))
    elif what == "crash":  # no code, no tables
        from pyvmm.layout import Gpa

        vm().memory.write(Gpa(0x20000), bytes((2 << 20) - 0x20000))
    elif what == "cancel":
        session.cancel("enough")
    elif what == "close":
        vm().close()
        voice.say(closed=True)


def _check(vm):
    """The guest gets on, and all its memory is as it must be; or what is wrong."""
    from pyvmm.testing.verify_model import check_memory

    begin, end = vm.progress(), time.monotonic() + SECONDS / 2
    while vm.progress().passes < begin.passes + 2:
        if vm.ended or vm.paused or time.monotonic() > end:
            return f"stands at pass {begin.passes}: {_state(vm)} {vm.printed}"
        time.sleep(0.002)
    vm.pause()
    wrong = check_memory(vm.memory, vm.progress(), order="random", zeros=100)
    vm.resume()
    return "; ".join(one.text for one in wrong) or ("" if vm.progress().status == "running" else vm.printed)


def _relay(voice, **options):
    from relay import relay

    relay(voice, **options)


def silent(voice, listen):
    """A destination that takes connections and says nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(listen.partition(":")[2])
        listener.listen()
        voice.say(address=listen)
        voice.orders.read()


ROLES = {"source": source, "destination": destination, "relay": _relay, "silent": silent}

if __name__ == "__main__":
    main()
