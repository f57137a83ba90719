/* live_block.c: a live save's view of one block: what it holds, its copy before it changes (live.c says how all works). */
#define _GNU_SOURCE
#include "live_inside.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

uint32_t live_mode(const struct live *live) { return __atomic_load_n(&live->mode, __ATOMIC_ACQUIRE); }

/* Under the mutex. */
void live_set_mode(struct live *live, uint32_t mode)
{
    /* release: who sees it under a block's lock sees the arrays */
    __atomic_store_n(&live->mode, mode, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&live->room);
    pthread_cond_broadcast(&live->work);
    pthread_cond_broadcast(&live->ended);
}

/* Nothing more is saved: the first cause is the one that is told. */
void live_stop(struct live *live, int error, uint32_t cause, uint64_t page, uint32_t home)
{
    pthread_mutex_lock(&live->mutex);
    if (live->mode == PV_LIVE_ARMING || live->mode == PV_LIVE_SAVING) {
        live->told.error = -error;
        live->told.cause = cause;
        live->told.page = page;
        live->told.home = home;
        live_set_mode(live, PV_LIVE_STOPPED);
    }
    pthread_mutex_unlock(&live->mutex);
}

/* ---- one block, under its lock ---- */

uint8_t live_state(const struct live *live, uint64_t block)
{
    return __atomic_load_n(&live->states[block], __ATOMIC_RELAXED);
}

void live_set_state(struct live *live, uint64_t block, uint8_t state)
{
    __atomic_store_n(&live->states[block], state, __ATOMIC_RELAXED);
}

/* Which pages hold something: those that are populated, and those in a home that is not zeros. Makes nothing resident. */
int live_see(struct pv_engine *engine, uint64_t block, struct live_copy *out, uint32_t *count)
{
    struct populated seen;
    int error = look_held(engine, block * PV_BLOCK_PAGES, pages_of_block(engine, block), &seen);
    if (error)
        return error;
    out->block = block;
    memcpy(out->held, seen.bits, sizeof(out->held));
    *count = seen.count;
    bool comes_large = block_away(engine, block) && *count && !(block_word(engine, block) & PV_BLOCK_SMALL);
    engine->live.large[block] = seen.large || comes_large;
    return 0;
}

/* What is populated can be read in the guest's mapping: only the lock's holder could take it away. */
int live_read(struct pv_engine *engine, struct live_copy *copy)
{
    uint64_t first = copy->block * PV_BLOCK_PAGES;
    uint32_t pages = pages_of_block(engine, copy->block);
    for (uint32_t i = 0, run; i < pages; i += run) {
        uint32_t home = page_home(engine, first + i);
        for (run = 1; i + run < pages && copy_has(copy, i + run) == copy_has(copy, i); run++)
            if (page_home(engine, first + i + run) != home)
                break;
        if (!copy_has(copy, i))
            continue;
        uint8_t *to = copy->bytes + (size_t)i * PV_PAGE;
        if (home == PV_HOME_PRESENT) {
            memcpy(to, ram_at(engine, first + i), (size_t)run * PV_PAGE);
            continue;
        }
        int error = fetch(engine, first + i, run, to);
        if (error) {
            live_stop(&engine->live, error, PV_LIVE_FETCH, first + i, home);
            return error;
        }
    }
    return 0;
}

static int protect_range(struct pv_engine *engine, uint64_t first, uint64_t end, bool on)
{
    uint64_t page = first * PV_BLOCK_PAGES, last = end * PV_BLOCK_PAGES;
    last = last < engine->pages ? last : engine->pages;
    return uffd_protect(engine, ram_at(engine, page), (last - page) * PV_PAGE, on);
}

int live_protect(struct pv_engine *engine, uint64_t first, uint64_t end, bool on)
{
    uint64_t page = first * PV_BLOCK_PAGES;
    int error = protect_range(engine, first, end, on);
    if (error == -ENOENT && end - first > 1) /* a kernel before 6.3 takes one mapping at a time; a block is in one */
        for (error = 0; !error && first < end; first++)
            error = protect_range(engine, first, first + 1, on);
    if (error && !on)
        engine->live.stuck = true;
    if (error)
        live_stop(&engine->live, error, PV_LIVE_PROTECT, page, PV_HOME_PRESENT);
    return error;
}

void live_note_saved(struct live *live, struct live_copy *copy, uint64_t block, bool before)
{
    pthread_mutex_lock(&live->mutex);
    live_set_state(live, block, SAVED);
    live->told.saved++;
    live->moves++;
    if (copy) {
        copy->next = NULL;
        *live->last = copy;
        live->last = &copy->next;
        live->told.copied += before;
    }
    pthread_cond_signal(&live->work);
    pthread_mutex_unlock(&live->mutex);
}

static struct live_copy *take_copy(struct live *live)
{
    pthread_mutex_lock(&live->mutex);
    live->told.waits += !live->free && live->mode == PV_LIVE_SAVING;
    while (!live->free && live->mode == PV_LIVE_SAVING)
        pthread_cond_wait(&live->room, &live->mutex);
    struct live_copy *copy = live->mode == PV_LIVE_SAVING ? live->free : NULL;
    if (copy)
        live->free = copy->next;
    pthread_mutex_unlock(&live->mutex);
    return copy;
}

void live_give(struct live *live, struct live_copy *copy)
{
    if (copy->extra) {
        (void)!pv_unmap(copy->bytes, PV_BLOCK);
        free(copy);
        return;
    }
    pthread_mutex_lock(&live->mutex);
    copy->next = live->free;
    live->free = copy;
    pthread_cond_signal(&live->room);
    pthread_mutex_unlock(&live->mutex);
}

/* The block is as it was at the instant, and is about to be changed. */
static void save_before(struct pv_engine *engine, uint64_t block)
{
    struct live *live = &engine->live;
    struct live_copy seen;
    uint32_t count;
    int error = live_see(engine, block, &seen, &count);
    if (error) {
        live_stop(live, error, PV_LIVE_LOOK, block * PV_BLOCK_PAGES, PV_HOME_PRESENT);
    } else if (!count) {
        live_note_saved(live, NULL, block, true);
    } else {
        struct live_copy *copy = take_copy(live);
        if (!copy)
            return; /* stopped meanwhile */
        copy->block = block;
        memcpy(copy->held, seen.held, sizeof(copy->held));
        if (live_read(engine, copy))
            live_give(live, copy);
        else
            live_note_saved(live, copy, block, true);
    }
}

void live_before(struct pv_engine *engine, uint64_t block)
{
    struct live *live = &engine->live;
    uint32_t mode = live_mode(live);
    if (mode == PV_LIVE_OFF)
        return;
    uint8_t before = live_state(live, block);
    if (before == SAVED)
        return;
    if (mode == PV_LIVE_SAVING)
        save_before(engine, block);
    /* Whatever is done under the lock now finds no protection: there is no trace. */
    if (before == ARMED)
        (void)!live_protect(engine, block, block + 1, false);
    if (live_state(live, block) != SAVED)
        live_set_state(live, block, OPEN);
}

bool live_on(const struct pv_engine *engine) { return live_mode(&engine->live) != PV_LIVE_OFF; }
