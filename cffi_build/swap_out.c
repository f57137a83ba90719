/* swap_out.c: how pages go from the aside area to the swap file: a queue of blocks, and a thread that writes them in
 * batches. Pages are copied under their block's lock, and written without it: a fault never waits for this disk. */
#define _GNU_SOURCE
#include "swap_inside.h"
#include "zero.h"

#include <signal.h>
#include <string.h>
#include <time.h>

#define SCATTERED 32 /* runs of a block's pages in the file, from which on it is worth to write all of it anew */

/* ---- the queue ---- */

static void set_bit(uint64_t *bits, uint64_t at, bool on)
{
    bits[at / 64] = (bits[at / 64] & ~(1ull << at % 64)) | (uint64_t)on << at % 64;
}

/* Under the mutex. There is room: each block is in the ring once. */
static void put(struct pv_swap *swap, uint64_t block)
{
    if (has_bit_at(swap->behind, block)) {
        set_bit(swap->behind, block, false);
        swap->told.behind--;
    }
    if (has_bit_at(swap->waits, block))
        return;
    set_bit(swap->waits, block, true);
    swap->ring[(swap->head + swap->told.queued++) % swap->engine->blocks] = (uint32_t)block;
    pthread_cond_signal(&swap->work);
}

/* The next block, from now on this thread's; whoever puts it again meanwhile has it looked at once more. */
static bool take(struct pv_swap *swap, uint64_t *block)
{
    pthread_mutex_lock(&swap->mutex);
    bool any = swap->told.queued && !swap->ending;
    if (any) {
        *block = swap->ring[swap->head];
        swap->head = (swap->head + 1) % swap->engine->blocks;
        swap->told.queued--;
        set_bit(swap->waits, *block, false);
    }
    swap->busy = swap->busy || any;
    pthread_mutex_unlock(&swap->mutex);
    return any;
}

static void put_first(struct pv_swap *swap, uint64_t block)
{
    pthread_mutex_lock(&swap->mutex);
    if (!has_bit_at(swap->waits, block)) {
        swap->head = (swap->head + swap->engine->blocks - 1) % swap->engine->blocks;
        swap->ring[swap->head] = (uint32_t)block;
        swap->told.queued++;
        set_bit(swap->waits, block, true);
    }
    pthread_mutex_unlock(&swap->mutex);
}

/* ---- a batch ---- */

static uint64_t aside_word(const struct pv_swap *swap) { return swap->ticket << PV_PAGE_LOCATOR_SHIFT | PV_HOME_ASIDE; }

static uint8_t *copy_of(const struct pv_swap *swap, uint32_t i) { return swap->copies + (size_t)i * PV_PAGE; }

/* What is aside of a block: all of it, or false. The ticket in its words tells whether it has been back since. */
static bool copy_block(struct pv_swap *swap, uint64_t block)
{
    struct pv_engine *engine = swap->engine;
    uint64_t first = block * PV_BLOCK_PAGES, end = first + pages_of_block(engine, block);
    uint32_t aside = 0;
    block_lock(engine, block);
    for (uint64_t page = first; page < end; page++)
        aside += page_home(engine, page) == PV_HOME_ASIDE;
    bool fits = swap->used + aside <= PV_BLOCK_PAGES;
    for (uint64_t page = first; fits && page < end; page++) {
        if (page_home(engine, page) != PV_HOME_ASIDE)
            continue;
        page_set(engine, page, aside_word(swap) | (engine->page_words[page] & PV_PAGE_FAILED));
        memcpy(copy_of(swap, swap->used), aside_at(engine, page), PV_PAGE);
        swap->entries[swap->used++] = (struct entry){.page = page};
    }
    block_unlock(engine, block);
    return fits;
}

static bool in_batch(const struct pv_swap *swap, uint64_t block)
{
    for (uint32_t i = 0; i < swap->used; i++)
        if (swap->entries[i].page / PV_BLOCK_PAGES == block)
            return true;
    return false;
}

/* A block once only: a page that has been back meanwhile would be in the batch twice, with one ticket. */
static void collect(struct pv_swap *swap)
{
    uint64_t block;
    swap->used = 0;
    swap->error = 0;
    swap->ticket++;
    while (swap->used < PV_BLOCK_PAGES && take(swap, &block))
        if (in_batch(swap, block) || !copy_block(swap, block)) {
            put_first(swap, block);
            return;
        }
}

/* Of a block that goes out whole: in how many runs of the file do its pages lie, that have a place there? */
static uint32_t runs_of(const struct pv_swap *swap)
{
    uint32_t runs = 0, before = 0;
    for (uint32_t i = 0; i < swap->used; i++) {
        uint32_t kept = swap->slot_of[swap->entries[i].page];
        runs += kept && kept != before + 1;
        before = kept ? kept : before;
    }
    return runs;
}

static void write_to(struct pv_swap *swap, struct entry *entry, uint64_t slot)
{
    entry->what = ENTRY_WRITTEN;
    entry->slot = (uint32_t)slot;
    slot_set(swap, slot, entry->page, SLOT_BUSY);
    memcpy(swap->table[slot].digest, entry->digest, sizeof(entry->digest));
}

