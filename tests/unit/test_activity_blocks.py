# test_activity_blocks.py: a sampled block (cffi_build/sample.c) on a stand-in for userfaultfd: what is touched is seen,
# every operation finds the block as it was, and no failure loses a byte. Needs no KVM, no userfaultfd.
from __future__ import annotations

import errno

import pytest
from test_pagemap_machine import (
    ACTIVE,
    BLOCK,
    BROKEN_OFF,
    CALLS,
    LIVE_DONE,
    MOVE,
    PAGES,
    POISON,
    RUNNING,
    SAMPLED,
    SWAP,
    balance,
    compile_engine,
    ffi,
)

SMALL, BROKEN, ASIDE_LARGE = 1 << 2, 1 << 3, 1 << 4
HOWS = [0, MOVE, POISON, MOVE | POISON]


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return ffi.dlopen(str(compile_engine(tmp_path_factory.mktemp("fake"))))


class Made:
    """Two blocks, each one large page, of which page i holds i % 9, and five pages behind them."""

    def __init__(self, lib, how, small=0, scans=1):
        self.lib = lib
        lib.fake_scans(scans)
        self.engine = lib.fake_open(PAGES, small, how)
        self.model = [page % 9 for page in range(PAGES)]
        for page, value in enumerate(self.model):
            assert lib.guest_write(self.engine, page, value) == 0
        for block in range(2):
            assert lib.pv_engine_merge(self.engine, block) == 0 or not scans

    def write(self, page, value):
        assert self.lib.guest_write(self.engine, page, value) == 0
        self.model[page] = value

    def begin(self, block=0, limit=0):
        return self.lib.pv_sample_begin(self.engine, block, limit)

    def end(self, block=0, keep=1):
        """Result, touched pages, state."""
        told = ffi.new("struct pv_sample *")
        result = self.lib.pv_sample_end(self.engine, block, keep, told)
        return result, [i for i in range(BLOCK) if told.bits[i // 64] >> i % 64 & 1], told.state

    def flags(self, block=0):
        return self.lib.fake_block_flags(self.engine, block) & (SMALL | BROKEN | ASIDE_LARGE | SAMPLED)

    def check(self, users=0):
        """Every page's bytes are in one place, and right; the books balance."""
        assert balance(self.lib, self.engine, users) == ""
        found = ffi.new("uint64_t[]", PAGES)
        self.lib.fake_values(self.engine, found)
        assert list(found) == self.model

    def over(self):
        """All comes back, and nothing is registered then."""
        self.lib.fake_clear()
        assert [self.lib.guest_read(self.engine, page) for page in range(PAGES)] == self.model
        assert self.lib.pv_engine_install(self.engine, 0, PAGES) == 0
        self.check()
        assert not self.lib.fake_armed()


@pytest.fixture
def made(lib):
    engines = []

    def make(how=MOVE, **options):
        engines.append(Made(lib, how, **options))
        return engines[-1]

    yield make
    lib.fake_scans(1)
    for each in engines:
        lib.fake_close(each.engine)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("keep", [0, 1])
def test_what_is_touched_is_seen_and_kept(made, how, keep):
    own = made(how)
    assert own.begin() == 0
    assert own.flags() == SAMPLED
    own.check()
    for page in (7, 300, 7, 511):
        own.write(page, 100 + page)
        own.check()
    assert own.lib.guest_read(own.engine, 4) == 4
    own.check()
    assert own.end(keep=keep) == (0, [4, 7, 300, 511], RUNNING)
    assert own.flags() == (0 if keep else BROKEN)
    own.check()
    own.over()


@pytest.mark.parametrize("how", HOWS)
def test_a_block_that_nobody_touched_stays_whole_wherever_it_is(made, how):
    own = made(how)
    assert own.begin(0) == own.begin(1) == 0
    assert own.end(0, keep=1) == (0, [], RUNNING)
    assert own.end(1, keep=0) == (0, [], RUNNING)
    assert own.flags(0) == 0
    assert own.flags(1) == ASIDE_LARGE
    own.check()
    own.over()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("limit", [1, 5, 512])
def test_an_active_block_is_back_with_the_touch_that_makes_it_so(made, how, limit):
    own = made(how)
    assert own.begin(limit=limit) == 0
    for page in range(limit):
        assert own.flags() == SAMPLED
        own.write(page, 50 + page)
    assert own.flags() == 0
    assert not own.lib.fake_armed()
    own.write(511, 99)  # nobody looks any more
    own.check()
    assert own.begin() == -errno.EALREADY  # until the last one is ended
    assert own.end() == (0, list(range(limit)), ACTIVE)
    assert own.begin() == 0
    assert own.end() == (0, [], RUNNING)
    own.over()


@pytest.mark.parametrize("how", [0, MOVE])
@pytest.mark.parametrize(
    "operation", ["remove", "part", "zeros", "install", "fill", "store", "pin", "split", "merge", "break", "assign"]
)
def test_every_operation_finds_the_block_as_it_was(made, how, operation):
    own = made(how)
    lib, engine = own.lib, own.engine
    assert own.begin() == 0
    own.write(3, 33)
    own.write(400, 44)
    result = {
        "remove": lambda: lib.pv_engine_remove(engine, 0, BLOCK, 0),
        "part": lambda: lib.pv_engine_remove(engine, 1, 20, 0),
        "zeros": lambda: lib.pv_engine_remove(engine, 0, 16, 1),
        "install": lambda: lib.pv_engine_install(engine, 0, 1),
        "fill": lambda: lib.pv_engine_fill(engine, 0, BLOCK),
        "store": lambda: lib.pv_engine_store(engine, 0, BLOCK, SWAP),
        "pin": lambda: lib.pv_engine_pin(engine, 0, 1),
        "split": lambda: lib.pv_engine_split(engine, 0),
        "merge": lambda: lib.pv_engine_merge(engine, 0),
        "break": lambda: lib.pv_engine_break(engine, 0),
        "assign": lambda: lib.pv_engine_assign(engine, 0, 1, SWAP, 0),
    }[operation]()
    assert result == {"remove": BLOCK, "part": 20, "assign": -errno.EEXIST}.get(operation, 0)
    assert not own.flags() & SAMPLED
    assert own.begin() in (-errno.EALREADY, -errno.EBUSY)
    if operation == "pin":
        lib.pv_engine_unpin(engine, 0, 1)
    own.check()
    own.write(5, 55)
    assert own.end() == (0, [3, 400], BROKEN_OFF)
    own.over()


@pytest.mark.parametrize("call", ["move", "copy", "protect", "register", "drop", "scan", "collapse", "populate"])
@pytest.mark.parametrize("skip", range(2))
@pytest.mark.parametrize("how", [0, MOVE])
@pytest.mark.parametrize("moment", ["begin", "touch", "limit", "end", "install"])
def test_no_failure_loses_a_byte(made, call, skip, how, moment):
    error = errno.ENOMEM
    own = made(how)
    inject = lambda: own.lib.fake_inject(CALLS.index(call), skip, 0, error, 1000)  # noqa: E731
    if moment == "begin":
        inject()
    begun = own.begin(limit=3)
    assert begun == 0 or moment == "begin"
    own.check()
    if begun == 0:
        for page in (1, 2, *([3] if moment == "limit" else [])):
            if moment in ("touch", "limit"):
                inject()
            if own.lib.guest_write(own.engine, page, 60) == 0:
                own.model[page] = 60
            own.check()
        if moment in ("end", "install"):
            inject()
        if moment == "install":
            own.lib.pv_engine_install(own.engine, 0, BLOCK)
            own.check()
        result, seen, _ = own.end()
        assert result in (0, -error)
        assert set(seen) <= {1, 2, 3}
    assert not own.flags() & SAMPLED
    own.check()
    own.over()


@pytest.mark.parametrize("how", [0, MOVE])
def test_what_cannot_be_sampled(made, how):
    own = made(how)
    lib, engine = own.lib, own.engine
    assert own.begin(2) == -errno.EINVAL  # a part of one
    assert own.begin(1 << 40) == -errno.EINVAL
    assert own.end(1)[0] == -errno.ENOENT
    assert lib.pv_engine_pin(engine, 3, 1) == 0
    assert own.begin() == -errno.EBUSY
    lib.pv_engine_unpin(engine, 3, 1)
    assert lib.pv_engine_remove(engine, 3, 1, 0) == 1
    assert own.begin() == -errno.ENXIO  # a page of it is away
    assert lib.pv_engine_split(engine, 1) == 0
    assert own.begin(1) == -errno.ENXIO
    assert lib.pv_engine_merge(engine, 1) == 0
    assert lib.pv_trace_start(engine, 21, 0) == 0
    assert own.begin(1) == -errno.EBUSY  # it would be told as written
    assert lib.pv_trace_stop(engine) == 0
    assert own.begin(1) == 0
    own.check()
    own.end(1)
    own.over()


def test_without_a_look_at_large_pages_there_is_no_sampling(made):
    own = made(0, scans=0)
    assert own.begin() == -errno.EOPNOTSUPP
    own.over()


@pytest.mark.parametrize("how", [0, MOVE])
def test_a_trace_that_begins_meanwhile_misses_no_write(made, how):
    own = made(how)
    bits = ffi.new("uint64_t[]", PAGES // 64 + 1)
    assert own.begin() == own.begin(1) == 0
    own.write(10, 1)
    assert own.lib.pv_trace_start(own.engine, 12, 0) == 0
    own.write(10, 2)  # protected, and there
    own.write(20, 2)  # comes
    own.write(BLOCK + 1, 2)
    assert own.end()[:2] == (0, [10, 20])
    own.write(30, 2)
    assert own.lib.pv_trace_collect(own.engine, bits) == 0
    marked = {page for page in range(PAGES) if bits[page // 64] >> page % 64 & 1}
    assert {10, 20, 30, BLOCK + 1} <= marked
    own.check(users=1)
    assert own.lib.pv_trace_stop(own.engine) == 0
    assert own.end(1)[:2] == (0, [1])
    own.over()


@pytest.mark.parametrize("how", [0, MOVE])
@pytest.mark.parametrize("then", ["touch", "limit", "end", "cold", "install", "nothing"])
def test_a_live_save_has_a_sampled_block_as_it_was(made, how, then):
    """Block 1, since the drain thread has the first one before it stops."""
    own, told = made(how), ffi.new("struct pv_live_progress *")
    lib, engine = own.lib, own.engine
    assert own.begin(1, limit=3 if then == "limit" else 0) == 0
    own.write(BLOCK + 9, 5)
    assert lib.pv_live_begin(engine, ffi.NULL, 2, 0) == 0
    own.write(BLOCK + 10, 6)
    assert lib.fake_freeze(engine, 0) == 0
    instant = list(own.model)
    if then in ("touch", "limit"):
        own.write(BLOCK + 9, 7)
        own.write(BLOCK + 200, 7)
    elif then in ("end", "cold"):
        assert own.end(1, keep=then == "end")[:2] == (0, [9, 10])
        own.write(BLOCK + 9, 7)
    elif then == "install":
        assert lib.pv_engine_install(engine, BLOCK, BLOCK) == 0
        own.write(BLOCK + 9, 7)
    own.check(users=1)
    assert lib.fake_drain(engine, told) == LIVE_DONE
    found = ffi.new("uint64_t[]", PAGES)
    lib.fake_packed(engine, found)
    assert list(found) == instant
    lib.pv_live_end(engine, ffi.NULL, ffi.NULL)
    own.check()
    own.end(1)
    own.over()


def test_an_engine_may_end_while_it_samples(made):
    own = made()
    assert own.begin() == own.begin(1) == 0
    own.write(3, 4)  # the fixture closes it


def test_a_cold_block_goes_on_to_a_home(made):
    """What was not touched is aside, for who takes it from there."""
    own = made()
    assert own.begin() == 0
    own.write(100, 5)
    assert own.end(keep=0) == (0, [100], RUNNING)
    assert own.lib.pv_engine_store(own.engine, 0, BLOCK, SWAP) == BLOCK - 1
    own.check()
    own.over()
