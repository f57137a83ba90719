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
#include "engine_inside.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define STRIDE 16 /* blocks protected in one call while the guest runs: what a fault may have to wait for */

/* Of a block: its protection is on, or not (or not for all of it); or it is saved, and nothing of it matters any more. */
enum { OPEN, ARMED, SAVED };

/* The bytes of a block's pages, for the drain thread. */
struct live_copy {
    struct live_copy *next;
    uint8_t *bytes; /* PV_BLOCK of room; only pages in `held` are there */
    uint64_t block;
    uint64_t held[PV_BLOCK_PAGES / 64];
    bool extra; /* not of the pool: given back when it is written */
};

static uint32_t mode_of(const struct live *live) { return __atomic_load_n(&live->mode, __ATOMIC_ACQUIRE); }

/* Under the mutex. */
static void set_mode(struct live *live, uint32_t mode)
{
    /* release: who sees it under a block's lock sees the arrays */
    __atomic_store_n(&live->mode, mode, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&live->room);
    pthread_cond_broadcast(&live->work);
    pthread_cond_broadcast(&live->ended);
}

/* Nothing more is saved: the first cause is the one that is told. */
static void stop(struct live *live, int error, uint32_t cause, uint64_t page, uint32_t home)
{
    pthread_mutex_lock(&live->mutex);
    if (live->mode == PV_LIVE_ARMING || live->mode == PV_LIVE_SAVING) {
        live->told.error = -error;
        live->told.cause = cause;
        live->told.page = page;
        live->told.home = home;
        set_mode(live, PV_LIVE_STOPPED);
    }
    pthread_mutex_unlock(&live->mutex);
}

/* ---- one block, under its lock ---- */

static uint8_t state_of(const struct live *live, uint64_t block)
{
    return __atomic_load_n(&live->states[block], __ATOMIC_RELAXED);
}

static void set_state(struct live *live, uint64_t block, uint8_t state)
{
    __atomic_store_n(&live->states[block], state, __ATOMIC_RELAXED);
}

static bool is_held(const struct live_copy *copy, uint32_t index) { return copy->held[index / 64] >> index % 64 & 1; }

/* Which pages hold something: those that are populated, and those in a home that is not zeros. Makes nothing resident. */
static int see_held(struct pv_engine *engine, uint64_t block, struct live_copy *out, uint32_t *count)
{
    uint64_t first = block * PV_BLOCK_PAGES;
    block_find(engine, block);
    uint32_t pages = pages_of_block(engine, block), away = block_away(engine, block);
    struct populated seen;
    int error = look_at(engine, ram_at(engine, first), pages, &seen);
    if (error)
        return error;
    out->block = block;
    memcpy(out->held, seen.bits, sizeof(out->held));
    *count = seen.count;
    for (uint32_t i = 0; away && i < pages; i++) {
        uint32_t home = page_home(engine, first + i);
        uint64_t bit = 1ull << i % 64;
        if (home == PV_HOME_PRESENT)
            continue;
        *count -= (out->held[i / 64] & bit) != 0; /* what is away is where its word says, whatever is mapped */
        out->held[i / 64] &= ~bit;
        if (home == PV_HOME_ZERO || home == PV_HOME_BALLOON)
            continue;
        out->held[i / 64] |= bit;
        ++*count;
    }
    bool comes_large = away && *count && !(block_word(engine, block) & PV_BLOCK_SMALL);
    engine->live.large[block] = seen.large || comes_large;
    return 0;
}

