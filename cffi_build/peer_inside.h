/* peer_inside.h: what peerhome.c and inbox.c share. */
#pragma once

#include "engine_inside.h"

struct pv_peer {
    struct pv_engine *engine;
    uint64_t *large; /* NULL: all blocks are to be large */
    bool store;
    pthread_mutex_t asking; /* who has requests under way; outer to the next one */
    pthread_mutex_t mutex;
    pthread_cond_t news;      /* of any of these */
    struct pv_stream *stream; /* NULL but when CONNECTED */
    bool busy;                /* who holds `asking` uses a stream, maybe one that has been given up */
    struct pv_peer_told told;
};

static inline bool has_bit(const uint64_t *bits, uint64_t at) { return bits[at / 64] >> at % 64 & 1; }

/* Does a block with so many pages to come stay small, as it was at the source? */
static inline bool peer_small(const struct pv_peer *peer, uint64_t block, uint32_t to_come)
{
    return peer->large && to_come < SPARSE && !has_bit(peer->large, block);
}

/* Until the next call this thread fetches those pages of the home from there which are in the inbox, and asks for no
 * others that it can do without. NULL: no more. */
void peer_stage(const struct pv_peer *peer, const struct pv_inbox *inbox);
