/* swap_inside.h: what the files of the home SWAP share. Its mutex is the innermost lock, inside that of a block. */
#pragma once

#include "engine_inside.h"

#include <sys/uio.h>

/* Slots: of a page each; with compression smaller ones, of which a page takes as many neighbours as it needs. All that is
 * known of a page in the file is kept by its number in RAM, since it has one place there at most. */
#define PAGE_SHIFT 12
#define PACKED_SHIFT 9 /* 512 bytes */
#define NEAR 8         /* slots of a gap that is read, and not used, since one read is faster than two */

/* What a page's place is. BUSY: it is being written, or compared; only the writer's who has its block. */
enum { PLACE_NONE, PLACE_BUSY, PLACE_LIVE, PLACE_KEPT };

struct record {
    uint64_t digest[2];
    uint64_t when : 48, size : 13, state : 3; /* pages that had gone out until then; bytes stored: PV_PAGE: as they are */
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

/* A page on its way out. from, size: what is to be stored of it. */
struct entry {
    uint64_t page, digest[2];
    uint8_t *from;
    uint32_t size;
    enum { ENTRY_STAYS, ENTRY_ZERO, ENTRY_WRITTEN, ENTRY_SAVED } what;
};

/* What one writer has under way: entries of blocks that are in no other batch, and copies of their pages. */
struct batch {
    struct pv_swap *swap;
    struct entry entries[PV_BLOCK_PAGES];
    uint8_t *copies, *packed;
    uint32_t used;
    bool whole, anew;         /* it is a block; and all of that is to lie together again */
    uint64_t ticket;          /* in the words of the pages that it has copied: are they still those? */
    int error;
    pthread_t thread;
};
#define WRITERS 4

struct pv_swap {
    struct pv_engine *engine;
    uint64_t pages;           /* of RAM: known also when the engine has ended */
    int fd, codec;
    uint32_t shift;           /* of a slot's bytes */
    struct pv_digest_key key;

    pthread_mutex_t mutex;    /* of all that follows */
    struct record *records;   /* of each page of RAM */
    uint32_t *slot_of;        /* 1 + first slot of each page of RAM that has a place */
    uint32_t *page_at;        /* 1 + page whose first slot this is */
    uint64_t *taken;          /* a bit a slot that is some page's, or has another holder */
    uint32_t *holders;        /* references to the place that begins with this slot */
    uint64_t *filled, *loose; /* a bit for 4 KiB of the file: written to, and takes disk space; one for 2 MiB: something
                                 there was freed, so that some space may be given back */
    uint64_t loosened;        /* bits of `loose` */
    uint64_t reserved;        /* slots that are taken while a hole is made of them */
    uint64_t cursor, hand;    /* where to look for free slots, and for those to give up */
    struct stream streams[STREAMS];
    uint32_t order;           /* of a new one: less with each touch that goes on nowhere */
    uint64_t touches, clock;  /* clock: pages that have gone out */
    struct pv_swap_told told; /* counters of reads: by atomic additions, without the mutex */
    pthread_cond_t work, news;
    uint32_t *ring;           /* blocks to be written, each once: `told.queued` of them from `head` on */
    uint64_t head;
    uint64_t *waits, *behind; /* a bit a block: it is in the ring; something of it could not be written */
    uint64_t *writing, *again; /* ... it is in a batch; and is to be in the ring after that */
    uint64_t tickets;
    uint32_t busy, writers, threaded; /* batches under way; those that there may be; threads */
    bool ending, no_holes;
    struct batch *batches;
};

static inline uint64_t swap_word(uint64_t slot) { return slot << PV_PAGE_LOCATOR_SHIFT | PV_HOME_SWAP; }
static inline bool has_bit_at(const uint64_t *bits, uint64_t at) { return bits[at / 64] >> at % 64 & 1; }
static inline void put_bit(uint64_t *bits, uint64_t at, bool on)
{
    bits[at / 64] = (bits[at / 64] & ~(1ull << at % 64)) | (uint64_t)on << at % 64;
}
static inline uint32_t slots_for(const struct pv_swap *swap, uint32_t size)
{
    return (size + (1u << swap->shift) - 1) >> swap->shift;
}
/* Of a page that has a place. */
static inline uint64_t slot_at(const struct pv_swap *swap, uint64_t page) { return swap->slot_of[page] - 1; }
static inline uint32_t slots_of(const struct pv_swap *swap, uint64_t page)
{
    return slots_for(swap, swap->records[page].size);
}

/* ---- swap_slots.c: under the mutex ---- */

/* A page without a place gets one, BUSY: these slots must be free. */
void place_give(struct pv_swap *swap, uint64_t page, uint64_t slot, uint32_t size);
/* It is not the page's any more. Its slots are free, unless there are references to it. */
void place_free(struct pv_swap *swap, uint64_t page);
void slots_free(struct pv_swap *swap, uint64_t slot, uint32_t count);
void place_state(struct pv_swap *swap, uint64_t page, uint32_t state);
/* Free slots that follow each other from `at` on, `most` at most. */
uint32_t free_at(const struct pv_swap *swap, uint64_t at, uint32_t most);
/* Up to `count` free slots that follow each other, at least `least`; 0: nowhere so many, nor are kept, to be given up. */
uint32_t slots_find(struct pv_swap *swap, uint32_t count, uint32_t least, uint64_t *first);
/* The bytes that all slots together have which are some page's; those that are only referred to aside. */
uint64_t bytes_stored(const struct pv_swap *swap);

/* ---- swap_out.c ---- */

/* As pv_swap_step. */
int batch_write(struct batch *batch);

/* ---- swap_thread.c ---- */

/* The next block that waits, from now on this writer's; whoever puts it again meanwhile has it looked at once more. */
bool queue_take(struct pv_swap *swap, uint64_t *block);
/* Gives it back; waits: it is the next one again. */
void queue_give(struct pv_swap *swap, uint64_t block, bool waits);

/* ---- swap_in.c: the functions of the home ---- */

/* Something to be read: where it is, to where it goes, and where its stored bytes are meanwhile, if these are others. */
struct piece {
    uint64_t slot;
    const uint64_t *digest;
    uint8_t *to, *packed;
    uint32_t size;
};
/* A call for each run of slots, wherever its pages go; up to a block's worth, whose places stay. */
int read_pieces(struct pv_swap *swap, struct piece *pieces, uint32_t count, uint64_t *reads, uint64_t *bytes) PV_CHECKED;

/* All of it, by preadv or pwritev, which may do a part: 0 or -errno; -ENODATA where the file ends before. Changes parts. */
typedef ssize_t vector_call(int fd, const struct iovec *parts, int count, off_t offset);
int vector_whole(vector_call *call, int fd, struct iovec *parts, uint32_t count, uint64_t offset) PV_CHECKED;

int swap_fetch(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to) PV_CHECKED;
int swap_scatter(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to) PV_CHECKED;
int swap_gather(void *self, uint64_t page, uint64_t word, struct pv_unit *unit) PV_CHECKED;
int swap_read(void *self, const struct pv_unit *unit, const uint8_t **bytes) PV_CHECKED;
void swap_forget(void *self, uint64_t page, uint32_t count, const uint64_t *words);
