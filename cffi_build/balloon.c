/* balloon.c: pages that the guest gives up leave memory at once, without a copy: home BALLOON. A touch brings zeros. A
 * block of which the guest has given up a part comes back by small pages: what it gave up must not come with the rest. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>
#include <sched.h>

#define PINNED_NS 2000000ull /* until a pin is one that stays: whoever reads a page holds it for microseconds */

static uint32_t ballooned_in(const struct pv_engine *engine, uint64_t block)
{
    uint32_t found = 0, count = pages_of_block(engine, block);
    for (uint32_t i = 0; i < count; i++)
        found += page_home(engine, block * PV_BLOCK_PAGES + i) == PV_HOME_BALLOON;
    return found;
}

void balloon_settle(struct pv_engine *engine, uint64_t block)
{
    uint32_t found = ballooned_in(engine, block), flags = (uint32_t)block_word(engine, block);
    bool ours = flags & PV_BLOCK_BALLOONED;
    if (found && found < pages_of_block(engine, block)) {
        if (!(flags & PV_BLOCK_SMALL))
            block_flags(engine, block, PV_BLOCK_SMALL | PV_BLOCK_BALLOONED, 0);
        return;
    }
    if (ours) {
        block_flags(engine, block, 0, PV_BLOCK_SMALL | PV_BLOCK_BALLOONED);
        if (found == PV_BLOCK_PAGES) /* nothing is there, but a page table may be: the kernel frees it (since 6.14) */
            (void)madvise(ram_at(engine, block * PV_BLOCK_PAGES), PV_BLOCK, MADV_DONTNEED);
    }
    if (found || !block_away(engine, block))
        block_flags(engine, block, 0, PV_BLOCK_UNITS | PV_BLOCK_TOUCHED | PV_BLOCK_ASIDE_LARGE);
    if (found) /* nothing is left of it: it comes anew, as a large page if it may */
        block_flags(engine, block, 0, PV_BLOCK_PIECES | (ours || !(flags & PV_BLOCK_SMALL) ? PV_BLOCK_BROKEN : 0));
}

bool balloon_keeps(const struct pv_engine *engine, uint64_t block)
{
    return atomic_load_explicit(&engine->home_counts[PV_HOME_BALLOON], memory_order_relaxed) &&
           block_away(engine, block) && ballooned_in(engine, block);
}

/* ---- out ---- */

/* A part of a large page would stay allocated until the kernel is short of memory: the kernel breaks it when one page
 * is moved out. Where that does not work, memory is freed later. */
static int break_for(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    uint64_t block = page / PV_BLOCK_PAGES, first = block * PV_BLOCK_PAGES;
    struct populated seen;
    if (count == PV_BLOCK_PAGES)
        return 0;
    if (block_word(engine, block) & PV_BLOCK_ASIDE_LARGE) {
        int answer = bring(engine, first, pages_of_block(engine, block));
        if (answer < 0)
            return answer;
    }
    if (!engine->move || look_at(engine, ram_at(engine, first), pages_of_block(engine, block), &seen))
        return 0;
    bool split = (block_word(engine, block) & (PV_BLOCK_SMALL | PV_BLOCK_BROKEN)) == PV_BLOCK_SMALL;
    for (uint32_t i = 0; (seen.large || split) && i < count; i++)
        if (is_populated(&seen, (uint32_t)(page - first) + i)) {
            (void)!take_out(engine, page + i, 1);
            break;
        }
    return 0;
}

