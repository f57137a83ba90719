/* passes.h: pages stamped in a first pass, then checked in pass after pass while some are rewritten, by all CPUs.
 *
 * Nothing is remembered: the bytes of page p follow from (seed, p, version), and the version is the last pass so far in
 * which a hash of (seed, p, pass) said "write". Pass 0 writes all. Pass n >= 1 looks at each page once: it must have
 * the version of pass n - 1, and is rewritten if the hash says so for n.
 *
 *     key     = mix(mix(seed) + p * GOLDEN)
 *     writes  = n == 0 or mix(~key + n * GOLDEN) % 100 < write=
 *
 * Page p is CPU p % cpus's. Its pages in order are cpu + cpus * i, or with order=random cpu + cpus * shuffled(i) with
 * the key mix(~mix(seed) + n). CPUs do not wait for each other.
 *
 * What the host may rely on, at whatever instruction a CPU is stopped: work[cpu].pass = n, the present pass, and
 * work[cpu].index = i, the place in it, change together, by one 16-byte store, after the last store to the page. So the
 * CPU's pages at places < i have the version of pass n, those at places > i that of pass n - 1 (before that of pass 0:
 * anything), and of the page at i each 8-byte word is of one or the other. After the last pass, N: n = N + 1, i = 0.
 * count (pages checked: not pass 0) and writes follow later, and are for people. */
#pragma once

#include "stamp.h"

struct passes {
    struct region region;
    uint64_t pages, mixed_seed;
    uint64_t write;  /* per cent of the pages */
    uint64_t passes; /* 0: for ever */
    bool shuffles;
    unsigned cpus;
};
extern struct passes passes;

/* ---- what the guest that calls passes_run() defines ---- */
extern struct content (*content_of)(uint64_t page, uint64_t key, uint64_t version);
/* A page is not as it must be in a pass. Does not return. */
extern void (*on_wrong)(uint64_t page, uint64_t pass);

/* Takes seed=, write= (or else `write`), passes=, order= and size=. */
void passes_options(uint64_t write);
/* Returns when all passes are through. */
int passes_run(void);

static inline uint64_t key_of(uint64_t page) { return mix(passes.mixed_seed + page * GOLDEN); }
uint64_t version_of(uint64_t key, uint64_t pass);
/* What the page must be like before it is visited in a pass >= 1. */
static inline struct content content_before(uint64_t page, uint64_t pass)
{
    return content_of(page, key_of(page), version_of(key_of(page), pass - 1));
}
