/* swap_out.c: how pages go from the aside area to the swap file: a batch of what waits is
 * put together, compressed and written. Pages are copied under their block's lock, and written without it: a fault never waits for this disk. */
#define _GNU_SOURCE
#include "swap_inside.h"
#include "zero.h"

#include <string.h>

#define SCATTERED 32 /* runs of a block's pages in the file, from which on it is worth to write all of it anew */
#define LEVEL 1      /* of zstd: those above give 2 % more, in half as much time again */

/* ---- a batch ---- */

static uint64_t aside_word(const struct batch *batch) { return batch->ticket << PV_PAGE_LOCATOR_SHIFT | PV_HOME_ASIDE; }

/* What is aside of a block: all of it, or false. The ticket in its words tells whether it has been back since. */
static bool copy_block(struct batch *batch, uint64_t block)
{
    struct pv_engine *engine = batch->swap->engine;
    uint64_t first = block * PV_BLOCK_PAGES, end = first + pages_of_block(engine, block);
    uint32_t aside = 0;
    block_lock(engine, block);
    for (uint64_t page = first; page < end; page++)
        aside += page_home(engine, page) == PV_HOME_ASIDE;
    bool fits = batch->used + aside <= PV_BLOCK_PAGES;
    for (uint64_t page = first; fits && page < end; page++) {
        if (page_home(engine, page) != PV_HOME_ASIDE)
            continue;
        uint8_t *copy = batch->copies + (size_t)batch->used * PV_PAGE;
        page_set(engine, page, aside_word(batch) | (engine->page_words[page] & PV_PAGE_FAILED));
        memcpy(copy, aside_at(engine, page), PV_PAGE);
        batch->entries[batch->used++] = (struct entry){.page = page, .from = copy, .size = PV_PAGE};
    }
    block_unlock(engine, block);
    return fits;
}

static void collect(struct batch *batch)
{
    struct pv_swap *swap = batch->swap;
    uint64_t block;
    batch->used = 0;
    batch->error = 0;
    while (batch->used < PV_BLOCK_PAGES && queue_take(swap, &block)) {
        uint32_t before = batch->used;
        bool fits = copy_block(batch, block);
        if (batch->used == before)
            queue_give(swap, block, !fits);
        if (!fits)
            return;
    }
}

/* Zeros need no place; of the others, the digests. */
static void sort_out(struct batch *batch)
{
    struct pv_swap *swap = batch->swap;
    for (uint32_t i = 0; i < batch->used; i++) {
        struct entry *entry = &batch->entries[i];
        if (is_zero(entry->from))
            entry->what = ENTRY_ZERO;
        else
            pv_digest(&swap->key, entry->from, entry->digest);
    }
}

/* Of a block that goes out whole: in how many runs of the file do its pages lie, that have a place there? */
static uint32_t runs_of(const struct batch *batch)
{
    const struct pv_swap *swap = batch->swap;
    uint64_t end = 0, gap = swap->codec == PV_CODEC_RAW ? 0 : NEAR;
    uint32_t runs = 0;
    for (uint32_t i = 0; i < batch->used; i++) {
        uint64_t page = batch->entries[i].page;
        if (!swap->slot_of[page])
            continue;
        uint64_t slot = slot_at(swap, page);
        runs += slot < end || slot - end > gap || !end;
        end = slot + slots_of(swap, page);
    }
    return runs;
}

/* Which pages has the file already, from the last time that they were out? Nobody else gives these a place, or takes it:
 * they are aside. Whole blocks are written to where they were, so that they come back by one read; unless that is in many
 * places, since they went out page by page before. */
static void compare(struct batch *batch)
{
    struct pv_swap *swap = batch->swap;
    pthread_mutex_lock(&swap->mutex);
    batch->whole = batch->used == PV_BLOCK_PAGES &&
                  batch->entries[0].page + PV_BLOCK_PAGES - 1 == batch->entries[PV_BLOCK_PAGES - 1].page;
    batch->anew = batch->whole && runs_of(batch) > SCATTERED;
    for (uint32_t i = 0; i < batch->used && !batch->anew; i++) {
        struct entry *entry = &batch->entries[i];
        if (entry->what == ENTRY_ZERO || !swap->slot_of[entry->page] ||
            memcmp(swap->records[entry->page].digest, entry->digest, sizeof(entry->digest)))
            continue;
        entry->what = ENTRY_SAVED;
        place_state(swap, entry->page, PLACE_BUSY);
    }
    pthread_mutex_unlock(&swap->mutex);
}

