/* sample.c: how active large blocks are (technique T8, US9501422B2, US9330015B2). A large page is moved aside whole, and
 * never taken apart there: a touch brings its page alone into the guest, as a small copy. So the pages that are PRESENT in
 * a SAMPLED block are those that have been touched. What lies aside of these is out of date, and the away count tells how
 * many they are without a look at them.
 *
 * At the end the touched pages are copied back, and the large page moves home in one step; or the block is given up as
 * cold: what was touched stays in the guest, the rest aside, for whoever has use for the memory.
 *
 * Nobody else knows of this state. Whoever locks such a block for anything but a touch finds it as it was before: that
 * is one line in block_lock(), as for a live save, which comes first. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>
#include <string.h>

static uint64_t first_page(uint64_t block) { return block * PV_BLOCK_PAGES; }

static bool is_sampled(const struct pv_engine *engine, uint64_t block)
{
    return block_word(engine, block) & PV_BLOCK_SAMPLED;
}

/* The touched pages go back into the large page. Writers wait from before they are copied until they are there again;
 * readers, until they are dropped, see what they would see anyway. All of the block is aside afterwards, as one large
 * page; or -errno, and nothing has changed. A trace lifts protection in units of its own: not in the meantime. */
static int take_back(struct pv_engine *engine, uint64_t block)
{
    uint64_t page = first_page(block);
    uint32_t touched = PV_BLOCK_PAGES - block_away(engine, block);
    if (!touched)
        return 0;
    int error = span_hold(engine, page, true);
    if (error)
        return error;
    trace_enter(engine);
    error = uffd_protect(engine, ram_at(engine, page), PV_BLOCK, true);
    for (uint32_t i = 0; !error && i < PV_BLOCK_PAGES; i++)
        if (page_home(engine, page + i) == PV_HOME_PRESENT)
            memcpy(aside_at(engine, page + i), ram_at(engine, page + i), PV_PAGE);
    if (!error && madvise(ram_at(engine, page), PV_BLOCK, MADV_DONTNEED))
        error = -errno;
    if (error)
        (void)!uffd_protect(engine, ram_at(engine, page), PV_BLOCK, false);
    trace_leave(engine, page, error ? PV_BLOCK_PAGES : 0);
    for (uint32_t i = 0; !error && i < PV_BLOCK_PAGES; i++)
        if (page_home(engine, page + i) == PV_HOME_PRESENT)
            page_set(engine, page + i, PV_HOME_ASIDE);
    if (!error)
        span_add(engine, page, touched);
    span_release(engine, page, 1, true);
    return error;
}

/* What is out of date aside goes, and with it the large page; where nothing was touched, that stays whole. */
static void give_up(struct pv_engine *engine, uint64_t block)
{
    uint64_t page = first_page(block);
    bool touched = block_away(engine, block) < PV_BLOCK_PAGES;
    for (uint32_t i = 0, run; i < PV_BLOCK_PAGES; i += run) {
        for (run = 0; i + run < PV_BLOCK_PAGES && page_home(engine, page + i + run) == PV_HOME_PRESENT; run++)
            ;
        if (run)
            (void)madvise(aside_at(engine, page + i), (size_t)run * PV_PAGE, MADV_DONTNEED);
        run += !run;
    }
    block_flags(engine, block, touched ? PV_BLOCK_BROKEN : PV_BLOCK_ASIDE_LARGE, PV_BLOCK_SAMPLED);
}

/* Ends a sample. keep: the block is a large page in the guest again. Where memory is so short that this does not work, it
 * is given up, or stays aside as a whole, and comes when it is touched. Answer of what came, or -errno. */
static int end_sample(struct pv_engine *engine, uint64_t block, uint32_t state, bool keep)
{
    struct sample *own = &engine->samples[block];
    uint64_t begin = pv_now();
    own->told.nanoseconds = begin - own->begun;
    count_up(&engine->sampling.aside, -(uint64_t)block_away(engine, block));
    __atomic_store_n(&own->told.state, state, __ATOMIC_RELAXED);
    int answer = keep ? take_back(engine, block) : 0;
    if (!keep || answer) {
        give_up(engine, block);
    } else {
        block_flags(engine, block, PV_BLOCK_ASIDE_LARGE, 0);
        answer = bring_block(engine, first_page(block));
        block_flags(engine, block, 0, PV_BLOCK_SAMPLED); /* only now: what comes is not noted as touched */
    }
    own->told.small = keep && answer != PV_ANSWER_BLOCK && answer != PV_ANSWER_COLLAPSED;
    count_up(&engine->sampling.ended, 1);
    count_up(&engine->sampling.active, state == PV_SAMPLE_ACTIVE);
    count_up(&engine->sampling.broken_off, state == PV_SAMPLE_BROKEN_OFF);
    count_up(&engine->sampling.moved_ns, pv_now() - begin);
    return answer;
}

void sample_before(struct pv_engine *engine, uint64_t block)
{
    if (is_sampled(engine, block))
        (void)!end_sample(engine, block, PV_SAMPLE_BROKEN_OFF, true);
}

/* Ends the sample that a touch is of; the page is in the guest then, if it can be. */
static int end_by_touch(struct pv_engine *engine, uint64_t page, uint32_t state)
{
    int answer = end_sample(engine, page / PV_BLOCK_PAGES, state, true);
    return page_home(engine, page) == PV_HOME_PRESENT ? answer < 0 ? PV_ANSWER_PAGES : answer : bring(engine, page, 1);
}

