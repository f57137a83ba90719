/* blocks.c: how a block is split (its mapping made small, the physical large page whole), broken (that given up too)
 * and merged (one large page again), while vCPUs run. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>

/* Makes the mapping small. A mapping's attributes can differ by small pages, so one that changes in the middle of a
 * large page splits the mapping of it; and khugepaged is told to leave the block alone. */
static int split_locked(struct pv_engine *engine, uint64_t block)
{
    uint8_t *start = ram_at(engine, block * PV_BLOCK_PAGES);
    if (madvise(start + PV_PAGE, PV_BLOCK - PV_PAGE, MADV_NOHUGEPAGE) || madvise(start, PV_BLOCK, MADV_NOHUGEPAGE))
        return -errno;
    block_flags(engine, block, PV_BLOCK_SMALL, PV_BLOCK_BALLOONED);
    return 0;
}

static bool whole_block(const struct pv_engine *engine, uint64_t block)
{
    return block < engine->pages / PV_BLOCK_PAGES;
}

int pv_engine_split(struct pv_engine *engine, uint64_t block)
{
    if (!whole_block(engine, block))
        return -EINVAL;
    uint64_t begin = pv_now();
    block_lock(engine, block);
    int error = split_locked(engine, block);
    block_unlock(engine, block);
    count_op(engine, PV_OP_SPLIT, begin, error);
    return error;
}

/* To move one small page out of a large page, the kernel must break that. */
static int break_by_move(struct pv_engine *engine, uint64_t page)
{
    struct populated seen;
    int error = look_at(engine, ram_at(engine, page), PV_BLOCK_PAGES, &seen);
    if (error || !seen.count)
        return error;
    while (!is_populated(&seen, page % PV_BLOCK_PAGES))
        page++;
    int gone = take_out(engine, page, 1);
    int answer = gone > 0 ? bring(engine, page, 1) : gone;
    return answer < 0 ? answer : 0;
}

/* Without UFFDIO_MOVE: out by copying, back by copying, but not what was away before. */
static int break_by_copy(struct pv_engine *engine, uint64_t page)
{
    struct populated seen;
    int error = look_at(engine, ram_at(engine, page), PV_BLOCK_PAGES, &seen);
    if (error || !seen.count)
        return error;
    bool was_away[PV_BLOCK_PAGES];
    for (uint32_t i = 0; i < PV_BLOCK_PAGES; i++)
        was_away[i] = page_home(engine, page + i) != PV_HOME_PRESENT;
    int answer = take_out(engine, page, PV_BLOCK_PAGES);
    for (uint32_t i = 0; answer >= 0 && i < PV_BLOCK_PAGES; i++)
        answer = was_away[i] ? 0 : bring(engine, page + i, 1);
    return answer < 0 ? answer : 0;
}

int pv_engine_break(struct pv_engine *engine, uint64_t block)
{
    if (!whole_block(engine, block))
        return -EINVAL;
    uint64_t page = block * PV_BLOCK_PAGES, begin = pv_now();
    int error = span_hold(engine, page, !engine->move);
    if (!error) {
        block_lock(engine, block);
        error = block_pins(engine, block) ? -EBUSY : split_locked(engine, block);
        if (!error)
            error = engine->move ? break_by_move(engine, page) : break_by_copy(engine, page);
        if (!error)
            block_flags(engine, block, PV_BLOCK_BROKEN, 0);
        block_unlock(engine, block);
        span_release(engine, page, 1, !engine->move);
    }
    count_op(engine, PV_OP_BREAK, begin, error);
    return error;
}

/* MADV_COLLAPSE takes a mapping that userfaultfd watches only if no page of it is missing, write-protected or the shared
 * zero page, to which the kernel turns pages of zeros when it breaks a large page (since 6.12). */
