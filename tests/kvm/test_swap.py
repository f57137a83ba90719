# test_swap.py: a guest in a part of its memory: the rest is in the home SWAP. It checks itself what comes back, all the
# time; its model, KVM's statistics and the books of engine and swap do the rest.
from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice

import pytest
from engine_help import BLOCK, judge, passes, until, working

from pyvmm import BadInput
from pyvmm._native import lib
from pyvmm.errors import FetchError, HostError, MemoryAccessError
from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.memory import GuestMemory
from pyvmm.memory.swap import Swap
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "uffd_guest")

SECONDS = 0.3
"""Of a guest in a half, a quarter and an eighth of its memory each. Longer: PYVMM_HAMMER=20 pytest ..."""


def victims(machine, rng, large):
    pages = machine.memory.size // PAGE_SIZE
    while True:
        if large or rng.random() < 0.1:
            yield rng.randrange(pages // BLOCK) * BLOCK, BLOCK
        else:
            count = rng.choice((1, 16, 64))
            yield rng.randrange(pages - count), count


def balances(swap, machine):
    """All slots are accounted for, and the live ones are the pages that the engine has in this home."""
    swap.drain()
    until(lambda: swap.stats().live == machine.memory.pages().homes["swap"], "slots that balance")
    counts = swap.stats()
    assert counts.stored == (counts.slots - counts.free) * counts.slot_bytes
    if counts.slot_bytes == PAGE_SIZE:
        assert counts.live + counts.kept + counts.free == counts.slots
    assert (counts.queued, counts.behind) == (0, 0)
    return counts


@pytest.mark.parametrize(
    ("pages", "cpus", "compress"),
    [
        ("4k", 2, None),
        pytest.param("2m", 1, None, marks=needs("thp")),
        ("auto", 2, None),
        ("4k", 2, "lz4"),
        pytest.param("2m", 1, "zstd", marks=needs("thp")),
        ("auto", 2, "zstd"),
    ],
)
def test_a_guest_runs_right_in_less_and_less_of_its_memory(vm, tmp_path, pages, cpus, compress):
    machine = working(vm, "48M", "order=random zeros=100", cpus=cpus, pages=pages)
    rng, size = random.Random(pages), machine.memory.size
    swap = Swap(machine.memory, str(tmp_path), size, compress)
    choice = victims(machine, rng, pages != "4k")
    for share in (2, 4, 8):
        end = time.monotonic() + float(os.environ.get("PYVMM_HAMMER", SECONDS))
        least = size
        while time.monotonic() < end and not machine.ended:
            least = min(least, swap.shrink(size // share, islice(choice, 500)))
        assert not machine.ended
        machine.pause()  # it has nothing more to bring back
        assert swap.shrink(size // share, islice(choice, 20000)) <= size // share
        machine.resume()
    passes(machine, 1)
    machine.pause()
    counts = balances(swap, machine)
    assert counts.out > 0
    assert counts.came > 0
    assert counts.zeros > 0
    assert counts.errors == 0
    assert counts.ratio == 1.0 if compress is None else counts.ratio > 1.0
    judge(machine)
    balances(swap, machine)
    swap.close()
    assert machine.memory.pages().homes["swap"] == 0
    machine.resume()
    passes(machine, 1)
    judge(machine)
    assert os.listdir(tmp_path) == []


@needs("large_mappings")
def test_what_went_out_whole_comes_back_as_large_pages(vm):
    machine = working(vm, "64M", pages="2m")
    swap = Swap(machine.memory, None, 64 * MIB)
    blocks = machine.memory.size // PAGE_SIZE // BLOCK
    for _ in range(3):
        machine.pause()
        assert swap.out([(0, blocks * BLOCK)]) == blocks * BLOCK
        swap.drain()
        assert machine.memory.pages().homes["aside"] == 0
        machine.resume()
        passes(machine)
    counts = swap.stats()
    assert counts.reads <= 3 * blocks + 20  # a read for each, but for pages that had been zeros
    assert machine.memory.engine.looks() == ["large"] * blocks
    assert machine.mappings()["pages_2m"] >= blocks - 2
    assert counts.saved > 0
    machine.pause()
    judge(machine)


def test_a_file_that_is_full_costs_nothing_but_room(vm):
    machine = working(vm, "32M", pages="4k")
    swap = Swap(machine.memory, None, 4 * MIB)
    machine.pause()
    with pytest.raises(
        HostError, match=r"\Athe swap file is full, all 4M of it: pages that did not fit stay in memory\Z"
    ):
        swap.shrink(8 * MIB, [(0, machine.memory.size // PAGE_SIZE)])
    swap.drain()  # it is told once
    swap.retry()
    with pytest.raises(HostError, match="full"):
        swap.drain()
    counts = swap.stats()
    assert (counts.live, counts.free, counts.error) == (1024, 0, lib.PV_SWAP_FULL)
    assert counts.behind > 0
    assert machine.memory.pages().homes["aside"] > 5000
    machine.resume()
    passes(machine, 1)
    judge(machine)


def swap_fd():
    """The descriptor of the swap's file, of which there is no name."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the list itself
            if "/swap-here/" in os.readlink(f"/proc/self/fd/{fd}"):
                found.append(int(fd))
    (only,) = found
    return only


def test_a_file_that_is_damaged_pauses_the_guest(vm, tmp_path):
    """No wrong byte comes from it, and what is put right, comes."""
    folder = tmp_path / "swap-here"
    folder.mkdir()
    machine = working(vm, "16M", "order=random", pages="4k")
    swap = Swap(machine.memory, str(folder), 16 * MIB)
    machine.pause()
    swap.out([(4 * BLOCK, BLOCK)])
    swap.drain()
    fd = swap_fd()
    right = os.pread(fd, BLOCK * PAGE_SIZE, 0)
    os.pwrite(fd, bytes(byte ^ 0x80 for byte in right), 0)
    machine.resume()
    with pytest.raises(FetchError, match=r"home 'swap': the swap file in .*swap-here is damaged") as caught:
        machine.wait(20)
    assert caught.value.errno == errno.EBADMSG
    with pytest.raises(FetchError):
        swap.close()
    os.pwrite(fd, right, 0)
    machine.resume()
    until(lambda: machine.progress().passes > 2, "passes")
    swap.close()
    swap.close()
    with pytest.raises(BadInput, match="closed"):
        swap.out([(0, 1)])
    judge(machine)


@pytest.mark.parametrize("compress", [None, "lz4", "zstd"])
def test_disk_space_that_no_page_takes_is_given_back(tmp_path, compress):
    """By itself, once there is nothing to write. Pages of zeros take none."""
    folder, pages = tmp_path / "swap-here", 8 * MIB // PAGE_SIZE
    folder.mkdir()
    memory, noise = GuestMemory(16 * MIB), random.Random(1).randbytes(MIB)
    for at in range(0, pages, MIB // PAGE_SIZE):
        memory.write(memory.gpa_of(at), noise)
    swap = Swap(memory, str(folder), 16 * MIB, compress)
    fd = swap_fd()
    swap.out([(0, pages)])
    swap.drain()
    os.fsync(fd)  # some file systems count blocks only when they are on the disk
    before = os.fstat(fd).st_blocks * 512
    assert before >= 8 * MIB
    memory.zero(memory.gpa_of(0), 6 * MIB)
    swap.out([(0, pages)])
    swap.drain()
    assert swap.stats().stored == 2 * MIB
    until(lambda: swap.stats().given_back >= 5 * MIB, "disk space")
    until(lambda: os.fstat(fd).st_blocks * 512 <= before - 5 * MIB, "blocks")
    assert memory.read(memory.gpa_of(pages - MIB // PAGE_SIZE), MIB) == noise
    memory.close()


def test_beginnings_and_ends(tmp_path):
    memory = GuestMemory(16 * MIB)
    here = tmp_path / "here"
    here.write_text("precious")
    for path, size, words in (
        (str(here), MIB, "is there already"),
        (str(tmp_path / "no" / "such"), MIB, "No such file"),
        (None, 100, "give from 4K"),
        (None, 1 << 60, "give from 4K"),
    ):
        with pytest.raises(BadInput, match=words):
            Swap(memory, path, size)
    with pytest.raises(BadInput, match=r"no codec 'gzip' for a swap: choose one of lz4, zstd, or none"):
        Swap(memory, None, MIB, "gzip")
    with pytest.raises(BadInput, match="give from 4K to 2047G"):
        Swap(memory, None, 3 << 40, "lz4")
    assert here.read_text() == "precious"
    swap = Swap(memory, str(tmp_path / "name"), MIB)
    assert os.listdir(tmp_path) == ["here"]
    with pytest.raises(BadInput, match="already"):
        Swap(memory, None, MIB)
    swap.close()
    second = Swap(memory, None, MIB)  # the first one has given the home up
    memory.write(memory.gpa_of(700), b"\1" * PAGE_SIZE)
    assert second.out([(0, 4096)]) == 4096
    second.drain()
    assert (second.stats().live, second.stats().out) == (1, second.stats().zeros + 1)
    assert memory.read(memory.gpa_of(700), PAGE_SIZE) == b"\1" * PAGE_SIZE
    memory.close()
    second.close()
    with pytest.raises(MemoryAccessError):
        second.stats()


def test_nothing_is_left_of_a_process_that_was_killed(tmp_path):
    """Nor while it lives has anybody else a name for its file."""
    code = """
import sys, time
from pyvmm.memory import GuestMemory
from pyvmm.memory.swap import Swap
memory = GuestMemory(16 << 20)
memory.write(memory.gpa_of(0), b"x" * (8 << 20))
swap = Swap(memory, sys.argv[1], 16 << 20)
swap.out([(0, 2048)])
swap.drain()
print("out", flush=True)
time.sleep(60)
"""
    for path in (tmp_path, tmp_path / "name"):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"out\n"
            assert os.listdir(tmp_path) == []
            process.kill()
        assert os.listdir(tmp_path) == []
