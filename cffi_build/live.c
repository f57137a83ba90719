/* live.c: all RAM as it was at one instant, into a snapshot, while the guest runs on and writes.
 *
 * Each block is saved once: by the drain thread, which goes through RAM and writes the file, or by whoever locks the
 * block first. All that can change what a block holds or where its pages are comes through block_lock() (pagemap.c): a
 * write, by the fault of its write protection; a touch of a page that is not there; and every operation of the engine.
 * So block_lock() calls live_before(), and copy-before-write needs no other place. The copy goes into one of a few
 * buffers, which the drain thread empties before it goes on; where there is none left, the writer waits for the disk.
 *
 *   OFF -> ARMING: blocks are protected while the guest runs; who locks one frees it again and leaves it OPEN
 *       -> SAVING: the instant. Under the locks of all blocks, the OPEN ones are protected
 *       -> DONE: every block is saved; or STOPPED: cancelled, or something failed, and nobody copies any more -> OFF
 *
 * At the instant all locks are held, so that a host thread which writes through a view cannot have one write in the
 * snapshot and an earlier one not. Nobody holds two blocks' locks but here, in ascending order.
 *
 * No thread here needs the GIL but to fetch from a home that is in Python. While there is one, whoever writes to a view
 * of guest memory, with the GIL, must not wait for a fault: so pinned blocks are never protected then, but copied at the
 * instant itself. */
#define _GNU_SOURCE
#include "live_inside.h"
#include "clock.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define STRIDE 16 /* blocks protected in one call while the guest runs: what a fault may have to wait for */

bool live_claimed(struct pv_engine *engine)
{
    pthread_mutex_lock(&engine->live.mutex);
    bool claimed = engine->live.claimed;
    pthread_mutex_unlock(&engine->live.mutex);
    return claimed;
}

void live_init(struct live *live)
{
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&live->mutex, NULL);
    pthread_cond_init(&live->room, NULL);
    pthread_cond_init(&live->work, NULL);
    pthread_cond_init(&live->ended, &clock);
    pthread_condattr_destroy(&clock);
}

void live_deinit(struct live *live)
{
    pthread_mutex_destroy(&live->mutex);
    pthread_cond_destroy(&live->room);
    pthread_cond_destroy(&live->work);
    pthread_cond_destroy(&live->ended);
}

static void give_all(struct live *live)
{
    for (struct live_copy *copy = live->first, *next; copy; copy = next) {
        next = copy->next;
        if (copy->extra)
            live_give(live, copy);
    }
    if (live->pool)
        (void)!pv_unmap(live->pool, (live->buffers + 1) * (size_t)PV_BLOCK);
    free(live->copies);
    free(live->states);
    free(live->large);
    live->pool = NULL;
    live->copies = live->own = live->free = live->first = NULL;
    live->states = live->large = NULL;
}

static int take_all(struct pv_engine *engine, uint32_t buffers)
{
    struct live *live = &engine->live;
    void *pool = NULL;
    live->buffers = buffers;
    live->copies = calloc(buffers + 1, sizeof(struct live_copy));
    live->states = calloc(engine->blocks, 1);
    live->large = calloc(engine->blocks, 1);
    int error = live->copies && live->states && live->large ? 0 : -ENOMEM;
    error = error ? error : pv_map((buffers + 1) * (size_t)PV_BLOCK, PV_BACKING_THP, &pool);
    live->pool = pool;
    if (error)
        return error;
    /* Now, not when a vCPU waits for it. Advice: a kernel before 5.14 has them populated then. */
    (void)madvise(pool, (buffers + 1) * (size_t)PV_BLOCK, MADV_POPULATE_WRITE);
    for (uint32_t i = 0; i <= buffers; i++) {
        live->copies[i].bytes = live->pool + i * (size_t)PV_BLOCK;
        live->copies[i].next = i + 1 < buffers ? &live->copies[i + 1] : NULL;
    }
    live->own = &live->copies[buffers];
    live->free = live->copies;
    live->last = &live->first;
    live->cursor = live->moves = 0;
    live->stuck = false;
    return 0;
}

