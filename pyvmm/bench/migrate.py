# migrate.py: a guest moves from one process to another: how fast (measures P3, P4), how long it stands (P5), what it
# gets done meanwhile (P6), what of its large pages it keeps (P7). Units: GB/s of RAM, seconds, "x": one over another.
"""Beside QEMU with the same guests and the same bytes, where it is installed, and beside raw system calls.

A guest goes on from process to process, in another way each time, round by round: so all ways meet the same guest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pyvmm.bench import Collected, Result
from pyvmm.bench.checkpoints import ZEROS, folder
from pyvmm.bench.mover import Side
from pyvmm.bench.qemu import MISSING, QEMU, Qemu, write_ram
from pyvmm.bench.qemu import WAYS as QEMU_WAYS
from pyvmm.bench.streams import LIMITS, Pair
from pyvmm.bench.warm import warm_host
from pyvmm.layout import GIB, MIB, format_size
from pyvmm.record import Record

if TYPE_CHECKING:
    from collections.abc import Iterator

# name -> transport, options of VM.migrate()
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "tcp": ("tcp", {}),
    "tcp, 2 channels": ("tcp", {"channels": 2}),
    "tls": ("tls", {}),
    "unix": ("unix", {}),
    "local": ("local", {}),
    "tcp, post-copy": ("tcp", {"mode": "postcopy"}),
    "local, post-copy": ("local", {"mode": "postcopy"}),
    "tcp, hybrid": ("tcp", {"mode": "hybrid"}),
    "tcp, traced by 4 KiB": ("tcp", {"tracker": "manual"}),
}
_FAST = ("tcp", "tcp, 2 channels", "tls", "unix", "local", "tcp, post-copy", "local, post-copy")
_GENTLE = ("tcp", "local", "tcp, post-copy", "tcp, hybrid", "tcp, traced by 4 KiB")
_KEEPING = ("tcp", "tcp, post-copy", "tcp, hybrid")
PATTERNS = ("sequential", "uniform")
TRACKERS = {"coarse": "coarse", "4 KiB log (bitmap)": "bitmap"}
PACES: dict[str, dict[str, Any]] = {"": {}, ", at 400 MB/s": {"bandwidth": 400_000_000}}

DOWNTIME = 0.020
"""Seconds that both sides are told to keep to."""
_ROOM = 64 * MIB
_ROUNDS = 6
"""Of a migration that is not to come about."""
_NEVER = 1e-6


class Size(Record):
    """memory: RAM of the guest that idles; hot: bytes that guests write to; small: RAM of those whose large pages are
    counted; rounds: after one that warms up, if `warm`; ways, qemu: which ones, of WAYS and those of bench/qemu.py;
    seconds: an untraced guest's speed is watched."""

    __slots__ = ("hot", "memory", "qemu", "rounds", "seconds", "small", "warm", "ways")

    def __init__(
        self,
        memory: int,
        hot: int,
        small: int,
        rounds: int,
        warm: bool,
        ways: tuple[str, ...],
        qemu: tuple[str, ...],
        seconds: float,
    ) -> None:
        self.memory = memory
        self.hot = hot
        self.small = small
        self.rounds = rounds
        self.warm = warm
        self.ways = ways
        self.qemu = qemu
        self.seconds = seconds


FULL = Size(GIB, 256 * MIB, 128 * MIB, 5, True, tuple(WAYS), tuple(QEMU_WAYS), 1.0)
QUICK = Size(16 * MIB, 4 * MIB, 16 * MIB, 1, False, ("tcp", "local", "tcp, post-copy"), ("QEMU, unix",), 0.05)