/* Pages that share a home: none keeps their bytes any more. For a trace they are written: they are zeros now. */
static int drop_alike(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    uint32_t number = page_home(engine, page);
    const struct pv_home *home = &engine->homes[number];
    bool failed = false;
    if (number == PV_HOME_PRESENT && madvise(ram_at(engine, page), (size_t)count * PV_PAGE, MADV_DONTNEED))
        return -errno;
    trace_enter(engine);
    trace_leave(engine, page, count);
    if (number == PV_HOME_ASIDE)
        (void)madvise(aside_at(engine, page), (size_t)count * PV_PAGE, MADV_DONTNEED);
    else if (number != PV_HOME_PRESENT && home->forget)
        home->forget(home->self, page, count, &engine->page_words[page]);
    for (uint32_t i = 0; i < count; i++) {
        failed |= (engine->page_words[page + i] & PV_PAGE_FAILED) != 0;
        page_set(engine, page + i, PV_HOME_BALLOON);
    }
    if (number == PV_HOME_PRESENT)
        span_add(engine, page, count);
    if (failed) /* who waited for what could not come touches it again: zeros come */
        uffd_wake(engine, ram_at(engine, page), (uint64_t)count * PV_PAGE);
    return 0;
}

static void drop(struct pv_engine *engine, uint64_t page, uint32_t count, struct pv_balloon_told *told)
{
    if (break_for(engine, page, count)) {
        told->stayed += count;
        return;
    }
    for (uint32_t i = 0, run; i < count; i += run) {
        uint32_t home = page_home(engine, page + i);
        for (run = 1; i + run < count && page_home(engine, page + i + run) == home; run++)
            ;
        if (home == PV_HOME_BALLOON)
            continue;
        if (drop_alike(engine, page + i, run)) {
            told->stayed += run;
            continue;
        }
        told->gone += run;
    }
    told->blocks += count == PV_BLOCK_PAGES;
}

/* ---- and back: nothing comes before it is touched. Where what is resident is counted, it is counted then ---- */

static void release(struct pv_engine *engine, uint64_t page, uint32_t count, struct pv_balloon_told *told)
{
    bool counted = engine->limit.whole_at; /* set for good before the first limit looks at any block */
    uint32_t found = 0;
    for (uint32_t i = 0; i < count; i++)
        if (page_home(engine, page + i) == PV_HOME_BALLOON) {
            page_set(engine, page + i, counted ? PV_HOME_ZERO : PV_HOME_PRESENT);
            found++;
        }
    told->back += found;
    if (found && !counted)
        span_release(engine, page, found, false);
}

/* ---- what is asked for ---- */

/* The block's lock, when nobody uses its pages; else false, and it is not held. */
static bool lock_unpinned(struct pv_engine *engine, uint64_t block)
{
    uint64_t begin = pv_now();
    for (;;) {
        block_lock(engine, block);
        if (!block_pins(engine, block))
            return true;
        block_unlock(engine, block);
        if (pv_now() - begin > PINNED_NS)
            return false;
        sched_yield();
    }
}

static int change(struct pv_engine *engine, uint64_t page, uint32_t count, int how, struct pv_balloon_told *told)
{
    uint64_t block = page / PV_BLOCK_PAGES, begin = pv_now();
    int error = span_hold(engine, page, false);
    if (error)
        return error;
    bool held = true;
    if (how == PV_BALLOON_DEFLATE)
        block_lock(engine, block);
    else
        held = lock_unpinned(engine, block);
    if (held) {
        if (how != PV_BALLOON_DEFLATE) {
            drop(engine, page, count, told);
            balloon_settle(engine, block);
        }
        if (how != PV_BALLOON_INFLATE) {
            release(engine, page, count, told);
            balloon_settle(engine, block);
        }
        block_unlock(engine, block);
    } else {
        told->stayed += count;
    }
    span_release(engine, page, 1, false);
    if (how != PV_BALLOON_DEFLATE)
        count_op(engine, PV_OP_REMOVE, begin, held ? 0 : -EBUSY);
    return 0;
}

int pv_balloon(struct pv_engine *engine, const struct pv_run_pages *runs, uint64_t count, int how,
               struct pv_balloon_told *told)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t page = runs[i].first, end = page + runs[i].count;
        if (page > engine->pages || runs[i].count > engine->pages - page)
            return -EINVAL;
        for (uint64_t next; page < end; page = next) {
            next = (page / PV_BLOCK_PAGES + 1) * PV_BLOCK_PAGES;
            next = next < end ? next : end;
            int error = change(engine, page, (uint32_t)(next - page), how, told);
            if (error)
                return error;
        }
    }
    return 0;
}
