# test_swapdisk.py: the swap disk's requests, with a stand-in for the host's swap, whose reads fail where a test says:
# whatever fails, each block has what the guest wrote there last, and no slot is lost. Needs no KVM.
from __future__ import annotations

import errno
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pyvmm._native import ffi, lib
from pyvmm.devices.virtio import specs
from pyvmm.devices.virtio.queue import Buffers
from pyvmm.devices.virtio.rawfile import SECTOR, RawFile
from pyvmm.devices.virtio.sequences import GAP, Sequences
from pyvmm.devices.virtio.spans import spans
from pyvmm.devices.virtio.swapdisk import SwapDisk
from pyvmm.errors import BadInput, HostError
from pyvmm.layout import PAGE_SIZE, Gpa
from pyvmm.memory import GuestMemory

BLOCKS = 16
SECTORS = BLOCKS * 8 + 3
"""The last block is not a whole one."""
PAGES = 32


class Slots:
    """A Swap: `out` says which pages are in it, and holders are counted by slot."""

    def __init__(self, memory):
        self.memory, self.out, self.zeros = memory, set(), set()
        self.bytes, self.holders = {}, {}
        self.fails, self.full, self.leaving = 0, False, []

    def before_close(self, leave):
        self.leaving.append(leave)

    def refer(self, page, count, refs, look=False):
        became = []
        for i in range(count):
            if page + i in self.out:
                became.append(lib.PV_REFER_FULL if look or self.full else lib.PV_REFER_SLOT)
            elif page + i in self.zeros and not look:
                became.append(lib.PV_REFER_ZERO)
            else:
                became.append(lib.PV_REFER_BYTES)
            if became[-1] == lib.PV_REFER_SLOT:
                slot = len(self.bytes)
                self.bytes[slot], self.holders[slot] = self.memory.read(Gpa((page + i) * PAGE_SIZE), PAGE_SIZE), 1
                self.unrefer(refs + i, 1)
                refs[i].slot, refs[i].what = slot, lib.PV_REF_SLOT
            elif became[-1] == lib.PV_REFER_ZERO:
                self.unrefer(refs + i, 1)
                refs[i].what = lib.PV_REF_ZERO
        return bytes(became)

    def hold(self, refs, count):
        for i in range(count):
            if refs[i].what == lib.PV_REF_SLOT:
                self.holders[refs[i].slot] += 1

    def unrefer(self, refs, count):
        for i in range(count):
            if refs[i].what == lib.PV_REF_SLOT:
                self.holders[refs[i].slot] -= 1
                assert self.holders[refs[i].slot] >= 0
            refs[i].slot, refs[i].what = 0, lib.PV_REF_NONE

    def read_refs(self, refs, count, into):
        if self.fails:
            self.fails -= 1
            raise OSError(errno.EBADMSG, "damaged")
        reads = 0
        for i in range(count):
            if refs[i].what != lib.PV_REF_NONE:
                slot = refs[i].what == lib.PV_REF_SLOT
                assert not slot or self.holders[refs[i].slot] > 0
                into[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] = self.bytes[refs[i].slot] if slot else bytes(PAGE_SIZE)
                reads += slot
        return reads


class Failing(RawFile):
    fails = 0

    def _fail(self):
        if self.fails:
            self.fails -= 1
            raise OSError(errno.EIO, "failed")

    def get(self, offset, size):
        self._fail()
        return super().get(offset, size)

    def put(self, data, offset):
        self._fail()
        super().put(data, offset)

    def write_zeroes(self, sector, count, unmap):
        self._fail()
        super().write_zeroes(sector, count, unmap)


