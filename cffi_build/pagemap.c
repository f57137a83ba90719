/* pagemap.c: the words of pages and blocks, the locks of blocks, and a look at what the kernel has mapped. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- a block's lock: the low half of its word is a futex, as in "Futexes Are Tricky" (U. Drepper), all woken ---- */

static uint32_t *low_half(const struct pv_engine *engine, uint64_t block)
{
    return (uint32_t *)&engine->block_words[block]; /* little-endian, as all of x86 */
}

void block_find(struct pv_engine *engine, uint64_t block)
{
    if (!(block_word(engine, block) & PV_BLOCK_PENDING))
        return;
    struct pv_home *home = &engine->homes[engine->source];
    uint64_t first = block * PV_BLOCK_PAGES, words[PV_BLOCK_PAGES];
    uint32_t count = pages_of_block(engine, block), homes[PV_HOMES] = {0};
    uint32_t flags = home->find(home->self, first, count, words);
    for (uint32_t i = 0; i < count; i++) {
        __atomic_store_n(&engine->page_words[first + i], words[i], __ATOMIC_RELAXED);
        homes[words[i] & (PV_HOMES - 1)]++;
    }
    for (uint32_t i = PV_HOME_PRESENT + 1; i < PV_HOMES; i++)
        atomic_fetch_add_explicit(&engine->home_counts[i], homes[i], memory_order_relaxed);
    uint32_t away = count - homes[PV_HOME_PRESENT];
    __atomic_fetch_add(&engine->block_words[block], (uint64_t)away << PV_BLOCK_AWAY_SHIFT, __ATOMIC_RELAXED);
    block_flags(engine, block, flags & (PV_BLOCK_UNITS | PV_BLOCK_SMALL | PV_BLOCK_BROKEN), PV_BLOCK_PENDING);
    span_add(engine, first, away);
    span_release(engine, first, 1, false);
}

bool block_trylock_plain(struct pv_engine *engine, uint64_t block)
{
    /* acquire: pairs with the release in block_unlock */
    return !(__atomic_fetch_or(low_half(engine, block), PV_BLOCK_LOCKED, __ATOMIC_ACQUIRE) & PV_BLOCK_LOCKED);
}

void block_lock_plain(struct pv_engine *engine, uint64_t block)
{
    uint32_t *word = low_half(engine, block), seen = __atomic_load_n(word, __ATOMIC_RELAXED);
    for (;;) {
        if (!(seen & PV_BLOCK_LOCKED)) {
            /* acquire: pairs with the release in block_unlock */
            if (__atomic_compare_exchange_n(word, &seen, seen | PV_BLOCK_LOCKED, true, __ATOMIC_ACQUIRE,
                                            __ATOMIC_RELAXED))
                return;
            continue;
        }
        if (!(seen & PV_BLOCK_WAITED)) {
            if (!__atomic_compare_exchange_n(word, &seen, seen | PV_BLOCK_WAITED, true, __ATOMIC_RELAXED,
                                             __ATOMIC_RELAXED))
                continue;
            seen |= PV_BLOCK_WAITED;
        }
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        seen = __atomic_load_n(word, __ATOMIC_RELAXED);
    }
}

void block_lock_as_is(struct pv_engine *engine, uint64_t block)
{
    block_lock_plain(engine, block);
    block_find(engine, block);
    if (live_on(engine))
        live_before(engine, block);
}

void block_lock(struct pv_engine *engine, uint64_t block)
{
    block_lock_as_is(engine, block);
    sample_before(engine, block);
}

