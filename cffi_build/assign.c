/* assign.c: how pages that have not been in the guest get a home, or lose to one what they hold. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>

/* Takes the home from pages that have just got it, but for those that have come from there already. */
static void unassign(struct pv_engine *engine, uint64_t page, uint64_t end, uint32_t home)
{
    for (; page < end; page++) {
        block_lock(engine, page / PV_BLOCK_PAGES);
        bool away = page_home(engine, page) == home;
        if (away)
            page_set(engine, page, PV_HOME_PRESENT);
        block_unlock(engine, page / PV_BLOCK_PAGES);
        if (away)
            span_release(engine, page, 1, false);
    }
}

int pv_engine_assign(struct pv_engine *engine, uint64_t page, uint64_t count, uint32_t home, uint64_t locator)
{
    if (page > engine->pages || count > engine->pages - page || home == PV_HOME_PRESENT || home == PV_HOME_ASIDE ||
        home >= PV_HOMES)
        return -EINVAL;
    uint64_t first = page;
    for (uint64_t end = page + count; page < end;) {
        uint64_t block = page / PV_BLOCK_PAGES, next = (block + 1) * PV_BLOCK_PAGES;
        uint32_t part = (uint32_t)((next < end ? next : end) - page);
        struct populated seen;
        int error = span_hold(engine, page, false);
        if (error)
            return error;
        block_lock(engine, block);
        error = look_at(engine, ram_at(engine, page), part, &seen);
        error = error ? error : seen.count || block_away(engine, block) + part > PV_BLOCK_PAGES ? -EEXIST : 0;
        for (uint32_t i = 0; !error && i < part; i++)
            error = page_home(engine, page + i) == PV_HOME_PRESENT ? 0 : -EEXIST;
        for (uint32_t i = 0; !error && i < part; i++)
            page_set(engine, page + i, (locator + i) << PV_PAGE_LOCATOR_SHIFT | home);
        if (!error)
            span_add(engine, page, part);
        block_unlock(engine, block);
        span_release(engine, page, 1, false);
        if (error) {
            unassign(engine, first, page, home);
            return error;
        }
        page += part;
        locator += part;
    }
    return 0;
}

/* Of pages just taken out: the copies go, since the home has what they hold. All of them are away now, or -EBUSY. */
static int give_to(struct pv_engine *engine, uint64_t page, uint32_t count, uint32_t home)
{
    bool copies = false;
    for (uint32_t i = 0; i < count; i++) {
        if (page_home(engine, page + i) == PV_HOME_PRESENT)
            return -EBUSY;
        copies |= page_home(engine, page + i) == PV_HOME_ASIDE;
    }
    /* in one go: page by page the kernel would take a large page apart */
    if (copies && madvise(aside_at(engine, page), (size_t)count * PV_PAGE, MADV_DONTNEED))
        return -errno;
    for (uint32_t i = 0; i < count; i++)
        page_set(engine, page + i, (page + i) << PV_PAGE_LOCATOR_SHIFT | home);
    return 0;
}

/* The next run of a block's pages whose bits are set: from *at on, which ends behind it; 0: there is none. */
static uint32_t next_run(const uint64_t *bits, uint64_t first, uint32_t count, uint32_t *at)
{
    uint32_t run = 0;
    for (; *at < count; ++*at) {
        bool set = bits[(first + *at) / 64] >> (first + *at) % 64 & 1;
        if (!set && run)
            break;
        run += set;
    }
    return run;
}

static int assign_part(struct pv_engine *engine, uint64_t first, uint32_t count, uint32_t home, const uint64_t *bits,
                       const uint64_t *large)
{
    uint64_t block = first / PV_BLOCK_PAGES;
    uint32_t stale = 0, at = 0, run;
    struct populated seen;
    while ((run = next_run(bits, first, count, &at)))
        stale += run;
    if (block_away(engine, block))
        return -EEXIST;
    if (block_pins(engine, block))
        return -EBUSY;
    int error = look_at(engine, ram_at(engine, first), count, &seen);
    if (error)
        return error;
    if (large && !(large[block / 64] >> block % 64 & 1) && seen.count + stale < SPARSE)
        block_flags(engine, block, PV_BLOCK_SMALL | PV_BLOCK_BROKEN, 0);
    bool whole = to_be_large(engine, block);
    error = whole ? take_out(engine, first, count) : 0;
    for (at = 0; error >= 0 && (run = next_run(bits, first, count, &at));) {
        error = whole ? 0 : take_out(engine, first + at - run, run);
        error = error < 0 ? error : give_to(engine, first + at - run, run, home);
    }
    /* TOUCHED: there is little to fetch, and all else of the block waits for it */
    block_flags(engine, block, PV_BLOCK_UNITS | (whole ? PV_BLOCK_TOUCHED : 0), PV_BLOCK_ASIDE_LARGE);
    return error < 0 ? error : 0;
}

int pv_engine_assign_bits(struct pv_engine *engine, uint32_t home, const uint64_t *bits, const uint64_t *large)
{
    if (home <= PV_HOME_ASIDE || home >= PV_HOMES)
        return -EINVAL;
    for (uint64_t block = 0; block < engine->blocks; block++) {
        uint64_t first = block * PV_BLOCK_PAGES;
        uint32_t count = pages_of_block(engine, block), at = 0;
        if (!next_run(bits, first, count, &at))
            continue;
        int error = span_hold(engine, first, !engine->move);
        if (error)
            return error;
        block_lock(engine, block);
        error = assign_part(engine, first, count, home, bits, large);
        block_unlock(engine, block);
        span_release(engine, first, 1, !engine->move);
        if (error)
            return error;
    }
    return 0;
}
