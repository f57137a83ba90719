/* unit.c: how much comes together with a page: the unit in which its home keeps it, or the whole block (technique T3,
 * US9053065B2: the storage block of a checkpoint file). All under the block's lock, unless it says otherwise. */
#include "engine_inside.h"

#include <errno.h>
#include <sched.h>

#define RECORD_PAGES 64u   /* touches of a block that are recorded one by one */
#define PREFETCH_LARGE 128 /* wanted pages of a block from which on all of it is brought */

/* Those pages of a unit that are in `block`, and still where the unit has them; wanted: NULL, or a bit a page. */
static int put_unit(struct pv_engine *engine, const struct pv_unit *unit, const uint8_t *bytes, uint64_t block,
                    const uint64_t *wanted)
{
    for (uint32_t i = 0, run; i < unit->count; i += run) {
        for (run = 0; i + run < unit->count; run++) {
            uint64_t page = unit->pages[i + run];
            if (page != unit->pages[i] + run || page / PV_BLOCK_PAGES != block || page >= engine->pages ||
                (engine->page_words[page] & ~PV_PAGE_FAILED) != unit->words[i + run] ||
                (wanted && !(wanted[page / 64] >> page % 64 & 1)))
                break;
        }
        int error = run ? put_pages(engine, unit->pages[i], run, bytes + (size_t)i * PV_PAGE) : 0;
        if (error)
            return error;
        run += run == 0;
    }
    return 0;
}

static bool gathers(const struct pv_engine *engine, uint64_t page)
{
    return engine->homes[page_home(engine, page)].gather;
}

static int gather(struct pv_engine *engine, uint64_t page, struct pv_unit *unit)
{
    const struct pv_home *home = &engine->homes[page_home(engine, page)];
    unit->count = 0;
    if (!home->gather)
        return 0;
    return home_result(home->gather(home->self, page, engine->page_words[page] & ~PV_PAGE_FAILED, unit));
}

/* After an error the unit is empty: what has been read is not to be believed, by whoever goes on with `others`. */
static int read_unit(struct pv_engine *engine, uint64_t page, struct others *others)
{
    const struct pv_home *home = &engine->homes[page_home(engine, page)];
    int error = home_result(home->read(home->self, &others->unit, &others->bytes));
    if (error)
        others->unit.count = 0;
    others->block = page / PV_BLOCK_PAGES;
    return error;
}

static uint32_t place_in(const struct pv_unit *unit, uint64_t page)
{
    uint32_t i = 0;
    while (i < unit->count && unit->pages[i] != page)
        i++;
    return i;
}

/* The page first, since a vCPU may wait for it, then what is kept with it in this block. */
static int bring_unit(struct pv_engine *engine, uint64_t page, struct others *others, const uint64_t *wanted)
{
    const struct pv_unit *unit = &others->unit;
    int error = read_unit(engine, page, others);
    if (error)
        return error;
    uint32_t i = place_in(unit, page);
    if (i == unit->count)
        return -EUCLEAN;
    error = put_pages(engine, page, 1, others->bytes + (size_t)i * PV_PAGE);
    error = error ? error : put_unit(engine, unit, others->bytes, others->block, wanted);
    return error ? error : PV_ANSWER_UNIT;
}

/* One page that is away; `others` is empty afterwards, or has what is kept with it in other blocks. */
static int bring_one(struct pv_engine *engine, uint64_t page, struct others *others, const uint64_t *wanted)
{
    int error = gather(engine, page, &others->unit);
    if (error)
        return error;
    return others->unit.count ? bring_unit(engine, page, others, wanted) : bring_small(engine, page, 1);
}

/* Not under any block's lock. What goes wrong here will be said when the page is touched. */
static void bring_others_wanted(struct pv_engine *engine, const struct others *others, const uint64_t *wanted)
{
    uint64_t before = others->block;
    for (uint32_t i = 0; i < others->unit.count; i++) {
        uint64_t block = others->unit.pages[i] / PV_BLOCK_PAGES;
        if (block == before || block == others->block || block >= engine->blocks)
            continue;
        before = block;
        block_lock(engine, block);
        (void)!put_unit(engine, &others->unit, others->bytes, block, wanted);
        block_unlock(engine, block);
    }
}

void bring_others(struct pv_engine *engine, const struct others *others) { bring_others_wanted(engine, others, NULL); }

