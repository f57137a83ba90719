/* remove.c: how pages go away: out of the guest in one step while its vCPUs run, then to their home. */
#define _GNU_SOURCE
#include "engine_inside.h"
#include "zero.h"

#include <errno.h>
#include <string.h>

void count_op(struct pv_engine *engine, int op, uint64_t since, int result)
{
    struct pv_op_count *own = &engine->stats.ops[op];
    uint64_t spent = pv_now() - since;
    count_up(result < 0 ? &own->failed : &own->done, 1);
    count_up(&own->nanoseconds, spent);
    note_longest(&own->longest, spent);
}

/* ---- out of the guest, into the aside area ---- */

/* What was copied, but stays in the guest after all. */
static void drop_copies(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (page_home(engine, page + i) == PV_HOME_PRESENT)
            (void)madvise(aside_at(engine, page + i), PV_PAGE, MADV_DONTNEED);
}

/* Without UFFDIO_MOVE: protected, so that writers wait; copied; dropped. Readers see the pages until they are dropped.
 * A trace lifts protection in units of its own, of other blocks than the faulting one too: not in the meantime. */
static int copy_out(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    uint8_t *from = ram_at(engine, page);
    trace_enter(engine);
    int error = uffd_protect(engine, from, (uint64_t)count * PV_PAGE, true);
    struct populated seen; /* looked at once nobody can add to it */
    error = error ? error : look_at(engine, from, count, &seen);
    for (uint32_t i = 0; !error && i < count; i++)
        if (is_populated(&seen, i))
            memcpy(aside_at(engine, page + i), ram_at(engine, page + i), PV_PAGE);
    if (!error && madvise(from, (size_t)count * PV_PAGE, MADV_DONTNEED))
        error = -errno;
    if (error) {
        (void)!uffd_protect(engine, from, (uint64_t)count * PV_PAGE, false);
        drop_copies(engine, page, count);
    }
    trace_leave(engine, page, error ? count : 0);
    return error;
}

/* Run by run, past what is away already: its place in the aside area may be taken, and then not even a hole moves. */
static int move_out(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    for (uint32_t i = 0, run; i < count; i += run) {
        for (run = 1; i + run < count; run++)
            if ((page_home(engine, page + i + run) == PV_HOME_PRESENT) !=
                (page_home(engine, page + i) == PV_HOME_PRESENT))
                break;
        if (page_home(engine, page + i) != PV_HOME_PRESENT)
            continue;
        int error = uffd_move(engine, engine->aside_uffd, aside_at(engine, page + i), ram_at(engine, page + i),
                              (uint64_t)run * PV_PAGE);
        if (error)
            return error;
    }
    return 0;
}

int take_out(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    uint64_t block = page / PV_BLOCK_PAGES;
    bool whole = count == PV_BLOCK_PAGES && block_away(engine, block) == 0;
    if (whole) /* a page table left there would split a large page */
        (void)madvise(aside_at(engine, page), PV_BLOCK, MADV_DONTNEED);
    int error = share_suspend(engine, page, count);
    if (!error)
        error = engine->move ? move_out(engine, page, count) : copy_out(engine, page, count);
    share_go_on(engine, page, count);
    struct populated left, aside;
    int blind = look_at(engine, ram_at(engine, page), count, &left);
    blind = blind ? blind : look_at(engine, aside_at(engine, page), count, &aside);
    if (blind)
        return blind;
    uint32_t gone = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (is_populated(&left, i) || page_home(engine, page + i) != PV_HOME_PRESENT)
            continue;
        page_set(engine, page + i, is_populated(&aside, i) ? PV_HOME_ASIDE : PV_HOME_ZERO);
        gone++;
    }
    bool small = block_word(engine, block) & PV_BLOCK_SMALL;
    if (whole && aside.count == PV_BLOCK_PAGES && (engine->move ? aside.large == PV_BLOCK_PAGES : !small))
        block_flags(engine, block, PV_BLOCK_ASIDE_LARGE, 0);
    if (!whole && engine->move && gone) /* to move a small page out of a large one breaks that */
        block_flags(engine, block, PV_BLOCK_BROKEN, 0);
    span_add(engine, page, gone);
    return gone ? (int)gone : error;
}