/* One session at a time, and none while a trace uses the same protection (nor the other way: coarse.c). */
static int claim(struct pv_engine *engine, struct pv_pack *pack)
{
    struct live *live = &engine->live;
    pthread_mutex_lock(&engine->trace.mutex);
    pthread_mutex_lock(&live->mutex);
    int error = live->closing ? -ECANCELED : engine->trace.on ? -EBUSY : live->claimed ? -EALREADY : 0;
    if (!error) {
        live->claimed = true;
        live->pack = pack;
        live->told = (struct pv_live_progress){.blocks = engine->blocks};
    }
    pthread_mutex_unlock(&live->mutex);
    pthread_mutex_unlock(&engine->trace.mutex);
    return error;
}

/* Protects what it can without waiting. pinned: also blocks that are pinned. The others stay OPEN until the instant. */
static int arm(struct pv_engine *engine, bool pinned)
{
    struct live *live = &engine->live;
    for (uint64_t first = 0, end; first < engine->blocks; first = end) {
        uint64_t begin = first, limit = first + STRIDE < engine->blocks ? first + STRIDE : engine->blocks;
        for (end = first; end < limit; end++) {
            if (!block_trylock_plain(engine, end))
                break;
            if (!pinned && block_pins(engine, end)) {
                block_unlock(engine, end);
                break;
            }
            live_set_state(live, end, ARMED);
        }
        int error = end > begin ? live_protect(engine, begin, end, true) : 0;
        for (uint64_t block = begin; block < end; block++)
            block_unlock(engine, block);
        if (error)
            return error;
        end += end < limit;
    }
    return 0;
}

int pv_live_begin(struct pv_engine *engine, struct pv_pack *pack, uint32_t buffers, int python_homes)
{
    struct live *live = &engine->live;
    if (!buffers)
        return -EINVAL;
    int error = claim(engine, pack);
    if (error)
        return error;
    error = take_all(engine, buffers);
    error = error ? error : span_hold_all(engine, true);
    if (error) {
        give_all(live);
        pthread_mutex_lock(&live->mutex);
        live->claimed = false;
        pthread_mutex_unlock(&live->mutex);
        return error;
    }
    pthread_mutex_lock(&live->mutex);
    live_set_mode(live, live->closing ? PV_LIVE_STOPPED : PV_LIVE_ARMING);
    if (live->closing)
        live->told.error = ECANCELED;
    pthread_mutex_unlock(&live->mutex);
    error = live_start_drain(engine);
    error = error ? error : share_suspend_all(engine); /* a page that is merged loses its protection */
    error = error ? error : arm(engine, !python_homes);
    if (error) {
        live_stop(live, error, PV_LIVE_PROTECT, 0, PV_HOME_PRESENT);
        pv_live_end(engine, NULL, NULL);
    }
    return error;
}

/* Does all of a block come without Python? */
static bool comes_alone(struct pv_engine *engine, uint64_t block)
{
    block_find(engine, block);
    for (uint32_t i = 0; block_away(engine, block) && i < pages_of_block(engine, block); i++)
        if (page_home(engine, block * PV_BLOCK_PAGES + i) > PV_HOME_ASIDE)
            return false;
    return true;
}

/* A block that must not be protected: into memory of its own. */
static int save_now(struct pv_engine *engine, uint64_t block)
{
    struct live *live = &engine->live;
    struct live_copy *copy = calloc(1, sizeof(*copy));
    void *bytes = NULL;
    uint32_t count = 0;
    int error = copy ? pv_map(PV_BLOCK, PV_BACKING_THP, &bytes) : -ENOMEM;
    if (!error) {
        copy->bytes = bytes;
        copy->extra = true;
        error = live_see(engine, block, copy, &count);
    }
    error = error ? error : live_read(engine, copy);
    if (!error)
        live_note_saved(live, copy, block, true);
    else if (bytes)
        live_give(live, copy);
    else
        free(copy);
    if (error)
        live_stop(live, error, PV_LIVE_LOOK, block * PV_BLOCK_PAGES, PV_HOME_PRESENT);
    return error;
}

