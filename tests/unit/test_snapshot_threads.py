# test_snapshot_threads.py: the threads of the writer and the reader: the same file and RAM, errors told, nobody left.
from __future__ import annotations

import gc
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from snapshot_files import AVAILABLE, BLOCK, STATE, page_of, pages_in, save

from pyvmm.errors import BadInput, HostError, LifecycleError, SnapshotError
from pyvmm.layout import MIB, PAGE_SIZE, Gpa
from pyvmm.memory import GuestMemory
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.writer import Writer

PAGES = 20 * MIB // PAGE_SIZE + 1
"""More than one thread writes at once, and more than a reader takes in one go."""


def threads():
    return len(os.listdir("/proc/self/task"))


def all_gone(before):
    """A thread that has been joined may be listed for a moment yet; one that is left stays."""
    end = time.monotonic() + 10
    while threads() > before and time.monotonic() < end:
        os.sched_yield()
    return threads() <= before


@pytest.fixture(scope="module")
def ram():
    rng = random.Random(3)
    kinds = [bytes(PAGE_SIZE), *(rng.randbytes(PAGE_SIZE) for _ in range(8)), rng.randbytes(64) * 64]
    made = bytearray().join(rng.choice(kinds) for _ in range(PAGES))
    for page in range(0, PAGES, 3):
        made[page * PAGE_SIZE : page * PAGE_SIZE + 4] = page.to_bytes(4, "little")
    return made


@pytest.fixture
def orders():
    mixed = list(range(PAGES))
    random.Random(4).shuffle(mixed)
    return {"by address": None, "mixed": mixed}


@pytest.mark.parametrize("order", ["by address", "mixed"])
@pytest.mark.parametrize("codec", AVAILABLE)
def test_loaded_by_any_number_of_readers(tmp_path, ram, orders, codec, order):
    """Over a parent that has other bytes for each page of the child."""
    before = threads()
    save(tmp_path / "a", bytearray(b"p" * len(ram)), None, "raw", 256 << 10)
    with Snapshot.open(str(tmp_path / "a")) as parent:
        pages = orders[order] or range(PAGES)
        save(tmp_path / "b", ram, pages, codec, BLOCK, parent)
    told: list[tuple[int, int]] = []
    for readers in (1, 3, None):
        memory = GuestMemory(len(ram))
        told.clear()
        with Snapshot.open(str(tmp_path / "b")) as snapshot:
            snapshot.load_into(memory, lambda done, total: told.append((done, total)), readers)
        assert memory.read(Gpa(0), len(ram)) == ram
        assert told[-1][0] == told[-1][1]
        assert told == sorted(told)
        memory.close()
    assert all_gone(before)


@pytest.mark.parametrize("codec", AVAILABLE)
def test_the_same_pages_make_the_same_file(tmp_path, ram, codec):
    whole = []
    for name in ("a", "b"):
        save(tmp_path / name, ram, codec=codec)
        raw = bytearray((tmp_path / name).read_bytes())
        whole.append(raw[:48] + raw[64:4088] + raw[4096:])  # without its id, and the checksum over that
    assert whole[0] == whole[1]
    with Snapshot.open(str(tmp_path / "a")) as snapshot:
        snapshot.check()


def test_no_thread_is_left_whatever_ends_a_writer(tmp_path, ram):
    before = threads()
    for end in ("abandon", "interrupt", "forget", "finish"):
        writer = Writer(str(tmp_path / "a"), len(ram), BLOCK, AVAILABLE[-1])
        writer.add_pages([(0, PAGES)], ram)
        assert threads() > before
        if end == "interrupt":
            with pytest.raises(KeyboardInterrupt), writer:
                raise KeyboardInterrupt
        elif end == "finish":
            writer.finish(STATE)
        elif end == "abandon":
            writer.abandon()
            writer.abandon()
        else:
            fd = writer._file.fd
            del writer
            gc.collect()
            os.close(fd)  # which nobody but a process's end does for who uses no `with`
        assert all_gone(before), end
    assert pages_in(tmp_path / "a") == ram


def add_one_by_one(writer, ram):
    for page in range(PAGES):
        writer.add_pages([(page, 1)], page_of(ram, page))
    writer.finish(STATE)


@pytest.mark.parametrize("codec", AVAILABLE)
def test_what_fails_in_a_thread_is_told_and_stays_told(tmp_path, ram, codec):
    """In a limit of file size that ends the third piece or so: the writer's caller hears of it, then or at the end."""
    before = threads()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB // 2, limits[1]))
    try:
        with Writer(str(tmp_path / "a"), len(ram), BLOCK, codec) as writer:
            with pytest.raises(HostError, match="File too large; free some space"):
                add_one_by_one(writer, ram)
            with pytest.raises(LifecycleError, match="by an error"):
                writer.add_pages([], b"")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert all_gone(before)
    assert os.listdir(tmp_path) == []


def test_the_first_damaged_block_is_named_and_no_reader_is_left(tmp_path, ram):
    before = threads()
    save(tmp_path / "a", ram)
    with Snapshot.open(str(tmp_path / "a")) as snapshot:
        blocks = snapshot.blocks
        with open(tmp_path / "a", "r+b") as file:
            file.seek(4096 + 700 * BLOCK + 5)
            file.write(b"#wrong#")
        for readers in (1, 4):
            memory = GuestMemory(len(ram))
            with pytest.raises(SnapshotError, match="damaged: the checksum of storage block 700 is wrong"):
                snapshot.load_into(memory, readers=readers)
            memory.close()
    assert blocks > 700
    assert all_gone(before)


def test_an_interrupt_ends_all_readers(tmp_path, ram):
    before = threads()
    save(tmp_path / "a", ram, block_size=2 * MIB)

    def interrupt(done, total):
        raise KeyboardInterrupt

    memory = GuestMemory(len(ram))
    with Snapshot.open(str(tmp_path / "a")) as snapshot, pytest.raises(KeyboardInterrupt):
        snapshot.load_into(memory, interrupt, 4)
    memory.close()
    assert all_gone(before)


@pytest.mark.parametrize("readers", [0, -1, 65])
def test_readers_that_cannot_be(tmp_path, ram, readers):
    save(tmp_path / "a", ram[: 4 * MIB])
    with Snapshot.open(str(tmp_path / "a")) as snapshot, pytest.raises(BadInput, match="give 1 to 64"):
        snapshot.load_into(GuestMemory(4 * MIB), readers=readers)


def test_a_process_with_one_cpu(tmp_path, ram):
    """Neither side waits for a thread that never comes."""
    program = f"""
import os, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
sys.path.insert(0, {os.path.dirname(__file__)!r})
from snapshot_files import *
from pyvmm.memory import GuestMemory
ram = bytearray(os.urandom({5 * MIB}))
save({str(tmp_path / "a")!r}, ram)
memory = GuestMemory(len(ram))
Snapshot.open({str(tmp_path / "a")!r}).load_into(memory)
assert memory[memory.regions[0].gpa : memory.regions[0].end] == ram
"""
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)