class Requests(RuleBasedStateMachine):
    """`model`: what the guest may read."""

    path = None

    @initialize(mode=st.sampled_from(["references", "replace", "replace", "naive"]), durable=st.booleans())
    def begin(self, mode, durable):
        self.path.write_bytes(bytes(SECTORS * SECTOR))
        self.now = 1.0
        self.durable = durable
        self.memory = GuestMemory(4 << 20)
        self.memory.swap = self.slots = Slots(self.memory)
        self.local = Failing(str(self.path))
        self.disk = SwapDisk(self.local, mode, durable=durable, clock=lambda: self.now)
        self.model = bytearray(SECTORS * SECTOR)
        self.versions = random.Random(1)
        self.change(0, PAGES, "out")
        self.change(3, 2, "zeros")
        self.change(9, 3, "in")

    def teardown(self):
        if hasattr(self, "disk"):
            self.local.fails = self.slots.fails = 0
            self.as_it_was(0, SECTORS)
            self.disk.close()
            assert not any(self.slots.holders.values())
            self.memory.close()

    def buffers(self, parts):
        return Buffers(self.memory, parts)

    def found(self, sector, count):
        into = self.buffers([(1 << 20, count * SECTOR)])
        self.memory.write(Gpa(1 << 20), b"\xee" * (count * SECTOR))
        self.disk.read(sector, into)
        return into.read()

    def as_it_was(self, sector, count):
        assert self.found(sector, count) == self.model[sector * SECTOR : (sector + count) * SECTOR]

    def after_failure(self, sector, count, new):
        """Each sector has what it had, or what it was to have, and that for good."""
        fails, self.local.fails, self.slots.fails = (self.local.fails, self.slots.fails), 0, 0
        found = self.found(sector, count)
        for at in range(0, count * SECTOR, SECTOR):
            old = self.model[sector * SECTOR + at :][:SECTOR]
            assert found[at : at + SECTOR] in (bytes(old), new[at : at + SECTOR])
        self.model[sector * SECTOR : (sector + count) * SECTOR] = found
        self.local.fails, self.slots.fails = fails

    def do(self, call, sector, count, new):
        pending = self.local.fails + self.slots.fails
        try:
            call()
        except OSError:
            assert pending
            self.after_failure(sector, count, new)
        else:
            self.model[sector * SECTOR : (sector + count) * SECTOR] = new

    @rule(
        page=st.integers(0, PAGES - 1), count=st.integers(1, PAGES), how=st.sampled_from(["out", "out", "zeros", "in"])
    )
    def change(self, page, count, how):
        """Pages are written, and then where they are said to be."""
        for each in range(page, min(page + count, PAGES)):
            data = bytes(PAGE_SIZE) if how == "zeros" else self.versions.randbytes(8) * (PAGE_SIZE // 8)
            self.memory.write(Gpa(each * PAGE_SIZE), data)
            self.slots.out.discard(each)
            self.slots.zeros.discard(each)
            if how != "in":
                getattr(self.slots, how).add(each)

    @rule(
        block=st.integers(0, BLOCKS),
        pages=st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 6)), min_size=1, max_size=4),
    )
    def write_pages(self, block, pages):
        """Whole pages, in several buffers, to whole blocks."""
        pages = [(page, min(count, PAGES - page)) for page, count in pages]
        self.write_parts(block * 8, [(page * PAGE_SIZE, count * PAGE_SIZE) for page, count in pages])

    @rule(
        sector=st.integers(0, SECTORS - 1),
        parts=st.lists(
            st.tuples(st.integers(0, PAGES * 8 - 1), st.sampled_from([0, 0, 4, 256]), st.integers(1, 40)), max_size=4
        ),
    )
    def write_bytes(self, sector, parts):
        """Anything, anywhere, also the same page twice."""
        self.write_parts(sector, [(at * SECTOR + skew, count * SECTOR) for at, skew, count in parts])

    def write_parts(self, sector, parts):
        source = self.buffers(parts).part(0, (SECTORS - sector) * SECTOR)
        if source.size:
            self.do(lambda: self.disk.write(sector, source), sector, source.size // SECTOR, source.read())

    @rule(sector=st.integers(0, SECTORS - 1), count=st.integers(1, SECTORS))
    def read(self, sector, count):
        count = min(count, SECTORS - sector)
        pending = self.local.fails + self.slots.fails
        try:
            self.as_it_was(sector, count)
        except OSError:
            assert pending

    @rule(sector=st.integers(0, SECTORS - 1), count=st.integers(1, SECTORS), unmap=st.booleans())
    def write_zeroes(self, sector, count, unmap):
        count = min(count, SECTORS - sector)
        self.do(lambda: self.disk.write_zeroes(sector, count, unmap), sector, count, bytes(count * SECTOR))

    @rule(sector=st.integers(0, SECTORS - 1), count=st.integers(1, SECTORS))
    def discard(self, sector, count):
        count = min(count, SECTORS - sector)
        self.disk.discard(sector, count)
        self.local.fails = self.slots.fails = 0
        self.model[sector * SECTOR : (sector + count) * SECTOR] = self.found(sector, count)

    @rule()
    def flush(self):
        pending = self.local.fails + self.slots.fails
        try:
            self.disk.flush()
        except OSError:
            assert pending
        else:
            if self.durable:
                assert not any(self.slots.holders.values())
                assert self.path.read_bytes() == self.model

    @rule(seconds=st.sampled_from([0.0, GAP / 2, 2 * GAP]))
    def time_passes(self, seconds):
        self.now += seconds
        self.disk.replace_next()

    @rule(of=st.sampled_from(["local", "slots"]), times=st.integers(0, 3))
    def fail(self, of, times):
        getattr(self, of).fails = times

    @rule(full=st.booleans())
    def no_more_references(self, full):
        self.slots.full = full

    @rule()
    def close_swap(self):
        """Another one takes its place."""
        try:
            for leave in self.slots.leaving:
                leave()
        except HostError:
            return
        assert not any(self.slots.holders.values())
        self.memory.swap = self.slots = Slots(self.memory)

    @invariant()
    def holders_balance(self):
        if hasattr(self, "disk"):
            held = {}
            for block in range(BLOCKS + 1):
                ref = self.disk._refs[block]
                if ref.what == lib.PV_REF_SLOT:
                    held[ref.slot] = held.get(ref.slot, 0) + 1
            assert held == {slot: count for slot, count in self.slots.holders.items() if count}


def test_whatever_fails_a_block_has_what_was_written_last(tmp_path):
    class Machine(Requests):
        pass

    Machine.path = tmp_path / "disk"
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize("seed", range(12))
def test_long_runs_of_requests(tmp_path, seed):
    """The same, deep where the machine above is wide: most states need several requests to one block."""

    class Machine(Requests):
        path = tmp_path / "disk"

    rng, machine = random.Random(seed), Machine()
    machine.begin(mode=("references", "replace", "naive", "replace")[seed % 4], durable=seed % 3 == 0)
    for _ in range(250):
        at, sector, count = rng.randrange(PAGES), rng.randrange(SECTORS), rng.randrange(1, 40)
        if rng.random() < 0.3:
            machine.change(at, rng.randrange(1, 9), rng.choice(("out", "out", "zeros", "in")))
        elif rng.random() < 0.6:
            machine.write_pages(sector // 8, [(rng.randrange(PAGES), rng.randrange(1, 5)) for _ in range(2)])
        elif rng.random() < 0.5:
            machine.write_bytes(sector, [(rng.randrange(PAGES * 8), rng.choice((0, 4)), count)])
        elif rng.random() < 0.6:
            rng.choice((machine.read, machine.discard, lambda *at: machine.write_zeroes(*at, True)))(sector, count)
        else:
            rng.choice(
                (
                    machine.flush,
                    machine.close_swap,
                    lambda: machine.time_passes(2 * GAP),
                    lambda: machine.time_passes(2 * GAP),
                    lambda: machine.fail(rng.choice(("local", "slots")), rng.randrange(3)),
                    lambda: machine.no_more_references(rng.random() < 0.2),
                )
            )()
        machine.holders_balance()
    machine.local.fails = machine.slots.fails = 0
    machine.as_it_was(0, SECTORS)
    machine.teardown()


# Step by step.


@pytest.fixture
def made(tmp_path):
    """A disk of 1024 blocks, whose guest has 512 pages, all of them in the swap."""

    def make(mode, blocks=1024, **options):
        path = tmp_path / "disk"
        path.write_bytes(bytes(blocks * PAGE_SIZE))
        memory = GuestMemory(4 << 20)
        memory.swap = Slots(memory)
        for page in range(512):
            memory.write(Gpa(page * PAGE_SIZE), page.to_bytes(8, "little") * 512)
            memory.swap.out.add(page)
        disk = SwapDisk(RawFile(str(path)), mode, **options)
        ends.append((disk, memory))
        return disk, memory

    ends = []
    yield make
    for disk, memory in ends:
        disk.close()
        memory.close()


def test_what_was_written_in_one_go_is_put_together_before_it_is_read(made):
    now = [1.0]
    disk, memory = made("replace", rate=1 << 20, clock=lambda: now[0])
    for block in range(64):
        disk.write(block * 8, Buffers(memory, [(block * PAGE_SIZE, PAGE_SIZE)]))
    disk.write(8 * 500, Buffers(memory, [(0, PAGE_SIZE)]))  # alone: it stays where it is
    assert disk.figures()["referred"] == 65
    wait = disk.replace_next()
    assert 0 < wait <= GAP + 0.01
    assert disk.figures()["replaced"] == 0
    now[0] += 2 * GAP
    assert disk.replace_next() == pytest.approx(64 * PAGE_SIZE / (1 << 20))  # so much later the next
    assert disk.figures()["replaced"] == 64
    assert disk.replace_next() is None
    into = Buffers(memory, [(3 << 20, 64 * PAGE_SIZE)])
    disk.read(0, into)
    assert into.read() == b"".join(page.to_bytes(8, "little") * 512 for page in range(64))
    assert (disk.figures()["local_reads"], disk.figures()["slot_reads"]) == (1, 0)
    assert sum(memory.swap.holders.values()) == 1


def test_what_the_guest_writes_while_it_is_copied_counts(made, monkeypatch):
    now = [1.0]
    disk, memory = made("replace", clock=lambda: now[0])
    disk.write(0, Buffers(memory, [(0, 4 * PAGE_SIZE)]))
    read_refs = memory.swap.read_refs

    def meanwhile(refs, count, into):
        memory.swap.read_refs = read_refs
        memory.swap.out.discard(9)
        disk.write(8, Buffers(memory, [(9 * PAGE_SIZE, PAGE_SIZE)]))  # by bytes
        disk.write(16, Buffers(memory, [(8 * PAGE_SIZE, PAGE_SIZE)]))  # by another reference
        return read_refs(refs, count, into)

    memory.swap.read_refs = meanwhile
    now[0] += 2 * GAP
    disk.replace_next()
    assert disk.figures()["replaced"] == 2
    into = Buffers(memory, [(3 << 20, 4 * PAGE_SIZE)])
    disk.read(0, into)
    assert into.read() == b"".join(page.to_bytes(8, "little") * 512 for page in (0, 9, 8, 3))
    assert sum(memory.swap.holders.values()) == 1


def test_a_durable_disk_does_not_have_a_flush_wait_for_long(made, monkeypatch):
    monkeypatch.setattr("pyvmm.devices.virtio.swapdisk.MOST_UNFLUSHED", 100)
    disk, memory = made("references", durable=True)
    for block in range(400):
        disk.write(block * 8, Buffers(memory, [(block * PAGE_SIZE, PAGE_SIZE)]))
        assert sum(memory.swap.holders.values()) <= 100


@pytest.mark.parametrize(
    ("start", "size", "offset", "expected"),
    [
        (0x2000, 0x3000, 0x1000, [(0, 0x3000, 2)]),
        (0x2200, 0x3000, 0x1200, [(0, 0xE00, None), (0xE00, 0x2000, 3), (0x2E00, 0x200, None)]),
        (0x2200, 0x3000, 0x1000, [(0, 0x3000, None)]),
        (0x2200, 0x200, 0x1200, [(0, 0x200, None)]),
        (0x2001, 0x3000, 0x1000, [(0, 0x3000, None)]),
        (0, 600 << 12, 0, [(0, 512 << 12, 0), (512 << 12, 88 << 12, 512)]),
    ],
)
def test_which_parts_of_a_request_are_whole_pages(start, size, offset, expected):
    memory = GuestMemory(4 << 20)
    assert spans(Buffers(memory, [(start, size)]), offset) == expected
    memory.close()


def test_sequences_of_several_at_a_time():
    sequences, now = Sequences(), 1.0
    for step in range(10):
        sequences.wrote(step, 1, now)
        sequences.wrote(100 + 2 * step, 2, now)
        now += GAP / 2
    sequences.wrote(500, 1, now)
    assert sequences.take(now) is None
    assert sequences.next_end() == pytest.approx(1.0 + 9 * GAP / 2 + GAP)
    now += 2 * GAP
    ended = [sequences.take(now), sequences.take(now)]
    assert sorted((one.first, one.count) for one in ended) == [(0, 10), (100, 20)]
    assert sequences.take(now) is None
    for block in range(600):
        sequences.wrote(block, 1, now)
    assert [(one.first, one.count) for one in (sequences.take(now + 1), sequences.take(now + 1))] == [
        (0, 512),
        (512, 88),
    ]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("swapdisk", "give swapdisk:SIZE or swapdisk:FILE"),
        ("swapdisk:1M,mode=fast", "mode=fast of a swap disk: choose one of naive, references, replace"),
        ("swapdisk:1M,quick", "'quick' is none of"),
        ("swapdisk:1M,durable", "cannot be durable"),
        ("swapdisk:5000", "give pages of 4K"),
        ("swapdisk:2T", "give pages of 4K"),
        ("swapdisk:/nowhere/at/all", "disk /nowhere/at/all: No such file"),
    ],
)
def test_what_cannot_be_a_swap_disk(spec, why):
    with pytest.raises(BadInput, match=why):
        specs.make(spec, lambda data: None)


def test_a_disk_of_a_size_has_that_size():
    model = specs.make("swapdisk:1M,mode=references,volatile", lambda data: None)
    assert model.backend.sectors == 2048
    assert ffi.sizeof("struct pv_swap_ref") == 24
    with pytest.raises(BadInput, match="give --swap-disk a FILE"):
        model.save()
    model.close()