static int freeze(struct pv_engine *engine, bool python_homes)
{
    struct live *live = &engine->live;
    int error = 0;
    for (uint64_t block = 0; !error && python_homes && block < engine->blocks; block++)
        if (block_pins(engine, block) && live_state(live, block) == OPEN && comes_alone(engine, block))
            error = save_now(engine, block);
    for (uint64_t first = 0, end; !error && first < engine->blocks; first = end) {
        for (end = first; end < engine->blocks && live_state(live, end) == OPEN; end++)
            live_set_state(live, end, ARMED);
        error = end > first ? live_protect(engine, first, end, true) : 0;
        end += end == first;
    }
    return error;
}

int pv_live_freeze(struct pv_engine *engine, int python_homes)
{
    struct live *live = &engine->live;
    for (uint64_t block = 0; block < engine->blocks; block++)
        block_lock_plain(engine, block);
    int error = live_mode(live) == PV_LIVE_ARMING ? freeze(engine, python_homes) : -ECANCELED;
    pthread_mutex_lock(&live->mutex);
    if (!error && live->mode == PV_LIVE_ARMING)
        live_set_mode(live, PV_LIVE_SAVING);
    pthread_mutex_unlock(&live->mutex);
    for (uint64_t block = 0; block < engine->blocks; block++)
        block_unlock(engine, block);
    pthread_mutex_lock(&live->mutex);
    live->moves++; /* the drain thread may have found these locks taken */
    pthread_cond_signal(&live->work);
    pthread_mutex_unlock(&live->mutex);
    return error;
}

int pv_live_wait(struct pv_engine *engine, uint32_t milliseconds, struct pv_live_progress *out)
{
    struct live *live = &engine->live;
    struct timespec until = time_after(milliseconds * MILLISECOND_NS);
    pthread_mutex_lock(&live->mutex);
    int late = 0;
    while (!late && (live->mode == PV_LIVE_ARMING || live->mode == PV_LIVE_SAVING))
        late = pthread_cond_timedwait(&live->ended, &live->mutex, &until);
    *out = live->told;
    int mode = (int)live->mode;
    pthread_mutex_unlock(&live->mutex);
    return mode;
}

void pv_live_cancel(struct pv_engine *engine, int closing)
{
    struct live *live = &engine->live;
    pthread_mutex_lock(&live->mutex);
    live->closing |= closing != 0;
    pthread_mutex_unlock(&live->mutex);
    live_stop(live, -ECANCELED, PV_LIVE_CANCELLED, 0, PV_HOME_PRESENT);
}

void pv_live_end(struct pv_engine *engine, uint8_t *large, struct pv_live_progress *out)
{
    struct live *live = &engine->live;
    pv_live_cancel(engine, false);
    if (live->threaded)
        pthread_join(live->thread, NULL);
    live->threaded = false;
    for (uint64_t block = 0; block < engine->blocks; block++) {
        block_lock_plain(engine, block);
        if (live_state(live, block) == ARMED || live->stuck) {
            (void)!live_protect(engine, block, block + 1, false); /* if it fails, it goes with the span's registration */
            live_set_state(live, block, OPEN);
        }
        block_unlock(engine, block);
    }
    if (large)
        memcpy(large, live->large, engine->blocks);
    pthread_mutex_lock(&live->mutex);
    if (out)
        *out = live->told;
    live_set_mode(live, PV_LIVE_OFF);
    pthread_mutex_unlock(&live->mutex);
    for (uint64_t block = 0; block < engine->blocks; block++) { /* whoever saw it on is through now */
        block_lock_plain(engine, block);
        block_unlock(engine, block);
    }
    span_release_all(engine, true);
    give_all(live);
    pthread_mutex_lock(&live->mutex);
    live->claimed = false;
    pthread_mutex_unlock(&live->mutex);
    share_go_on_all(engine);
}
