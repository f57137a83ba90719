/* scan.c: what each small page holds, as a hash, also inside large pages, which stay whole (technique T5, US9977747B2):
 * for an estimate alone, since two pages are equal only if their bytes are.
 *
 * Nothing is fetched and nothing made resident for it, and to read is no write: traces and live saves do not notice. A
 * block is locked for PART pages at a time: whoever waits for the lock meanwhile is a vCPU. */
#define _GNU_SOURCE
#include "engine_inside.h"
#include "zero.h"

#define PART 64u /* pages: some 30 us */

/* Pages of which the bytes are at hand are listed in `at`, and where their hashes go in `index`; the others are settled. */
struct part {
    const uint8_t *at[PART];
    uint32_t sizes[PART], index[PART], used;
};

static uint64_t settle(struct pv_engine *engine, uint64_t page, bool populated, const uint8_t **bytes)
{
    switch (page_home(engine, page)) {
    case PV_HOME_PRESENT:
        *bytes = populated ? ram_at(engine, page) : NULL;
        return PV_SCAN_NOTHING;
    case PV_HOME_ASIDE:
        *bytes = aside_at(engine, page);
        return PV_SCAN_NOTHING;
    case PV_HOME_ZERO:
    case PV_HOME_BALLOON:
        return PV_SCAN_NOTHING;
    default:
        return PV_SCAN_UNKNOWN;
    }
}

/* Under the block's lock: what is populated, or aside, stays so. */
static int scan_part(struct pv_engine *engine, uint64_t page, uint32_t count, uint64_t *hashes)
{
    struct populated seen;
    struct part part = {.used = 0};
    uint64_t found[PART];
    int error = look_at(engine, ram_at(engine, page), count, &seen);
    for (uint32_t i = 0; !error && i < count; i++) {
        const uint8_t *bytes = NULL;
        hashes[i] = settle(engine, page + i, is_populated(&seen, i), &bytes);
        if (!bytes)
            continue;
        if (is_zero(bytes)) {
            hashes[i] = PV_SCAN_ZERO;
            continue;
        }
        part.at[part.used] = bytes;
        part.sizes[part.used] = PV_PAGE;
        part.index[part.used++] = i;
    }
    if (error)
        return error;
    pv_hash_many(part.at, part.sizes, part.used, found);
    for (uint32_t i = 0; i < part.used; i++)
        hashes[part.index[i]] = found[i] < PV_SCAN_CONTENT ? found[i] + PV_SCAN_CONTENT : found[i];
    return 0;
}

int pv_scan(struct pv_engine *engine, uint64_t page, uint64_t count, uint64_t *hashes)
{
    if (page > engine->pages || count > engine->pages - page)
        return -EINVAL;
    for (uint64_t end = page + count; page < end;) {
        uint64_t block = page / PV_BLOCK_PAGES, next = (page / PART + 1) * PART;
        uint32_t part = (uint32_t)((next < end ? next : end) - page);
        int error = 0;
        block_lock_plain(engine, block); /* nothing of it changes: a live save need not copy it */
        if (block_word(engine, block) & PV_BLOCK_PENDING)
            for (uint32_t i = 0; i < part; i++)
                hashes[i] = PV_SCAN_UNKNOWN; /* to know more, its source would have to be asked */
        else
            error = scan_part(engine, page, part, hashes);
        block_unlock(engine, block);
        if (error)
            return error;
        hashes += part;
        page += part;
    }
    return 0;
}
