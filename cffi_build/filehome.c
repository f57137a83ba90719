/* filehome.c: the home FILE: pages that are still in a snapshot file (technique T3, US9053065B2). Without the GIL, from
 * the engine's thread and any other. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A locator: how many parents up the file is, the storage block there, the slot in it. */
#define SLOT_BITS 9
#define BLOCK_BITS 38

static uint32_t slot_of(uint64_t locator) { return locator & (PV_STORE_SLOTS - 1); }
static uint64_t block_of(uint64_t locator) { return locator >> SLOT_BITS & ((1ull << BLOCK_BITS) - 1); }
static uint32_t up_of(uint64_t locator) { return (uint32_t)(locator >> (SLOT_BITS + BLOCK_BITS)); }

/* Pages of one storage block that lie together are read with one read of it. */
int pv_file_fetch(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to)
{
    struct pv_file_home *home = self;
    uint64_t pages[PV_STORE_SLOTS], loaded = UINT64_MAX;
    struct pv_stored row = {0};
    uint8_t *bytes = malloc(PV_STORE_MAX);
    int error = bytes ? 0 : -ENOMEM;
    for (uint32_t i = 0; !error && i < count; i++) {
        uint64_t locator = words[i] >> PV_PAGE_LOCATOR_SHIFT;
        uint32_t up = up_of(locator), slot = slot_of(locator);
        if (up >= home->files)
            error = -EUCLEAN;
        else if (locator >> SLOT_BITS != loaded)
            error = pv_snapshot_read(home->file[up], block_of(locator), &row, pages, bytes);
        if (!error && (slot >= row.slots || pages[slot] != page + i))
            error = -EUCLEAN; /* the file's maps do not agree */
        if (error)
            break;
        if (locator >> SLOT_BITS != loaded) {
            __atomic_fetch_add(&home->reads, 1, __ATOMIC_RELAXED);
            __atomic_fetch_add(&home->bytes_read, row.length, __ATOMIC_RELAXED);
        }
        loaded = locator >> SLOT_BITS;
        memcpy(to + (size_t)i * PV_PAGE, bytes + (size_t)slot * PV_PAGE, PV_PAGE);
    }
    free(bytes);
    return error;
}

/* The word of a page that nobody has touched: zeros, or where the youngest file of the chain that has it keeps it. */
static int word_for(const struct pv_file_home *home, uint64_t page, uint64_t *word)
{
    for (uint32_t up = 0; up < home->files; up++) {
        uint64_t found;
        int error = pv_snapshot_page(home->file[up], page, &found);
        if (error)
            return error;
        if ((found & PV_INDEX_KIND) == PV_INDEX_PARENT)
            continue;
        uint64_t locator = (uint64_t)up << (SLOT_BITS + BLOCK_BITS) | found >> PV_INDEX_SLOT_SHIFT;
        *word = (found & PV_INDEX_KIND) == PV_INDEX_ZERO ? PV_HOME_ZERO
                                                          : locator << PV_PAGE_LOCATOR_SHIFT | PV_HOME_FILE;
        return 0;
    }
    return -EUCLEAN; /* the oldest file refers to a parent */
}

static int assign_block(struct pv_engine *engine, const struct pv_file_home *home, uint64_t block)
{
    uint64_t first = block * PV_BLOCK_PAGES, words[PV_BLOCK_PAGES];
    uint32_t count = pages_of_block(engine, block);
    int error = 0;
    for (uint32_t i = 0; !error && i < count; i++)
        error = word_for(home, first + i, &words[i]);
    error = error ? error : span_hold(engine, first, !engine->move);
    if (error)
        return error;
    block_lock(engine, block);
    struct populated seen;
    error = look_at(engine, ram_at(engine, first), count, &seen);
    error = error ? error : seen.count || block_away(engine, block) ? -EEXIST : 0;
    for (uint32_t i = 0; !error && i < count; i++)
        page_set(engine, first + i, words[i]);
    if (!error)
        span_add(engine, first, count);
    block_unlock(engine, block);
    span_release(engine, first, 1, !engine->move);
    return error;
}

int pv_file_assign(struct pv_engine *engine, const struct pv_file_home *home)
{
    int error = 0;
    for (uint64_t block = 0; !error && block < engine->blocks; block++)
        error = assign_block(engine, home, block);
    return error;
}