int bring_units(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    struct others others;
    int answer = PV_ANSWER_PAGES;
    for (uint64_t end = page + count; page < end;) {
        uint32_t run = 0;
        while (page + run < end && !gathers(engine, page + run))
            run++;
        int part = run ? bring_small(engine, page, run) : bring_one(engine, page, &others, NULL);
        answer = part < 0 && answer >= 0 ? part : answer; /* on to the others: what can come, does */
        page += part < 0 || !run ? 1 : run;
    }
    return answer;
}

int bring_whole(struct pv_engine *engine, uint64_t page)
{
    uint64_t block = page / PV_BLOCK_PAGES, first = block * PV_BLOCK_PAGES;
    uint32_t count = pages_of_block(engine, block);
    if (to_be_large(engine, block) && block_away(engine, block) < PV_BLOCK_PAGES && !block_pins(engine, block)) {
        int error = span_hold(engine, first, !engine->move);
        if (error)
            return error;
        (void)!take_out(engine, first, PV_BLOCK_PAGES); /* where a page stays, the kernel uses it: no large page then */
        span_release(engine, first, 1, !engine->move);
    }
    if (!to_be_large(engine, block) || block_away(engine, block) < PV_BLOCK_PAGES)
        return bring_units(engine, first, count);
    int answer = bring_block(engine, first);
    if (answer < 0)
        return bring_units(engine, first, count);
    if (answer == PV_ANSWER_BLOCK || answer == PV_ANSWER_COLLAPSED)
        block_flags(engine, block, 0, PV_BLOCK_BROKEN);
    return answer;
}

static uint32_t pages_here(const struct pv_unit *unit, uint64_t block)
{
    uint32_t here = 0;
    for (uint32_t i = 0; i < unit->count; i++)
        here += unit->pages[i] / PV_BLOCK_PAGES == block;
    return here;
}

/* What fails elsewhere in the block is for those who touch it. */
static int bring_around(struct pv_engine *engine, uint64_t page)
{
    int answer = bring_whole(engine, page);
    return answer < 0 && page_home(engine, page) == PV_HOME_PRESENT ? PV_ANSWER_PAGES : answer;
}

int bring_touched(struct pv_engine *engine, uint64_t page, struct others *others)
{
    uint64_t block = page / PV_BLOCK_PAGES;
    uint32_t flags = (uint32_t)block_word(engine, block);
    bool paced = engine->homes[gathers(engine, page) ? page_home(engine, page) : PV_HOME_SWAP].paced; /* zeros: as the rest */
    bool large = to_be_large(engine, block), adaptive = engine->unit == PV_UNIT_ADAPTIVE && !engine->record;
    others->unit.count = 0;
    __atomic_store_n(&engine->touched, block, __ATOMIC_RELAXED);
    if (!(flags & PV_BLOCK_UNITS))
        return bring(engine, page, 1);
    block_flags(engine, block, PV_BLOCK_TOUCHED, 0);
    if (engine->record && pages_of_block(engine, block) - block_away(engine, block) < RECORD_PAGES)
        return bring_small(engine, page, 1);
    if (engine->record || engine->unit == PV_UNIT_LARGE || (adaptive && large && !paced && flags & PV_BLOCK_TOUCHED))
        return bring_around(engine, page);
    if (large && paced && limit_is_dense(engine, block)) {
        block_flags(engine, block, 0, PV_BLOCK_PIECES);
        return bring_around(engine, page);
    }
    if (engine->unit == PV_UNIT_PAGE)
        return bring_small(engine, page, 1);
    int error = gather(engine, page, &others->unit);
    if (error)
        return error;
    if (!others->unit.count)
        return bring_small(engine, page, 1);
    if (adaptive && large && 2 * pages_here(&others->unit, block) >= PV_BLOCK_PAGES) {
        others->unit.count = 0;
        return bring_around(engine, page);
    }
    return bring_unit(engine, page, others, NULL);
}

/* ---- ahead of touches ---- */

static uint32_t wanted_in(const struct pv_engine *engine, uint64_t block, const uint64_t *wanted)
{
    uint32_t found = 0, words = (pages_of_block(engine, block) + 63) / 64;
    for (uint64_t i = 0; i < words; i++)
        found += (uint32_t)__builtin_popcountll(wanted[block * (PV_BLOCK_PAGES / 64) + i]);
    return found;
}