int bring_sampled(struct pv_engine *engine, uint64_t page)
{
    uint64_t block = page / PV_BLOCK_PAGES;
    uint32_t place = page % PV_BLOCK_PAGES;
    struct sample *own = &engine->samples[block];
    own->told.bits[place / 64] |= 1ull << place % 64;
    own->told.touched++;
    count_up(&engine->sampling.touches, 1);
    if (own->told.touched == own->limit)
        return end_by_touch(engine, page, PV_SAMPLE_ACTIVE);
    trace_enter(engine);
    int error = uffd_copy(engine, ram_at(engine, page), aside_at(engine, page), PV_PAGE, 0);
    trace_leave(engine, page, 1);
    if (error)
        return end_by_touch(engine, page, PV_SAMPLE_BROKEN_OFF);
    page_set(engine, page, PV_HOME_PRESENT);
    count_up(&engine->sampling.aside, -1ull);
    span_release(engine, page, 1, false);
    return PV_ANSWER_PAGES;
}

/* A large page, all of it in the guest, that nobody holds. Marks of a coarse trace are of whole blocks, and each sample
 * would set them: it would report what nobody has written. */
static int may_begin(struct pv_engine *engine, uint64_t block)
{
    struct populated seen;
    if (is_sampled(engine, block) || engine->samples[block].told.state != PV_SAMPLE_NONE)
        return -EALREADY;
    if (block_pins(engine, block) || engine->trace.on)
        return -EBUSY;
    if (block_away(engine, block) || !to_be_large(engine, block))
        return -ENXIO;
    int error = look_at(engine, ram_at(engine, first_page(block)), PV_BLOCK_PAGES, &seen);
    return error ? error : seen.large == PV_BLOCK_PAGES ? 0 : -ENXIO;
}

static int begin_locked(struct pv_engine *engine, uint64_t block, uint32_t limit)
{
    int error = may_begin(engine, block);
    if (error)
        return error;
    int gone = take_out(engine, first_page(block), PV_BLOCK_PAGES);
    if (gone < 0)
        return gone;
    if (!(block_word(engine, block) & PV_BLOCK_ASIDE_LARGE)) { /* the kernel uses a page of it, or has split it */
        int answer = bring(engine, first_page(block), PV_BLOCK_PAGES);
        return answer < 0 ? answer : -EBUSY;
    }
    engine->samples[block] = (struct sample){.begun = pv_now(), .limit = limit, .told.state = PV_SAMPLE_RUNNING};
    block_flags(engine, block, PV_BLOCK_SAMPLED, PV_BLOCK_ASIDE_LARGE);
    count_up(&engine->sampling.aside, PV_BLOCK_PAGES);
    return 0;
}

int pv_sample_begin(struct pv_engine *engine, uint64_t block, uint32_t limit)
{
    if (block >= engine->pages / PV_BLOCK_PAGES)
        return -EINVAL;
    if (!engine->scans)
        return -EOPNOTSUPP; /* a large page cannot be told from a small one */
    uint64_t begin = pv_now();
    int error = span_hold(engine, first_page(block), true); /* protection is needed at the end */
    if (error)
        return error;
    block_lock_as_is(engine, block);
    error = begin_locked(engine, block, limit);
    block_unlock(engine, block);
    span_release(engine, first_page(block), 1, true);
    count_up(&engine->sampling.begun, !error);
    count_up(&engine->sampling.moved_ns, pv_now() - begin);
    return error;
}

int pv_sample_look(struct pv_engine *engine, uint64_t block, struct pv_sample *out)
{
    if (block >= engine->blocks)
        return -EINVAL;
    block_lock_as_is(engine, block);
    *out = engine->samples[block].told;
    if (out->state == PV_SAMPLE_RUNNING)
        out->nanoseconds = pv_now() - engine->samples[block].begun;
    block_unlock(engine, block);
    return out->state == PV_SAMPLE_NONE ? -ENOENT : 0;
}

int pv_sample_state(const struct pv_engine *engine, uint64_t block)
{
    return block < engine->blocks ? (int)__atomic_load_n(&engine->samples[block].told.state, __ATOMIC_RELAXED) : -EINVAL;
}

int pv_sample_end(struct pv_engine *engine, uint64_t block, int keep, struct pv_sample *out)
{
    if (block >= engine->blocks)
        return -EINVAL;
    int answer = 0;
    block_lock_as_is(engine, block);
    if (is_sampled(engine, block))
        answer = end_sample(engine, block, PV_SAMPLE_RUNNING, keep);
    *out = engine->samples[block].told;
    __atomic_store_n(&engine->samples[block].told.state, PV_SAMPLE_NONE, __ATOMIC_RELAXED);
    block_unlock(engine, block);
    if (out->state == PV_SAMPLE_NONE)
        return -ENOENT;
    return answer < 0 ? answer : 0;
}

void pv_sample_counts(struct pv_engine *engine, struct pv_sample_counts *out)
{
    const uint64_t *from = (const uint64_t *)&engine->sampling;
    uint64_t *to = (uint64_t *)out;
    for (size_t i = 0; i < sizeof(*out) / sizeof(uint64_t); i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}
