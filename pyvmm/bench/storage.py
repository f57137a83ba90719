# storage.py: how fast a snapshot file is written and read (measures P8, P10). Unit: GB/s of pages.
"""Beside plain write() and read() of the same bytes. Half of them are noise, half text-like; none is a page of zeros.

Writing ends with the file on the disk on both sides; reading is from the page cache, into fresh memory on both sides.
"""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import time

from pyvmm._native import lib
from pyvmm.bench import Result, alternate
from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.memory import GuestMemory
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.format import CODECS
from pyvmm.snapshot.writer import Writer
from pyvmm.state import State

_SIZE, _QUICK_SIZE = 256 * MIB, 8 * MIB
_ROUNDS = 5
_PIECE = MIB


def _pages(size: int) -> mmap.mmap:
    """Warm memory that holds what is saved."""
    rng, ram = random.Random(1), mmap.mmap(-1, size)
    words = [rng.randbytes(8) for _ in range(64)]
    noise = rng.randbytes(_PIECE)
    for at in range(0, size, 2 * _PIECE):
        ram[at : at + 8] = at.to_bytes(8, "little")
        ram[at + 8 : at + _PIECE] = noise[8:]
        ram[at + _PIECE : at + 2 * _PIECE] = b"".join(rng.choices(words, k=PAGE_SIZE // 8)) * (_PIECE // PAGE_SIZE)
    return ram


def _speed(size: int, begin: float) -> float:
    return size / 1e9 / (time.perf_counter() - begin)


def _write_plain(path: str, ram: mmap.mmap) -> float:
    begin = time.perf_counter()
    with memoryview(ram) as view, open(path, "wb", buffering=0) as file:
        for at in range(0, len(view), _PIECE):
            file.write(view[at : at + _PIECE])
        os.fsync(file.fileno())
    return _speed(len(ram), begin)


def _write(path: str, ram: mmap.mmap, codec: str) -> float:
    begin = time.perf_counter()
    with Writer(path, len(ram), codec=codec) as writer, memoryview(ram) as view:
        writer.add_pages([(0, len(ram) // PAGE_SIZE)], view)
        writer.finish(State("vm", 1, {}))
    return _speed(len(ram), begin)


def _read_plain(path: str, size: int) -> float:
    memory = GuestMemory(size)
    views = [memory.view(region.gpa, region.size) for region in memory.regions]
    begin = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        for view in views:
            for at in range(0, len(view), _PIECE):
                file.readinto(view[at : at + _PIECE])
    return _speed(size, begin)


def _read(path: str, size: int) -> float:
    memory = GuestMemory(size)
    begin = time.perf_counter()
    with Snapshot.open(path) as snapshot:
        snapshot.load_into(memory)
    return _speed(size, begin)


def measure(quick: bool = False) -> list[Result]:
    """GB/s of pages: plain write and read, and the snapshot file with each codec that is here."""
    codecs = [name for number, name in enumerate(CODECS) if lib.pv_codec_available(number) == 0]
    size, rounds = (_QUICK_SIZE, 1) if quick else (_SIZE, _ROUNDS)
    ram = _pages(size)
    with tempfile.TemporaryDirectory() as folder:
        plain, paths = os.path.join(folder, "plain"), {name: os.path.join(folder, name) for name in codecs}
        sides = {"write plain": lambda: _write_plain(plain, ram)}
        for name in codecs:
            sides[f"write {name}"] = lambda name=name: _write(paths[name], ram, name)  # type: ignore[misc]
        sides["read plain"] = lambda: _read_plain(plain, size)
        for name in codecs:
            sides[f"read {name}"] = lambda name=name: _read(paths[name], size)  # type: ignore[misc]
        return alternate(sides, "GB/s", rounds, warm=size)