/* What does not become smaller by a slot at least is stored as it is. */
static void compress(struct batch *batch)
{
    struct pv_swap *swap = batch->swap;
    uint8_t *to = batch->packed;
    uint32_t slot = 1u << swap->shift;
    for (uint32_t i = 0; i < batch->used && to; i++) {
        struct entry *entry = &batch->entries[i];
        int size = entry->what == ENTRY_STAYS
                       ? pv_codec_compress(swap->codec, LEVEL, entry->from, PV_PAGE, to, PV_PAGE - slot)
                       : 0;
        if (size <= 0)
            continue;
        entry->from = to;
        entry->size = (uint32_t)size;
        for (to += size; (to - batch->packed) % slot; to++)
            *to = 0;
    }
}

static void write_to(struct pv_swap *swap, struct entry *entry, uint64_t slot)
{
    entry->what = ENTRY_WRITTEN;
    place_give(swap, entry->page, slot, entry->size);
    memcpy(swap->records[entry->page].digest, entry->digest, sizeof(entry->digest));
}

/* What was there of a page that has changed: it goes to the same place, if that has room, or gives it up. */
static void replace(const struct batch *batch, struct entry *entry)
{
    struct pv_swap *swap = batch->swap;
    if (entry->what == ENTRY_SAVED || !swap->slot_of[entry->page])
        return;
    uint64_t slot = slot_at(swap, entry->page);
    uint32_t slots = slots_for(swap, entry->size);
    place_free(swap, entry->page);
    if (entry->what != ENTRY_ZERO && batch->whole && !batch->anew && free_at(swap, slot, slots) == slots)
        write_to(swap, entry, slot);
}

/* Slots for all that is to be written, together where that can be. */
static void place(struct batch *batch)
{
    struct pv_swap *swap = batch->swap;
    uint32_t wanted = 0, run = 0, hopeless = UINT32_MAX;
    uint64_t slot = 0;
    pthread_mutex_lock(&swap->mutex);
    for (uint32_t i = 0; i < batch->used; i++) {
        replace(batch, &batch->entries[i]);
        wanted += batch->entries[i].what == ENTRY_STAYS ? slots_for(swap, batch->entries[i].size) : 0;
    }
    for (uint32_t i = 0; i < batch->used && wanted; i++) {
        uint32_t slots = slots_for(swap, batch->entries[i].size);
        if (batch->entries[i].what != ENTRY_STAYS)
            continue;
        wanted -= slots;
        if (run < slots && slots < hopeless) {
            while (!(run = slots_find(swap, wanted + slots, slots, &slot)) && swap->reserved)
                pthread_cond_wait(&swap->news, &swap->mutex);
            hopeless = run ? hopeless : slots; /* nor will more be found; smaller ones may still fit */
        }
        if (run < slots) {
            batch->error = -PV_SWAP_FULL;
            continue;
        }
        write_to(swap, &batch->entries[i], slot);
        slot += slots;
        run -= slots;
    }
    pthread_mutex_unlock(&swap->mutex);
}

static void not_written(struct batch *batch, uint32_t first, uint32_t end, int error)
{
    struct pv_swap *swap = batch->swap;
    pthread_mutex_lock(&swap->mutex);
    for (uint32_t i = first; i < end; i++)
        if (batch->entries[i].what == ENTRY_WRITTEN) {
            place_free(swap, batch->entries[i].page);
            batch->entries[i].what = ENTRY_STAYS;
        }
    pthread_mutex_unlock(&swap->mutex);
    batch->error = error;
}

