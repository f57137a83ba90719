/* install.c: how pages come back: fetched from their homes, put together in staging, installed in one step. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>
#include <sched.h>
#include <string.h>

#define COLLAPSE_NS 20000000ull /* until a page in use is one that stays so: nobody waits for the large page */

/* ---- staging: a few blocks in which a large page is put together ---- */

static int slot_take(struct pv_engine *engine)
{
    pthread_mutex_lock(&engine->slot_mutex);
    while (engine->slots_taken == (1u << SLOTS) - 1)
        pthread_cond_wait(&engine->slot_free, &engine->slot_mutex);
    int slot = __builtin_ctz(~engine->slots_taken);
    engine->slots_taken |= 1u << slot;
    pthread_mutex_unlock(&engine->slot_mutex);
    return slot;
}

static uint8_t *slot_at(struct pv_engine *engine, int slot) { return engine->staging + (size_t)slot * PV_BLOCK; }

/* Empty afterwards, its page table too, so that the next large page in it is whole and zeroed by the kernel. */
static void slot_give(struct pv_engine *engine, int slot)
{
    if (madvise(slot_at(engine, slot), PV_BLOCK, MADV_DONTNEED))
        memset(slot_at(engine, slot), 0, PV_BLOCK); /* locked memory: what is left would be taken for zeros */
    pthread_mutex_lock(&engine->slot_mutex);
    engine->slots_taken &= ~(1u << slot);
    pthread_cond_signal(&engine->slot_free);
    pthread_mutex_unlock(&engine->slot_mutex);
}

/* ---- homes ---- */

int fetch(struct pv_engine *engine, uint64_t page, uint32_t count, uint8_t *to)
{
    uint32_t home = page_home(engine, page);
    switch (home) {
    case PV_HOME_ZERO:
    case PV_HOME_BALLOON:
        memset(to, 0, (size_t)count * PV_PAGE);
        return 0;
    case PV_HOME_ASIDE:
        memcpy(to, aside_at(engine, page), (size_t)count * PV_PAGE);
        return 0;
    default:
        if (!engine->homes[home].fetch)
            return -ENXIO;
        return home_result(
            engine->homes[home].fetch(engine->homes[home].self, page, count, &engine->page_words[page], to));
    }
}

/* The pages are in the guest: their homes need not keep them. */
static void forget(struct pv_engine *engine, uint64_t page, uint32_t count, bool moved)
{
    struct pv_home *home = &engine->homes[page_home(engine, page)];
    if (page_home(engine, page) == PV_HOME_ASIDE) {
        if (engine->poison && !engine->move)
            memset(aside_at(engine, page), 0xa5, (size_t)count * PV_PAGE);
        if (!moved)
            (void)madvise(aside_at(engine, page), (size_t)count * PV_PAGE, MADV_DONTNEED);
    } else if (home->forget) {
        home->forget(home->self, page, count, &engine->page_words[page]);
    }
}

/* How many pages from `page` on, at most `limit`, share its home. */
static uint32_t alike(const struct pv_engine *engine, uint64_t page, uint32_t limit)
{
    uint32_t count = 1;
    while (count < limit && page_home(engine, page + count) == page_home(engine, page))
        count++;
    return count;
}

void now_present(struct pv_engine *engine, uint64_t page, uint32_t count, bool moved)
{
    uint32_t away = 0;
    if (engine->record)
        note_recorded(engine, page, count);
    for (uint32_t i = 0; i < count;) {
        uint32_t run = alike(engine, page + i, count - i);
        if (page_home(engine, page + i) != PV_HOME_PRESENT) {
            forget(engine, page + i, run, moved);
            away += run;
        }
        for (uint32_t last = i + run; i < last; i++)
            page_set(engine, page + i, PV_HOME_PRESENT);
    }
    bool all = !block_away(engine, page / PV_BLOCK_PAGES);
    block_flags(engine, page / PV_BLOCK_PAGES, 0, PV_BLOCK_ASIDE_LARGE | (all ? PV_BLOCK_UNITS | PV_BLOCK_TOUCHED : 0));
    if (all && block_word(engine, page / PV_BLOCK_PAGES) & PV_BLOCK_BALLOONED)
        balloon_settle(engine, page / PV_BLOCK_PAGES);
    if (away) {
        span_release(engine, page, away, false);
        limit_grown(engine);
    }
}

/* ---- whole blocks ---- */

int collapse_small(void *block)
{
    uint64_t begin = pv_now();
    while (madvise(block, PV_BLOCK, MADV_COLLAPSE)) {
        if (errno != EAGAIN || pv_now() - begin > COLLAPSE_NS) /* EAGAIN: a page is in use for the moment */
            return -errno;
        sched_yield();
    }
    return 0;
}

