# hostile_peers.py: both ends of a migration as scripts: frames and pages in plain Python, which keep to the protocol up
# to one message, and then do something else. A second implementation: it shares frames.py with pyvmm, and no more.
from __future__ import annotations

import os
import random
import socket
import threading
import time
from contextlib import suppress

from pyvmm._native import ffi
from pyvmm.errors import ProtocolError
from pyvmm.layout import PAGE_SIZE
from pyvmm.migration import frames as f
from pyvmm.migration.frames import FEATURES, HEAD_SIZE, MODES, Decoder, Fixed, Number, encode
from pyvmm.migration.proof import join_key
from pyvmm.snapshot.format import checksum

PATIENCE = 10.0
"""Seconds for an answer, as long as all is as it should be."""
SOON = 0.15
"""The same, when something is wrong."""
BLOCK = 512
KINDS = {"pages": 1, "urgent": 2, "source-witness": 3, "destination-witness": 4}

CONTROL = [
    f.Ping(7), f.Pong(1 << 63), f.Cancel("enough"), f.Refuse("not you"), f.Commit(), f.Done(), f.Taken(), f.Ready(0),
    f.Ready(9), f.Complete(0), f.Round(1, 5), f.Round(1 << 20, 1), f.RoundDone(1, 1), f.States(9, 0, b"x"),
    f.Large(0, 8, b"\xff"), f.Large((1 << 19) - 8, 8, b"\xff"), f.Away(0, 8, b"\xff"), f.Have(0, 8, b"\0"),
    f.Prepare(1, 0, 1, 0), f.Prepare(0, 1 << 28, 1 << 26, 0), f.Resume(bytes(16), bytes(32), 1, 3),
    f.Resumed((1 << 32) - 1, 6), f.Died(3, bytes(32)), f.Source(1, 0, 0), f.Joined(1, 0), f.Welcome(0, 8, bytes(32)),
    f.Join(bytes(16), bytes(32), 3, 0), f.Hello(bytes(16), bytes(32), 1, 8, 0, "", b"x"),
]  # fmt: skip
RUNS = [
    f.Zeros(0, 1, 1), f.Zeros(0, 1 << 28, 1), f.Zeros((1 << 28) - 1, 1, 0), f.Zeros(0, 1024, 0), f.End(0, 0, 1),
    f.End(1 << 28, 0, 0), f.End(0, 0, 0), f.Request(0, 1, 0), f.Request(511, 1, 0), f.Pull(0, 512, 1), f.Pull(0, 1, 0),
    f.Bytes(0, 1, 1), f.Bytes(0, 512, 0), f.Bytes(1 << 27, 1, 1),
]  # fmt: skip


class Ended(Exception):
    """The other side has said no, has gone, or says nothing."""


class Wire:
    """A connection: numbers what it sends."""

    def __init__(self, sock):
        self.sock = sock
        self.sent = 0
        self.decoder = Decoder()

    def put(self, raw, frames=1):
        self.sock.settimeout(2.0)
        self.sock.sendall(raw)
        self.sent += frames

    def take(self, size, seconds):
        out = bytearray()
        while len(out) < size:
            self.sock.settimeout(seconds)
            data = self.sock.recv(size - len(out))
            if not data:
                raise Ended("closed")
            out += data
        return bytes(out)

    def get(self, seconds):
        while True:
            for frame in self.decoder.feed(self.take(self.decoder.wants, seconds)):
                if isinstance(frame, (f.Cancel, f.Refuse)):
                    raise Ended(frame.reason)
                if not isinstance(frame, (f.Ping, f.Pong)):
                    return frame

    def close(self):
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def sealed(raw, sequence):
    """With the sequence and the checksum that it should have."""
    raw = bytearray(raw)
    raw[12:16] = (sequence & 0xFFFFFFFF).to_bytes(4, "little")
    raw[16:24] = bytes(8)
    raw[16:24] = checksum(raw).to_bytes(8, "little")
    return bytes(raw)


