/* peer.h: post-copy: a guest runs here, and some of its pages are still with the migration source (technique of
 * docs/migration-protocol.md, "Post-copy"). peerhome.c and inbox.c are the destination's side, serve.c the source's. All without the
 * GIL. What the other side sends may be hostile, as in stream.h. */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* ---- peerhome.c: the home PEER ---- */

#define PV_PEER_APART 0     /* no connection: who needs a page waits for one */
#define PV_PEER_CONNECTED 1
#define PV_PEER_ENDED 2     /* no page comes any more */

struct pv_peer;

struct pv_peer_told {
    uint32_t state;            /* PV_PEER_* */
    uint32_t fault;            /* PV_FAULT_* of `frame`, where error is EBADMSG */
    int error;                 /* positive errno: why the last connection broke, or the end; 0: none has */
    struct pv_run_frame frame; /* the last of such a connection */
    uint64_t breaks;
    uint64_t requests, pages;  /* asked for and answered; a request that a break undid is not counted */
    uint64_t nanoseconds, longest; /* from the first request of what was asked for at once to the last answer */
};

/* large: NULL, or a bit a block: it is a large page at the source; one without its bit that has little to come stays small.
 * store: a touch brings up to 16 neighbouring pages (PV_UNIT_STORE), else one. The engine stays until pv_peer_close. */
int pv_peer_open(struct pv_engine *engine, const uint64_t *large, int store, struct pv_peer **out) PV_CHECKED;
/* After the engine's end. */
void pv_peer_close(struct pv_peer *peer);
/* For pv_engine_home(PV_HOME_PEER): its struct, of which the engine takes a copy. */
void pv_peer_home(struct pv_peer *peer, struct pv_home *out);

/* A connection for requests, which are sent on it by whoever needs a page, one after the other. `stream` stays until the
 * state is another one; the one before is not used any more when this returns. -ECANCELED after the end. Who waits for a
 * page holds the lock of its block: a receiver may wait for that, so that this comes before a receiver is waited for. */
int pv_peer_connect(struct pv_peer *peer, struct pv_stream *stream) PV_CHECKED;
/* The connection is not to be used any more, and its socket is shut down. Who needs a page waits for another one. */
void pv_peer_break(struct pv_peer *peer);
/* The same for good: who needs a page is told -error. The first error is the one that counts. */
void pv_peer_end(struct pv_peer *peer, int error);
/* Waits until there is no connection, for so long at most: the state. */
int pv_peer_wait(struct pv_peer *peer, uint32_t milliseconds) PV_CHECKED;
void pv_peer_look(struct pv_peer *peer, struct pv_peer_told *out);

/* ---- inbox.c: what the source sends by itself ---- */

/* What one channel has received and not installed yet: pages of one block. Zeros at first. */
struct pv_inbox {
    uint64_t block, settled;            /* settled: 1 + the block that was merged last */
    uint32_t count;                     /* pages in it, a page that came twice counted twice */
    uint64_t came, dropped, failed;     /* pages; of these, here already; and blocks that could not be installed as wished */
    uint64_t pages[PV_BLOCK_PAGES / 64], zeros[PV_BLOCK_PAGES / 64];
    uint8_t bytes[PV_BLOCK];
};

/* Receives BYTES and ZEROS of round 0 until END (PV_RECV_END, and *end), or until `limit` pages or more have come (0):
 * then it is to be called again. A block is installed when all of it that is still with the source has come, or when
 * frames of another one come: as a large page where it is to be one. Whole blocks of zeros stay unpopulated. A page that
 * is here already is dropped: the guest may have written to it. What cannot be installed stays with the source, which
 * gives it when it is asked for it. Errors as pv_recv_frame, with *end what came last; also -EINVAL. */
int pv_peer_receive(struct pv_peer *peer, struct pv_inbox *inbox, struct pv_stream *stream, uint64_t limit,
                    struct pv_run_frame *end) PV_CHECKED;

/* ---- serve.c: the source, whose VM stands still ---- */

struct pv_served {
    uint64_t requests, pages, zero_pages; /* asked for; of these pages, those that went without being looked at */
    uint64_t nanoseconds, longest;        /* from a request to its answer, on this side */
    uint64_t touched;                     /* 1 + the page that was asked for last; 0: none */
};

/* Answers requests until the other side ends the connection (0), or -errno: as pv_recv_frame, with *frame what came, as
 * pv_send_runs, or as pv_engine_pin. sent: a bit for each page that has been given to a connection. */
int pv_serve(struct pv_engine *engine, struct pv_stream *stream, uint64_t *sent, struct pv_served *told,
             struct pv_run_frame *frame) PV_CHECKED;
/* Sends those pages of blocks that have not been sent, in round 0, and adds them to *pages. zeros: pages that are found to
 * hold nothing but zeros go as such. Several threads may do this for the same blocks. Errors as above. */
int pv_send_rest(struct pv_engine *engine, struct pv_stream *stream, uint64_t *sent, uint64_t block, uint64_t blocks,
                 int zeros, uint64_t *pages) PV_CHECKED;
