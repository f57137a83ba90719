# test_swap_machine.py: the home SWAP on the stand-in for userfaultfd: whatever fails, and whatever the guest touches
# while pages are being written, each page's bytes are in one place, and slots balance. Needs no KVM.
from __future__ import annotations

import errno
import random

import pytest
from cffi import FFI
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from test_pagemap_machine import (
    BLOCK,
    CALLS,
    DECLARATIONS,
    ERRORS,
    MISSING,
    MOVE,
    PAGES,
    REPLACED,
    SOURCES,
    compile_engine,
)  # fmt: skip

from pyvmm._native import ffi as native_ffi
from pyvmm._native import lib as native

ffi = FFI()
ffi.cdef(
    DECLARATIONS
    + """
struct pv_swap_told {
    uint64_t slots, free, slot_bytes, live, kept, stored, queued, behind, out, zeros, saved, late, came, ahead;
    uint64_t refaults, writes, bytes_written, reads, bytes_read, given_up, given_back;
    uint64_t references, referred, held, ref_reads, ref_bytes_read, errors;
    int error;
};
void *fake_swap_open(struct pv_engine *engine, uint64_t slots, int codec);
void fake_swap_close(void);
void fake_meanwhile(int what, uint64_t page, uint64_t count, uint64_t value);
uint64_t fake_done(void);
void fake_damage(uint64_t page, uint32_t bit, int shorter);
void fake_no_holes(int error);
uint64_t fake_disk(void);
uint32_t fake_stored(uint64_t page);
uint64_t fake_place(uint64_t page);
uint64_t fake_refer(uint32_t block, uint64_t page, uint32_t count);
void fake_unrefer(uint32_t block, uint32_t count);
void fake_copy_ref(uint32_t from, uint32_t to);
int fake_read_refs(uint64_t *values);
int fake_slots(char *text, size_t size);
int pv_swap_out(void *swap, uint64_t page, uint32_t count);
int pv_swap_step(void *swap);
uint64_t pv_swap_punch(void *swap);
void pv_swap_retry(void *swap);
void pv_swap_look(void *swap, struct pv_swap_told *out);
"""
)
FULL = 105
PUT, GET = CALLS.index("put"), CALLS.index("get")
EXAMPLES = 24
DISK, NOTHING = 64, (1 << 64) - 1
"""Blocks that may be references; the value of one that is none."""
RAW, LZ4, ZSTD = range(3)
SLOT = {RAW: 4096, LZ4: 512, ZSTD: 512}
NOISY = 1000
"""A page of value NOISY + n has n times 512 bytes that do not compress."""


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return ffi.dlopen(
        str(
            compile_engine(
                tmp_path_factory.mktemp("fake"),
                others=("checksum", "codec", "digest"),
                sources=(*SOURCES, "swap", "swap_slots", "swap_in", "swap_out", "swap_refs", "swap_thread"),
                replaced=(*REPLACED, "preadv", "pwritev", "fallocate"),
                fake="fake_swap.c",
            )
        )
    )


def wrong(lib, engine, users=0):
    text = ffi.new("char[300]")
    lib.fake_check(engine, users, 0, text, 300) or lib.fake_slots(text, 300)
    return ffi.string(text).decode()


def look(lib, swap):
    told = ffi.new("struct pv_swap_told *")
    lib.pv_swap_look(swap, told)
    return told


pages = st.integers(0, PAGES - 1)
counts = st.one_of(st.just(BLOCK), st.integers(1, 40), st.integers(1, BLOCK))
values = st.one_of(st.just(0), st.integers(1, 3), st.integers(NOISY + 1, NOISY + 8))