static bool is_large(struct pv_engine *engine, uint64_t page)
{
    struct populated seen;
    return engine->scans && look_at(engine, ram_at(engine, page), PV_BLOCK_PAGES, &seen) == 0 &&
           seen.large == PV_BLOCK_PAGES;
}

/* A 2 MiB page from `from` into an empty block of the guest, large if it can be. */
static int install_large(struct pv_engine *engine, uint64_t page, uint8_t *from)
{
    uint8_t *to = ram_at(engine, page);
    /* Nothing is there, but a page table may be: the kernel frees it (since 6.14), and the large page stays whole. */
    (void)madvise(to, PV_BLOCK, MADV_DONTNEED);
    trace_enter(engine);
    int error = engine->move ? uffd_move(engine, engine->uffd, to, from, PV_BLOCK)
                             : uffd_copy(engine, to, from, PV_BLOCK, UFFDIO_COPY_MODE_DONTWAKE);
    trace_leave(engine, page, PV_BLOCK_PAGES);
    bool large = !error && engine->move && is_large(engine, page);
    bool collapsed = !error && !large && collapse_small(to) == 0;
    if (!engine->move) /* only now, since a guest that uses the pages keeps them from being put together */
        uffd_wake(engine, to, PV_BLOCK);
    if (error)
        return error;
    if (large) {
        count_up(&engine->stats.kept_large, 1);
        return PV_ANSWER_BLOCK;
    }
    if (collapsed) {
        count_up(&engine->stats.collapsed, 1);
        return PV_ANSWER_COLLAPSED;
    }
    count_up(&engine->stats.stayed_small, 1); /* no free large page: the guest runs on with small ones */
    return PV_ANSWER_PAGES;
}

static bool reads_zero(uint32_t home) { return home == PV_HOME_ZERO || home == PV_HOME_BALLOON; }

/* A fresh slot reads as zeros: the kernel makes them once, we not again. */
static void make_zeros(uint8_t *slot)
{
    if (madvise(slot, PV_BLOCK, MADV_POPULATE_WRITE))
        memset(slot, 0, PV_BLOCK); /* a kernel before 5.14 */
}

/* Which of the homes of a block's pages give all of theirs at once: a bit each, and they have. Or -errno. */
static int scatter(struct pv_engine *engine, uint64_t page, uint8_t *slot)
{
    int homes = 0;
    for (uint32_t i = 0; i < PV_BLOCK_PAGES; i++)
        homes |= 1 << page_home(engine, page + i);
    for (uint32_t number = 0; number < PV_HOMES; number++) {
        const struct pv_home *home = &engine->homes[number];
        if (!home->scatter)
            homes &= ~(1 << number);
        if (!(homes >> number & 1))
            continue;
        int error =
            home_result(home->scatter(home->self, page, PV_BLOCK_PAGES, &engine->page_words[page], slot));
        if (error)
            return error;
    }
    return homes;
}

static int fill(struct pv_engine *engine, uint64_t page, uint8_t *slot)
{
    make_zeros(slot);
    if (engine->poison)
        memset(slot, 0xa5, PV_BLOCK);
    int scattered = scatter(engine, page, slot);
    if (scattered < 0)
        return scattered;
    for (uint32_t i = 0; i < PV_BLOCK_PAGES;) {
        uint32_t run = alike(engine, page + i, PV_BLOCK_PAGES - i), home = page_home(engine, page + i);
        bool done = scattered >> home & 1 || (!engine->poison && reads_zero(home));
        int error = done ? 0 : fetch(engine, page + i, run, slot + (size_t)i * PV_PAGE);
        if (error)
            return error;
        i += run;
    }
    return 0;
}

/* After an installation that stopped halfway: what is populated is present. The block's lock and the armed span see to
 * it that nobody else can have populated anything. */
static void settle(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    struct populated seen;
    if (look_at(engine, ram_at(engine, page), count, &seen))
        return;
    for (uint32_t i = 0; i < count; i++)
        if (is_populated(&seen, i) && page_home(engine, page + i) != PV_HOME_PRESENT)
            now_present(engine, page + i, 1, false);
}

int bring_block(struct pv_engine *engine, uint64_t page)
{
    int answer;
    bool whole = block_word(engine, page / PV_BLOCK_PAGES) & PV_BLOCK_ASIDE_LARGE;
    if (whole) {
        answer = install_large(engine, page, aside_at(engine, page));
    } else {
        int slot = slot_take(engine);
        answer = fill(engine, page, slot_at(engine, slot));
        if (!answer)
            answer = install_large(engine, page, slot_at(engine, slot));
        slot_give(engine, slot);
    }
    if (answer >= 0) {
        now_present(engine, page, PV_BLOCK_PAGES, whole && engine->move);
        limit_came_whole(engine, page / PV_BLOCK_PAGES);
    } else {
        settle(engine, page, PV_BLOCK_PAGES);
    }
    return answer;
}

/* ---- small pages ---- */

