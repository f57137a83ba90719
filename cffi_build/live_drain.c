/* live_drain.c: the thread that writes what a live save has copied, and goes through the rest of RAM meanwhile. */
#define _GNU_SOURCE
#include "live_inside.h"

#include <signal.h>

static int pack_copy(const struct pv_engine *engine, struct pv_pack *pack, const struct live_copy *copy)
{
    uint32_t pages = pages_of_block(engine, copy->block);
    for (uint32_t i = 0, run; i < pages; i += run) {
        for (run = 1; i + run < pages && copy_has(copy, i + run) == copy_has(copy, i); run++)
            ;
        if (!copy_has(copy, i))
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
    int error = live_see(engine, block, live->own, &count);
    if (error) {
        live_stop(live, error, PV_LIVE_LOOK, block * PV_BLOCK_PAGES, PV_HOME_PRESENT);
        return false;
    }
    if ((count && live_read(engine, live->own)) || live_protect(engine, block, block + 1, false))
        return false;
    live_note_saved(live, NULL, block, false);
    return count != 0;
}

/* The next block that nobody has saved, unless all that are left are locked: those come as copies, or are noted as
 * saved, since whoever has the lock saves first. Not waited for here: they may be waiting for a buffer. */
static bool save_next(struct pv_engine *engine)
{
    struct live *live = &engine->live;
    for (uint64_t looked = 0; looked < engine->blocks && live_mode(live) == PV_LIVE_SAVING; looked++) {
        uint64_t block = live->cursor;
        live->cursor = (block + 1) % engine->blocks;
        if (live_state(live, block) == SAVED || !block_trylock_plain(engine, block))
            continue;
        bool holds = live_state(live, block) != SAVED && save_own(engine, block);
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
        live_stop(live, error, PV_LIVE_WRITE, 0, PV_HOME_PRESENT);
    if (copy != live->own)
        live_give(live, copy);
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
            live_set_mode(live, PV_LIVE_DONE);
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

int live_start_drain(struct pv_engine *engine)
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