void block_unlock(struct pv_engine *engine, uint64_t block)
{
    uint32_t *word = low_half(engine, block);
    /* release: pairs with the acquire in block_lock */
    uint32_t before = __atomic_fetch_and(word, ~(PV_BLOCK_LOCKED | PV_BLOCK_WAITED), __ATOMIC_RELEASE);
    if (before & PV_BLOCK_WAITED)
        syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* ---- words: changed by the lock's holder, but atomically, since waiters set their bit in the same word ---- */

uint64_t block_word(const struct pv_engine *engine, uint64_t block)
{
    return __atomic_load_n(&engine->block_words[block], __ATOMIC_RELAXED);
}

void block_flags(struct pv_engine *engine, uint64_t block, uint32_t set, uint32_t clear)
{
    __atomic_fetch_or(&engine->block_words[block], set, __ATOMIC_RELAXED);
    __atomic_fetch_and(&engine->block_words[block], ~(uint64_t)clear, __ATOMIC_RELAXED);
}

uint32_t block_away(const struct pv_engine *engine, uint64_t block)
{
    return block_word(engine, block) >> PV_BLOCK_AWAY_SHIFT & 0x3ff;
}

uint32_t block_pins(const struct pv_engine *engine, uint64_t block)
{
    return (uint32_t)(block_word(engine, block) >> PV_BLOCK_PINS_SHIFT);
}

void block_pin(struct pv_engine *engine, uint64_t block, int by)
{
    __atomic_fetch_add(&engine->block_words[block], (uint64_t)(int64_t)by << PV_BLOCK_PINS_SHIFT, __ATOMIC_RELAXED);
}

uint32_t page_home(const struct pv_engine *engine, uint64_t page)
{
    return __atomic_load_n(&engine->page_words[page], __ATOMIC_RELAXED) & PV_PAGE_HOME;
}

void page_set(struct pv_engine *engine, uint64_t page, uint64_t word)
{
    uint32_t before = page_home(engine, page), after = word & PV_PAGE_HOME;
    __atomic_store_n(&engine->page_words[page], word, __ATOMIC_RELAXED);
    if (before == after)
        return;
    int64_t away = (after != PV_HOME_PRESENT) - (before != PV_HOME_PRESENT);
    if (before != PV_HOME_PRESENT)
        atomic_fetch_sub_explicit(&engine->home_counts[before], 1, memory_order_relaxed);
    if (after != PV_HOME_PRESENT)
        atomic_fetch_add_explicit(&engine->home_counts[after], 1, memory_order_relaxed);
    if (away)
        __atomic_fetch_add(&engine->block_words[page / PV_BLOCK_PAGES], (uint64_t)away << PV_BLOCK_AWAY_SHIFT,
                           __ATOMIC_RELAXED);
    if (after != PV_HOME_PRESENT && after != PV_HOME_ASIDE)
        limit_shrunk(engine);
}

/* ---- what the kernel has mapped (Documentation/admin-guide/mm/pagemap.rst) ---- */

#define POPULATED (PAGE_IS_PRESENT | PAGE_IS_SWAPPED)
#define REGIONS 256
#define ENTRY_PRESENT (1ull << 63)
#define ENTRY_SWAPPED (1ull << 62)

/* Calls `see` for each populated run. Without PAGEMAP_SCAN (kernels before 6.7), or where it fails, large mappings look
 * small: what was moved must be seen, or it is lost. */
static int walk(struct pv_engine *engine, const uint8_t *base, uint64_t pages,
                void (*see)(void *into, uint64_t page, uint64_t count, bool large), void *into)
{
    uint64_t start = (uintptr_t)base, end = start + pages * PV_PAGE, at = start;
    if (engine->scans) {
        struct page_region found[REGIONS];
        while (at < end) {
            struct pm_scan_arg scan = {.size = sizeof(scan), .start = at, .end = end, .vec = (uintptr_t)found,
                                       .vec_len = REGIONS, .category_anyof_mask = POPULATED,
                                       .return_mask = POPULATED | PAGE_IS_HUGE};
            int count = ioctl(engine->pagemap, PAGEMAP_SCAN, &scan);
            if (count < 0)
                break;
            for (int i = 0; i < count; i++)
                see(into, (found[i].start - start) / PV_PAGE, (found[i].end - found[i].start) / PV_PAGE,
                    found[i].categories & PAGE_IS_HUGE);
            at = scan.walk_end;
        }
    }
    uint64_t entries[PV_BLOCK_PAGES];
    for (uint64_t page = (at - start) / PV_PAGE; page < pages; page += PV_BLOCK_PAGES) {
        uint64_t count = pages - page < PV_BLOCK_PAGES ? pages - page : PV_BLOCK_PAGES;
        ssize_t size = (ssize_t)(count * sizeof(entries[0]));
        ssize_t got = pread(engine->pagemap, entries, (size_t)size, (off_t)(start / PV_PAGE + page) * 8);
        if (got != size)
            return got < 0 ? -errno : -EIO;
        for (uint64_t i = 0; i < count; i++)
            if (entries[i] & (ENTRY_PRESENT | ENTRY_SWAPPED))
                see(into, page + i, 1, false);
    }
    return 0;
}

static void note_bits(void *into, uint64_t page, uint64_t count, bool large)
{
    struct populated *out = into;
    out->count += (uint32_t)count;
    if (large)
        out->large += (uint32_t)count;
    for (uint64_t i = page; i < page + count; i++)
        out->bits[i / 64] |= 1ull << i % 64;
}

int look_at(struct pv_engine *engine, const uint8_t *address, uint32_t pages, struct populated *out)
{
    memset(out, 0, sizeof(*out));
    return walk(engine, address, pages, note_bits, out);
}

int look_unprotected(struct pv_engine *engine, uint64_t page, uint32_t count, struct populated *out)
{
    memset(out, 0, sizeof(*out));
    uint64_t start = (uintptr_t)ram_at(engine, page), end = start + (uint64_t)count * PV_PAGE;
    struct page_region found[REGIONS];
    struct pm_scan_arg scan = {.size = sizeof(scan), .end = end, .vec = (uintptr_t)found, .vec_len = REGIONS,
                               .category_mask = PAGE_IS_WRITTEN, .category_anyof_mask = POPULATED,
                               .return_mask = PAGE_IS_WRITTEN};
    for (uint64_t at = start; engine->scans && at < end; at = scan.walk_end) {
        scan.start = at;
        int regions = ioctl(engine->pagemap, PAGEMAP_SCAN, &scan);
        if (regions < 0)
            return look_at(engine, ram_at(engine, page), count, out);
        for (int i = 0; i < regions; i++)
            note_bits(out, (found[i].start - start) / PV_PAGE, (found[i].end - found[i].start) / PV_PAGE, false);
    }
    return engine->scans ? 0 : look_at(engine, ram_at(engine, page), count, out);
}

int look_held(struct pv_engine *engine, uint64_t page, uint32_t count, struct populated *out)
{
    uint64_t block = page / PV_BLOCK_PAGES;
    block_find(engine, block);
    int error = look_at(engine, ram_at(engine, page), count, out);
    for (uint32_t i = 0; !error && block_away(engine, block) && i < count; i++) {
        uint32_t home = page_home(engine, page + i);
        uint64_t bit = 1ull << i % 64;
        if (home == PV_HOME_PRESENT)
            continue;
        out->count -= is_populated(out, i); /* what is away is where its word says, whatever is mapped */
        out->bits[i / 64] &= ~bit;
        if (home == PV_HOME_ZERO || home == PV_HOME_BALLOON)
            continue;
        out->bits[i / 64] |= bit;
        out->count++;
    }
    return error;
}

int pv_engine_held(struct pv_engine *engine, uint64_t page, uint64_t count, uint64_t *bits)
{
    if (page > engine->pages || count > engine->pages - page)
        return -EINVAL;
    for (uint64_t end = page + count; page < end;) {
        uint64_t block = page / PV_BLOCK_PAGES, next = (block + 1) * PV_BLOCK_PAGES;
        uint32_t part = (uint32_t)((next < end ? next : end) - page);
        struct populated seen;
        block_lock_plain(engine, block); /* nothing of it changes: a live save need not copy it */
        int error = look_held(engine, page, part, &seen);
        block_unlock(engine, block);
        if (error)
            return error;
        for (uint32_t i = 0, run; seen.count && i < part; i += run) {
            for (run = 1; i + run < part && is_populated(&seen, i + run) == is_populated(&seen, i); run++)
                ;
            if (is_populated(&seen, i))
                pv_bits_set(bits, page + i, run);
        }
        page += part;
    }
    return 0;
}

struct looks {
    uint64_t *large, *small;
    uint8_t *looks;
};

static void note_looks(void *into, uint64_t page, uint64_t count, bool large)
{
    struct looks *out = into;
    *(large ? out->large : out->small) += count;
    for (uint64_t i = page; out->looks && i < page + count;) {
        uint64_t block = i / PV_BLOCK_PAGES, next = (block + 1) * PV_BLOCK_PAGES;
        out->looks[block] = large ? PV_LOOK_LARGE : PV_LOOK_SMALL;
        i = next;
    }
}

void pv_engine_find_all(struct pv_engine *engine)
{
    for (uint64_t block = 0; block < engine->blocks; block++)
        if (block_word(engine, block) & PV_BLOCK_PENDING) {
            block_lock(engine, block);
            block_unlock(engine, block);
        }
}

static void note_any(void *into, uint64_t page, uint64_t count, bool large)
{
    (void)page;
    (void)large;
    *(uint64_t *)into += count;
}

int pv_engine_assign_all(struct pv_engine *engine, uint32_t home)
{
    if (home <= PV_HOME_ASIDE || home >= PV_HOMES || !engine->homes[home].find)
        return -EINVAL;
    int error = span_hold_all(engine, !engine->move);
    if (error)
        return error;
    uint64_t touched = 0;
    error = walk(engine, engine->ram, engine->pages, note_any, &touched);
    for (uint64_t block = 0; block < engine->blocks; block++)
        touched += block_away(engine, block);
    error = error ? error : touched ? -EEXIST : 0;
    engine->source = home;
    for (uint64_t block = 0; !error && block < engine->blocks; block++)
        block_flags(engine, block, PV_BLOCK_PENDING, 0);
    const uint64_t step = 1ull << (SPAN_SHIFT - 12); /* each block is a user of its span until its words are filled in */
    for (uint64_t page = 0; !error && page < engine->pages; page += step) {
        uint64_t left = engine->pages - page, in_span = left < step ? left : step;
        span_add(engine, page, (in_span + PV_BLOCK_PAGES - 1) / PV_BLOCK_PAGES);
    }
    span_release_all(engine, !engine->move);
    return error;
}

int pv_engine_look(struct pv_engine *engine, uint64_t *large, uint64_t *small, uint8_t *looks)
{
    pv_engine_find_all(engine);
    struct looks out = {.large = large, .small = small, .looks = looks};
    *large = *small = 0;
    if (looks)
        memset(looks, PV_LOOK_UNTOUCHED, engine->blocks);
    int error = walk(engine, engine->ram, engine->pages, note_looks, &out);
    for (uint64_t block = 0; looks && !error && block < engine->blocks; block++) {
        if (2 * block_away(engine, block) < pages_of_block(engine, block))
            continue;
        uint32_t homes[PV_HOMES] = {0}, most = PV_HOME_ZERO;
        for (uint32_t i = 0; i < pages_of_block(engine, block); i++)
            homes[page_home(engine, block * PV_BLOCK_PAGES + i) % PV_HOMES]++;
        for (uint32_t home = PV_HOME_ZERO; home < PV_HOMES; home++)
            most = homes[home] > homes[most] ? home : most;
        looks[block] = (uint8_t)(PV_LOOK_AWAY + most);
    }
    return error;
}

static void note_held(void *into, uint64_t page, uint64_t count, bool large)
{
    for (uint64_t block = page / PV_BLOCK_PAGES; block <= (page + count - 1) / PV_BLOCK_PAGES; block++)
        ((uint8_t *)into)[block] |= (uint8_t)(PV_HOLDS | (large ? PV_HOLDS_LARGE : 0));
}

int pv_engine_holds(struct pv_engine *engine, uint8_t *blocks)
{
    pv_engine_find_all(engine);
    memset(blocks, 0, engine->blocks);
    int error = walk(engine, engine->ram, engine->pages, note_held, blocks);
    for (uint64_t block = 0; !error && block < engine->blocks; block++) {
        if (!block_away(engine, block))
            continue;
        for (uint32_t i = 0; !(blocks[block] & PV_HOLDS) && i < pages_of_block(engine, block); i++) {
            uint32_t home = page_home(engine, block * PV_BLOCK_PAGES + i);
            blocks[block] |= home != PV_HOME_PRESENT && home != PV_HOME_ZERO && home != PV_HOME_BALLOON ? PV_HOLDS : 0;
        }
        if (blocks[block] & PV_HOLDS && !(block_word(engine, block) & PV_BLOCK_SMALL))
            blocks[block] |= PV_HOLDS_LARGE;
    }
    return error;
}

void pv_engine_count(struct pv_engine *engine, uint64_t *by_home, int *armed)
{
    uint64_t away = 0;
    pv_engine_find_all(engine);
    for (int home = PV_HOME_ZERO; home < PV_HOMES; home++) {
        by_home[home] = atomic_load_explicit(&engine->home_counts[home], memory_order_relaxed);
        away += by_home[home];
    }
    by_home[PV_HOME_PRESENT] = engine->pages - away;
    *armed = 0;
    pthread_mutex_lock(&engine->span_mutex);
    for (uint64_t span = 0; span < (engine->size + (1ull << SPAN_SHIFT) - 1) >> SPAN_SHIFT; span++)
        *armed |= engine->spans[span].modes != 0;
    pthread_mutex_unlock(&engine->span_mutex);
}

uint64_t pv_engine_at_home(struct pv_engine *engine, uint32_t home, uint64_t *bits)
{
    uint64_t found = 0;
    pv_engine_find_all(engine);
    for (uint64_t block = 0; block < engine->blocks; block++)
        for (uint32_t i = 0; block_away(engine, block) && i < pages_of_block(engine, block); i++)
            if (page_home(engine, block * PV_BLOCK_PAGES + i) == home) {
                pv_bits_set(bits, block * PV_BLOCK_PAGES + i, 1);
                found++;
            }
    return found;
}
