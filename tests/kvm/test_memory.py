# test_memory.py: guest RAM: its bounds and its hole, views, page sizes as KVM counts them, and sparse large memory.
from __future__ import annotations

import gc
import resource

import pytest

from pyvmm import BadInput, Gpa
from pyvmm.errors import MemoryAccessError
from pyvmm.layout import GIB, HOLE_END, HOLE_START, MIB, PAGE_SIZE
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm")

SIZES = {"2M": 2 * MIB, "64M": 64 * MIB, "3G": 3 * GIB, "5G": 5 * GIB, "64G": 64 * GIB, 2 * MIB + PAGE_SIZE: None}


def edges(size):
    """(first address, address behind the last) of each piece of RAM of a VM with `size` bytes."""
    return [(0, min(size, HOLE_START)), *([(HOLE_END, HOLE_END + size - HOLE_START)] if size > HOLE_START else [])]


@pytest.mark.parametrize("memory", SIZES)
def test_all_ram_can_be_reached_and_nothing_else(vm, memory):
    machine = vm(memory=memory)
    ram = machine.memory
    for first, end in edges(SIZES[memory] or memory):
        for gpa in (first, end - 16):
            ram.write(Gpa(gpa), b"0123456789abcdef")
            assert ram.read(Gpa(gpa), 16) == ram[Gpa(gpa) : Gpa(gpa + 16)] == b"0123456789abcdef"
        assert ram.read(Gpa(end), 0) == b""
        outside = [(end - 15, 16), (end, 1), (first, end - first + 1), (first, 1 << 63), (end + 1, 0), (first, -1)]
        for gpa, size in outside + ([(first - 1, 2)] if first else []):
            for access in (
                ram.read,
                ram.view,
                ram.zero,
            ):
                with pytest.raises(MemoryAccessError):
                    access(Gpa(gpa), size)
        with pytest.raises(MemoryAccessError):
            ram.write(Gpa(end - 1), b"xx")
        assert ram.read(Gpa(end - 1), 1) == b"f"  # nothing was written of what did not fit


def test_the_end_of_the_address_space(vm):
    ram = vm(memory="5G").memory
    for gpa, size in (((1 << 64) - 1, 1), ((1 << 64) - 1, 2), (HOLE_START, 1), (HOLE_END - 1, 1)):
        with pytest.raises(MemoryAccessError, match="not \\(wholly\\) RAM"):
            ram.read(Gpa(gpa), size)


def test_slices(vm):
    ram = vm(memory="2M").memory
    at = Gpa(0x1000)
    ram[at : at + 4] = b"abcd"
    assert ram[at : at + 4] == b"abcd"
    for bad in (slice(None, at), slice(at, None), slice(at, at + 4, 2), at):
        with pytest.raises(BadInput):
            ram[bad]
    with pytest.raises(BadInput, match="3 bytes do not fit"):
        ram[at : at + 4] = b"abc"


def mapped():
    """Bytes of address space of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def test_a_view_keeps_memory_alive_and_the_last_one_gives_it_back(vm):
    before = mapped()
    machine = vm(memory="8G")
    at = Gpa(5 * GIB)
    machine.memory.write(at, b"still here")
    view = machine.memory.view(at, 10)
    again = view[:5]
    machine.close()
    view[0:5] = b"STILL"
    view.release()
    assert bytes(again) == b"STILL"
    assert mapped() - before >= 8 * GIB
    again.release()
    del view, again
    gc.collect()
    assert mapped() - before < GIB
    with pytest.raises(MemoryAccessError, match="closed"):
        machine.memory.read(at, 1)


def test_a_view_shows_what_the_guest_writes(vm):
    machine = vm(memory="4M")
    machine.load("smp", "count=0")
    view = machine.memory.view(Gpa(0x10000), 4096)
    machine.start()
    before = bytes(view)
    while bytes(view) == before:
        assert not machine.ended


@pytest.mark.parametrize(
    ("pages", "large"),
    [
        ("4k", False),
        pytest.param("2m", True, marks=needs("large_mappings")),
        pytest.param("auto", True, marks=needs("large_mappings")),
    ],
)
def test_mappings_are_of_the_size_asked_for(vm, pages, large):
    """By KVM's own statistics, after the guest has written 32 MiB."""
    machine = vm(memory="64M", pages=pages)
    machine.load("touch", "size=32M passes=0")
    machine.start()
    while machine.progress().passes < 1:
        assert not machine.ended
    machine.pause()
    found = machine.mappings()
    if large:
        assert found["pages_2m"] >= 16
        assert found["pages_4k"] < 16 * 512
    else:
        assert found["pages_2m"] == 0
        assert found["pages_4k"] >= 16 * 512


@needs("stats_fd")
def test_sparse_memory_costs_what_is_touched(vm):
    """64 GiB on a host with less: 16 MiB touched near either end."""

    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    before = resident()
    machine = vm(memory="64G", pages="4k")
    machine.load("touch", "start=63G size=16M passes=1")
    assert machine.run(timeout=20).ok
    assert machine.memory.read(Gpa(HOLE_END + 40 * GIB), 64) == bytes(64)
    assert 16 * MIB <= resident() - before < 128 * MIB


def test_the_guest_reads_what_the_host_wrote(vm):
    machine = vm(memory="4M")
    machine.load("hello", "text=before")
    ram = bytes(machine.memory.read(Gpa(0), MIB))
    places = [at for at in range(0, MIB, 4096) if b"text=before" in ram[at : at + 4096]]
    assert places
    for at in places:
        machine.memory.write(Gpa(at), ram[at : at + 4096].replace(b"before", b"behind"))
    assert machine.run(timeout=10).ok
    assert machine.printed == "behind\n"