class Swapping(RuleBasedStateMachine):
    """`model`: what each page holds. What is put away is written by hand, a batch at a time."""

    lib = None
    """Set by the test."""

    @initialize(
        how=st.sampled_from([0, MOVE, MOVE]),
        small=st.sampled_from([0, 1, 1 << 63]),
        slots=st.sampled_from([1, 100, BLOCK, 2 * BLOCK, 3 * BLOCK]),
        codec=st.sampled_from([RAW, LZ4, ZSTD]),
    )
    def begin(self, how, small, slots, codec):
        self.lib.fake_scans(1)
        self.engine = self.lib.fake_open(PAGES, small, how)
        self.swap = self.lib.fake_swap_open(self.engine, slots * (1 if codec == RAW else 2), codec)
        self.model = [0] * PAGES
        for page in range(0, PAGES, 2):
            self.write(page, 1 + page % 3 if page % 3 else NOISY + 1 + page // 3 % 8)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        try:
            self.lib.fake_clear()
            assert self.lib.pv_engine_install(self.engine, 0, PAGES) == 0
            assert [self.lib.guest_read(self.engine, page) for page in range(PAGES)] == self.model
            self.balanced()
            told = look(self.lib, self.swap)
            assert told.live == 0
            assert (told.stored, told.stored > 0) == ((told.slots - told.free) * told.slot_bytes, told.kept > 0)
        finally:
            self.lib.fake_swap_close()

    def within(self, page, count):
        return min(count, BLOCK - page % BLOCK, PAGES - page)

    @rule(
        call=st.sampled_from([PUT, GET, PUT, GET, CALLS.index("move"), CALLS.index("copy")]),
        skip=st.integers(0, 3),
        part=st.sampled_from([0, 0, 1, 4096, 5000, 400000]),
        error=st.sampled_from([*ERRORS, errno.ENOSPC]),
        times=st.sampled_from([1, 1, 2, 500]),
    )
    def inject(self, call, skip, part, error, times):
        # EINTR is tried again: for ever, if it always comes
        self.lib.fake_inject(call, skip, part, error, 2 if error == errno.EINTR else times)

    @rule()
    def clear(self):
        self.lib.fake_clear()

    @rule(page=pages, count=counts)
    def out(self, page, count):
        self.lib.pv_swap_out(self.swap, page, self.within(page, count))

    @rule(block=st.integers(0, 2))
    def out_block(self, block):
        self.out(block * BLOCK, BLOCK)

    @rule(what=st.sampled_from([0, 0, 1, 2, 3, 4, 4]), page=pages, count=counts, value=values)
    def step(self, what, page, count, value):
        """A batch is written; the guest has a hand in it."""
        count = self.within(page, count)
        self.lib.fake_meanwhile(what, page, count, value)
        pending = self.lib.fake_pending()
        result = self.lib.pv_swap_step(self.swap)
        for each in range(page, page + self.lib.fake_done()):
            self.model[each] = value
        assert result >= 0 or pending or result == -FULL
        assert (result >= 0) or look(self.lib, self.swap).error == -result

    @rule(error=st.sampled_from([0, 0, errno.EOPNOTSUPP, errno.EIO]))
    def punch(self, error):
        self.lib.fake_no_holes(error)
        self.lib.pv_swap_punch(self.swap)

    @rule(page=pages, bit=st.integers(0, 1 << 15))
    def damage(self, page, bit):
        """A bit of the file is another: the page does not come, and nothing else than its bytes ever does."""
        if self.lib.fake_stored(page):
            self.lib.fake_damage(page, bit, 0)
            stored, place = self.lib.fake_stored(page), self.lib.fake_place(page)
            value = self.lib.guest_read(self.engine, page)
            assert value in (self.model[page], MISSING)
            assert (stored, place) == (self.lib.fake_stored(page), self.lib.fake_place(page))
            self.lib.fake_damage(page, bit, 0)

    @rule()
    def retry(self):
        self.lib.pv_swap_retry(self.swap)
        assert look(self.lib, self.swap).behind == 0

    @rule(page=pages, count=st.integers(0, PAGES))
    def install(self, page, count):
        pending = self.lib.fake_pending()
        result = self.lib.pv_engine_install(self.engine, page, min(count, PAGES - page))
        assert result == 0 or (result < 0 and pending)

    @rule(page=pages, value=values)
    def write(self, page, value):
        pending = self.lib.fake_pending()
        if self.lib.guest_write(self.engine, page, value) == 0:
            self.model[page] = value
        else:
            assert pending

    @rule(page=pages, count=counts)
    def read(self, page, count):
        for each in range(page, page + self.within(page, count)):
            pending = self.lib.fake_pending()
            value = self.lib.guest_read(self.engine, each)
            assert value == self.model[each] or (value == MISSING and pending)

    @rule(block=st.integers(0, 2))
    def split(self, block):
        self.lib.pv_engine_split(self.engine, block)

    @rule(block=st.integers(0, 2))
    def merge(self, block):
        self.lib.pv_engine_merge(self.engine, block)

    @invariant()
    def balanced(self):
        if not hasattr(self, "engine"):
            return
        assert wrong(self.lib, self.engine) == ""
        found = ffi.new("uint64_t[]", PAGES)
        self.lib.fake_values(self.engine, found)
        assert [(page, found[page], was) for page, was in enumerate(self.model) if found[page] != was][:5] == []


FEW = 12
few = st.integers(0, FEW - 1)


class Referring(RuleBasedStateMachine):
    """Few pages, blocks of a disk that refer to them, a file of few slots: each is held, given up, written again."""

    lib = None

    @initialize(slots=st.sampled_from([FEW, 2 * FEW, 4 * FEW]), codec=st.sampled_from([RAW, RAW, LZ4]))
    def begin(self, slots, codec):
        self.lib.fake_scans(1)
        self.engine = self.lib.fake_open(PAGES, 1 << 63, MOVE)
        self.swap = self.lib.fake_swap_open(self.engine, slots * (1 if codec == RAW else 4), codec)
        self.model, self.disk = [0] * FEW, [None] * DISK
        self.go_out(0, FEW, 1, True)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        try:
            self.lib.fake_clear()
            assert self.lib.pv_engine_install(self.engine, 0, PAGES) == 0
            self.right()
            self.lib.fake_unrefer(0, DISK)
            self.disk = [None] * DISK
            self.right()
            told = look(self.lib, self.swap)
            assert (told.held, told.references, told.live) == (0, 0, 0)
        finally:
            self.lib.fake_swap_close()

    @rule(first=few, count=st.integers(1, FEW), value=values, written=st.booleans())
    def go_out(self, first, count, value, written):
        """As they are, or changed before, each to something else."""
        count = min(count, FEW - first)
        for page in range(first, first + count if written else first):
            one = value + page if 0 < value < NOISY else value
            if self.lib.guest_write(self.engine, page, one) == 0:
                self.model[page] = one
        self.lib.pv_swap_out(self.swap, first, count)
        while look(self.lib, self.swap).queued:
            pending = self.lib.fake_pending()
            result = self.lib.pv_swap_step(self.swap)
            assert result >= 0 or pending or result == -FULL

    @rule(page=few, count=st.integers(1, FEW))
    def come_back(self, page, count):
        self.lib.pv_engine_install(self.engine, page, min(count, FEW - page))

    @rule(block=few, page=few, count=st.integers(1, FEW))
    def refer(self, block, page, count):
        """The guest writes pages to its disk."""
        count = min(count, FEW - page)
        became = self.lib.fake_refer(block, page, count)
        for i in range(count):
            if became >> i & 1:
                self.disk[block + i] = self.model[page + i]

    @rule(block=few, count=st.integers(1, 3))
    def unrefer(self, block, count):
        self.lib.fake_unrefer(block, count)
        self.disk[block : block + count] = [None] * count

    @rule(block=few, other=few)
    def copy_ref(self, block, other):
        self.lib.fake_copy_ref(block, other)
        self.disk[other] = self.disk[block]

    @rule(
        call=st.sampled_from([PUT, GET]),
        skip=st.integers(0, 3),
        part=st.sampled_from([0, 0, 1, 4096, 5000]),
        times=st.sampled_from([1, 2, 500]),
    )
    def inject(self, call, skip, part, times):
        self.lib.fake_inject(call, skip, part, errno.EIO, times)

    @rule()
    def clear(self):
        self.lib.fake_clear()

    @rule()
    def punch(self):
        self.lib.pv_swap_punch(self.swap)

    @invariant()
    def right(self):
        if not hasattr(self, "engine"):
            return
        assert wrong(self.lib, self.engine) == ""
        found = ffi.new("uint64_t[]", PAGES)
        self.lib.fake_values(self.engine, found)
        assert list(found)[:FEW] == self.model
        pending, found = self.lib.fake_pending(), ffi.new("uint64_t[]", DISK)
        error = self.lib.fake_read_refs(found)
        assert error == 0 or (error < 0 and pending)
        assert list(found) == [NOTHING if each is None or error else each for each in self.disk]


@pytest.mark.parametrize("kind", [Swapping, Referring])
def test_no_failure_loses_a_byte(lib, kind):
    class Machine(kind):
        pass

    Machine.lib = lib
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES * (2 if kind is Referring else 1),
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Step by step.


@pytest.fixture
def swapping(lib):
    """(engine, swap) with all pages of its first two blocks full of `value`."""

    def make(slots=3 * BLOCK, small=0, value=lambda page: 1 + page % 7, codec=RAW):
        lib.fake_scans(1)
        engine = lib.fake_open(PAGES, small, MOVE)
        swap = lib.fake_swap_open(engine, slots, codec)
        made.append(swap)
        for page in range(2 * BLOCK):
            assert lib.guest_write(engine, page, value(page)) == 0
        return engine, swap

    made = []
    yield make
    if made:
        lib.fake_swap_close()


def put_out(lib, swap, *runs):
    for page, count in runs:
        assert lib.pv_swap_out(swap, page, count) == count
    steps = []
    while look(lib, swap).queued:
        steps.append(lib.pv_swap_step(swap))
    return steps


def test_a_block_goes_out_by_one_write_and_comes_back_by_one_read(lib, swapping):
    engine, swap = swapping()
    assert put_out(lib, swap, (0, BLOCK), (BLOCK, BLOCK)) == [BLOCK, BLOCK]
    told = look(lib, swap)
    assert (told.writes, told.bytes_written, told.live) == (2, 2 * BLOCK * 4096, 2 * BLOCK)
    assert lib.guest_read(engine, 100) == 1 + 100 % 7
    told = look(lib, swap)
    assert (told.reads, told.came, told.live) == (1, BLOCK, BLOCK)
    assert wrong(lib, engine) == ""


def test_what_is_unchanged_is_not_written_again_and_what_is_changed_is(lib, swapping):
    engine, swap = swapping()
    put_out(lib, swap, (0, BLOCK))
    assert lib.pv_engine_install(engine, 0, BLOCK) == 0
    assert (look(lib, swap).kept, look(lib, swap).live) == (BLOCK, 0)
    assert lib.guest_write(engine, 5, 9) == 0
    assert lib.guest_write(engine, 7, 0) == 0
    put_out(lib, swap, (0, BLOCK))
    told = look(lib, swap)
    assert (told.saved, told.zeros, told.bytes_written) == (BLOCK - 2, 1, (BLOCK + 1) * 4096)
    before = told.reads
    assert lib.guest_read(engine, 5) == 9
    assert look(lib, swap).reads == before + 2  # page 5 has kept its place; page 7 has none any more
    assert [lib.guest_read(engine, page) for page in (4, 5, 6, 7)] == [5, 9, 7, 0]
    assert wrong(lib, engine) == ""


def test_kept_slots_are_given_up_when_the_file_is_full(lib, swapping):
    engine, swap = swapping(slots=BLOCK + 10)
    assert put_out(lib, swap, (0, BLOCK)) == [BLOCK]
    assert lib.pv_engine_install(engine, 0, BLOCK) == 0
    assert put_out(lib, swap, (BLOCK, BLOCK)) == [BLOCK]
    told = look(lib, swap)
    assert (told.live, told.kept, told.given_up) == (BLOCK, 0, BLOCK)
    assert put_out(lib, swap, (0, BLOCK)) == [-FULL]
    told = look(lib, swap)
    assert (told.live, told.free, told.behind, told.errors, told.error) == (BLOCK + 10, 0, 1, 1, FULL)
    assert lib.pv_engine_install(engine, BLOCK, BLOCK) == 0
    lib.pv_swap_retry(swap)
    assert lib.pv_swap_step(swap) == BLOCK - 10
    assert [lib.guest_read(engine, page) for page in range(BLOCK)] == [1 + page % 7 for page in range(BLOCK)]
    assert wrong(lib, engine) == ""


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("part", [0, 1, 4096, 1000000])
def test_what_cannot_be_written_stays_in_memory(lib, swapping, error, part):
    engine, swap = swapping()
    lib.fake_inject(PUT, 0, part, error, 1)
    assert put_out(lib, swap, (0, BLOCK)) == [-error]
    assert (look(lib, swap).live, look(lib, swap).behind, look(lib, swap).errors) == (0, 1, 1)
    assert wrong(lib, engine) == ""
    lib.pv_swap_retry(swap)
    assert lib.pv_swap_step(swap) == BLOCK
    assert [lib.guest_read(engine, page) for page in range(BLOCK)] == [1 + page % 7 for page in range(BLOCK)]


@pytest.mark.parametrize("codec", [RAW, LZ4, ZSTD])
@pytest.mark.parametrize("small", [0, 1 << 63])
@pytest.mark.parametrize("error", [errno.EIO, errno.EBADMSG, errno.ENODATA])
def test_what_cannot_be_read_is_no_wrong_byte(lib, swapping, error, small, codec):
    engine, swap = swapping(small=small, codec=codec)
    put_out(lib, swap, (0, BLOCK))
    if error == errno.EIO:
        lib.fake_inject(GET, 0, 5000, error, 1 << 30)
    else:
        lib.fake_damage(3, 80, int(error == errno.ENODATA))
    assert lib.guest_read(engine, 3) == MISSING
    assert lib.pv_engine_install(engine, 3, 1) == -error
    assert wrong(lib, engine) == ""
    if error == errno.EIO:
        lib.fake_clear()
    elif error == errno.EBADMSG:
        lib.fake_damage(3, 80, 0)
    else:
        return
    assert [lib.guest_read(engine, page) for page in range(BLOCK)] == [1 + page % 7 for page in range(BLOCK)]


@pytest.mark.parametrize("what", [1, 2, 3, 4])
def test_a_page_that_is_touched_while_it_is_written(lib, swapping, what):
    """It comes back at once; the copy of it that was written counts for nothing, unless it goes out again as it was."""
    engine, swap = swapping(small=1 << 63)
    lib.fake_meanwhile(what, 10, 5, 9)
    steps = put_out(lib, swap, (0, BLOCK))
    assert steps == [BLOCK - 5] + [5] * (what >= 3)
    assert look(lib, swap).late == 5
    assert wrong(lib, engine) == ""
    if what == 1:
        before = look(lib, swap).bytes_written
        assert put_out(lib, swap, (10, 5)) == [5]
        assert look(lib, swap).bytes_written == before
    assert [lib.guest_read(engine, page) for page in range(9, 16)] == [
        page % 7 + 1 if what == 1 or not 10 <= page < 15 else 9 for page in range(9, 16)
    ]


def test_the_window_grows_while_the_guest_goes_on_and_shrinks_when_it_does_not(lib, swapping):
    engine, swap = swapping(small=1 << 63)
    put_out(lib, swap, (0, BLOCK), (BLOCK, BLOCK))
    reads = []
    for page in range(BLOCK):
        before = look(lib, swap).reads
        assert lib.guest_read(engine, page) == 1 + page % 7
        reads.append(look(lib, swap).reads - before)
    assert sum(reads) <= 10
    rng = random.Random(3)
    apart = list(range(BLOCK + 40, 2 * BLOCK, 40))
    rng.shuffle(apart)
    before = look(lib, swap).ahead
    for page in apart:
        assert lib.guest_read(engine, page) == 1 + page % 7
    assert look(lib, swap).ahead - before <= 7 + 3 + 1
    assert wrong(lib, engine) == ""


def test_read_ahead_stays_in_the_block_that_is_locked(lib, swapping):
    engine, swap = swapping(small=1 << 63)
    assert put_out(lib, swap, (0, 4), (BLOCK, 4)) == [8]
    assert lib.guest_read(engine, 0) == 1
    assert look(lib, swap).live == 4
    assert lib.guest_read(engine, BLOCK) == 1 + BLOCK % 7
    assert look(lib, swap).live == 0


def test_a_second_touch_of_a_block_that_is_partly_out_brings_no_more_than_its_window(lib, swapping):
    engine, swap = swapping()
    put_out(lib, swap, (0, 400))
    for page in (10, 300, 150):
        assert lib.guest_read(engine, page) == 1 + page % 7
    assert look(lib, swap).live >= 400 - 3 * 16
    assert wrong(lib, engine) == ""


def test_a_block_that_has_gone_out_in_pieces_is_put_together(lib, swapping):
    """It is written anew once; what changes of it later goes to its own place."""
    engine, swap = swapping()
    for page in range(0, BLOCK, 2):
        put_out(lib, swap, (page, 1), (BLOCK + page, 1))
    put_out(lib, swap, *[(page, 1) for page in range(1, BLOCK, 2)])
    for changed in (0, 9):
        assert lib.pv_engine_install(engine, 0, BLOCK) == 0
        if changed:
            assert lib.guest_write(engine, 77, 9) == 0
        written, reads = look(lib, swap).bytes_written, look(lib, swap).reads
        assert put_out(lib, swap, (0, BLOCK)) == [BLOCK]
        assert look(lib, swap).bytes_written - written == (4096 if changed else BLOCK * 4096)
        assert lib.guest_read(engine, 77) == (changed or 1 + 77 % 7)
        assert look(lib, swap).reads - reads == 1
    assert wrong(lib, engine) == ""


# Compressed.


def noisy(page):
    return NOISY + page % 9 if page % 9 else 1 + page % 7


@pytest.mark.parametrize("codec", [LZ4, ZSTD])
def test_pages_take_as_many_slots_as_they_need(lib, swapping, codec):
    """Still by one write, and back by one read."""
    engine, swap = swapping(slots=3 * 8 * BLOCK, value=noisy, codec=codec)
    assert put_out(lib, swap, (0, BLOCK)) == [BLOCK]
    sizes = [lib.fake_stored(page) for page in range(BLOCK)]
    for page, size in enumerate(sizes):
        noise = 512 * (page % 9)
        assert size == 4096 if noise >= 3584 else noise < size < noise + 200
    slots = sum(-(-size // 512) for size in sizes)
    told = look(lib, swap)
    assert (told.writes, told.bytes_written, told.stored) == (1, slots * 512, slots * 512)
    assert lib.guest_read(engine, 100) == noisy(100)
    told = look(lib, swap)
    assert (told.reads, told.bytes_read, told.came) == (1, slots * 512, BLOCK)
    assert [lib.guest_read(engine, page) for page in range(BLOCK)] == [noisy(page) for page in range(BLOCK)]
    assert wrong(lib, engine) == ""


@pytest.mark.parametrize("codec", [LZ4, ZSTD])
def test_what_is_unchanged_is_not_compressed_again_and_what_has_grown_moves(lib, swapping, codec):
    engine, swap = swapping(slots=3 * 8 * BLOCK, value=lambda _: NOISY + 2, codec=codec)
    put_out(lib, swap, (0, BLOCK))
    places, before = [lib.fake_place(page) for page in range(BLOCK)], look(lib, swap)
    assert lib.pv_engine_install(engine, 0, BLOCK) == 0
    changed = {5: NOISY + 1, 6: NOISY + 3, 7: 0, 8: NOISY + 7, 100: NOISY + 7}
    for page, value in changed.items():
        assert lib.guest_write(engine, page, value) == 0
    put_out(lib, swap, (0, BLOCK))
    told = look(lib, swap)
    assert (told.saved, told.zeros, told.bytes_written - before.bytes_written) == (BLOCK - 5, 1, (2 + 4 + 8 + 8) * 512)
    moved = {page for page, place in enumerate(places) if lib.fake_place(page) != place}
    assert moved == {6, 7, 100, *(() if lib.fake_place(8) == places[8] else (8,))}
    assert lib.guest_read(engine, 8) == NOISY + 7
    assert [lib.guest_read(engine, page) for page in range(BLOCK)] == [
        changed.get(page, NOISY + 2) for page in range(BLOCK)
    ]
    assert look(lib, swap).reads - told.reads <= 5  # small gaps are read, too
    assert wrong(lib, engine) == ""


@pytest.mark.parametrize("codec", [LZ4, ZSTD])
def test_a_full_file_of_pieces(lib, swapping, codec):
    """What is kept is given up until there are slots side by side; what finds none stays, smaller pages fit yet."""
    engine, swap = swapping(slots=2 * BLOCK, value=lambda page: 1 + page % 7, codec=codec)
    assert put_out(lib, swap, (0, BLOCK), (BLOCK, BLOCK)) == [BLOCK, BLOCK]
    assert look(lib, swap).free == 0
    assert lib.pv_engine_install(engine, 0, BLOCK) == 0
    put_out(lib, swap, *[(page, 1) for page in range(0, BLOCK, 2)])  # what is kept lies nowhere together
    assert (look(lib, swap).live, look(lib, swap).kept) == (BLOCK + BLOCK // 2, BLOCK // 2)
    for page in (3, 5):
        assert lib.guest_write(engine, page, NOISY + 5) == 0
    assert lib.pv_swap_out(swap, 3, 1) == 1
    assert lib.pv_swap_step(swap) == -FULL
    told = look(lib, swap)
    assert (told.behind, told.error) == (1, FULL)
    assert lib.guest_write(engine, 9, 4) == 0
    assert lib.pv_swap_out(swap, 9, 1) == 1
    assert lib.pv_swap_step(swap) == -FULL  # page 3 again, but
    assert lib.fake_stored(9) > 0
    assert lib.pv_engine_install(engine, BLOCK, 6) == 0
    lib.pv_swap_retry(swap)
    assert lib.pv_swap_step(swap) == 1
    assert lib.guest_read(engine, 3) == NOISY + 5
    assert wrong(lib, engine) == ""


@pytest.mark.parametrize("codec", [LZ4, ZSTD])
def test_each_bit_of_what_is_stored_counts_or_is_of_no_matter(lib, swapping, codec):
    """Of damaged bytes the page comes right, or not at all."""
    engine, swap = swapping(small=1 << 63, value=lambda page: NOISY + page % 4, codec=codec)
    put_out(lib, swap, (0, 4))
    rng = random.Random(6)
    missing = 0
    for page in range(4):
        for bit in [*range(100), *(rng.randrange(1 << 14) for _ in range(100))]:
            lib.fake_damage(page, bit, 0)
            value = lib.guest_read(engine, page)
            missing += value == MISSING
            assert value in (NOISY + page % 4, MISSING)
            lib.fake_damage(page, bit, 0)
            assert lib.guest_read(engine, page) == NOISY + page % 4
            put_out(lib, swap, (page, 1))
    assert missing > 700
    assert wrong(lib, engine) == ""


# Disk space.


@pytest.mark.parametrize("codec", [RAW, LZ4])
def test_disk_space_is_given_back_where_no_page_is(lib, swapping, codec):
    engine, swap = swapping(slots=3 * BLOCK * 4096 // SLOT[codec], value=lambda _: NOISY + 8, codec=codec)
    put_out(lib, swap, (0, BLOCK), (BLOCK, BLOCK))
    assert fake_disk_mib(lib) == 4
    assert lib.pv_engine_install(engine, 0, 2 * BLOCK) == 0
    assert lib.pv_swap_punch(swap) == 0  # kept, which may be worth a write
    for page in range(100, BLOCK):
        assert lib.guest_write(engine, page, 0) == 0
    for page in range(0, 100, 4):  # holes that are too small
        assert lib.guest_write(engine, page, 0) == 0
    put_out(lib, swap, (0, BLOCK), (BLOCK, BLOCK))
    before = look(lib, swap)
    assert before.given_back == 0
    assert lib.pv_swap_punch(swap) == (BLOCK - 100) * 4096
    told = look(lib, swap)
    assert (told.given_back, told.free) == ((BLOCK - 100) * 4096, before.free)
    assert lib.fake_disk() == (BLOCK + 100) * 4096
    assert lib.pv_swap_punch(swap) == 0
    put_out(lib, swap)
    assert [lib.guest_read(engine, page) for page in range(2 * BLOCK)] == [
        0 if 100 <= page < BLOCK or (page < 100 and page % 4 == 0) else NOISY + 8 for page in range(2 * BLOCK)
    ]
    assert wrong(lib, engine) == ""


def fake_disk_mib(lib):
    return lib.fake_disk() / (1 << 20)


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EIO])
def test_where_no_holes_can_be_made_nothing_happens(lib, swapping, error):
    engine, swap = swapping()
    put_out(lib, swap, (0, BLOCK))
    lib.fake_no_holes(error)
    for page in range(BLOCK):
        assert lib.guest_write(engine, page, 0) == 0
    put_out(lib, swap, (0, BLOCK))
    assert (lib.pv_swap_punch(swap), look(lib, swap).given_back, look(lib, swap).free) == (0, 0, 3 * BLOCK)
    lib.fake_no_holes(0)
    for page in range(BLOCK):
        assert lib.guest_write(engine, page, 1) == 0
    put_out(lib, swap, (0, BLOCK))
    assert lib.fake_disk() == 2 * BLOCK * 4096  # elsewhere
    for page in range(BLOCK):
        assert lib.guest_write(engine, page, 0) == 0
    put_out(lib, swap, (0, BLOCK))
    assert lib.pv_swap_punch(swap) == (0 if error == errno.EOPNOTSUPP else BLOCK * 4096)  # of the second time
    assert wrong(lib, engine) == ""


# Which pages are alike.

M64 = (1 << 64) - 1
P1, P2 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F


def twins(rng):
    """Two pages that XXH64 takes for the same one under half of all seeds, known or not."""
    words = [rng.getrandbits(64) for _ in range(512)]
    others = list(words)
    others[0] = (words[0] + (1 << 63) * pow(P2, -1, 1 << 64)) & M64
    others[4] = (words[4] + (1 << 30) * P1 * pow(P2, -1, 1 << 64)) & M64  # the next word of the same lane
    return [b"".join(word.to_bytes(8, "little") for word in each) for each in (words, others)]


def digest(key, page):
    out = native_ffi.new("uint64_t[2]")
    native.pv_digest(key, page, out)
    return tuple(out)


def new_key(plain):
    key = native_ffi.new("struct pv_digest_key *")
    assert native.pv_digest_key_make(key, plain) == 0
    return key


WAYS = pytest.mark.parametrize("plain", [0, 1])
"""As fast as this CPU can, and as every CPU can."""


@WAYS
def test_a_guest_cannot_have_pages_seem_alike(plain):
    """With XXH64, it could, whatever the seed."""
    rng = random.Random(4)
    collisions = 0
    for _ in range(100):
        one, other = twins(rng)
        seed = rng.getrandbits(64)
        collisions += native.pv_hash(one, 4096, seed) == native.pv_hash(other, 4096, seed)
        key = new_key(plain)
        assert digest(key, one) != digest(key, other)
    assert collisions > 20


@WAYS
def test_each_bit_counts_and_each_key_is_another(plain):
    rng = random.Random(5)
    key, page = new_key(plain), bytearray(rng.randbytes(4096))
    right = digest(key, bytes(page))
    assert all(half < 1 << 61 for half in right)
    assert digest(key, bytes(page)) == right
    assert digest(new_key(plain), bytes(page)) != right
    seen = {right}
    for bit in rng.sample(range(4096 * 8), 300):
        page[bit // 8] ^= 1 << bit % 8
        seen.add(digest(key, bytes(page)))
        page[bit // 8] ^= 1 << bit % 8
    assert len({half for found in seen for half in found}) == 2 * 301