static int complete(struct pv_engine *engine, uint64_t page)
{
    struct populated seen;
    int answer = block_away(engine, page / PV_BLOCK_PAGES) ? bring(engine, page, PV_BLOCK_PAGES) : 0;
    int error = answer < 0 ? answer : look_at(engine, ram_at(engine, page), PV_BLOCK_PAGES, &seen);
    for (uint32_t i = 0; !error && seen.count && i < PV_BLOCK_PAGES; i++)
        if (!is_populated(&seen, i)) {
            answer = bring_untouched(engine, page + i, true);
            error = answer < 0 ? answer : 0;
        }
    return error;
}

static int collapse(struct pv_engine *engine, uint64_t page)
{
    struct populated seen;
    int error = collapse_small(ram_at(engine, page));
    if (error)
        return error;
    error = look_at(engine, ram_at(engine, page), PV_BLOCK_PAGES, &seen);
    return error ? error : !engine->scans || seen.large == PV_BLOCK_PAGES ? 0 : -EAGAIN;
}

/* The zero page is replaced by a write fault, a trace's protection is lifted, and no other comes meanwhile. */
static int collapse_complete(struct pv_engine *engine, uint64_t page)
{
    trace_enter(engine);
    bool watched = engine->trace.on || live_on(engine); /* a live save has freed the block, unless that failed */
    int error = watched ? uffd_protect(engine, ram_at(engine, page), PV_BLOCK, false) : 0;
    if (!error) {
        (void)madvise(ram_at(engine, page), PV_BLOCK, MADV_POPULATE_WRITE); /* if it fails, so does what follows */
        error = collapse(engine, page);
    }
    trace_leave(engine, page, PV_BLOCK_PAGES);
    return error;
}

static int make_large(struct pv_engine *engine, uint64_t page)
{
    struct populated seen;
    int error = complete(engine, page); /* of a block that is wholly away: comes as a large page */
    error = error ? error : look_at(engine, ram_at(engine, page), PV_BLOCK_PAGES, &seen);
    if (error || seen.count == 0 || seen.large == PV_BLOCK_PAGES)
        return error; /* never touched: it costs nothing, and comes as one large page */
    return collapse_complete(engine, page);
}

static int merge_locked(struct pv_engine *engine, uint64_t block)
{
    uint8_t *start = ram_at(engine, block * PV_BLOCK_PAGES);
    struct populated seen;
    bool shared = block_mergeable(engine, block);
    int unshared = share_end(engine, block);
    if (unshared)
        return unshared;
    if (madvise(start, PV_BLOCK, MADV_HUGEPAGE))
        return -errno;
    int error = look_at(engine, start, PV_BLOCK_PAGES, &seen);
    const uint32_t all = PV_BLOCK_SMALL | PV_BLOCK_BROKEN | PV_BLOCK_BALLOONED;
    uint32_t flags = (uint32_t)block_word(engine, block) & all;
    block_flags(engine, block, 0, all);
    if (!error && (seen.large < PV_BLOCK_PAGES || !engine->scans))
        error = make_large(engine, block * PV_BLOCK_PAGES);
    if (error) {
        block_flags(engine, block, flags, 0);
        if (flags & PV_BLOCK_SMALL)
            (void)madvise(start, PV_BLOCK, MADV_NOHUGEPAGE);
        if (shared)
            (void)!share_begin(engine, block);
    }
    return error;
}

int pv_engine_merge(struct pv_engine *engine, uint64_t block)
{
    if (!whole_block(engine, block))
        return -EINVAL;
    uint64_t begin = pv_now();
    int error = 0;
    bool held = pv_engine_equipped(engine); /* else nothing is away, watched or protected */
    if (held)
        error = span_hold(engine, block * PV_BLOCK_PAGES, false);
    if (!error) {
        block_lock(engine, block);
        error = merge_locked(engine, block);
        block_unlock(engine, block);
        if (held)
            span_release(engine, block * PV_BLOCK_PAGES, 1, false);
    }
    count_op(engine, PV_OP_MERGE, begin, error);
    return error;
}
