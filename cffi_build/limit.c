/* limit.c: how much of RAM may take memory of the host. What is counted are words: a page that is PRESENT or ASIDE takes
 * a page of memory, in every other home it takes none. So that this is true, pages that nobody has touched are ZERO while
 * there is a limit. Who reclaims is woken before the limit is reached; a fault that would go beyond it waits for that. */
#define _GNU_SOURCE
#include "engine_inside.h"
#include "clock.h"

#include <stdlib.h>
#include <string.h>

#define PATIENCE_NS SECOND_NS /* a fault waits so long: then its page comes, whatever the limit is */

uint64_t pv_limit_resident(const struct pv_engine *engine)
{
    uint64_t resident = engine->pages;
    for (uint32_t home = PV_HOME_ZERO; home < PV_HOMES; home++) {
        if (home == PV_HOME_ASIDE)
            continue;
        uint64_t away = atomic_load_explicit(&engine->home_counts[home], memory_order_relaxed);
        resident -= away < resident ? away : resident;
    }
    return resident;
}

/* ---- what the engine says ---- */

void limit_init(struct limit *limit)
{
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&limit->mutex, NULL);
    pthread_cond_init(&limit->above, &clock);
    pthread_cond_init(&limit->below, &clock);
    pthread_condattr_destroy(&clock);
    limit->most = limit->wake = UINT64_MAX;
}

void limit_deinit(struct limit *limit)
{
    pthread_mutex_destroy(&limit->mutex);
    pthread_cond_destroy(&limit->above);
    pthread_cond_destroy(&limit->below);
    free(limit->whole_at);
    free(limit->dense_at);
}

static uint64_t load(const uint64_t *value) { return __atomic_load_n(value, __ATOMIC_RELAXED); }

void limit_grown(struct pv_engine *engine)
{
    struct limit *limit = &engine->limit;
    if (load(&limit->wake) == UINT64_MAX || pv_limit_resident(engine) <= load(&limit->wake))
        return;
    pthread_mutex_lock(&limit->mutex);
    pthread_cond_signal(&limit->above);
    pthread_mutex_unlock(&limit->mutex);
}

void limit_shrunk(struct pv_engine *engine)
{
    struct limit *limit = &engine->limit;
    count_up(&limit->clock, 1);
    if (load(&limit->most) == UINT64_MAX)
        return;
    /* Pairs with the fence in limit_wait(): of what was counted before each, at least one side sees the other's. */
    atomic_thread_fence(memory_order_seq_cst);
    if (!__atomic_load_n(&limit->waiting, __ATOMIC_RELAXED))
        return;
    pthread_mutex_lock(&limit->mutex);
    pthread_cond_broadcast(&limit->below);
    pthread_mutex_unlock(&limit->mutex);
}

static bool has_room(const struct pv_engine *engine, uint32_t wanted)
{
    uint64_t most = load(&engine->limit.most);
    return most == UINT64_MAX || pv_limit_resident(engine) + wanted <= most;
}

void limit_wait(struct pv_engine *engine, uint64_t page)
{
    struct limit *limit = &engine->limit;
    if (load(&limit->most) == UINT64_MAX)
        return;
    uint64_t block = page / PV_BLOCK_PAGES;
    uint32_t wanted = to_be_large(engine, block) && block_away(engine, block) == PV_BLOCK_PAGES ? PV_BLOCK_PAGES : 1;
    if (has_room(engine, wanted))
        return;
    uint64_t begin = pv_now();
    struct timespec until = time_after(PATIENCE_NS);
    bool waited = false, late = false;
    pthread_mutex_lock(&limit->mutex);
    __atomic_fetch_add(&limit->waiting, 1, __ATOMIC_RELAXED);
    atomic_thread_fence(memory_order_seq_cst);
    while (!late && !limit->ending && !limit->stuck && !has_room(engine, wanted)) {
        pthread_cond_signal(&limit->above);
        waited = true;
        late = pthread_cond_timedwait(&limit->below, &limit->mutex, &until) == ETIMEDOUT;
    }
    __atomic_fetch_sub(&limit->waiting, 1, __ATOMIC_RELAXED);
    if (waited) {
        uint64_t spent = pv_now() - begin;
        limit->told.waits++;
        limit->told.overruns += late;
        limit->told.nanoseconds += spent;
        limit->told.longest = spent > limit->told.longest ? spent : limit->told.longest;
    }
    pthread_mutex_unlock(&limit->mutex);
}

/* ---- whole blocks: large pages are worth it where the guest uses most of them ---- */

/* Time is told in turns: in one, as many pages leave memory as may be resident. */
#define BELIEVED 16     /* turns for which a block that was dense counts as such */
#define FEW 16u
#define DENSE 64u      /* a block of which few pages were here, and within a quarter of a turn so many: it is dense */

static bool within(const struct limit *limit, uint64_t since, uint64_t quarters)
{
    return since && load(&limit->clock) - (since - 1) <= load(&limit->most) / 4 * quarters;
}