/* Does the file have this page already, from the last time that it was out? `here`: else it goes to the same place. */
static void compare(struct pv_swap *swap, struct entry *entry, bool here, bool anew)
{
    uint32_t kept = swap->slot_of[entry->page];
    if (!kept)
        return;
    if (entry->what != ENTRY_ZERO && !anew && !memcmp(swap->table[kept - 1].digest, entry->digest, sizeof(entry->digest))) {
        entry->what = ENTRY_SAVED;
        entry->slot = kept - 1;
        slot_set(swap, kept - 1, entry->page, SLOT_BUSY);
    } else if (here && entry->what != ENTRY_ZERO && !anew) {
        write_to(swap, entry, kept - 1);
    } else {
        slot_set(swap, kept - 1, entry->page, SLOT_FREE);
    }
}

/* Slots for all that is to be written, together where that can be. Whole blocks stay where they are, so that they come
 * back by one read; unless that is in many places, since they went out page by page before. */
static void place(struct pv_swap *swap)
{
    uint32_t wanted = 0, run = 0;
    uint64_t slot = 0;
    pthread_mutex_lock(&swap->mutex);
    bool whole = swap->used == PV_BLOCK_PAGES && swap->entries[0].page + PV_BLOCK_PAGES - 1 ==
                                                     swap->entries[PV_BLOCK_PAGES - 1].page;
    bool anew = whole && runs_of(swap) > SCATTERED;
    for (uint32_t i = 0; i < swap->used; i++) {
        compare(swap, &swap->entries[i], whole, anew);
        wanted += swap->entries[i].what == ENTRY_STAYS;
    }
    for (uint32_t i = 0; i < swap->used && wanted; i++) {
        if (swap->entries[i].what != ENTRY_STAYS)
            continue;
        if (!run && !(run = slots_take(swap, wanted, &slot))) {
            swap->error = -PV_SWAP_FULL;
            break;
        }
        write_to(swap, &swap->entries[i], slot++);
        run--;
        wanted--;
    }
    pthread_mutex_unlock(&swap->mutex);
}

/* Without any lock: what may take long. (Here a cluster of pages would be compressed.) */
static void sort_out(struct pv_swap *swap)
{
    for (uint32_t i = 0; i < swap->used; i++) {
        struct entry *entry = &swap->entries[i];
        if (is_zero(copy_of(swap, i)))
            entry->what = ENTRY_ZERO;
        else
            pv_digest(&swap->key, copy_of(swap, i), entry->digest);
    }
}

static void not_written(struct pv_swap *swap, uint32_t first, uint32_t end, int error)
{
    pthread_mutex_lock(&swap->mutex);
    for (uint32_t i = first; i < end; i++)
        if (swap->entries[i].what == ENTRY_WRITTEN) {
            slot_set(swap, swap->entries[i].slot, swap->entries[i].page, SLOT_FREE);
            swap->entries[i].what = ENTRY_STAYS;
        }
    pthread_mutex_unlock(&swap->mutex);
    swap->error = error;
}

/* A call for each run of slots. */
static void write_out(struct pv_swap *swap)
{
    struct iovec parts[PV_BLOCK_PAGES];
    for (uint32_t i = 0, next; i < swap->used; i = next) {
        uint32_t used = 0, pages = 0;
        const struct entry *head = &swap->entries[i];
        for (next = i; next < swap->used; next++) {
            const struct entry *entry = &swap->entries[next];
            if (entry->what != ENTRY_WRITTEN && next > i)
                continue;
            if (entry->what != ENTRY_WRITTEN || entry->slot != head->slot + pages)
                break;
            uint8_t *from = copy_of(swap, next);
            if (used && (uint8_t *)parts[used - 1].iov_base + parts[used - 1].iov_len == from)
                parts[used - 1].iov_len += PV_PAGE;
            else
                parts[used++] = (struct iovec){from, PV_PAGE};
            pages++;
        }
        if (!pages) {
            next = i + 1;
            continue;
        }
        int error = vector_whole(pwritev, swap->fd, parts, used, (uint64_t)head->slot * PV_PAGE);
        if (error) {
            not_written(swap, i, next, error == -ENODATA ? -EIO : error);
            continue;
        }
        count_up(&swap->told.writes, 1);
        count_up(&swap->told.bytes_written, (uint64_t)pages * PV_PAGE);
    }
}

/* Under the block's lock and the mutex. Did the page go out? */
static bool settle_entry(struct pv_swap *swap, const struct entry *entry)
{
    struct pv_engine *engine = swap->engine;
    bool same = (engine->page_words[entry->page] & ~PV_PAGE_FAILED) == aside_word(swap);
    swap->told.late += !same;
    if (entry->what == ENTRY_WRITTEN || entry->what == ENTRY_SAVED) /* what came back may go out again as it was */
        slot_set(swap, entry->slot, entry->page, same ? SLOT_LIVE : SLOT_KEPT);
    if (!same || entry->what == ENTRY_STAYS)
        return false;
    if (entry->what == ENTRY_ZERO) {
        page_set(engine, entry->page, PV_HOME_ZERO);
    } else {
        page_set(engine, entry->page, swap_word(entry->slot));
        swap->table[entry->slot].when = swap->clock;
    }
    swap->clock++;
    swap->told.out++;
    swap->told.zeros += entry->what == ENTRY_ZERO;
    swap->told.saved += entry->what == ENTRY_SAVED;
    return true;
}

