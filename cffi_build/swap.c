/* swap.c: the swap file: its beginning and its end. */
#define _GNU_SOURCE
#include "swap_inside.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

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
    unmap_table(swap->records, swap->pages, sizeof(struct record));
    unmap_table(swap->slot_of, swap->pages, sizeof(uint32_t));
    unmap_table(swap->page_at, slots, sizeof(uint32_t));
    unmap_table(swap->holders, slots, sizeof(uint32_t));
    unmap_table(swap->taken, slots / 64 + 1, sizeof(uint64_t));
    unmap_table(swap->filled, slots / 64 + 1, sizeof(uint64_t));
    for (uint32_t i = 0; swap->batches && i < swap->writers; i++) {
        unmap_table(swap->batches[i].copies, PV_BLOCK_PAGES, PV_PAGE);
        unmap_table(swap->batches[i].packed, PV_BLOCK_PAGES, PV_PAGE);
    }
    free(swap->batches);
    free(swap->loose);
    free(swap->writing);
    free(swap->again);
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

uint32_t pv_swap_slot(int codec) { return codec == PV_CODEC_RAW ? PV_PAGE : 1u << PACKED_SHIFT; }

/* While one writes, another one compares and compresses; more of them are of use for that alone. */
static bool make_batches(struct pv_swap *swap)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    uint32_t most = swap->codec == PV_CODEC_RAW ? 2 : WRITERS;
    swap->writers = cpus < 1 ? 1 : cpus < (long)most ? (uint32_t)cpus : most;
    swap->batches = calloc(swap->writers, sizeof(*swap->batches));
    for (uint32_t i = 0; swap->batches && i < swap->writers; i++) {
        struct batch *batch = &swap->batches[i];
        batch->swap = swap;
        batch->copies = map_table(PV_BLOCK_PAGES, PV_PAGE);
        batch->packed = swap->codec == PV_CODEC_RAW ? NULL : map_table(PV_BLOCK_PAGES, PV_PAGE);
        if (!batch->copies || (swap->codec != PV_CODEC_RAW && !batch->packed))
            return false;
    }
    return swap->batches;
}

static int make_tables(struct pv_swap *swap, uint64_t slots)
{
    uint64_t bits = swap->engine->blocks / 64 + 1;
    swap->records = map_table(swap->pages, sizeof(struct record));
    swap->slot_of = map_table(swap->pages, sizeof(uint32_t));
    swap->page_at = map_table(slots, sizeof(uint32_t));
    swap->holders = map_table(slots, sizeof(uint32_t));
    swap->taken = map_table(slots / 64 + 1, sizeof(uint64_t));
    swap->filled = map_table(slots / 64 + 1, sizeof(uint64_t)); /* needs as many at most */
    swap->loose = calloc(slots / PV_BLOCK_PAGES / 64 + 1, sizeof(uint64_t));
    swap->ring = calloc(swap->engine->blocks, sizeof(uint32_t));
    swap->waits = calloc(bits, sizeof(uint64_t));
    swap->behind = calloc(bits, sizeof(uint64_t));
    swap->writing = calloc(bits, sizeof(uint64_t));
    swap->again = calloc(bits, sizeof(uint64_t));
    if (!swap->records || !swap->slot_of || !swap->page_at || !swap->holders || !swap->taken || !swap->filled || !swap->loose ||
        !swap->ring || !swap->waits || !swap->behind || !swap->writing || !swap->again || !make_batches(swap))
        return -ENOMEM;
    swap->taken[slots / 64] = ~0ull << slots % 64; /* there are no more */
    return pv_digest_key_make(&swap->key, 0);
}

int pv_swap_open(struct pv_engine *engine, int fd, uint64_t slots, int codec, struct pv_swap **out)
{
    bool fits = slots && slots <= PV_SWAP_SLOTS && engine->pages <= PV_SWAP_SLOTS;
    int error = fits ? pv_codec_available(codec) : -EINVAL;
    struct pv_swap *swap = error ? NULL : calloc(1, sizeof(*swap));
    if (!swap) {
        close(fd);
        return error ? error : -ENOMEM;
    }
    swap->engine = engine;
    swap->pages = engine->pages;
    swap->fd = fd;
    swap->codec = codec;
    swap->shift = codec == PV_CODEC_RAW ? PAGE_SHIFT : PACKED_SHIFT;
    swap->order = FIRST_ORDER;
    swap->told.slots = swap->told.free = slots;
    swap->told.slot_bytes = pv_swap_slot(codec);
    init_locks(swap);
    error = make_tables(swap, slots);
    if (error) {
        pv_swap_close(swap);
        return error;
    }
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
    out->stored = bytes_stored(swap);
    pthread_mutex_unlock(&swap->mutex);
}