/* What is populated can be read in the guest's mapping: only the lock's holder could take it away. */
static int read_held(struct pv_engine *engine, struct live_copy *copy)
{
    uint64_t first = copy->block * PV_BLOCK_PAGES;
    uint32_t pages = pages_of_block(engine, copy->block);
    for (uint32_t i = 0, run; i < pages; i += run) {
        uint32_t home = page_home(engine, first + i);
        for (run = 1; i + run < pages && is_held(copy, i + run) == is_held(copy, i); run++)
            if (page_home(engine, first + i + run) != home)
                break;
        if (!is_held(copy, i))
            continue;
        uint8_t *to = copy->bytes + (size_t)i * PV_PAGE;
        if (home == PV_HOME_PRESENT) {
            memcpy(to, ram_at(engine, first + i), (size_t)run * PV_PAGE);
            continue;
        }
        int error = fetch(engine, first + i, run, to);
        if (error) {
            stop(&engine->live, error, PV_LIVE_FETCH, first + i, home);
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

static int protect(struct pv_engine *engine, uint64_t first, uint64_t end, bool on)
{
    uint64_t page = first * PV_BLOCK_PAGES;
    int error = protect_range(engine, first, end, on);
    if (error == -ENOENT && end - first > 1) /* a kernel before 6.3 takes one mapping at a time; a block is in one */
        for (error = 0; !error && first < end; first++)
            error = protect_range(engine, first, first + 1, on);
    if (error && !on)
        engine->live.stuck = true;
    if (error)
        stop(&engine->live, error, PV_LIVE_PROTECT, page, PV_HOME_PRESENT);
    return error;
}

static void noted_saved(struct live *live, struct live_copy *copy, uint64_t block, bool before)
{
    pthread_mutex_lock(&live->mutex);
    set_state(live, block, SAVED);
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

static void give_copy(struct live *live, struct live_copy *copy)
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
    int error = see_held(engine, block, &seen, &count);
    if (error) {
        stop(live, error, PV_LIVE_LOOK, block * PV_BLOCK_PAGES, PV_HOME_PRESENT);
    } else if (!count) {
        noted_saved(live, NULL, block, true);
    } else {
        struct live_copy *copy = take_copy(live);
        if (!copy)
            return; /* stopped meanwhile */
        copy->block = block;
        memcpy(copy->held, seen.held, sizeof(copy->held));
        if (read_held(engine, copy))
            give_copy(live, copy);
        else
            noted_saved(live, copy, block, true);
    }
}

void live_before(struct pv_engine *engine, uint64_t block)
{
    struct live *live = &engine->live;
    uint32_t mode = mode_of(live);
    if (mode == PV_LIVE_OFF)
        return;
    uint8_t before = state_of(live, block);
    if (before == SAVED)
        return;
    if (mode == PV_LIVE_SAVING)
        save_before(engine, block);
    /* Whatever is done under the lock now finds no protection: there is no trace. */
    if (before == ARMED)
        (void)!protect(engine, block, block + 1, false);
    if (state_of(live, block) != SAVED)
        set_state(live, block, OPEN);
}

bool live_on(const struct pv_engine *engine) { return mode_of(&engine->live) != PV_LIVE_OFF; }

bool live_claimed(struct pv_engine *engine)
{
    pthread_mutex_lock(&engine->live.mutex);
    bool claimed = engine->live.claimed;
    pthread_mutex_unlock(&engine->live.mutex);
    return claimed;
}

/* ---- the drain thread ---- */

static int pack_copy(const struct pv_engine *engine, struct pv_pack *pack, const struct live_copy *copy)
{
    uint32_t pages = pages_of_block(engine, copy->block);
    for (uint32_t i = 0, run; i < pages; i += run) {
        for (run = 1; i + run < pages && is_held(copy, i + run) == is_held(copy, i); run++)
            ;
        if (!is_held(copy, i))
            continue;
        int error = pv_pack_add(pack, copy->block * PV_BLOCK_PAGES + i, run, copy->bytes + (size_t)i * PV_PAGE);
        if (error)
            return error;
    }
    return 0;
}

/* Of a block whose lock is held and that is not saved: into the drain's own buffer. Does it hold anything? */
static bool save_own(struct pv_engine *engine, uint64_t block)
{
    struct live *live = &engine->live;
    uint32_t count;
    int error = see_held(engine, block, live->own, &count);
    if (error) {
        stop(live, error, PV_LIVE_LOOK, block * PV_BLOCK_PAGES, PV_HOME_PRESENT);
        return false;
    }
    if ((count && read_held(engine, live->own)) || protect(engine, block, block + 1, false))
        return false;
    noted_saved(live, NULL, block, false);
    return count != 0;
}

/* The next block that nobody has saved, unless all that are left are locked: those come as copies, or are noted as
 * saved, since whoever has the lock saves first. Not waited for here: they may be waiting for a buffer. */
static bool save_next(struct pv_engine *engine)
{
    struct live *live = &engine->live;
    for (uint64_t looked = 0; looked < engine->blocks && mode_of(live) == PV_LIVE_SAVING; looked++) {
        uint64_t block = live->cursor;
        live->cursor = (block + 1) % engine->blocks;
        if (state_of(live, block) == SAVED || !block_trylock_plain(engine, block))
            continue;
        bool holds = state_of(live, block) != SAVED && save_own(engine, block);
        block_unlock(engine, block);
        if (holds)
            return true;
    }
    return false;
}

static void write_copy(struct pv_engine *engine, struct live_copy *copy)
{
    struct live *live = &engine->live;
    int error = pack_copy(engine, live->pack, copy);
    if (error)
        stop(live, error, PV_LIVE_WRITE, 0, PV_HOME_PRESENT);
    if (copy != live->own)
        give_copy(live, copy);
}

static void *drain(void *argument)
{
    struct pv_engine *engine = argument;
    struct live *live = &engine->live;
    uint64_t looked_at = UINT64_MAX; /* what `moves` was before a look that found all that are left locked */
    pthread_mutex_lock(&live->mutex);
    for (;;) {
        while (live->mode == PV_LIVE_ARMING ||
               (live->mode == PV_LIVE_SAVING && !live->first && live->moves == looked_at))
            pthread_cond_wait(&live->work, &live->mutex);
        if (live->mode != PV_LIVE_SAVING)
            break;
        struct live_copy *copy = live->first;
        if (!copy && live->told.saved == live->told.blocks) {
            set_mode(live, PV_LIVE_DONE);
            break;
        }
        if (copy && !(live->first = copy->next))
            live->last = &live->first;
        uint64_t moves = live->moves;
        pthread_mutex_unlock(&live->mutex);
        if (copy)
            write_copy(engine, copy);
        else if (save_next(engine))
            write_copy(engine, live->own);
        else
            looked_at = moves; /* what happened since is seen above, and looked for again */
        pthread_mutex_lock(&live->mutex);
    }
    pthread_mutex_unlock(&live->mutex);
    return NULL;
}

static int start_drain(struct pv_engine *engine)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* inherited: the program's signals are for its other threads */
    int error = pthread_create(&engine->live.thread, NULL, drain, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    engine->live.threaded = error == 0;
    if (!error)
        (void)pthread_setname_np(engine->live.thread, "pyvmm live save");
    return -error;
}

/* ---- a session ---- */

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
            give_copy(live, copy);
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
            set_state(live, end, ARMED);
        }
        int error = end > begin ? protect(engine, begin, end, true) : 0;
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
    set_mode(live, live->closing ? PV_LIVE_STOPPED : PV_LIVE_ARMING);
    if (live->closing)
        live->told.error = ECANCELED;
    pthread_mutex_unlock(&live->mutex);
    error = start_drain(engine);
    error = error ? error : arm(engine, !python_homes);
    if (error) {
        stop(live, error, PV_LIVE_PROTECT, 0, PV_HOME_PRESENT);
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
        error = see_held(engine, block, copy, &count);
    }
    error = error ? error : read_held(engine, copy);
    if (!error)
        noted_saved(live, copy, block, true);
    else if (bytes)
        give_copy(live, copy);
    else
        free(copy);
    if (error)
        stop(live, error, PV_LIVE_LOOK, block * PV_BLOCK_PAGES, PV_HOME_PRESENT);
    return error;
}

static int freeze(struct pv_engine *engine, bool python_homes)
{
    struct live *live = &engine->live;
    int error = 0;
    for (uint64_t block = 0; !error && python_homes && block < engine->blocks; block++)
        if (block_pins(engine, block) && state_of(live, block) == OPEN && comes_alone(engine, block))
            error = save_now(engine, block);
    for (uint64_t first = 0, end; !error && first < engine->blocks; first = end) {
        for (end = first; end < engine->blocks && state_of(live, end) == OPEN; end++)
            set_state(live, end, ARMED);
        error = end > first ? protect(engine, first, end, true) : 0;
        end += end == first;
    }
    return error;
}

int pv_live_freeze(struct pv_engine *engine, int python_homes)
{
    struct live *live = &engine->live;
    for (uint64_t block = 0; block < engine->blocks; block++)
        block_lock_plain(engine, block);
    int error = mode_of(live) == PV_LIVE_ARMING ? freeze(engine, python_homes) : -ECANCELED;
    pthread_mutex_lock(&live->mutex);
    if (!error && live->mode == PV_LIVE_ARMING)
        set_mode(live, PV_LIVE_SAVING);
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
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += milliseconds % 1000 * 1000000l;
    until.tv_sec += milliseconds / 1000 + until.tv_nsec / 1000000000l;
    until.tv_nsec %= 1000000000l;
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
    stop(live, -ECANCELED, PV_LIVE_CANCELLED, 0, PV_HOME_PRESENT);
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
        if (state_of(live, block) == ARMED || live->stuck) {
            (void)!protect(engine, block, block + 1, false); /* if it fails, it goes with the span's registration */
            set_state(live, block, OPEN);
        }
        block_unlock(engine, block);
    }
    if (large)
        memcpy(large, live->large, engine->blocks);
    pthread_mutex_lock(&live->mutex);
    if (out)
        *out = live->told;
    set_mode(live, PV_LIVE_OFF);
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
}
