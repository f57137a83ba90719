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
    uint64_t slots, live, kept, free, queued, behind, out, zeros, saved, late, came, ahead, refaults, writes;
    uint64_t bytes_written, reads, bytes_read, given_up, errors;
    int error;
};
void *fake_swap_open(struct pv_engine *engine, uint64_t slots);
void fake_swap_close(void);
void fake_meanwhile(int what, uint64_t page, uint64_t count, uint64_t value);
uint64_t fake_done(void);
void fake_damage(uint64_t page, int shorter);
int fake_slots(char *text, size_t size);
int pv_swap_out(void *swap, uint64_t page, uint32_t count);
int pv_swap_step(void *swap);
void pv_swap_retry(void *swap);
void pv_swap_look(void *swap, struct pv_swap_told *out);
"""
)
FULL = 105
PUT, GET = CALLS.index("put"), CALLS.index("get")
EXAMPLES = 12


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return ffi.dlopen(
        str(
            compile_engine(
                tmp_path_factory.mktemp("fake"),
                others=("checksum", "codec", "digest"),
                sources=(*SOURCES, "swap", "swap_in", "swap_out"),
                replaced=(*REPLACED, "preadv", "pwritev"),
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
values = st.one_of(st.just(0), st.integers(1, 3))


class Swapping(RuleBasedStateMachine):
    """`model`: what each page holds. What is put away is written by hand, a batch at a time."""

    lib = None
    """Set by the test."""

    @initialize(
        how=st.sampled_from([0, MOVE, MOVE]),
        small=st.sampled_from([0, 1, 1 << 63]),
        slots=st.sampled_from([1, 100, BLOCK, 2 * BLOCK, 3 * BLOCK]),
    )
    def begin(self, how, small, slots):
        self.lib.fake_scans(1)
        self.engine = self.lib.fake_open(PAGES, small, how)
        self.swap = self.lib.fake_swap_open(self.engine, slots)
        self.model = [0] * PAGES
        for page in range(0, PAGES, 2):
            self.write(page, 1 + page % 3)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        try:
            self.lib.fake_clear()
            assert self.lib.pv_engine_install(self.engine, 0, PAGES) == 0
            assert [self.lib.guest_read(self.engine, page) for page in range(PAGES)] == self.model
            self.balanced()
            told = look(self.lib, self.swap)
            assert (told.live, told.kept + told.free) == (0, told.slots)
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

    @rule(what=st.sampled_from([0, 0, 1, 2, 3]), page=pages, count=counts, value=values)
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


def test_no_failure_loses_a_byte(lib):
    class Machine(Swapping):
        pass

    Machine.lib = lib
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# Step by step.


@pytest.fixture
def swapping(lib):
    """(engine, swap) with all pages of its first two blocks full of `value`."""

    def make(slots=3 * BLOCK, small=0, value=lambda page: 1 + page % 7):
        lib.fake_scans(1)
        engine = lib.fake_open(PAGES, small, MOVE)
        swap = lib.fake_swap_open(engine, slots)
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


@pytest.mark.parametrize("small", [0, 1 << 63])
@pytest.mark.parametrize("error", [errno.EIO, errno.EBADMSG, errno.ENODATA])
def test_what_cannot_be_read_is_no_wrong_byte(lib, swapping, error, small):
    engine, swap = swapping(small=small)
    put_out(lib, swap, (0, BLOCK))
    if error == errno.EIO:
        lib.fake_inject(GET, 0, 5000, error, 1 << 30)
    else:
        lib.fake_damage(3, int(error == errno.ENODATA))
    assert lib.guest_read(engine, 3) == MISSING
    assert lib.pv_engine_install(engine, 3, 1) == -error
    assert wrong(lib, engine) == ""
    if error == errno.EIO:
        lib.fake_clear()
    elif error == errno.EBADMSG:
        lib.fake_damage(3, 0)
    else:
        return
    assert [lib.guest_read(engine, page) for page in range(BLOCK)] == [1 + page % 7 for page in range(BLOCK)]


@pytest.mark.parametrize("what", [1, 2, 3])
def test_a_page_that_is_touched_while_it_is_written(lib, swapping, what):
    """It comes back at once; the copy of it that was written counts for nothing, unless it goes out again as it was."""
    engine, swap = swapping(small=1 << 63)
    lib.fake_meanwhile(what, 10, 5, 9)
    steps = put_out(lib, swap, (0, BLOCK))
    assert steps == [BLOCK - 5] + [5] * (what == 3)
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


def new_key():
    key = native_ffi.new("struct pv_digest_key *")
    assert native.pv_digest_key_make(key) == 0
    return key


def test_a_guest_cannot_have_pages_seem_alike():
    """With XXH64, it could, whatever the seed."""
    rng = random.Random(4)
    collisions = 0
    for _ in range(100):
        one, other = twins(rng)
        seed = rng.getrandbits(64)
        collisions += native.pv_hash(one, 4096, seed) == native.pv_hash(other, 4096, seed)
        key = new_key()
        assert digest(key, one) != digest(key, other)
    assert collisions > 20


def test_each_bit_counts_and_each_key_is_another():
    rng = random.Random(5)
    key, page = new_key(), bytearray(rng.randbytes(4096))
    right = digest(key, bytes(page))
    assert all(half < 1 << 61 for half in right)
    assert digest(key, bytes(page)) == right
    assert digest(new_key(), bytes(page)) != right
    seen = {right}
    for bit in rng.sample(range(4096 * 8), 300):
        page[bit // 8] ^= 1 << bit % 8
        seen.add(digest(key, bytes(page)))
        page[bit // 8] ^= 1 << bit % 8
    assert len({half for found in seen for half in found}) == 2 * 301
