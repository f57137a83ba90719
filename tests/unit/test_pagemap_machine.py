# test_pagemap_machine.py: the memory engine's C files on a stand-in for userfaultfd (fake_uffd.c), which fails where it
# is told: whatever happens, each page's bytes are in one place, and the books balance. Needs no KVM, no userfaultfd.
from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest
from cffi import FFI
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

ROOT = Path(__file__).parents[2]
SOURCES = (
    "engine",
    "pagemap",
    "uffd",
    "fault",
    "install",
    "remove",
    "assign",
    "blocks",
    "unit",
    "coarse",
    "limit",
    "sample",
    "sharing",
    "balloon",
    "live",
    "live_block",
    "live_drain",
    "map",
    "bits",
)
REPLACED = ("ioctl", "madvise", "clock_gettime")
DECLARATIONS = """
struct pv_engine *fake_open(uint64_t pages, uint64_t small_blocks, uint32_t how);
void fake_close(struct pv_engine *engine);
int fake_late_fault(struct pv_engine *engine, uint64_t page, int written);
int fake_source(struct pv_engine *engine, const uint64_t *values, uint32_t unit);
int pv_engine_prefetch(struct pv_engine *engine, const uint64_t *pages, uint64_t count, const uint64_t *wanted);
int pv_engine_fill(struct pv_engine *engine, uint64_t page, uint64_t count);
void fake_scans(int on);
void fake_inject(int call, uint64_t skip, uint64_t pages, int error, int times);
int fake_pending(void);
void fake_clear(void);
void fake_put(uint64_t locator, uint64_t value);
int guest_write(struct pv_engine *engine, uint64_t page, uint64_t value);
uint64_t guest_read(struct pv_engine *engine, uint64_t page);
void fake_values(struct pv_engine *engine, uint64_t *values);
int fake_check(struct pv_engine *engine, uint64_t users, uint64_t pins, char *text, size_t size);
int fake_armed(void);
uint32_t fake_block_flags(struct pv_engine *engine, uint64_t block);
int pv_engine_remove(struct pv_engine *engine, uint64_t page, uint32_t count, int what);
int pv_engine_store(struct pv_engine *engine, uint64_t page, uint32_t count, uint32_t home);
int pv_engine_assign(struct pv_engine *engine, uint64_t page, uint64_t count, uint32_t home, uint64_t locator);
int pv_engine_install(struct pv_engine *engine, uint64_t page, uint64_t count);
int pv_engine_pin(struct pv_engine *engine, uint64_t page, uint64_t count);
void pv_engine_unpin(struct pv_engine *engine, uint64_t page, uint64_t count);
int pv_engine_split(struct pv_engine *engine, uint64_t block);
int pv_engine_merge(struct pv_engine *engine, uint64_t block);
int pv_engine_break(struct pv_engine *engine, uint64_t block);
struct pv_sample { uint64_t bits[8]; uint64_t nanoseconds; uint32_t touched, state; uint64_t small; };
int pv_sample_begin(struct pv_engine *engine, uint64_t block, uint32_t limit);
int pv_sample_look(struct pv_engine *engine, uint64_t block, struct pv_sample *out);
int pv_sample_state(struct pv_engine *engine, uint64_t block);
int pv_sample_end(struct pv_engine *engine, uint64_t block, int keep, struct pv_sample *out);
struct pv_run_pages { uint64_t first, count; };
struct pv_balloon_told { uint64_t gone, back, stayed, blocks; };
int pv_balloon(struct pv_engine *engine, const struct pv_run_pages *runs, uint64_t count, int how,
               struct pv_balloon_told *told);
int pv_engine_share(struct pv_engine *engine, uint64_t block, int on);
void fake_merge(uint64_t page, uint64_t count);
void fake_merge_later(uint64_t page, uint64_t value);
int fake_merged_later(void);
int pv_trace_start(struct pv_engine *engine, uint32_t shift, uint32_t refine);
int pv_trace_collect(struct pv_engine *engine, uint64_t *bits);
int pv_trace_stop(struct pv_engine *engine);
struct pv_live_progress { uint64_t blocks, saved, copied, waits, page; uint32_t home, cause; int error; };
int pv_live_begin(struct pv_engine *engine, void *pack, uint32_t buffers, int python_homes);
void pv_live_end(struct pv_engine *engine, uint8_t *large, struct pv_live_progress *out);
int fake_freeze(struct pv_engine *engine, int python_homes);
int fake_drain(struct pv_engine *engine, struct pv_live_progress *told);
void fake_packed(struct pv_engine *engine, uint64_t *values);
"""
CALLS = ("move", "copy", "zero", "protect", "register", "unregister", "scan", "drop", "collapse", "populate", "advise",
         "fetch", "store", "write", "put", "get")  # fmt: skip
