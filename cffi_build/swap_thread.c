/* swap_thread.c: the queue of blocks that are to be written, the threads that write them, and who has pages go out. */
#define _GNU_SOURCE
#include "swap_inside.h"
#include "clock.h"

#include <signal.h>

#define IDLE_NS 500000000 /* without anything to write, after which disk space is given back */

enum todo { END, WRITE, PUNCH };

/* ---- the queue ---- */

/* Under the mutex. There is room: each block is in the ring once; and never while it is in a batch, since then two copies
 * of one page would be on their way to one place. */
static void put(struct pv_swap *swap, uint64_t block)
{
    if (has_bit_at(swap->behind, block)) {
        put_bit(swap->behind, block, false);
        swap->told.behind--;
    }
    if (has_bit_at(swap->writing, block)) {
        put_bit(swap->again, block, true);
    } else if (!has_bit_at(swap->waits, block)) {
        put_bit(swap->waits, block, true);
        swap->ring[(swap->head + swap->told.queued++) % swap->engine->blocks] = (uint32_t)block;
        pthread_cond_signal(&swap->work);
    }
}

bool queue_take(struct pv_swap *swap, uint64_t *block)
{
    pthread_mutex_lock(&swap->mutex);
    bool any = swap->told.queued && !swap->ending;
    if (any) {
        *block = swap->ring[swap->head];
        swap->head = (swap->head + 1) % swap->engine->blocks;
        swap->told.queued--;
        put_bit(swap->waits, *block, false);
        put_bit(swap->writing, *block, true);
    }
    pthread_mutex_unlock(&swap->mutex);
    return any;
}

void queue_give(struct pv_swap *swap, uint64_t block, bool waits)
{
    pthread_mutex_lock(&swap->mutex);
    bool again = has_bit_at(swap->again, block);
    put_bit(swap->writing, block, false);
    put_bit(swap->again, block, false);
    if (waits) {
        swap->head = (swap->head + swap->engine->blocks - 1) % swap->engine->blocks;
        swap->ring[swap->head] = (uint32_t)block;
        swap->told.queued++;
        put_bit(swap->waits, block, true);
        pthread_cond_signal(&swap->work);
    } else if (again) {
        put(swap, block);
    }
    pthread_mutex_unlock(&swap->mutex);
}

/* ---- the threads ---- */

/* What there is to do next; where disk space can be given back, that comes after some time without anything to write. */
static enum todo wait_for_work(struct pv_swap *swap)
{
    struct timespec until = time_after(IDLE_NS);
    int late = 0;
    pthread_mutex_lock(&swap->mutex);
    while (!swap->ending && !swap->told.queued && !late)
        late = swap->loosened && !swap->no_holes ? pthread_cond_timedwait(&swap->work, &swap->mutex, &until)
                                                 : pthread_cond_wait(&swap->work, &swap->mutex);
    enum todo todo = swap->ending ? END : swap->told.queued ? WRITE : PUNCH;
    pthread_mutex_unlock(&swap->mutex);
    return todo;
}

static void *write_blocks(void *argument)
{
    struct batch *batch = argument;
    for (enum todo todo; (todo = wait_for_work(batch->swap)) != END;) {
        if (todo == WRITE)
            (void)!batch_write(batch); /* what goes wrong is in the counts */
        else
            (void)pv_swap_punch(batch->swap);
    }
    return NULL;
}

int pv_swap_start(struct pv_swap *swap)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* inherited: the program's signals are for its other threads */
    int error = 0;
    while (!error && swap->threaded < swap->writers) {
        struct batch *batch = &swap->batches[swap->threaded];
        error = pthread_create(&batch->thread, NULL, write_blocks, batch);
        if (!error)
            (void)pthread_setname_np(batch->thread, "pyvmm swap");
        swap->threaded += !error;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return swap->threaded ? 0 : -error; /* one is enough */
}

void pv_swap_end(struct pv_swap *swap)
{
    pthread_mutex_lock(&swap->mutex);
    uint32_t threaded = swap->threaded;
    swap->ending = true;
    swap->threaded = 0;
    pthread_cond_broadcast(&swap->work);
    pthread_cond_broadcast(&swap->news);
    pthread_mutex_unlock(&swap->mutex);
    for (uint32_t i = 0; i < threaded; i++)
        pthread_join(swap->batches[i].thread, NULL);
}

/* ---- who has pages go out ---- */

void pv_swap_put(struct pv_swap *swap, uint64_t block)
{
    if (block >= swap->engine->blocks)
        return;
    pthread_mutex_lock(&swap->mutex);
    put(swap, block);
    pthread_mutex_unlock(&swap->mutex);
}

int pv_swap_out(struct pv_swap *swap, uint64_t page, uint32_t count)
{
    int result = pv_engine_remove(swap->engine, page, count, PV_REMOVE_ASIDE);
    if (result != -EINVAL) /* also where none went now: some may be aside since an earlier time */
        pv_swap_put(swap, page / PV_BLOCK_PAGES);
    return result;
}

void pv_swap_retry(struct pv_swap *swap)
{
    pthread_mutex_lock(&swap->mutex);
    for (uint64_t block = 0; swap->told.behind && block < swap->engine->blocks; block++)
        if (has_bit_at(swap->behind, block))
            put(swap, block);
    pthread_mutex_unlock(&swap->mutex);
}

int pv_swap_wait(struct pv_swap *swap, uint64_t most, uint32_t milliseconds)
{
    struct timespec until = time_after(milliseconds * MILLISECOND_NS);
    pthread_mutex_lock(&swap->mutex);
    while (swap->told.queued + swap->busy > most && !swap->ending &&
           pthread_cond_timedwait(&swap->news, &swap->mutex, &until) != ETIMEDOUT)
        ;
    int done = swap->told.queued + swap->busy <= most;
    pthread_mutex_unlock(&swap->mutex);
    return done;
}