class Saboteur:
    """Says what a script has it say, but for message number `nth` of a kind, which becomes something else. kind: of
    frames; None: nothing becomes anything else. how: of HOWS, or "stall". said: what it was; told: what it became,
    where that is a frame."""

    HOWS = ("byte", "field", "header", "cut", "twice", "drop", "instead", "before", "close", "garbage", "late_by_one")

    def __init__(self, kind=None, nth=0, how="", seed=0):
        self.kind, self.nth, self.how, self.seed = kind, nth, how, seed
        self.rng = random.Random(seed)
        self.left = nth
        self.said = None
        self.told = None
        self._late = None
        self._lock = threading.Lock()

    def __repr__(self):
        name = self.kind.__name__ if self.kind else "nothing"
        return f"{name} {self.nth} {self.how} seed {self.seed}: {self.said!r:.150}, told {self.told!r:.100}"

    @property
    def patience(self):
        return PATIENCE if self.said is None else SOON

    def say(self, wire, frame, tail=b""):
        with self._lock:  # urgent and other channels have a thread each
            fits = self.kind is not None and isinstance(frame, self.kind)
            self.left -= fits
            now = fits and self.left == -1
        if not now:
            wire.put(encode(frame, wire.sent) + tail)
            if self._late is not None and self._late[0] is wire:
                late, self._late = self._late, None
                wire.put(encode(late[1], wire.sent) + late[2])
            return
        self.said = frame
        getattr(self, f"_{self.how}")(wire, frame, tail)

    def _byte(self, wire, frame, tail):
        raw = bytearray(encode(frame, 0))
        if len(raw) == HEAD_SIZE:
            self._header(wire, frame, tail)
            return
        at = self.rng.randrange(HEAD_SIZE, len(raw))
        raw[at] ^= self.rng.randrange(1, 256)
        wire.put(sealed(raw, wire.sent) + tail)

    def _field(self, wire, frame, tail):
        """A number, or a key, is another one."""
        raw, at, places = bytearray(encode(frame, 0)), HEAD_SIZE, []
        for kind in frame.FIELDS.values():
            if not isinstance(kind, (Number, Fixed)):
                break
            places.append((at, kind.size))
            at += kind.size
        if not places:
            self._byte(wire, frame, tail)
            return
        at, size = self.rng.choice(places)
        old = int.from_bytes(raw[at : at + size], "little")
        new = self.rng.choice((0, 1, old - 1, old + 1, old * 2, 1 << (8 * size - 1), (1 << 8 * size) - 1))
        raw[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
        wire.put(sealed(raw, wire.sent) + tail)

    def _header(self, wire, frame, tail):
        raw = bytearray(encode(frame, wire.sent))
        place = self.rng.choice(((0, 4), (4, 1), (5, 1), (6, 2), (8, 4), (12, 4), (16, 8)))
        value = self.rng.choice((0, 0xFF, 1, self.rng.getrandbits(8)))
        raw[place[0] : sum(place)] = bytes([value]) * place[1]
        if place[0] not in (12, 16):
            raw = sealed(raw, wire.sent)
        wire.put(bytes(raw) + tail)

    def _cut(self, wire, frame, tail):
        raw = encode(frame, wire.sent) + tail
        wire.put(raw[: self.rng.randrange(len(raw))])
        wire.close()

    def _twice(self, wire, frame, tail):
        for _ in range(2):
            wire.put(encode(frame, wire.sent) + tail)

    def _drop(self, wire, frame, tail):
        pass

    def _other(self, wire, frame):
        is_run = isinstance(frame, f._Run)
        other = self.rng.choice(RUNS if self.rng.random() < (0.9 if is_run else 0.1) else CONTROL)
        self.told = other
        wire.put(encode(other, wire.sent) + b"?" * (other.count * PAGE_SIZE if isinstance(other, f.Bytes) else 0))

    def _instead(self, wire, frame, tail):
        self._other(wire, frame)

    def _before(self, wire, frame, tail):
        self._other(wire, frame)
        wire.put(encode(frame, wire.sent) + tail)

    def _close(self, wire, frame, tail):
        wire.close()

    def _garbage(self, wire, frame, tail):
        wire.put(self.rng.randbytes(self.rng.choice((1, 24, 40, 5000))))

    def _late_by_one(self, wire, frame, tail):
        self._late = (wire, frame, tail)

    def _stall(self, wire, frame, tail):
        raise Ended("stalled")


class Peer:
    """What both scripts share. wires: all connections that there are."""

    def __init__(self, saboteur):
        self.saboteur = saboteur
        self.wires = []
        self.ended = ""
        self.welcomed = self.whole = False
        """A migration began; and went on until DONE."""

    def say(self, wire, frame, tail=b""):
        self.saboteur.say(wire, frame, tail)

    def expect(self, wire, kind):
        frame = wire.get(self.saboteur.patience)
        if not isinstance(frame, kind):
            raise Ended(f"{frame.name()} came where {kind.name()} should")
        return frame

    def play(self):
        """Never raises but for what is a mistake of the script's."""
        try:
            self._play()
            self.whole = True
        except (Ended, OSError, ProtocolError) as error:
            self.ended = f"{type(error).__name__}: {error}"
        finally:
            if self.saboteur.how != "stall" or self.saboteur.said is None:
                self.close()

    def close(self):
        for wire in self.wires:
            wire.close()


class Template:
    """A guest as it was saved. ram, states: bytes; shape: encoded."""

    def __init__(self, ram, states, shape):
        self.shape, self.states = shape, states
        self.pages = len(ram) // PAGE_SIZE
        self.native = ffi.new("uint8_t[]", ram)
        self.ram = ffi.buffer(self.native)
        self.zero = [not any(self.ram[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]) for page in range(self.pages)]

    def runs(self, pages):
        """(first, count, zeros) of these pages, in ascending order, each in a block of 2 MiB."""
        found = []
        for page in pages:
            last = found[-1] if found else (-1, 0, False)
            joins = last[0] + last[1] == page and last[2] == self.zero[page] and page % BLOCK
            if joins:
                found[-1] = (last[0], last[1] + 1, last[2])
            else:
                found.append((page, 1, self.zero[page]))
        return found


class ScriptedSource(Peer):
    """Has a template move to `path`, where a destination listens."""

    def __init__(self, template, path, saboteur, mode="precopy", channels=1, local=False):
        super().__init__(saboteur)
        self.template, self.path, self.mode, self.channels, self.local = template, path, mode, channels, local
        rng = random.Random(saboteur.seed)
        self.away = [page for page in range(template.pages) if mode == "postcopy" or rng.random() < 0.05]
        self.id, self.token = bytes(range(16)), bytes(range(32))

    def connect(self):
        sock = socket.socket(socket.AF_UNIX)  # blocking: others may connect at the moment
        self.wires.append(Wire(sock))
        sock.connect(self.path)
        return self.wires[-1]

    def _join(self, kind, index=0):
        wire, number = self.connect(), KINDS[kind]
        self.say(wire, f.Join(self.id, join_key(self.token, number), number, index))
        self.expect(wire, f.Joined)
        return wire

    def _play(self):
        template, post = self.template, self.mode != "precopy"
        control = self.connect()
        features = FEATURES["postcopy"] | FEATURES["large"] | (FEATURES["local"] if self.local else 0)
        hello = f.Hello(self.id, self.token, MODES[self.mode], self.channels, features, "", template.shape)
        self.say(control, hello)
        self.expect(control, f.Welcome)
        self.welcomed = True
        pages = [self._join("pages", index) for index in range(self.channels)]
        urgent = self._join("urgent") if post else None
        self._join("source-witness")
        self._join("destination-witness")
        if self.local:
            self.say(control, f.Source(os.getpid(), started(), int(ffi.cast("uintptr_t", template.native))))
        blocks = -(-template.pages // BLOCK)
        bits = (1 << blocks) - 2
        self.say(control, f.Large(0, blocks, bits.to_bytes(-(-blocks // 8), "little")))
        rounds = 0
        for number, sent in enumerate((range(template.pages), range(3, 40)) if self.mode != "postcopy" else (), 1):
            rounds = number
            self.say(control, f.Round(number, len(sent)))
            self._send(pages, sent, number)
            self.expect(control, f.RoundDone)
        for at in range(0, len(template.states), 2000):
            self.say(control, f.States(len(template.states), at, template.states[at : at + 2000]))
        if self.mode == "hybrid":
            half = template.pages // 16 * 8
            for first, end in ((0, half), (half, template.pages)):
                own = sum(1 << page - first for page in self.away if first <= page < end)
                self.say(control, f.Away(first, end - first, own.to_bytes(-(-(end - first) // 8), "little")))
        away = len(self.away) if post else 0
        self.say(control, f.Prepare(rounds, away, len(template.states), checksum(template.states)))
        self.expect(control, f.Ready)
        self.say(control, f.Commit())
        self.expect(control, f.Taken)
        self._finish(control, pages, urgent)

    def _finish(self, control, pages, urgent):
        serving = threading.Thread(target=self._serve, args=(urgent,)) if urgent is not None else None
        if serving is not None:
            serving.start()
        try:
            if serving is not None:
                self._send(pages, self.away, 0)
            self.expect(control, f.Complete)
            self.say(control, f.Done())
            with suppress(Ended, OSError):
                control.get(SOON)  # until it has closed
        finally:
            if serving is not None:
                urgent.close()
                serving.join()

    def _send(self, channels, pages, round):
        for index, channel in enumerate(channels):
            own = [page for page in pages if page // BLOCK % len(channels) == index]
            for first, count, zeros in self.template.runs(own):
                if zeros:
                    self.say(channel, f.Zeros(first, count, round))
                elif self.local:
                    self.say(channel, f.Pull(first, count, round))
                else:
                    self.say(channel, f.Bytes(first, count, round), self._bytes(first, count))
            self.say(channel, f.End(len(own), 0, round))

    def _bytes(self, first, count):
        return self.template.ram[first * PAGE_SIZE : (first + count) * PAGE_SIZE]

    def _serve(self, urgent):
        with suppress(Ended, OSError, ProtocolError):
            while True:
                asked = urgent.get(PATIENCE)
                for first, count, zeros in self.template.runs(range(asked.first, asked.first + asked.count)):
                    kind = f.Zeros if zeros else f.Pull if self.local else f.Bytes
                    tail = self._bytes(first, count) if kind is f.Bytes else b""
                    self.say(urgent, kind(first, count, 0), tail)


def started():
    """As SOURCE has it."""
    with open("/proc/self/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


class ScriptedDestination(Peer):
    """Listens at `path`, and takes a guest of `pages` pages, which never runs. ram: what came of it."""

    def __init__(self, path, pages, saboteur):
        super().__init__(saboteur)
        self.pages = pages
        self.ram = bytearray(pages * PAGE_SIZE)
        self.committed = self.taken = self.ready = False
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(path)
        self._listening.listen(16)

    def close(self):
        self._listening.close()
        super().close()

    def _accept(self, kind):
        self._listening.settimeout(self.saboteur.patience)
        self.wires.append(Wire(self._listening.accept()[0]))
        return self.wires[-1], self.expect(self.wires[-1], kind)

    def _play(self):
        control, hello = self._accept(f.Hello)
        self.say(control, f.Welcome(hello.features & 3, hello.channels, bytes(32)))
        joins = {}
        while len(joins) < hello.channels + 2 + (hello.mode != 1):
            wire, join = self._accept(f.Join)
            self.say(wire, f.Joined(join.kind, join.index))
            joins[join.kind, join.index] = wire
        channels = [joins[1, index] for index in range(hello.channels)]
        frame, away = control.get(self.saboteur.patience), 0
        while not isinstance(frame, f.Prepare):
            if isinstance(frame, f.Round):
                came = sum(self._receive(channel) for channel in channels)
                self.say(control, f.RoundDone(frame.round, came))
            frame = control.get(self.saboteur.patience)
        away, self.ready = frame.away, True
        self.say(control, f.Ready(away))
        self.expect(control, f.Commit)
        self.committed = True
        self.say(control, f.Taken())
        self.taken = True
        if away:
            self.say(joins[2, 0], f.Request(self.pages - 1, 1, 0))
            self._receive(joins[2, 0], 1)
            for channel in channels:
                self._receive(channel)
        self.say(control, f.Complete(5))
        self.expect(control, f.Done)

    def _receive(self, channel, limit=1 << 30):
        """Until END, or so many pages: how many."""
        came = 0
        while came < limit:
            frame = channel.get(self.saboteur.patience)
            if isinstance(frame, f.End):
                break
            size = frame.count * PAGE_SIZE
            data = channel.take(size, self.saboteur.patience) if isinstance(frame, f.Bytes) else bytes(size)
            self.ram[frame.first * PAGE_SIZE : frame.first * PAGE_SIZE + size] = data
            came += frame.count
        return came


def until_end(is_so, seconds=5.0):
    """Waits for that; was it so in time?"""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True