/* Faults that wait come first: each of their threads may need this CPU. Not for ever: guests that always wait for something
 * must not keep us from the rest. */
static void let_pass(struct pv_engine *engine)
{
    for (int tries = 0; tries < 1000 && __atomic_load_n(&engine->waiting, __ATOMIC_RELAXED); tries++)
        sched_yield();
}

int pv_engine_prefetch(struct pv_engine *engine, const uint64_t *pages, uint64_t count, const uint64_t *wanted)
{
    struct others others;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t page = pages[i], block = page / PV_BLOCK_PAGES;
        int answer = 0;
        if (page >= engine->pages)
            return -EINVAL;
        others.unit.count = 0;
        let_pass(engine);
        block_lock(engine, block);
        if (page_home(engine, page) != PV_HOME_PRESENT)
            answer = to_be_large(engine, block) && wanted_in(engine, block, wanted) >= PREFETCH_LARGE
                         ? bring_whole(engine, page)
                         : bring_one(engine, page, &others, wanted);
        block_unlock(engine, block);
        if (answer < 0)
            return answer;
        bring_others_wanted(engine, &others, wanted);
    }
    return 0;
}

/* What is away of a part of a block, but for what the guest has given up. */
static int bring_rest(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    int answer = 0;
    if (!balloon_keeps(engine, page / PV_BLOCK_PAGES))
        return bring(engine, page, count);
    for (uint32_t i = 0, run; answer >= 0 && i < count; i += run) {
        bool given = page_home(engine, page + i) == PV_HOME_BALLOON;
        for (run = 1; i + run < count && (page_home(engine, page + i + run) == PV_HOME_BALLOON) == given; run++)
            ;
        answer = given ? 0 : bring_units(engine, page + i, run);
    }
    return answer;
}

/* Has what cannot be brought told as if it had been touched: the VM is paused, and pv_engine_retry clears it. */
static int fill_block(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    uint64_t block = page / PV_BLOCK_PAGES;
    block_lock(engine, block);
    int answer = block_away(engine, block) ? bring_rest(engine, page, count) : 0;
    while (answer < 0 && count &&
           (page_home(engine, page) == PV_HOME_PRESENT || page_home(engine, page) == PV_HOME_BALLOON)) {
        page++;
        count--;
    }
    if (answer < 0 && count && !(engine->page_words[page] & PV_PAGE_FAILED))
        fail(engine, page, -answer);
    block_unlock(engine, block);
    return answer;
}

int pv_engine_fill(struct pv_engine *engine, uint64_t page, uint64_t count)
{
    int error = 0;
    for (uint64_t end = page + count; page < end;) {
        uint64_t next = (page / PV_BLOCK_PAGES + 1) * PV_BLOCK_PAGES, stop = next < end ? next : end;
        let_pass(engine);
        int answer = fill_block(engine, page, (uint32_t)(stop - page));
        error = answer < 0 && !error ? answer : error;
        page = stop;
    }
    return error;
}

/* ---- what has come, in order ---- */

void note_recorded(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    bool sampled = block_word(engine, page / PV_BLOCK_PAGES) & PV_BLOCK_SAMPLED; /* was there before */
    for (uint32_t i = 0; i < count; i++) {
        uint32_t home = page_home(engine, page + i);
        if (home == PV_HOME_PRESENT || sampled || (count == PV_BLOCK_PAGES && home == PV_HOME_ZERO))
            continue;
        uint64_t at = __atomic_fetch_add(&engine->recorded, 1, __ATOMIC_RELAXED);
        if (at < engine->record_room)
            engine->record[at] = page + i;
    }
}

void pv_engine_record(struct pv_engine *engine, uint64_t *pages, uint64_t room)
{
    engine->record_room = room;
    engine->record = pages;
}

uint64_t pv_engine_recorded(struct pv_engine *engine)
{
    uint64_t count = __atomic_load_n(&engine->recorded, __ATOMIC_RELAXED);
    return count < engine->record_room ? count : engine->record_room;
}

uint64_t pv_engine_touched(struct pv_engine *engine) { return __atomic_load_n(&engine->touched, __ATOMIC_RELAXED); }

void pv_engine_unit(struct pv_engine *engine, uint32_t unit) { engine->unit = unit; }