ERRORS = (errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EINTR, errno.EIO)
MOVE, POISON = 1, 2
ZERO, ASIDE, SWAP = 1, 2, 4
BLOCK = 512
PAGES = 2 * BLOCK + 5
TORN, MISSING, NOWHERE = (1 << 64) - 1, (1 << 64) - 2, (1 << 64) - 3

SAMPLED = 1 << 8
RUNNING, ACTIVE, BROKEN_OFF = 1, 2, 3
LIVE_DONE, LIVE_STOPPED = 3, 4

EXAMPLES = 60
"""Of the state machine; some 20 s."""

ffi = FFI()
ffi.cdef(DECLARATIONS)


def compile_engine(directory, *flags, others=(), replaced=REPLACED, sources=SOURCES, fake="fake_uffd.c"):
    """The shared object of engine and stand-in. others: C files more, with nothing replaced in them."""
    objects, compilers = [], []
    defines = [f"-D{name}=fake_{name}" for name in replaced]
    common = [
        "gcc",
        "-std=gnu11",
        "-g",
        "-O1",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{ROOT / 'cffi_build'}",
        *flags,
    ]
    for name in (*sources, *others):
        objects.append(str(directory / f"{name}.o"))
        with_these = () if name in others else defines
        command = [*common, *with_these, "-c", ROOT / f"cffi_build/{name}.c", "-o", objects[-1]]
        compilers.append(subprocess.Popen(command))  # all at once: that is what takes most of the time here
    assert [compiler.wait() for compiler in compilers] == [0] * len(objects)
    target = directory / "fake.so"
    stand_in = Path(__file__).with_name(fake)
    subprocess.run([*common, "-shared", "-o", target, stand_in, *objects, "-lpthread", "-ldl"], check=True)
    return target


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return ffi.dlopen(str(compile_engine(tmp_path_factory.mktemp("fake"))))


pages = st.integers(0, PAGES - 1)
blocks = st.integers(0, 2)
counts = st.one_of(st.just(BLOCK), st.integers(1, 40), st.integers(1, BLOCK))
values = st.one_of(st.just(0), st.integers(1, 9))


