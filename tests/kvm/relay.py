# relay.py: what lies between the two sides of a migration and can be cut, frame by frame. Units: bytes, seconds.
"""`relay()`, an actor of mover.py: it takes connections, and tells them apart by the frame that each begins with."""

from __future__ import annotations

import json
import os
import random
import select
import socket
import threading
from contextlib import suppress

HEAD = 24
HELLO, JOIN, RESUME = 1, 4, 20
KINDS = {1: "pages", 2: "urgent", 3: "witness", 4: "witness"}
_PIECE = 1 << 16


def _open(address):
    kind, _, place = address.partition(":")
    if kind != "tcp":
        return socket.AF_UNIX, place
    host, _, port = place.rpartition(":")
    return socket.AF_INET, (host or "127.0.0.1", int(port))


class Relay:
    """rules: what is to be done when, each once. {"at": FRAME, "do": what, "pass": is it let through}: on the control
    connection; or {"bytes": so many of pages have gone to the destination in all, "do": what}. what: "garbage" in its
    place, behind it among pages; or "cut" or "stall", with "kinds": of the connections, none: all; "gone": seconds in
    which nobody is let in."""

    def __init__(self, voice, to, rules):
        self._voice, self._to, self._rules = voice, to, rules
        self._lock = threading.Lock()
        self._lines = []
        self._closed_until = 0.0
        self._bytes = 0

    def take(self, sock):
        """One more connection from the source."""
        with self._lock:
            if self._closed_until:
                sock.close()
                return
        threading.Thread(target=self._first, args=(sock,), daemon=True).start()

    def _first(self, sock):
        with suppress(OSError):
            head = sock.recv(HEAD, socket.MSG_WAITALL)
            body = sock.recv(int.from_bytes(head[8:12], "little"), socket.MSG_WAITALL)
            kind = KINDS[body[48]] if head[5] == JOIN else "control"
            if kind == "pages":
                kind += str(body[49])
            family, place = _open(self._to)
            out = socket.socket(family)
            out.connect(place)
            line = Line(kind, sock, out)
            with self._lock:
                self._lines.append(line)
            line.came(self, head + body)
            threading.Thread(target=line.go, args=(self, out, sock, False), daemon=True).start()
            line.go(self, sock, out, True)
            return
        sock.close()

    def frame(self, type):
        """Is a frame of the control connection let through? And what is to be done after that."""
        return self._rule(lambda rule: rule.get("at") == type)

    def passed(self, size):
        """So many bytes of pages went to the destination."""
        with self._lock:
            self._bytes += size
        return self._rule(lambda rule: rule.get("bytes", 1 << 62) <= self._bytes)

    def _rule(self, fits):
        with self._lock:
            for rule in self._rules:
                if fits(rule):
                    self._rules.remove(rule)
                    return rule
        return None

    def do(self, rule):
        kinds = rule.get("kinds")
        with self._lock:
            meant = [line for line in self._lines if kinds is None or line.kind in kinds]
            if rule["do"] == "cut":
                self._lines = [line for line in self._lines if line not in meant]
            if rule.get("gone"):
                self._closed_until = 1.0
                threading.Timer(rule["gone"], self._let_in).start()
        for line in meant if rule["do"] != "garbage" else ():
            line.cut() if rule["do"] == "cut" else line.stall()
        self._voice.say(did=rule["do"], kinds=sorted(line.kind for line in meant))

    def _let_in(self):
        self._closed_until = 0.0


class Line:
    """One connection, through us."""

    def __init__(self, kind, source, target):
        self.kind = kind
        self._ends = (source, target)
        self._flows = threading.Event()
        self._flows.set()

    def cut(self):
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def stall(self):
        self._flows.clear()

    def came(self, relay, data):
        self._ends[1].sendall(data)

    def go(self, relay, inward, outward, forth):
        """Until either end has ended."""
        with suppress(OSError):
            while self._one(relay, inward, outward, forth):
                pass
        self.cut()

    def _one(self, relay, inward, outward, forth):
        if self.kind == "control":
            data = inward.recv(HEAD, socket.MSG_WAITALL)
            if len(data) < HEAD:
                return False
            data += inward.recv(int.from_bytes(data[8:12], "little"), socket.MSG_WAITALL)
            rule = relay.frame(data[5])
            if rule is not None and rule["do"] == "garbage":
                self._send(outward, random.Random(len(data)).randbytes(len(data)))
            elif rule is None or rule.get("pass"):
                self._send(outward, data)
        else:
            data = inward.recv(_PIECE)
            if not data:
                return False
            rule = relay.passed(len(data)) if forth else None
            garbage = rule is not None and rule["do"] == "garbage"
            self._send(outward, data + random.Random(1).randbytes(99) if garbage else data)
        if rule is not None:
            relay.do(rule)
        return True

    def _send(self, outward, data):
        while not self._flows.wait(0.05):
            if select.select([outward], [], [], 0)[0] and not outward.recv(1, socket.MSG_PEEK):
                raise OSError("the other end has gone")
        outward.sendall(data)


def relay(voice, listen, to, rules):
    family, place = _open(listen)
    with socket.socket(family) as listener:
        listener.bind(place)
        listener.listen(16)
        if family == socket.AF_INET:
            listen = f"tcp:{':'.join(map(str, listener.getsockname()))}"
        between = Relay(voice, to, rules)

        def obey():
            for line in voice.orders:
                between.do(json.loads(line))
            os._exit(0)

        threading.Thread(target=obey, daemon=True).start()
        voice.say(address=listen)
        while True:
            between.take(listener.accept()[0])