def measure(quick: bool = False) -> list[Result]:
    """Speed: all RAM of an idle guest, which is random data, by the time of the first round ("the round": its pages
    alone, from the first sent to the last stored), and by that of the whole migration, connecting and switching with
    it; of QEMU its total-time, of post-copy the whole alone. Memory at the destination is fresh, and the host's is
    warm; that of the raw system calls was touched before, and nothing of theirs is looked at for zeros.

    Downtime: what the source says, from the order to stand to the news that the guest runs (QEMU: its downtime); both
    are told to keep to 20 ms. "stood": from that order to the guest's first work at the destination, as the host sees
    it. "gap": the guest's longest without work by its own clock, which stands while the guest does: what faults and
    traces cost it. No such clock is read in QEMU, where it stands too.

    Work while migrating: writes a second in six rounds of a migration that is called off then, over those untraced.

    Large pages: KVM's 2 MiB mappings over those before, when the guest has gone over its memory.
    """
    size = QUICK if quick else FULL
    found = Collected()
    with ExitStack() as stack:
        path = stack.enter_context(folder(size.memory + size.small))
        tls = _certificates(path)
        _speeds(found, size, path, tls)
        for pattern in PATTERNS[: 1 if quick else None]:
            _standing(found, size, path, pattern)
        _working(found, size, path)
        for content in list(ZEROS)[2 if quick else 0 : 3 if quick else None]:
            _keeping(found, size, path, content)
    return found.results()


# ---- guests that move on and on ----


class Ours:
    """A guest that moves from one process of ours to the next."""

    def __init__(self, stack: ExitStack, path: str, size: int, guest: str, append: str, content: str) -> None:
        self._path, self._size, self._gaps = path, size, "gaps=1" in append
        self.side = Side()
        stack.callback(self.close)
        self.side.ask("make", memory=size, guest=guest, append=append, content=content)

    def close(self) -> None:
        """Ends the process that has the guest now."""
        self.side.close()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Only then it runs, so that guests which are compared do not take each other's CPU."""
        self.side.ask("resume")
        yield
        self.side.ask("pause")

    def move(self, way: str, tls: tuple[list[str], list[str]] | None = None) -> dict[str, Any]:
        """What the source says of it; "worked": when the guest first did, at the destination, if it keeps gaps."""
        transport, options = WAYS[way]
        ours, theirs = tls if tls and transport == "tls" else (None, None)
        with ExitStack() as stack:
            target = stack.enter_context(Side())
            where = "tcp:0" if transport in ("tcp", "tls") else f"{transport}:{self._path}/in"
            address = target.ask("listen", at=where, warm=self._size, tls=theirs, works=self._gaps)
            if self._gaps:
                self.side.ask("forget_gaps")
            told: dict[str, Any] = self.side.ask("migrate", to=address, tls=ours, downtime=DOWNTIME, **options)
            told |= {"worked": target.ask("arrived")["worked"]}
            self.side.close()
            self.side = target
            stack.pop_all()
        return told


class Theirs:
    """The same guest in QEMU."""

    def __init__(self, stack: ExitStack, path: str, size: int, guest: str, append: str, content: str) -> None:
        ram = os.path.join(path, "ram")
        write_ram(ram, size, content)
        self._size = size
        self.qemu = Qemu(path, size, guest, append, ram)
        stack.callback(self.close)
        os.unlink(ram)

    def close(self) -> None:
        """Ends the process that has the guest now."""
        self.qemu.close()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Only then it runs."""
        self.qemu.command("cont")
        yield
        self.qemu.command("stop")

    def move(self, way: str) -> tuple[float, float | None]:
        """Seconds in all, and of downtime, where QEMU says one that can be."""
        warm_host(self._size)
        self.qemu, moved = self.qemu.move(way, DOWNTIME)
        return moved.seconds, moved.downtime if moved.downtime <= moved.seconds else None


def _certificates(path: str) -> tuple[list[str], list[str]] | None:
    """Certificate, key and authority of both sides, by openssl; None: there is no such command."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return None

    def make(name: str, *options: str) -> None:
        command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt", *options]
        subprocess.run(command, cwd=path, check=True, capture_output=True)

    make("ca", "-addext", "keyUsage=critical,keyCertSign")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "basicConstraints=CA:FALSE")
    for name in ("source", "destination"):
        make(name, *signed, "-addext", "subjectAltName=IP:127.0.0.1")
    source, destination = ([f"{path}/{name}.crt", f"{path}/{name}.key", f"{path}/ca.crt"] for name in _SIDES)
    return source, destination