class Engine(RuleBasedStateMachine):
    """`model`: what each page holds. A failure may be injected into each operation; none may lose a byte."""

    lib = None
    """Set by the test."""

    @initialize(
        how=st.sampled_from([0, MOVE, MOVE | POISON, POISON]),
        small=st.sampled_from([0, 1, 1 << 63]),
        scans=st.sampled_from([1, 1, 0]),
        source=st.sampled_from([None, None, *range(8)]),
    )
    def begin(self, how, small, scans, source):
        """source: None, or all RAM comes from a home that keeps pages in units, half of them zeros if it is odd."""
        self.lib.fake_scans(scans)
        self.engine = self.lib.fake_open(PAGES, small, how)
        self.model = [0] * PAGES
        if source is not None:
            self.model = [page % 10 if page % 3 or source % 2 == 0 else 0 for page in range(PAGES)]
            assert self.lib.fake_source(self.engine, self.model, source // 2) == 0
        self.pins = []
        self.traced = False
        self.samples = {}
        self.live, self.python, self.instant, self.injected = False, 0, None, False
        self.written = set()
        self.bits = ffi.new("uint64_t[]", PAGES // 64 + 1)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.lib.fake_clear()
        try:
            for page, count in self.pins:
                self.lib.pv_engine_unpin(self.engine, page, count)
            if self.live:
                self.end_live()
            if self.traced:
                assert self.lib.pv_trace_stop(self.engine) == 0
            self.traced, self.pins = False, []
            self.balanced()
            assert self.lib.pv_engine_install(self.engine, 0, PAGES) == 0
            self.balanced()
            assert [self.lib.guest_read(self.engine, page) for page in range(PAGES)] == self.model
            self.balanced()
            # A registration that could not be undone in a failure is undone when the next one ends.
            assert self.lib.pv_engine_remove(self.engine, 0, 1, 0) == 1
            assert self.lib.pv_engine_install(self.engine, 0, 1) == 0
            assert not self.lib.fake_armed()
        finally:
            self.lib.fake_close(self.engine)

    def within(self, page, count):
        return min(count, BLOCK - page % BLOCK, PAGES - page)

    @rule(
        call=st.sampled_from(range(len(CALLS) - 2)),
        skip=st.integers(0, 6),
        part=st.sampled_from([0, 0, 1, 3, 200]),
        error=st.sampled_from(ERRORS),
        times=st.sampled_from([1, 1, 2, 500]),
    )
    def inject(self, call, skip, part, error, times):
        """What is to fail from now on; until cleared, or through."""
        self.injected = True
        self.lib.fake_inject(call, skip, part, error, times)

    @rule()
    def clear(self):
        self.lib.fake_clear()

    @rule(page=pages, count=counts, what=st.sampled_from([0, 0, 1]))
    def remove(self, page, count, what):
        self.lib.pv_engine_remove(self.engine, page, self.within(page, count), what)

    @rule(block=blocks, what=st.sampled_from([0, 0, 1]))
    def remove_block(self, block, what):
        self.remove(block * BLOCK, BLOCK, what)

    @rule(page=pages, count=counts)
    def store(self, page, count):
        self.lib.pv_engine_store(self.engine, page, self.within(page, count), SWAP)

    @rule(page=pages, count=st.integers(0, PAGES))
    def install(self, page, count):
        count = min(count, PAGES - page)
        pending = self.lib.fake_pending()
        result = self.lib.pv_engine_install(self.engine, page, count)
        assert result == 0 or (result < 0 and pending)

    @rule(wanted=st.lists(pages, max_size=40, unique=True))
    def prefetch(self, wanted):
        bits = ffi.new("uint64_t[]", PAGES // 64 + 1)
        for page in wanted:
            bits[page // 64] |= 1 << page % 64
        pending = self.lib.fake_pending()
        result = self.lib.pv_engine_prefetch(self.engine, wanted, len(wanted), bits)
        assert result == 0 or (result < 0 and pending)

    @rule(block=blocks)
    def fill(self, block):
        pending = self.lib.fake_pending()
        result = self.lib.pv_engine_fill(self.engine, block * BLOCK, self.within(block * BLOCK, BLOCK))
        assert result == 0 or (result < 0 and pending)

    @rule(page=pages, count=st.one_of(counts, st.integers(1, PAGES)), how=st.sampled_from([0, 0, 0, 1, 2]))
    def balloon(self, page, count, how):
        """The guest gives up pages, may use them again, or says that they are free: all are zeros, or stayed."""
        runs, told = ffi.new("struct pv_run_pages[1]"), ffi.new("struct pv_balloon_told *")
        runs[0].first, runs[0].count = page, min(count, PAGES - page)
        pending = self.lib.fake_pending()
        result = self.lib.pv_balloon(self.engine, runs, 1, how, told)
        assert result == 0 or (result < 0 and pending)
        found = ffi.new("uint64_t[]", PAGES)
        self.lib.fake_values(self.engine, found)
        stayed = 0
        for each in range(page, page + runs[0].count if how != 1 else page):
            assert found[each] in (0, self.model[each])
            if found[each]:
                stayed += 1
            elif self.model[each]:
                self.model[each] = 0
                self.written.add(each)
        assert stayed <= told.stayed or result
        assert not told.stayed or pending or self.pins

    @rule(block=blocks, how=st.sampled_from([0, 0, 1, 2]))
    def balloon_block(self, block, how):
        self.balloon(block * BLOCK, BLOCK, how)

    @rule(block=blocks)
    def split(self, block):
        self.lib.pv_engine_split(self.engine, block)

    @rule(block=blocks)
    def merge(self, block):
        self.lib.pv_engine_merge(self.engine, block)

    @rule(block=blocks)
    def break_(self, block):
        self.lib.pv_engine_break(self.engine, block)

    @rule(page=pages, value=values)
    def write(self, page, value):
        self.note_touch(page)
        pending = self.lib.fake_pending()
        if self.lib.guest_write(self.engine, page, value) == 0:
            self.model[page] = value
            self.written.add(page)
        else:
            assert pending

    @rule(page=pages, count=counts, value=values)
    def write_run(self, page, count, value):
        for each in range(page, page + self.within(page, count)):
            self.write(each, value)

    @rule(block=st.integers(0, 1), value=values)
    def write_block(self, block, value):
        self.write_run(block * BLOCK, BLOCK, value)

    @rule(page=pages)
    def read(self, page):
        self.note_touch(page)
        pending = self.lib.fake_pending()
        value = self.lib.guest_read(self.engine, page)
        assert value == self.model[page] or (value == MISSING and pending)

    @rule(page=pages, count=st.integers(1, 600))
    def pin(self, page, count):
        count = min(count, PAGES - page)
        if self.lib.pv_engine_pin(self.engine, page, count) == 0:
            self.pins.append((page, count))

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self):
        self.lib.pv_engine_unpin(self.engine, *self.pins.pop())

    @precondition(lambda self: not self.traced)
    @rule(block=blocks, limit=st.sampled_from([0, 1, 2, 5, 40]))
    def begin_sample(self, block, limit):
        """What is touched of it from now on must be seen; until somebody ends it, whoever that is."""
        if self.lib.pv_sample_begin(self.engine, block, limit) == 0:
            assert self.lib.fake_block_flags(self.engine, block) & SAMPLED
            self.samples[block] = set()

    @precondition(lambda self: self.samples)
    @rule(keep=st.integers(0, 1), data=st.data())
    def end_sample(self, keep, data):
        block, told = data.draw(st.sampled_from(sorted(self.samples))), ffi.new("struct pv_sample *")
        pending = self.lib.fake_pending()
        result = self.lib.pv_sample_end(self.engine, block, keep, told)
        assert result == 0 or (result < 0 and pending)
        assert not self.lib.fake_block_flags(self.engine, block) & SAMPLED
        seen = {i for i in range(BLOCK) if told.bits[i // 64] >> i % 64 & 1}
        assert len(seen) == told.touched
        assert seen <= self.samples[block]  # all of them, unless it was ended before
        assert seen == self.samples[block] or told.state != RUNNING
        del self.samples[block]

    def note_touch(self, page):
        if page // BLOCK in self.samples:
            self.samples[page // BLOCK].add(page % BLOCK)

    @precondition(lambda self: not self.traced)
    @rule(shift=st.sampled_from([12, 14, 21, 22, 30]), refine=st.integers(0, 2))
    def trace(self, shift, refine):
        if self.live:
            assert self.lib.pv_trace_start(self.engine, shift, refine) < 0
            return
        self.written.clear()
        self.traced = self.lib.pv_trace_start(self.engine, shift, refine) == 0
        ffi.memmove(self.bits, bytes(ffi.sizeof(self.bits)), ffi.sizeof(self.bits))

    @rule(block=blocks, on=st.sampled_from([1, 1, 0]))
    def share(self, block, on):
        self.lib.pv_engine_share(self.engine, block, on)

    @rule(page=pages, count=counts)
    def merge_equal(self, page, count):
        """The kernel merges pages of blocks that are shared; each has the content that it had."""
        self.lib.fake_merge(page, self.within(page, count))

    @precondition(lambda self: self.traced)
    @rule(late=st.none() | st.tuples(pages, values))
    def collect(self, late=None):
        """late: a page is merged, and then written, while its block is being collected: it may come the next time."""
        if late is not None:
            self.lib.fake_merge_later(*late)
        result = self.lib.pv_trace_collect(self.engine, self.bits)
        came = self.lib.fake_merged_later()
        if came:
            self.model[late[0]] = late[1]
        if came and result:
            self.written.add(late[0])
        if result == 0:
            missed = [page for page in self.written if not self.bits[page // 64] >> page % 64 & 1]
            assert missed == []
            self.written.clear()
            if came and not self.bits[late[0] // 64] >> late[0] % 64 & 1:
                self.written.add(late[0])
            ffi.memmove(self.bits, bytes(ffi.sizeof(self.bits)), ffi.sizeof(self.bits))

    @precondition(lambda self: self.traced)
    @rule()
    def stop_trace(self):
        self.lib.fake_clear()
        assert self.lib.pv_trace_stop(self.engine) == 0
        self.traced = False

    @precondition(lambda self: not self.live)
    @rule(python=st.integers(0, 1))
    def arm(self, python):
        """A live save begins: RAM is protected, as far as nobody works with it."""
        self.lib.fake_clear()
        result = self.lib.pv_live_begin(self.engine, ffi.NULL, 3, python)
        assert result == (-errno.EBUSY if self.traced else 0)
        self.live, self.python, self.instant, self.injected = not self.traced, python, None, False

    @precondition(lambda self: self.live and self.instant is None)
    @rule()
    def freeze(self):
        """The instant. The drain thread has the first block then, and waits."""
        result = self.lib.fake_freeze(self.engine, self.python)
        assert result == 0 or self.injected
        self.instant = list(self.model) if result == 0 else []

    @precondition(lambda self: self.live and self.instant is not None)
    @rule()
    def drain(self):
        """What was not saved by then is: all of it is as it was at the instant, or the save has failed."""
        told, found = ffi.new("struct pv_live_progress *"), ffi.new("uint64_t[]", PAGES)
        mode = self.lib.fake_drain(self.engine, told)
        assert mode == (LIVE_STOPPED if told.error else LIVE_DONE)
        assert not told.error or self.injected
        self.lib.fake_packed(self.engine, found)
        wrong = [(page, found[page], was) for page, was in enumerate(self.instant) if found[page] != was]
        assert mode == LIVE_STOPPED or wrong[:5] == []
        self.end_live()

    def end_live(self):
        self.lib.fake_clear()
        if self.instant is not None:
            self.lib.fake_drain(self.engine, ffi.new("struct pv_live_progress *"))
        self.lib.pv_live_end(self.engine, ffi.NULL, ffi.NULL)
        self.live, self.instant = False, None

    @invariant()
    def balanced(self):
        if not hasattr(self, "engine"):
            return
        text = ffi.new("char[300]")
        pins = sum((page + count - 1) // BLOCK - page // BLOCK + 1 for page, count in self.pins)
        assert not self.lib.fake_check(self.engine, int(self.traced or self.live), pins, text, 300), ffi.string(
            text
        ).decode()
        found = ffi.new("uint64_t[]", PAGES)
        self.lib.fake_values(self.engine, found)
        wrong = [(page, found[page], self.model[page]) for page in range(PAGES) if found[page] != self.model[page]]
        assert wrong[:5] == []


def test_no_failure_loses_a_byte(lib):
    from hypothesis.stateful import run_state_machine_as_test

    class Machine(Engine):
        pass

    Machine.lib = lib
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# Pages that the kernel merges.


def bits_of(lib, engine):
    bits = ffi.new("uint64_t[]", PAGES // 64 + 1)
    assert lib.pv_trace_collect(engine, bits) == 0
    return {page for page in range(PAGES) if bits[page // 64] >> page % 64 & 1}


@pytest.mark.parametrize("scans", [1, 0])
@pytest.mark.parametrize("shift", [12, 21, 30])
def test_a_trace_sees_a_write_to_a_page_that_was_merged(lib, engine, shift, scans):
    own = engine(small=1, scans=scans)
    fill(lib, own)
    assert lib.pv_trace_start(own, shift, 0) == 0
    assert lib.pv_engine_share(own, 0, 1) == 0
    bits_of(lib, own)
    lib.fake_merge(3, 2)
    assert lib.guest_write(own, 3, 9) == 0
    assert bits_of(lib, own) >= {3, 4}
    if scans:
        assert bits_of(lib, own) == set()  # protected again
    lib.fake_merge(5, 1)
    assert lib.pv_engine_share(own, 0, 0) == 0
    assert 5 in bits_of(lib, own)
    assert lib.pv_trace_stop(own) == 0


def test_a_page_that_is_merged_and_written_in_the_midst_of_a_look_is_found_the_next_time(lib, engine):
    own = engine(small=1)
    fill(lib, own)
    assert lib.pv_trace_start(own, 21, 0) == 0
    assert lib.pv_engine_share(own, 0, 1) == 0
    bits_of(lib, own)
    lib.fake_merge(4, 1)
    lib.fake_merge_later(7, 9)
    assert bits_of(lib, own) == {4}
    assert lib.fake_merged_later()
    assert bits_of(lib, own) == {7}
    assert lib.pv_trace_stop(own) == 0


def test_a_live_save_has_what_was_there_before_a_page_was_merged_and_written(lib, engine):
    own, told, found = engine(small=1), ffi.new("struct pv_live_progress *"), ffi.new("uint64_t[]", PAGES)
    fill(lib, own)
    assert lib.pv_engine_share(own, 1, 1) == -errno.EINVAL
    assert lib.pv_engine_break(own, 1) == 0
    assert lib.pv_engine_share(own, 1, 1) == 0
    assert lib.pv_live_begin(own, ffi.NULL, 3, 0) == 0
    assert lib.fake_freeze(own, 0) == 0
    lib.fake_merge(BLOCK, BLOCK)
    assert lib.guest_write(own, BLOCK + 300, 9) == 0
    assert lib.fake_drain(own, told) == LIVE_DONE
    lib.fake_packed(own, found)
    assert found[BLOCK + 300] == 7
    lib.pv_live_end(own, ffi.NULL, ffi.NULL)
    lib.fake_merge_later(BLOCK + 300, 8)  # it may be merged again
    assert lib.pv_trace_start(own, 12, 0) == 0
    bits_of(lib, own)
    assert lib.fake_merged_later()
    assert lib.pv_trace_stop(own) == 0


@pytest.mark.parametrize("how", [0, MOVE])
def test_merged_pages_go_away_and_come_back(lib, engine, how):
    own = engine(how, small=1)
    fill(lib, own)
    assert lib.pv_engine_share(own, 1, 1) == -errno.EINVAL  # a large page: to be broken first
    assert lib.pv_engine_share(own, 0, 1) == 0
    lib.fake_merge(0, BLOCK)
    assert lib.pv_engine_remove(own, 10, 5, 0) == 5
    lib.fake_merge(0, BLOCK)
    assert lib.pv_engine_remove(own, 0, BLOCK, 0) == BLOCK - 5
    assert {lib.guest_read(own, page) for page in range(BLOCK)} == {7}
    lib.fake_merge(0, BLOCK)
    assert lib.pv_engine_merge(own, 0) == 0
    assert balance(lib, own) == ""
    assert {lib.guest_read(own, page) for page in range(BLOCK)} == {7}


# What was found, step by step.


@pytest.fixture
def engine(lib):
    made = []

    def make(how=MOVE, small=0, scans=1):
        lib.fake_scans(scans)
        made.append(lib.fake_open(PAGES, small, how))
        return made[-1]

    yield make
    for each in made:
        lib.fake_close(each)


def balance(lib, engine, users=0):
    text = ffi.new("char[300]")
    lib.fake_check(engine, users, 0, text, 300)
    return ffi.string(text).decode()


def fill(lib, engine, value=7):
    for page in range(2 * BLOCK):
        assert lib.guest_write(engine, page, value) == 0


@pytest.mark.parametrize("how", [0, MOVE])
@pytest.mark.parametrize("scan", range(5))
def test_a_look_at_the_pagemap_that_fails_loses_nothing(lib, engine, how, scan):
    own = engine(how)
    fill(lib, own)
    lib.fake_inject(CALLS.index("scan"), scan, 0, errno.ENOMEM, 1)
    assert lib.pv_engine_remove(own, 0, BLOCK, 0) == BLOCK
    assert balance(lib, own) == ""
    assert {lib.guest_read(own, page) for page in range(BLOCK)} == {7}


@pytest.mark.parametrize("call", ["move", "copy", "fetch"])
@pytest.mark.parametrize("part", [0, 1, 100])
@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EBUSY, errno.ENOMEM])
@pytest.mark.parametrize("home", [ASIDE, SWAP])
@pytest.mark.parametrize("how", [0, MOVE, POISON, MOVE | POISON])
@pytest.mark.parametrize("small", [0, 1])
def test_an_installation_that_stops_halfway(lib, engine, call, part, error, home, how, small):
    own = engine(how, small)
    fill(lib, own)
    assert lib.pv_engine_remove(own, 0, BLOCK, 0) == BLOCK
    if home == SWAP:
        assert lib.pv_engine_store(own, 0, BLOCK, SWAP) == BLOCK
    lib.fake_inject(CALLS.index(call), 0, part, error, 1000)
    result = lib.pv_engine_install(own, 0, BLOCK)
    assert result in (0, -error)
    assert balance(lib, own) == ""
    lib.fake_clear()
    assert {lib.guest_read(own, page) for page in range(BLOCK)} == {7}
    assert lib.pv_engine_install(own, 0, PAGES) == 0
    assert balance(lib, own) == ""
    assert not lib.fake_armed()


@pytest.mark.parametrize("written", [0, 1])
def test_a_fault_whose_range_is_no_longer_registered_is_woken(lib, engine, written):
    """The kernel wakes who waits before it unregisters a range; a fault that comes in between would wait for ever."""
    own = engine(MOVE, 0)
    assert lib.pv_engine_remove(own, 0, 1, 0) == 1  # from here on there is a thread
    assert lib.pv_engine_install(own, 0, 1) == 0
    assert not lib.fake_armed()
    assert lib.fake_late_fault(own, 700, written)
    assert balance(lib, own) == ""


@pytest.mark.parametrize("call", ["fetch", "copy", "move"])
@pytest.mark.parametrize("skip", range(6))
@pytest.mark.parametrize("unit", range(4))
@pytest.mark.parametrize("small", [0, 1])
def test_a_unit_that_fails_leaves_nothing_wrong(lib, engine, call, skip, unit, small):
    """At each call of the answers to two touches; whatever has come by then, or comes later, is right."""
    own = engine(MOVE, small)
    model = [page % 10 for page in range(PAGES)]
    assert lib.fake_source(own, model, unit) == 0
    lib.fake_inject(CALLS.index(call), skip, 0, errno.EIO, 1000)
    for page in (5, 300):
        assert lib.guest_read(own, page) in (model[page], MISSING)
        found = ffi.new("uint64_t[]", PAGES)
        lib.fake_values(own, found)
        assert list(found) == model
        assert balance(lib, own) == ""
    lib.fake_clear()
    assert [lib.guest_read(own, page) for page in range(PAGES)] == model
    assert lib.pv_engine_install(own, 0, PAGES) == 0
    assert balance(lib, own) == ""
    assert not lib.fake_armed()


@pytest.mark.parametrize("how", [0, MOVE])
@pytest.mark.parametrize("small", [0, 1])
@pytest.mark.parametrize("python", [0, 1])
@pytest.mark.parametrize("change", ["write", "remove", "zeros", "install", "store", "pin", "merge", "break"])
def test_a_live_save_is_of_its_instant(lib, engine, how, small, python, change):
    """Whatever locks a block after it, the block was saved before; the first one by the drain thread."""
    own, told, found = engine(how, small), ffi.new("struct pv_live_progress *"), ffi.new("uint64_t[]", PAGES)
    fill(lib, own)
    assert lib.pv_engine_remove(own, BLOCK + 3, 40, 0) == 40
    assert lib.pv_engine_store(own, BLOCK + 10, 20, SWAP) == 20
    assert lib.pv_live_begin(own, ffi.NULL, 2, python) == 0
    assert lib.guest_write(own, BLOCK, 8) == 0  # before the instant
    assert lib.fake_freeze(own, python) == 0
    assert balance(lib, own, 1) == ""
    if change == "write":
        assert lib.guest_write(own, BLOCK + 5, 9) == 0
        assert lib.guest_write(own, 2 * BLOCK + 1, 9) == 0
    elif change in ("remove", "zeros"):
        assert lib.pv_engine_remove(own, BLOCK, BLOCK, int(change == "zeros")) >= 0
    elif change == "install":
        assert lib.pv_engine_install(own, 0, PAGES) == 0
    elif change == "store":
        assert lib.pv_engine_store(own, BLOCK, 8, SWAP) == 5
    elif change == "pin":
        assert lib.pv_engine_pin(own, BLOCK, 1) == 0
        lib.pv_engine_unpin(own, BLOCK, 1)
    elif change == "merge":
        assert lib.pv_engine_merge(own, 1) == 0
    else:
        assert lib.pv_engine_break(own, 1) == 0
    assert lib.guest_write(own, BLOCK + 500, 1) == 0
    assert balance(lib, own, 1) == ""
    assert lib.fake_drain(own, told) == LIVE_DONE
    assert (told.error, told.saved, told.blocks, told.waits) == (0, 3, 3, 0)
    assert told.copied >= 1
    lib.fake_packed(own, found)
    assert list(found) == [7] * BLOCK + [8] + [7] * (BLOCK - 1) + [0] * 5
    lib.pv_live_end(own, ffi.NULL, ffi.NULL)
    assert balance(lib, own) == ""


@pytest.mark.parametrize("call", ["protect", "scan", "fetch", "write", "register"])
@pytest.mark.parametrize("skip", range(4))
def test_a_live_save_that_fails_leaves_nothing_behind(lib, engine, call, skip):
    own, told = engine(), ffi.new("struct pv_live_progress *")
    fill(lib, own)
    assert lib.pv_engine_remove(own, BLOCK, BLOCK, 0) == BLOCK
    assert lib.pv_engine_store(own, BLOCK, 20, SWAP) == 20
    lib.fake_inject(CALLS.index(call), skip, 0, errno.EIO, 1)
    result = lib.pv_live_begin(own, ffi.NULL, 2, 0)
    if result == 0:
        result = lib.fake_freeze(own, 0)
        assert lib.guest_write(own, 1, 5) == 0
        mode = lib.fake_drain(own, told)
        assert mode == (LIVE_STOPPED if told.error else LIVE_DONE)
        assert told.error in (0, errno.EIO)
        assert told.error or lib.fake_pending() or call == "scan"  # pagemap is read where it cannot be scanned
        lib.pv_live_end(own, ffi.NULL, ffi.NULL)
        assert lib.guest_read(own, 1) == 5
    else:
        assert result == -errno.EIO
    lib.fake_clear()
    assert lib.pv_engine_install(own, 0, PAGES) == 0
    assert balance(lib, own) == ""
    assert not lib.fake_armed()