/* A block that is to be large, and all of it away, comes back whole, but for those that do so in vain; of others, what lies
 * together comes together. */
static void settle_flags(struct pv_engine *engine, uint64_t block)
{
    bool whole = to_be_large(engine, block) && block_away(engine, block) == PV_BLOCK_PAGES;
    if (whole)
        limit_gone_whole(engine, block);
    whole = whole && !(block_word(engine, block) & PV_BLOCK_PIECES);
    block_flags(engine, block, whole ? 0 : PV_BLOCK_UNITS,
                PV_BLOCK_ASIDE_LARGE | (whole ? PV_BLOCK_UNITS | PV_BLOCK_TOUCHED : 0));
}

/* Entries of one block: those that are still aside are in their new home from now on. How many. */
static uint32_t settle_block(struct pv_swap *swap, uint32_t first, uint32_t end)
{
    struct pv_engine *engine = swap->engine;
    uint64_t block = swap->entries[first].page / PV_BLOCK_PAGES;
    uint32_t gone = 0;
    bool went[PV_BLOCK_PAGES], stays = false;
    block_lock(engine, block);
    pthread_mutex_lock(&swap->mutex);
    for (uint32_t i = first; i < end; i++) {
        stays = stays || swap->entries[i].what == ENTRY_STAYS;
        gone += went[i - first] = settle_entry(swap, &swap->entries[i]);
    }
    if (stays && !has_bit_at(swap->behind, block) && !has_bit_at(swap->waits, block)) {
        set_bit(swap->behind, block, true);
        swap->told.behind++;
    }
    pthread_mutex_unlock(&swap->mutex);
    if (gone)
        settle_flags(engine, block);
    for (uint32_t i = first, run; i < end; i += run) {
        for (run = 1; i + run < end && went[i + run - first] == went[i - first] &&
                      swap->entries[i + run].page == swap->entries[i].page + run;)
            run++;
        if (went[i - first])
            (void)madvise(aside_at(engine, swap->entries[i].page), (size_t)run * PV_PAGE, MADV_DONTNEED);
    }
    block_unlock(engine, block);
    return gone;
}

int pv_swap_step(struct pv_swap *swap)
{
    uint32_t gone = 0;
    collect(swap);
    sort_out(swap);
    place(swap);
    write_out(swap);
    for (uint32_t i = 0, end; i < swap->used; i = end) {
        uint64_t block = swap->entries[i].page / PV_BLOCK_PAGES;
        for (end = i + 1; end < swap->used && swap->entries[end].page / PV_BLOCK_PAGES == block;)
            end++;
        gone += settle_block(swap, i, end);
    }
    pthread_mutex_lock(&swap->mutex);
    if (swap->error) {
        swap->told.errors++;
        swap->told.error = -swap->error;
    }
    swap->busy = false;
    pthread_cond_broadcast(&swap->news);
    pthread_mutex_unlock(&swap->mutex);
    return swap->error ? swap->error : (int)gone;
}

/* ---- the thread ---- */

static void *write_blocks(void *argument)
{
    struct pv_swap *swap = argument;
    for (;;) {
        pthread_mutex_lock(&swap->mutex);
        while (!swap->ending && !swap->told.queued)
            pthread_cond_wait(&swap->work, &swap->mutex);
        bool ending = swap->ending;
        pthread_mutex_unlock(&swap->mutex);
        if (ending)
            return NULL;
        (void)!pv_swap_step(swap); /* what goes wrong is in the counts */
    }
}

int pv_swap_start(struct pv_swap *swap)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* inherited: the program's signals are for its other threads */
    int error = pthread_create(&swap->thread, NULL, write_blocks, swap);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error)
        (void)pthread_setname_np(swap->thread, "pyvmm swap");
    swap->threaded = !error;
    return -error;
}

void pv_swap_end(struct pv_swap *swap)
{
    pthread_mutex_lock(&swap->mutex);
    bool threaded = swap->threaded;
    swap->ending = true;
    swap->threaded = false;
    pthread_cond_broadcast(&swap->work);
    pthread_cond_broadcast(&swap->news);
    pthread_mutex_unlock(&swap->mutex);
    if (threaded)
        pthread_join(swap->thread, NULL);
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
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)(milliseconds % 1000) * 1000000;
    until.tv_sec += milliseconds / 1000 + until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&swap->mutex);
    while (swap->told.queued + swap->busy > most && !swap->ending &&
           pthread_cond_timedwait(&swap->news, &swap->mutex, &until) != ETIMEDOUT)
        ;
    int done = swap->told.queued + swap->busy <= most;
    pthread_mutex_unlock(&swap->mutex);
    return done;
}
