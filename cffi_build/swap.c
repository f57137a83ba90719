/* swap.c: the swap file: its slots, its beginning and its end. */
#define _GNU_SOURCE
#include "swap_inside.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define LOOK (4ull << 20) /* slots to look at for a run that is long enough, before a shorter one will do */

/* ---- slots ---- */

static uint64_t *count_of(struct pv_swap *swap, uint32_t state)
{
    return state == SLOT_LIVE ? &swap->told.live : state == SLOT_KEPT ? &swap->told.kept : NULL;
}

void slot_set(struct pv_swap *swap, uint64_t slot, uint64_t page, uint32_t state)
{
    struct slot *own = &swap->table[slot];
    uint64_t *before = count_of(swap, slot_state(own)), *after = count_of(swap, state), bit = 1ull << slot % 64;
    uint32_t *of = &swap->slot_of[page];
    if (before)
        --*before;
    own->owner = page << 2 | state;
    if (after)
        ++*after;
    if (state == SLOT_FREE) {
        swap->taken[slot / 64] &= ~bit;
        swap->told.free++;
        *of = *of == slot + 1 ? 0 : *of;
        return;
    }
    swap->told.free -= !(swap->taken[slot / 64] & bit);
    swap->taken[slot / 64] |= bit;
    *of = (uint32_t)slot + 1;
}

/* Slots that are kept for pages which are back: from where the last ones were given up, some 2 MiB at a time, so that what
 * goes out next can lie together. */
static void give_up(struct pv_swap *swap, uint64_t wanted)
{
    for (uint64_t looked = 0; swap->told.free < wanted && swap->told.kept && looked < swap->told.slots;) {
        for (uint32_t i = 0; i < PV_BLOCK_PAGES && swap->hand < swap->told.slots; i++, looked++, swap->hand++)
            if (slot_state(&swap->table[swap->hand]) == SLOT_KEPT) {
                slot_set(swap, swap->hand, slot_page(&swap->table[swap->hand]), SLOT_FREE);
                swap->told.given_up++;
            }
        swap->hand = swap->hand < swap->told.slots ? swap->hand : 0;
    }
}

static uint32_t run_at(const struct pv_swap *swap, uint64_t at, uint32_t most)
{
    uint32_t run = 0;
    while (run < most && at + run < swap->told.slots && !has_bit_at(swap->taken, at + run))
        run++;
    return run;
}

uint32_t slots_take(struct pv_swap *swap, uint32_t count, uint64_t *first)
{
    uint32_t best = 0;
    if (swap->told.free < count)
        give_up(swap, count);
    uint64_t at = swap->cursor, looked = 0;
    while (swap->told.free && best < count && looked <= swap->told.slots && (looked < LOOK || !best)) {
        uint64_t step = 64 - at % 64, open = ~swap->taken[at / 64] >> at % 64;
        if (open) {
            at += step = (uint64_t)__builtin_ctzll(open);
            uint32_t run = run_at(swap, at, count);
            if (run > best) {
                best = run;
                *first = at;
            }
            step += run;
            at += run;
        } else {
            at += step;
        }
        at = at < swap->told.slots ? at : 0;
        looked += step ? step : 1;
    }
    if (best)
        swap->cursor = *first + best < swap->told.slots ? *first + best : 0;
    return best;
}

/* ---- life ---- */

/* Zeros that cost nothing until they are written to. */
static void *map_table(uint64_t count, size_t size)
{
    void *found = mmap(NULL, count * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return found == MAP_FAILED ? NULL : found;
}

static void unmap_table(void *table, uint64_t count, size_t size)
{
    if (table)
        munmap(table, count * size);
}

void pv_swap_drop(struct pv_swap *swap)
{
    if (swap->fd >= 0)
        close(swap->fd);
    swap->fd = -1;
}

void pv_swap_close(struct pv_swap *swap)
{
    pv_swap_drop(swap);
    uint64_t slots = swap->told.slots;
    unmap_table(swap->table, slots, sizeof(struct slot));
    unmap_table(swap->taken, slots / 64 + 1, sizeof(uint64_t));
    unmap_table(swap->slot_of, swap->pages, sizeof(uint32_t));
    unmap_table(swap->copies, PV_BLOCK_PAGES, PV_PAGE);
    free(swap->ring);
    free(swap->waits);
    free(swap->behind);
    pthread_mutex_destroy(&swap->mutex);
    pthread_cond_destroy(&swap->work);
    pthread_cond_destroy(&swap->news);
    free(swap);
}

static void init_locks(struct pv_swap *swap)
{
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&swap->mutex, NULL);
    pthread_cond_init(&swap->work, &clock);
    pthread_cond_init(&swap->news, &clock);
    pthread_condattr_destroy(&clock);
}

int pv_swap_open(struct pv_engine *engine, int fd, uint64_t slots, struct pv_swap **out)
{
    struct pv_swap *swap = slots && slots <= PV_SWAP_SLOTS ? calloc(1, sizeof(*swap)) : NULL;
    if (!swap) {
        close(fd);
        return slots && slots <= PV_SWAP_SLOTS ? -ENOMEM : -EINVAL;
    }
    uint64_t bits = engine->blocks / 64 + 1;
    swap->engine = engine;
    swap->pages = engine->pages;
    swap->fd = fd;
    swap->order = FIRST_ORDER;
    swap->told.slots = swap->told.free = slots;
    init_locks(swap);
    swap->table = map_table(slots, sizeof(struct slot));
    swap->taken = map_table(slots / 64 + 1, sizeof(uint64_t));
    swap->slot_of = map_table(engine->pages, sizeof(uint32_t));
    swap->copies = map_table(PV_BLOCK_PAGES, PV_PAGE);
    swap->ring = calloc(engine->blocks, sizeof(uint32_t));
    swap->waits = calloc(bits, sizeof(uint64_t));
    swap->behind = calloc(bits, sizeof(uint64_t));
    bool all = swap->table && swap->taken && swap->slot_of && swap->copies && swap->ring && swap->waits && swap->behind;
    int error = all ? pv_digest_key_make(&swap->key) : -ENOMEM;
    if (error) {
        pv_swap_close(swap);
        return error;
    }
    swap->taken[slots / 64] = ~0ull << slots % 64; /* there are no more */
    *out = swap;
    return 0;
}

void pv_swap_home(struct pv_swap *swap, struct pv_home *out)
{
    *out = (struct pv_home){.fetch = swap_fetch, .forget = swap_forget, .gather = swap_gather, .read = swap_read,
                            .scatter = swap_scatter, .paced = 1, .self = swap};
}

void pv_swap_look(struct pv_swap *swap, struct pv_swap_told *out)
{
    pthread_mutex_lock(&swap->mutex);
    *out = swap->told;
    pthread_mutex_unlock(&swap->mutex);
}