/* Of pages just taken out: those that are zeros to ZERO, the others back; a large page as a whole or not at all. */
static int keep_zeros(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    bool large = block_word(engine, page / PV_BLOCK_PAGES) & PV_BLOCK_ASIDE_LARGE, zero[PV_BLOCK_PAGES];
    uint32_t zeros = 0;
    for (uint32_t i = 0; i < count; i++)
        zeros += zero[i] = page_home(engine, page + i) == PV_HOME_ASIDE && is_zero(aside_at(engine, page + i));
    if (large && zeros < count) {
        int answer = bring(engine, page, count);
        return answer < 0 ? answer : 0;
    }
    if (large) {
        (void)madvise(aside_at(engine, page), PV_BLOCK, MADV_DONTNEED);
        block_flags(engine, page / PV_BLOCK_PAGES, 0, PV_BLOCK_ASIDE_LARGE);
    }
    for (uint32_t i = 0; i < count; i++) {
        if (zero[i]) {
            if (!large)
                (void)madvise(aside_at(engine, page + i), PV_PAGE, MADV_DONTNEED);
            page_set(engine, page + i, PV_HOME_ZERO);
        } else if (page_home(engine, page + i) == PV_HOME_ASIDE) {
            int answer = bring_small(engine, page + i, 1); /* were all away, bring() would bring the zeros too */
            if (answer < 0)
                return answer;
        }
    }
    return 0;
}

/* Only what seems to be zeros is taken out, and looked at again there, where nobody can write to it. What is populated
 * can be read in the guest's mapping under the lock: nothing is missing. */
static int remove_zeros(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    struct populated seen;
    bool seems[PV_BLOCK_PAGES];
    uint32_t away = block_away(engine, page / PV_BLOCK_PAGES);
    int error = look_at(engine, ram_at(engine, page), count, &seen);
    if (error || (seen.large && count < PV_BLOCK_PAGES))
        return error; /* to take a part of a large page would break it */
    for (uint32_t i = 0; i < count; i++) {
        seems[i] = page_home(engine, page + i) == PV_HOME_PRESENT &&
                   (!is_populated(&seen, i) || is_zero(ram_at(engine, page + i)));
        if (seen.large && !seems[i])
            return 0;
    }
    for (uint32_t i = 0, run; !error && i < count; i += run) {
        for (run = 1; i + run < count && seems[i + run] == seems[i]; run++)
            ;
        if (!seems[i])
            continue;
        error = take_out(engine, page + i, run);
        error = error < 0 ? error : keep_zeros(engine, page + i, run);
    }
    return error < 0 ? error : (int)(block_away(engine, page / PV_BLOCK_PAGES) - away);
}

static int remove_locked(struct pv_engine *engine, uint64_t page, uint32_t count, int what)
{
    if (block_pins(engine, page / PV_BLOCK_PAGES))
        return -EBUSY;
    return what == PV_REMOVE_ZERO ? remove_zeros(engine, page, count) : take_out(engine, page, count);
}

static bool in_block(const struct pv_engine *engine, uint64_t page, uint64_t count)
{
    return count && page < engine->pages && count <= engine->pages - page &&
           page / PV_BLOCK_PAGES == (page + count - 1) / PV_BLOCK_PAGES;
}

int pv_engine_remove(struct pv_engine *engine, uint64_t page, uint32_t count, int what)
{
    if (!in_block(engine, page, count))
        return -EINVAL;
    uint64_t begin = pv_now();
    int result = span_hold(engine, page, !engine->move);
    if (!result) {
        block_lock(engine, page / PV_BLOCK_PAGES);
        result = remove_locked(engine, page, count, what);
        block_unlock(engine, page / PV_BLOCK_PAGES);
        span_release(engine, page, 1, !engine->move);
    }
    count_op(engine, PV_OP_REMOVE, begin, result);
    return result;
}