_SIDES = ("source", "destination")


# ---- P3, P4, and of P5 the idle guest ----


def _speeds(found: Collected, size: Size, path: str, tls: tuple[list[str], list[str]] | None) -> None:
    memory = format_size(size.memory)
    whole, rounds, down = (f"{memory} of random data: {text}" for text in _SPEEDS)
    _told_missing(found, whole, "GB/s")
    _told_missing(found, down, "s")
    with ExitStack() as stack:
        pair = Pair(stack, size.memory)
        ours = Ours(stack, path, size.memory, "echo", "", "random")
        theirs = Theirs(stack, path, size.memory, "echo", "", "random") if QEMU else None
        for turn in range(size.rounds + size.warm):
            speeds = {name: pair.speed(*limit) for name, limit in LIMITS.items()}
            wholes, downs = {}, {}
            for way in _chosen(_FAST, size):
                if WAYS[way][0] == "tls" and tls is None:
                    continue
                report = ours.move(way, tls)["report"]
                wholes[way] = size.memory / 1e9 / report["seconds"]
                downs[way] = report["total_downtime"]
                if report["rounds"]:
                    speeds[way] = size.memory / 1e9 / report["rounds"][0]["seconds"]
            for way in size.qemu if theirs is not None else ():
                assert theirs is not None
                seconds, downtime = theirs.move(way)
                wholes[way] = size.memory / 1e9 / seconds
                if downtime is not None:
                    downs[way] = downtime
            if turn < size.warm:
                continue
            for group, unit, values in ((rounds, "GB/s", speeds), (whole, "GB/s", wholes), (down, "s", downs)):
                for name, value in values.items():
                    found.add(group, name, unit, value)
            _compare(found, memory, speeds, wholes)


_SPEEDS = ("the whole migration", "the round", "downtime of the idle guest")


def _compare(found: Collected, memory: str, speeds: dict[str, float], wholes: dict[str, float]) -> None:
    """What the targets are about, round by round. QEMU has no figure of its round: the whole of both."""
    group = f"{memory} of random data: one over another"
    raw_tcp, _, raw_read = LIMITS
    found.add(group, "tcp, the round / send() and recv()", "x", speeds["tcp"] / speeds[raw_tcp])
    found.add(group, "local, the round / process_vm_readv()", "x", speeds["local"] / speeds[raw_read])
    qemu = {way: speed for way, speed in wholes.items() if way in QEMU_WAYS}
    if qemu:
        tcp = max(speed for way, speed in wholes.items() if way in WAYS and WAYS[way][0] == "tcp")
        found.add(group, "tcp, the best / QEMU's best", "x", tcp / max(qemu.values()))
    if "QEMU, unix" in qemu:
        found.add(group, "local / QEMU, unix", "x", wholes["local"] / qemu["QEMU, unix"])


def _told_missing(found: Collected, group: str, unit: str) -> None:
    """A side that is not here is a row without values."""
    if QEMU is None:
        found.add(group, MISSING, unit)


def _chosen(ways: tuple[str, ...], size: Size) -> list[str]:
    return [way for way in ways if way in size.ways]


# ---- P5: a guest that writes ----