void limit_came_whole(struct pv_engine *engine, uint64_t block)
{
    struct limit *limit = &engine->limit;
    bool sampled = block_word(engine, block) & PV_BLOCK_SAMPLED; /* it was there all the time */
    if (load(&limit->most) != UINT64_MAX && !sampled)
        limit->whole_at[block] = load(&limit->clock) + 1;
}

/* It comes in pieces, until it shows that it is dense: a guest that uses a page each of many blocks would else bring and
 * take 512 pages for each touch, over and over. */
void limit_gone_whole(struct pv_engine *engine, uint64_t block)
{
    struct limit *limit = &engine->limit;
    if (load(&limit->most) == UINT64_MAX || within(limit, limit->dense_at[block], 4 * BELIEVED))
        return;
    block_flags(engine, block, PV_BLOCK_PIECES, 0);
}

bool limit_is_dense(struct pv_engine *engine, uint64_t block)
{
    struct limit *limit = &engine->limit;
    uint32_t here = PV_BLOCK_PAGES - block_away(engine, block);
    if (load(&limit->most) == UINT64_MAX)
        return block_word(engine, block) & PV_BLOCK_PIECES && here >= DENSE; /* from when there was one */
    if (here < FEW)
        limit->whole_at[block] = load(&limit->clock) + 1;
    if (here < DENSE || !within(limit, limit->whole_at[block], 1))
        return false;
    limit->dense_at[block] = load(&limit->clock) + 1;
    return true;
}

/* ---- what who reclaims says ---- */

static int begin_block(struct pv_engine *engine, uint64_t block)
{
    uint64_t first = block * PV_BLOCK_PAGES;
    uint32_t count = pages_of_block(engine, block), found = 0;
    struct populated seen;
    int error = span_hold(engine, first, false);
    if (error)
        return error;
    block_lock(engine, block);
    if (!block_pins(engine, block)) { /* else somebody may be about to touch what is not there yet */
        error = look_at(engine, ram_at(engine, first), count, &seen);
        for (uint32_t i = 0; !error && i < count; i++)
            if (!is_populated(&seen, i) && page_home(engine, first + i) == PV_HOME_PRESENT) {
                page_set(engine, first + i, PV_HOME_ZERO);
                found++;
            }
        span_add(engine, first, found);
    }
    block_unlock(engine, block);
    span_release(engine, first, 1, false);
    return error;
}

int pv_limit_begin(struct pv_engine *engine)
{
    struct limit *limit = &engine->limit;
    if (!limit->whole_at) { /* nobody looks at them before pv_limit_set */
        limit->whole_at = calloc(engine->blocks, sizeof(uint64_t));
        limit->dense_at = calloc(engine->blocks, sizeof(uint64_t));
        if (!limit->whole_at || !limit->dense_at)
            return -ENOMEM;
    }
    int error = span_hold_all(engine, false); /* else each block of a span would register and unregister it */
    if (error)
        return error;
    for (uint64_t block = 0; !error && block < engine->blocks; block++)
        error = begin_block(engine, block);
    span_release_all(engine, false);
    return error;
}

void pv_limit_set(struct pv_engine *engine, uint64_t most, uint64_t wake)
{
    struct limit *limit = &engine->limit;
    pthread_mutex_lock(&limit->mutex);
    __atomic_store_n(&limit->most, most, __ATOMIC_RELAXED);
    __atomic_store_n(&limit->wake, wake, __ATOMIC_RELAXED);
    limit->stuck = false;
    pthread_cond_broadcast(&limit->above);
    pthread_cond_broadcast(&limit->below);
    pthread_mutex_unlock(&limit->mutex);
}

void pv_limit_stuck(struct pv_engine *engine, int stuck)
{
    pthread_mutex_lock(&engine->limit.mutex);
    engine->limit.stuck = stuck;
    pthread_cond_broadcast(&engine->limit.below);
    pthread_mutex_unlock(&engine->limit.mutex);
}

int pv_limit_wait(struct pv_engine *engine, uint32_t milliseconds)
{
    struct limit *limit = &engine->limit;
    struct timespec until = time_after(milliseconds * MILLISECOND_NS);
    pthread_mutex_lock(&limit->mutex);
    while (!limit->ending && pv_limit_resident(engine) <= load(&limit->wake) &&
           pthread_cond_timedwait(&limit->above, &limit->mutex, &until) != ETIMEDOUT)
        ;
    int above = !limit->ending && pv_limit_resident(engine) > load(&limit->wake);
    pthread_mutex_unlock(&limit->mutex);
    return above;
}

void pv_limit_end(struct pv_engine *engine)
{
    pthread_mutex_lock(&engine->limit.mutex);
    engine->limit.ending = true;
    pthread_cond_broadcast(&engine->limit.above);
    pthread_cond_broadcast(&engine->limit.below);
    pthread_mutex_unlock(&engine->limit.mutex);
}

void pv_limit_look(struct pv_engine *engine, struct pv_limit_told *out)
{
    pthread_mutex_lock(&engine->limit.mutex);
    *out = engine->limit.told;
    pthread_mutex_unlock(&engine->limit.mutex);
}