#define BATCH 16 /* pages fetched together: 64 KiB on the stack */

static bool moves(const struct pv_engine *engine, uint64_t page)
{
    return engine->move && page_home(engine, page) == PV_HOME_ASIDE;
}

static int bring_run(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    bool small = block_word(engine, page / PV_BLOCK_PAGES) & PV_BLOCK_SMALL, move = moves(engine, page);
    bool zeros = small && reads_zero(page_home(engine, page));
    uint8_t buffer[BATCH * PV_PAGE], *to = ram_at(engine, page);
    uint64_t size = (uint64_t)count * PV_PAGE;
    /* Zeros are stored in blocks that are to be large: a shared zero page in it would keep them apart (T1). */
    int error = move || zeros ? 0 : fetch(engine, page, count, buffer);
    if (error)
        return error;
    trace_enter(engine); /* not before: to fetch may take long */
    if (move)
        error = uffd_move(engine, engine->uffd, to, aside_at(engine, page), size);
    else
        error = zeros ? uffd_zero(engine, to, size) : uffd_copy(engine, to, buffer, size, 0);
    trace_leave(engine, page, count);
    return error;
}

int bring_small(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    for (uint32_t i = 0; i < count;) {
        uint32_t limit = count - i < BATCH ? count - i : BATCH, run = alike(engine, page + i, limit);
        if (page_home(engine, page + i) != PV_HOME_PRESENT) {
            bool moved = moves(engine, page + i);
            int error = bring_run(engine, page + i, run);
            if (error) {
                settle(engine, page + i, run);
                return error;
            }
            now_present(engine, page + i, run, moved);
        }
        i += run;
    }
    return PV_ANSWER_PAGES;
}

int put_pages(struct pv_engine *engine, uint64_t page, uint32_t count, const uint8_t *from)
{
    trace_enter(engine);
    int error = uffd_copy(engine, ram_at(engine, page), from, (uint64_t)count * PV_PAGE, 0);
    trace_leave(engine, page, count);
    if (error)
        settle(engine, page, count);
    else
        now_present(engine, page, count, false);
    return error;
}

int bring(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    uint64_t block = page / PV_BLOCK_PAGES, word = block_word(engine, block);
    if (word & PV_BLOCK_UNITS)
        return count == pages_of_block(engine, block) ? bring_whole(engine, page) : bring_units(engine, page, count);
    if (block_away(engine, block) == PV_BLOCK_PAGES && !(word & PV_BLOCK_SMALL))
        return bring_block(engine, block * PV_BLOCK_PAGES);
    return bring_small(engine, page, count);
}

static int fill_untouched(struct pv_engine *engine, uint64_t page, bool written)
{
    uint64_t block = page / PV_BLOCK_PAGES, first = block * PV_BLOCK_PAGES;
    bool small = block_word(engine, block) & PV_BLOCK_SMALL;
    bool whole = !small && !block_away(engine, block) && pages_of_block(engine, block) == PV_BLOCK_PAGES;
    struct populated seen; /* of one page, where that is enough: to look at 512 small ones takes 6 us */
    int error = look_at(engine, ram_at(engine, whole ? first : page), whole ? PV_BLOCK_PAGES : 1, &seen);
    if (error)
        return error;
    if (is_populated(&seen, whole ? page - first : 0)) {
        uffd_wake(engine, ram_at(engine, page), PV_PAGE);
        return PV_ANSWER_MERGED;
    }
    if (whole && seen.count == 0) {
        int slot = slot_take(engine);
        make_zeros(slot_at(engine, slot));
        int answer = install_large(engine, first, slot_at(engine, slot));
        slot_give(engine, slot);
        return answer;
    }
    trace_enter(engine);
    if (small && !written)
        error = uffd_zero(engine, ram_at(engine, page), PV_PAGE);
    else
        error = uffd_copy(engine, ram_at(engine, page), engine->zero, PV_PAGE, 0);
    trace_leave(engine, page, 1);
    if (error == -EEXIST || error == -ENOENT) { /* raced: it is there, or faults are no longer reported here */
        uffd_wake(engine, ram_at(engine, page), PV_PAGE);
        return PV_ANSWER_MERGED;
    }
    return error ? error : PV_ANSWER_PAGES;
}

/* Only while faults are reported there: else a vCPU may be populating and writing these very pages by itself, and they
 * would be dropped to make room for a large one. Who waits is woken all the same: the kernel wakes those in a range
 * before it unregisters that, and a fault under the lock of its VMA alone may come in between. */
int bring_untouched(struct pv_engine *engine, uint64_t page, bool written)
{
    if (!span_keep(engine, page)) {
        uffd_wake(engine, ram_at(engine, page), PV_PAGE);
        return PV_ANSWER_MERGED;
    }
    int answer = fill_untouched(engine, page, written);
    span_release(engine, page, 1, false);
    return answer;
}