def _standing(found: Collected, size: Size, path: str, pattern: str) -> None:
    append = f"gaps=1 rate=10 pattern={pattern} size={size.hot}"
    memory = size.hot + _ROOM // (8 if size.hot < _ROOM else 1)
    group = f"{format_size(size.hot)} written at 10 pages a ms, {pattern}"
    _told_missing(found, f"{group}: downtime", "s")
    with ExitStack() as stack:
        ours = Ours(stack, path, memory, "touch", append, "random")
        ours.side.ask("pause")
        theirs = Theirs(stack, path, memory, "touch", append, "random") if QEMU else None
        if theirs is not None:
            theirs.qemu.command("stop")
        for turn in range(size.rounds + size.warm):
            told = [each for way in _chosen(_GENTLE, size) for each in _ours_stood(ours, way)]
            for way in size.qemu if theirs is not None else ():
                assert theirs is not None
                with theirs.awake():
                    seconds, downtime = theirs.move(way)
                told.append(("the whole migration", way, "s", seconds))
                told += [("downtime", way, "s", downtime)] if downtime is not None else []
            for what, way, unit, value in told if turn >= size.warm else ():
                found.add(f"{group}: {what}", way, unit, value)


def _ours_stood(ours: Ours, way: str) -> list[tuple[str, str, str, float]]:
    with ours.awake():
        moved = ours.move(way)
        gap = ours.side.ask("gap")
    report = moved["report"]
    return [
        ("downtime", way, "s", report["total_downtime"]),
        *(("stood", way, "s", worked - moved["stood"]) for worked in moved["worked"]),
        ("gap", way, "s", gap),
        ("the whole migration", way, "s", report["seconds"]),
        ("bytes of pages that went", way, "MiB", report["page_bytes"] / MIB),
        ("vCPUs held back at most", way, "%", 100 * report["throttled"]),
    ]


# ---- P6 ----


def _working(found: Collected, size: Size, path: str) -> None:
    group = f"{format_size(size.hot)} written as fast as it can: work while it migrates"
    memory = size.hot + _ROOM // (8 if size.hot < _ROOM else 1)
    with ExitStack() as stack:
        side, target = stack.enter_context(Side()), stack.enter_context(Side())
        side.ask("make", memory=memory, guest="touch", append=f"size={size.hot}", content="random")
        for turn in range(size.rounds + size.warm):
            for pace, limit in PACES.items():
                for name, tracker in TRACKERS.items():
                    before = side.ask("work", seconds=size.seconds)
                    address = target.ask("listen", at=f"unix:{path}/in", warm=memory)
                    options = {"tracker": tracker, "throttle": False, "rounds": _ROUNDS, "downtime": _NEVER} | limit
                    tried = side.ask("try_rounds", to=address, **options)
                    target.ask("nobody")
                    after = side.ask("work", seconds=size.seconds)
                    if turn < size.warm:
                        continue
                    untraced, own = ((before[key] + after[key]) / 2 for key in ("rate", "rate_of_threads"))
                    found.add(group, f"{name}{pace}", "%", 100 * tried["rate"] / untraced)
                    found.add(f"{group}, by CPU time", f"{name}{pace}", "%", 100 * tried["rate_of_threads"] / own)
                    found.add(f"{group}: sent again", f"{name}{pace}", "MiB/s", tried["resent"] * 4096 / MIB)


# ---- P7 ----


def _keeping(found: Collected, size: Size, path: str, content: str) -> None:
    """The guest reads all its memory again and again: nothing but the way that it moves changes what is large."""
    group = f"{format_size(size.small)}, {content}: large pages afterwards / before"
    with ExitStack() as stack:
        ours = Ours(stack, path, size.small, "touch", "read=1", content)
        before = ours.side.ask("large", passes=2)
        for way in _chosen(_KEEPING, size):
            ours.move(way)
            found.add(group, way, "%", 100 * ours.side.ask("large", passes=2) / before)
    _told_missing(found, group, "%")
    for way in size.qemu if QEMU else ():  # each with a guest of its own: what was broken once stays so
        with ExitStack() as stack:
            theirs = Theirs(stack, path, size.small, "touch", "read=1", content)
            before = theirs.qemu.large(2)
            theirs.move(way)
            found.add(group, way, "%", 100 * theirs.qemu.large(2) / before)