int pv_engine_remove_runs(struct pv_engine *engine, const struct pv_run_pages *runs, uint64_t count)
{
    int gone = 0;
    for (uint64_t i = 0; i < count; i++) {
        int result = runs[i].count > PV_BLOCK_PAGES
                         ? -EINVAL
                         : pv_engine_remove(engine, runs[i].first, (uint32_t)runs[i].count, PV_REMOVE_ASIDE);
        if (result < 0 && result != -EBUSY)
            return result;
        gone += result > 0 ? result : 0;
    }
    return gone;
}

int pv_engine_store(struct pv_engine *engine, uint64_t page, uint32_t count, uint32_t home)
{
    if (!in_block(engine, page, count) || home >= PV_HOMES || !engine->homes[home].store)
        return -EINVAL;
    uint64_t begin = pv_now(), locators[PV_BLOCK_PAGES];
    struct pv_home *to = &engine->homes[home];
    int stored = 0;
    block_lock(engine, page / PV_BLOCK_PAGES);
    for (uint32_t i = 0; i < count && stored >= 0;) {
        uint32_t run = 0;
        while (i + run < count && page_home(engine, page + i + run) == PV_HOME_ASIDE)
            run++;
        if (run == 0) {
            i++;
            continue;
        }
        int error = home_result(to->store(to->self, page + i, run, aside_at(engine, page + i), locators));
        if (error) {
            stored = error; /* what went before is in its new home, the rest is still aside */
            break;
        }
        block_flags(engine, page / PV_BLOCK_PAGES, 0, PV_BLOCK_ASIDE_LARGE);
        (void)madvise(aside_at(engine, page + i), (size_t)run * PV_PAGE, MADV_DONTNEED);
        for (uint32_t j = 0; j < run; j++)
            page_set(engine, page + i + j, locators[j] << PV_PAGE_LOCATOR_SHIFT | home);
        stored += (int)run;
        i += run;
    }
    block_unlock(engine, page / PV_BLOCK_PAGES);
    count_op(engine, PV_OP_STORE, begin, stored);
    return stored;
}

/* ---- back in, by whoever asks ---- */

static int install_range(struct pv_engine *engine, uint64_t page, uint64_t count, bool pin)
{
    if (page > engine->pages || count > engine->pages - page)
        return -EINVAL;
    uint64_t first = page;
    for (uint64_t end = page + count; page < end;) {
        uint64_t block = page / PV_BLOCK_PAGES, next = (block + 1) * PV_BLOCK_PAGES;
        uint32_t part = (uint32_t)((next < end ? next : end) - page);
        int answer = 0;
        block_lock(engine, block);
        if (block_away(engine, block))
            answer = bring(engine, page, part);
        if (answer >= 0 && pin)
            block_pin(engine, block, 1);
        block_unlock(engine, block);
        if (answer < 0) {
            if (pin)
                pv_engine_unpin(engine, first, block * PV_BLOCK_PAGES > first ? block * PV_BLOCK_PAGES - first : 0);
            return answer;
        }
        page += part;
    }
    return 0;
}

int pv_engine_install(struct pv_engine *engine, uint64_t page, uint64_t count)
{
    uint64_t begin = pv_now();
    int error = install_range(engine, page, count, false);
    count_op(engine, PV_OP_INSTALL, begin, error);
    return error;
}

int pv_engine_pin(struct pv_engine *engine, uint64_t page, uint64_t count)
{
    return install_range(engine, page, count, true);
}

void pv_engine_unpin(struct pv_engine *engine, uint64_t page, uint64_t count)
{
    if (!count)
        return;
    for (uint64_t block = page / PV_BLOCK_PAGES; block <= (page + count - 1) / PV_BLOCK_PAGES; block++)
        block_pin(engine, block, -1);
}

void pv_engine_unpin_runs(struct pv_engine *engine, const struct pv_run_pages *runs, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        pv_engine_unpin(engine, runs[i].first, runs[i].count);
}

int pv_engine_pin_runs(struct pv_engine *engine, const struct pv_run_pages *runs, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        int error = pv_engine_pin(engine, runs[i].first, runs[i].count);
        if (error) {
            pv_engine_unpin_runs(engine, runs, i);
            return error;
        }
    }
    return 0;
}
