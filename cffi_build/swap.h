/* swap.h: the home SWAP: pages in a file of the VMM's own, in slots of a page, or compressed in smaller
 * ones. All without the GIL.
 *
 * A page goes out in two steps: aside, in one step while the guest runs (pv_engine_remove), then to the file by a thread
 * that copies it under its block's lock and writes the copy without any lock. So nobody who touches the page meanwhile
 * waits for the disk: it comes back from the aside area, and what was written of it is of no use any more. A page comes
 * back by a touch, and keeps its slot: if it goes out again unchanged, nothing is written. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define PV_SWAP_FULL 105 /* ENOBUFS: no slot is left (ENOSPC: the disk is full) */
#define PV_SWAP_SLOTS ((1ull << 32) - 2)

struct pv_swap;

struct pv_swap_told {
    uint64_t slots, free, slot_bytes;   /* of the file */
    uint64_t live, kept, stored;        /* pages: there; that have come back, unchanged as far as known; bytes of both */
    uint64_t queued, behind;            /* blocks to be written; blocks of which something could not be written */
    uint64_t out, zeros, saved, late;   /* pages that went out; of these, zeros, which take no slot, and what its slot
                                           had still; pages that came back while they were written */
    uint64_t came, ahead, refaults;     /* pages that came back; that were read with a touched one; that came back
                                           before as many others had gone out as were in RAM */
    uint64_t writes, bytes_written, reads, bytes_read; /* calls that moved something, and what */
    uint64_t given_up;                  /* slots that were kept, until the file was full */
    uint64_t given_back;                /* bytes of disk space */
    uint64_t references, referred, held; /* of others than pages; slots that they have; of these, no page's any more */
    uint64_t ref_reads, ref_bytes_read; /* for them, and not counted above */
    uint64_t errors;                    /* times that something could not be written */
    int error;                          /* positive errno of the last time */
};

/* ---- digest.c: which pages are alike, also where a guest would have others seem so ---- */

struct pv_digest_key {
    uint64_t words[514], last[6];
    uint64_t polynomials; /* as fast as this CPU can */
};

/* 0 or -errno of getrandom. plain: as every CPU can. */
int pv_digest_key_make(struct pv_digest_key *key, int plain) PV_CHECKED;
/* Of a page of 4 KiB. */
void pv_digest(const struct pv_digest_key *key, const uint8_t *page, uint64_t digest[2]);

/* ---- swap.c ---- */

/* The bytes of a slot, with this codec. */
uint32_t pv_swap_slot(int codec);
/* A swap of so many slots, up to PV_SWAP_SLOTS, in the file `fd`: the swap's own from then on, also after an error.
 * codec: PV_CODEC_*. -ELIBACC where its library is not here. */
int pv_swap_open(struct pv_engine *engine, int fd, uint64_t slots, int codec, struct pv_swap **out) PV_CHECKED;
/* For pv_engine_home(PV_HOME_SWAP): its struct, of which the engine takes a copy. */
struct pv_home;
void pv_swap_home(struct pv_swap *swap, struct pv_home *out);
/* After pv_swap_end, when no page is in it any more: gives up the file. */
void pv_swap_drop(struct pv_swap *swap);
/* After pv_swap_end and the engine's end. */
void pv_swap_close(struct pv_swap *swap);
void pv_swap_look(struct pv_swap *swap, struct pv_swap_told *out);

/* ---- swap_refs.c: places that have other holders than a page: blocks of a guest's disk (technique T6, US9342248B2) ---- */

#define PV_REF_NONE 0 /* refers to nothing */
#define PV_REF_SLOT 1
#define PV_REF_ZERO 2 /* to zeros, which are stored nowhere */
struct pv_swap_ref {
    uint64_t digest[2];
    uint32_t slot;
    uint16_t size, what;
};

/* What became of a page that was to be referred to. */
#define PV_REFER_BYTES 0 /* nothing: it is in memory, or in another home */
#define PV_REFER_SLOT 1
#define PV_REFER_ZERO 2
#define PV_REFER_FULL 3 /* nothing: it is in the file, of which no more may be held */

/* Of `count` pages, up to a block's worth: refs[i] refers from now on to what page + i has at this moment, where that is in
 * the file or known to be zeros, and to nothing else any more. Others stay as they are. Nothing is read, and no page comes
 * back. became: PV_REFER_* of each. look: nothing changes, `became` is FULL for what is in the file. */
int pv_swap_refer(struct pv_swap *swap, uint64_t page, uint32_t count, struct pv_swap_ref *refs, uint8_t *became,
                  int look) PV_CHECKED;
/* Copies of references, which hold the places too. */
void pv_swap_hold(struct pv_swap *swap, const struct pv_swap_ref *refs, uint32_t count);
/* They refer to nothing any more: what has no holder, and is no page's, is free. */
void pv_swap_unrefer(struct pv_swap *swap, struct pv_swap_ref *refs, uint32_t count);
/* Their bytes, each to its place in `to`, read in the order of the slots; what belongs to NONE stays as it is. Nobody may
 * change the references meanwhile. How many reads that took, or -errno: -EBADMSG where the file has other bytes than were written. */
int pv_swap_read_refs(struct pv_swap *swap, const struct pv_swap_ref *refs, uint32_t count, uint8_t *to) PV_CHECKED;

/* ---- swap_thread.c ---- */

/* Starts the threads that write. */
int pv_swap_start(struct pv_swap *swap) PV_CHECKED;
/* Ends them: what has not been written yet is aside. Twice is once. */
void pv_swap_end(struct pv_swap *swap);
/* Takes pages of one block out of the guest, and has all of the block that is aside written soon. As pv_engine_remove. */
int pv_swap_out(struct pv_swap *swap, uint64_t page, uint32_t count) PV_CHECKED;
/* Has all of a block that is aside written soon, and takes nothing more out of the guest. */
void pv_swap_put(struct pv_swap *swap, uint64_t block);
/* Waits until at most so many blocks wait to be written, for so long at most: 1, or 0 where that was not enough. */
int pv_swap_wait(struct pv_swap *swap, uint64_t most, uint32_t milliseconds) PV_CHECKED;
/* Has what could not be written tried again. */
void pv_swap_retry(struct pv_swap *swap);

/* ---- swap_out.c, swap_slots.c: what the threads do, for tests that start none ---- */

/* Over and over: writes up to 512 pages of blocks that wait. How many went out, or -errno: others are aside still. */
int pv_swap_step(struct pv_swap *swap) PV_CHECKED;
/* When nothing has had to be written for a while: gives back disk space that no page takes. How many bytes. */
uint64_t pv_swap_punch(struct pv_swap *swap);
