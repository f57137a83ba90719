/* swap_inside.h: what the files of the home SWAP share. Its mutex is the innermost lock, inside that of a block. */
#pragma once

#include "engine_inside.h"

#include <sys/uio.h>

/* What a slot is. BUSY: its page is being written, or compared with it; only the writer's. */
enum { SLOT_FREE, SLOT_BUSY, SLOT_LIVE, SLOT_KEPT };

struct slot {
    uint64_t digest[2];
    uint64_t owner; /* page << 2 | SLOT_* */
    uint64_t when;  /* pages that had gone out until then */
};

/* Touches that follow each other: the unit that came last, and how much comes next. */
struct stream {
    uint64_t first, last; /* pages */
    uint64_t used;        /* when, in touches */
    uint32_t order;       /* 2^order slots */
};
#define STREAMS 8
#define FIRST_ORDER 4 /* 64 KiB */
#define MOST_ORDER 9  /* a block */
#define REACH 4       /* 2^4 pages beyond a unit: there a touch goes on */

/* A page on its way out. slot: where it is, or is to be; only of WRITTEN and SAVED. */
struct entry {
    uint64_t page, digest[2];
    uint32_t slot;
    enum { ENTRY_STAYS, ENTRY_ZERO, ENTRY_WRITTEN, ENTRY_SAVED } what;
};

struct pv_swap {
    struct pv_engine *engine;
    uint64_t pages;           /* of RAM: known also when the engine has ended */
    int fd;
    struct pv_digest_key key;

    pthread_mutex_t mutex;    /* of all that follows until `entries` */
    struct slot *table;
    uint64_t *taken;          /* a bit a slot that is not FREE */
    uint32_t *slot_of;        /* 1 + slot of each page of RAM that has one, LIVE or KEPT */
    uint64_t cursor, hand;    /* where to look for free slots, and for those to give up */
    struct stream streams[STREAMS];
    uint32_t order;           /* of a new one: less with each touch that goes on nowhere */
    uint64_t touches, clock;  /* clock: pages that have gone out */
    struct pv_swap_told told; /* counters of reads: by atomic additions, without the mutex */
    pthread_cond_t work, news;
    uint32_t *ring;           /* blocks to be written, each once: `told.queued` of them from `head` on */
    uint64_t head;
    uint64_t *waits, *behind; /* a bit a block: it is in the ring; something of it could not be written */
    bool busy, ending, threaded;
    pthread_t thread;

    struct entry entries[PV_BLOCK_PAGES]; /* the writer's own: a batch, and the copies of its pages */
    uint8_t *copies;
    uint32_t used;
    uint64_t ticket;          /* in the words of the pages that the batch has copied: are they still those? */
    int error;                /* of this batch */
};

static inline uint32_t slot_state(const struct slot *slot) { return slot->owner & 3; }
static inline uint64_t slot_page(const struct slot *slot) { return slot->owner >> 2; }
static inline uint64_t swap_word(uint64_t slot) { return slot << PV_PAGE_LOCATOR_SHIFT | PV_HOME_SWAP; }
static inline bool has_bit_at(const uint64_t *bits, uint64_t at) { return bits[at / 64] >> at % 64 & 1; }

/* ---- swap.c ---- */

/* Under the mutex: changes what a slot is, for whom, and the counts. */
void slot_set(struct pv_swap *swap, uint64_t slot, uint64_t page, uint32_t state);
/* Up to `count` free slots that follow each other, BUSY from now on; 0: none is left, and none is kept to be given up. */
uint32_t slots_take(struct pv_swap *swap, uint32_t count, uint64_t *first);

/* ---- swap_in.c: the functions of the home ---- */

/* All of it, by preadv or pwritev, which may do a part: 0 or -errno; -ENODATA where the file ends before. Changes parts. */
typedef ssize_t vector_call(int fd, const struct iovec *parts, int count, off_t offset);
int vector_whole(vector_call *call, int fd, struct iovec *parts, uint32_t count, uint64_t offset) PV_CHECKED;

int swap_fetch(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to) PV_CHECKED;
int swap_scatter(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to) PV_CHECKED;
int swap_gather(void *self, uint64_t page, uint64_t word, struct pv_unit *unit) PV_CHECKED;
int swap_read(void *self, const struct pv_unit *unit, const uint8_t **bytes) PV_CHECKED;
void swap_forget(void *self, uint64_t page, uint32_t count, const uint64_t *words);
