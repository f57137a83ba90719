/* live_inside.h: what the files of the live save share; live.c says how it works. */
#pragma once

#include "engine_inside.h"

/* Of a block: its protection is on, or not (or not for all of it); or it is saved, and nothing of it matters any more. */
enum { OPEN, ARMED, SAVED };

/* The bytes of a block's pages, for the drain thread. */
struct live_copy {
    struct live_copy *next;
    uint8_t *bytes; /* PV_BLOCK of room; only pages in `held` are there */
    uint64_t block;
    uint64_t held[PV_BLOCK_PAGES / 64];
    bool extra; /* not of the pool: given back when it is written */
};

static inline bool copy_has(const struct live_copy *copy, uint32_t index)
{
    return copy->held[index / 64] >> index % 64 & 1;
}

/* ---- live_block.c: the session's mode, and one block under its lock ---- */

uint32_t live_mode(const struct live *live);
void live_set_mode(struct live *live, uint32_t mode); /* under the mutex */
/* Nothing more is saved: the first cause is the one that is told. */
void live_stop(struct live *live, int error, uint32_t cause, uint64_t page, uint32_t home);
uint8_t live_state(const struct live *live, uint64_t block);
void live_set_state(struct live *live, uint64_t block, uint8_t state);
/* Which pages hold something: those that are populated, and those in a home that is not zeros. */
int live_see(struct pv_engine *engine, uint64_t block, struct live_copy *out, uint32_t *count) PV_CHECKED;
/* Their bytes. */
int live_read(struct pv_engine *engine, struct live_copy *copy) PV_CHECKED;
/* Of blocks from `first` to before `end`. */
int live_protect(struct pv_engine *engine, uint64_t first, uint64_t end, bool on) PV_CHECKED;
/* The block is saved: copy has its bytes for the drain thread, NULL: it has them, or there are none. */
void live_note_saved(struct live *live, struct live_copy *copy, uint64_t block, bool before);
void live_give(struct live *live, struct live_copy *copy);

/* ---- live_drain.c: the thread that writes ---- */

int live_start_drain(struct pv_engine *engine) PV_CHECKED;