/* A call for each run of slots. */
static void write_out(struct batch *batch)
{
    struct pv_swap *swap = batch->swap;
    struct iovec parts[PV_BLOCK_PAGES];
    for (uint32_t i = 0, next; i < batch->used; i = next) {
        uint32_t used = 0;
        uint64_t bytes = 0, first = 0;
        for (next = i; next < batch->used; next++) {
            const struct entry *entry = &batch->entries[next];
            if (entry->what != ENTRY_WRITTEN && next > i)
                continue;
            first = next == i && entry->what == ENTRY_WRITTEN ? slot_at(swap, entry->page) : first;
            if (entry->what != ENTRY_WRITTEN || slot_at(swap, entry->page) != first + (bytes >> swap->shift))
                break;
            size_t size = (size_t)slots_for(swap, entry->size) << swap->shift;
            if (used && (uint8_t *)parts[used - 1].iov_base + parts[used - 1].iov_len == entry->from)
                parts[used - 1].iov_len += size;
            else
                parts[used++] = (struct iovec){entry->from, size};
            bytes += size;
        }
        if (!bytes) {
            next = i + 1;
            continue;
        }
        int error = vector_whole(pwritev, swap->fd, parts, used, first << swap->shift);
        if (error) {
            not_written(batch, i, next, error == -ENODATA ? -EIO : error);
            continue;
        }
        count_up(&swap->told.writes, 1);
        count_up(&swap->told.bytes_written, bytes);
    }
}

/* Under the block's lock and the mutex. Did the page go out? */
static bool settle_entry(const struct batch *batch, const struct entry *entry)
{
    struct pv_swap *swap = batch->swap;
    struct pv_engine *engine = swap->engine;
    bool same = (engine->page_words[entry->page] & ~PV_PAGE_FAILED) == aside_word(batch);
    swap->told.late += !same;
    if (entry->what == ENTRY_WRITTEN || entry->what == ENTRY_SAVED) /* what came back may go out again as it was */
        place_state(swap, entry->page, same ? PLACE_LIVE : PLACE_KEPT);
    if (!same || entry->what == ENTRY_STAYS)
        return false;
    if (entry->what == ENTRY_ZERO) {
        page_set(engine, entry->page, PV_HOME_ZERO);
    } else {
        page_set(engine, entry->page, swap_word(slot_at(swap, entry->page)));
        swap->records[entry->page].when = swap->clock & 0xffffffffffff;
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
static uint32_t settle_block(struct batch *batch, uint32_t first, uint32_t end)
{
    struct pv_swap *swap = batch->swap;
    struct pv_engine *engine = swap->engine;
    uint64_t block = batch->entries[first].page / PV_BLOCK_PAGES;
    uint32_t gone = 0;
    bool went[PV_BLOCK_PAGES], stays = false;
    block_lock(engine, block);
    pthread_mutex_lock(&swap->mutex);
    for (uint32_t i = first; i < end; i++) {
        stays = stays || batch->entries[i].what == ENTRY_STAYS;
        gone += went[i - first] = settle_entry(batch, &batch->entries[i]);
    }
    if (stays && !has_bit_at(swap->behind, block) && !has_bit_at(swap->again, block)) {
        put_bit(swap->behind, block, true);
        swap->told.behind++;
    }
    pthread_mutex_unlock(&swap->mutex);
    if (gone)
        settle_flags(engine, block);
    for (uint32_t i = first, run; i < end; i += run) {
        for (run = 1; i + run < end && went[i + run - first] == went[i - first] &&
                      batch->entries[i + run].page == batch->entries[i].page + run;)
            run++;
        if (went[i - first])
            (void)madvise(aside_at(engine, batch->entries[i].page), (size_t)run * PV_PAGE, MADV_DONTNEED);
    }
    block_unlock(engine, block);
    return gone;
}

int batch_write(struct batch *batch)
{
    struct pv_swap *swap = batch->swap;
    uint32_t gone = 0;
    pthread_mutex_lock(&swap->mutex);
    batch->ticket = ++swap->tickets;
    swap->busy++;
    pthread_mutex_unlock(&swap->mutex);
    collect(batch);
    sort_out(batch);
    compare(batch);
    compress(batch);
    place(batch);
    write_out(batch);
    for (uint32_t i = 0, end; i < batch->used; i = end) {
        uint64_t block = batch->entries[i].page / PV_BLOCK_PAGES;
        for (end = i + 1; end < batch->used && batch->entries[end].page / PV_BLOCK_PAGES == block;)
            end++;
        gone += settle_block(batch, i, end);
        queue_give(swap, block, false);
    }
    pthread_mutex_lock(&swap->mutex);
    if (batch->error) {
        swap->told.errors++;
        swap->told.error = -batch->error;
    }
    swap->busy--;
    pthread_cond_broadcast(&swap->news);
    pthread_mutex_unlock(&swap->mutex);
    return batch->error ? batch->error : (int)gone;
}

int pv_swap_step(struct pv_swap *swap) { return batch_write(&swap->batches[0]); }
