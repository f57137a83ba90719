/* engine_inside.h: what the files of the memory engine share. Locks, from outer to inner: a block's lock, the staging
 * slots, the trace's mutex, that of a live save, the mutex of the spans. */
#pragma once

#include "native.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#define SPAN_SHIFT 30 /* userfaultfd is armed and disarmed by GiB */
#define SLOTS 4       /* staging blocks */
#define SPARSE 128u   /* pages up to which a block that was small at its source stays so: as it was, it costs less */

/* One GiB of RAM as userfaultfd sees it. */
struct span {
    uint64_t users;  /* pages away, and operations and traces that need faults to be reported */
    uint64_t wp_users; /* of these, those that need write protection */
    uint64_t modes;  /* UFFDIO_REGISTER_MODE_* in force; 0: not registered */
};

struct trace {
    pthread_mutex_t mutex; /* held while a page's mark and its protection change */
    uint32_t urgent;       /* threads that want the mutex and for which a vCPU may wait */
    bool on;
    uint32_t shift, refine;
    uint64_t *marks;  /* written since the last collection: one bit a page */
    uint8_t *streaks; /* successive rounds in which a block was written; REFINED: traced by small pages */
    uint8_t *hits;    /* faults of a refined block in this round */
    uint64_t fine_faults, round_began; /* faults of refined blocks since, in ns */
    struct pv_trace_stats stats;
};

struct live_copy;

/* A live save (live.c); all but what is said under its mutex, which comes inside a block's lock. */
struct live {
    pthread_mutex_t mutex;
    pthread_cond_t room, work, ended; /* a free buffer; something for the drain thread; the mode has changed */
    uint32_t mode;                    /* PV_LIVE_*: changed under the mutex, read without */
    bool closing, claimed, threaded;  /* closing: the engine ends, and no session begins any more */
    bool stuck;                       /* protection could not be taken away somewhere: all is tried again at the end */
    pthread_t thread;
    struct pv_pack *pack;             /* the drain thread's */
    uint8_t *states, *large;          /* one a block, under the block's lock */
    uint8_t *pool;                    /* `buffers` blocks, and the drain thread's own */
    uint32_t buffers;
    uint64_t cursor;                  /* the drain thread's: the next block to look at */
    uint64_t moves;                   /* changes that may give the drain thread something to do */
    struct live_copy *copies, *own, *free, *first, **last; /* of the pool; free ones; those to be written, in order */
    struct pv_live_progress told;
};

/* How much may be resident (limit.c). Its mutex is an innermost lock. */
struct limit {
    pthread_mutex_t mutex;
    pthread_cond_t above, below; /* more is resident than `wake`; some of it has gone */
    uint64_t most, wake;         /* pages; UINT64_MAX: there is no limit. Read without the mutex */
    uint64_t clock;              /* pages that have left memory */
    uint64_t *whole_at, *dense_at; /* of a block, under its lock: 1 + clock when it, or the first pieces of it, came; and
                                      when it was dense; or 0 */
    uint32_t waiting;            /* faults */
    bool ending, stuck;          /* stuck: nothing more can go, so no fault waits */
    struct pv_limit_told told;
};

/* A block's last sample (sample.c), under its lock. */
struct sample {
    uint64_t begun; /* pv_now() */
    uint32_t limit;
    struct pv_sample told;
};

struct pv_engine {
    uint8_t *ram, *aside, *staging, *zero;
    uint64_t size, pages, blocks;
    uint64_t *page_words, *block_words;
    struct sample *samples; /* one a block; costs nothing where there was none */
    struct pv_sample_counts sampling; /* by atomic additions */
    struct pv_home homes[PV_HOMES];

    int uffd, aside_uffd, pagemap, wake; /* wake: an eventfd that ends the thread */
    bool move, poison, scans;            /* scans: the kernel has PAGEMAP_SCAN */

    pthread_mutex_t span_mutex;
    struct span *spans;
    pthread_t threads[PV_MAX_WORKERS];
    uint32_t workers, threaded; /* wanted and running; under span_mutex */
    uint32_t waiting;           /* faults that have been read and not answered */

    uint32_t source; /* the home that knows where pages of PENDING blocks are */
    uint32_t unit;   /* PV_UNIT_* */
    uint64_t touched; /* the block of the last touch of a page that was away */
    uint64_t *record, record_room, recorded;

    pthread_mutex_t slot_mutex;
    pthread_cond_t slot_free;
    uint32_t slots_taken;

    struct trace trace;
    struct live live;
    struct limit limit;

    pthread_mutex_t fail_mutex;
    pthread_cond_t fail_news;
    struct pv_failure failure;
    uint64_t failed_first, failed_end; /* all pages with PV_PAGE_FAILED are among these */
    uint64_t failures_told;
    bool failures_ended;

    const struct pv_vcpu *vcpus[PV_MAX_CPUS];
    atomic_uint_fast64_t home_counts[PV_HOMES]; /* pages by home; PRESENT stays 0 */
    struct pv_engine_stats stats;               /* written by relaxed atomic additions */
};

/* ---- small things ---- */

static inline void count_up(uint64_t *counter, uint64_t by) { __atomic_fetch_add(counter, by, __ATOMIC_RELAXED); }

static inline void note_longest(uint64_t *longest, uint64_t value)
{
    uint64_t before = __atomic_load_n(longest, __ATOMIC_RELAXED);
    while (value > before &&
           !__atomic_compare_exchange_n(longest, &before, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        ;
}

uint64_t pv_now(void); /* ns, CLOCK_MONOTONIC */

/* Of a home: a positive result would be taken for an answer. */
static inline int home_result(int result) { return result > 0 ? -EIO : result; }

static inline uint8_t *ram_at(const struct pv_engine *engine, uint64_t page) { return engine->ram + page * PV_PAGE; }
static inline uint8_t *aside_at(const struct pv_engine *engine, uint64_t page)
{
    return engine->aside + page * PV_PAGE;
}
static inline uint32_t pages_of_block(const struct pv_engine *engine, uint64_t block)
{
    uint64_t left = engine->pages - block * PV_BLOCK_PAGES;
    return left < PV_BLOCK_PAGES ? (uint32_t)left : PV_BLOCK_PAGES;
}

/* ---- pagemap.c: words, locks, and what the kernel has mapped ---- */

/* Whoever locks a block may change what it holds, or where that is: while a live save runs, it is saved first; if it is
 * sampled, that ends. */
void block_lock(struct pv_engine *engine, uint64_t block);
/* The same, but a block that is sampled stays so: for touches, and the sampling itself. */
void block_lock_as_is(struct pv_engine *engine, uint64_t block);
/* Without all that: for the live save itself. */
void block_lock_plain(struct pv_engine *engine, uint64_t block);
bool block_trylock_plain(struct pv_engine *engine, uint64_t block) PV_CHECKED;
void block_unlock(struct pv_engine *engine, uint64_t block);
/* Fills in the words of a PENDING block's pages: under its lock; block_lock does it. */
void block_find(struct pv_engine *engine, uint64_t block);
/* All of these under the block's lock. */
uint64_t block_word(const struct pv_engine *engine, uint64_t block);
void block_flags(struct pv_engine *engine, uint64_t block, uint32_t set, uint32_t clear);
uint32_t block_away(const struct pv_engine *engine, uint64_t block);
uint32_t block_pins(const struct pv_engine *engine, uint64_t block);
void block_pin(struct pv_engine *engine, uint64_t block, int by);
uint32_t page_home(const struct pv_engine *engine, uint64_t page);
/* Changes a page's word and all counts that hang on it, but not the span's users. */
void page_set(struct pv_engine *engine, uint64_t page, uint64_t word);

/* Populated pages of at most a block, a bit each; *large: so many of them in a large mapping. 0 or -errno. */
struct populated {
    uint64_t bits[PV_BLOCK_PAGES / 64];
    uint32_t count, large;
};
int look_at(struct pv_engine *engine, const uint8_t *address, uint32_t pages, struct populated *out);
/* The same of those that hold something, in the guest or in a home that is not zeros: of one block, under its lock. */
int look_held(struct pv_engine *engine, uint64_t page, uint32_t count, struct populated *out);
/* The pages of a range of RAM that are populated and not write-protected by userfaultfd; of others too, maybe. */
int look_unprotected(struct pv_engine *engine, uint64_t page, uint32_t count, struct populated *out);
static inline bool is_populated(const struct populated *seen, uint32_t index)
{
    return seen->bits[index / 64] >> index % 64 & 1;
}

static inline bool to_be_large(const struct pv_engine *engine, uint64_t block)
{
    return !(block_word(engine, block) & PV_BLOCK_SMALL) && pages_of_block(engine, block) == PV_BLOCK_PAGES;
}

/* ---- uffd.c: the ioctls, with EAGAIN and partial results dealt with. 0 or -errno ---- */

int uffd_copy(struct pv_engine *engine, void *to, const void *from, uint64_t size, uint64_t mode);
int uffd_zero(struct pv_engine *engine, void *to, uint64_t size);
/* Moves what is populated; holes stay holes. */
int uffd_move(struct pv_engine *engine, int fd, void *to, void *from, uint64_t size);
int uffd_protect(struct pv_engine *engine, void *address, uint64_t size, bool on);
void uffd_wake(struct pv_engine *engine, void *address, uint64_t size);

/* Faults of the span of `page` are reported from here on until span_release; wp: write protection is possible too. */
int span_hold(struct pv_engine *engine, uint64_t page, bool wp) PV_CHECKED;
/* The same, but only if they are reported already: are they? */
bool span_keep(struct pv_engine *engine, uint64_t page) PV_CHECKED;
void span_add(struct pv_engine *engine, uint64_t page, uint64_t users); /* while held */
void span_release(struct pv_engine *engine, uint64_t page, uint64_t users, bool wp);
int span_hold_all(struct pv_engine *engine, bool wp) PV_CHECKED;
void span_release_all(struct pv_engine *engine, bool wp);

/* ---- fault.c: the thread ---- */

int fault_thread_start(struct pv_engine *engine) PV_CHECKED; /* under span_mutex; once */
void fault_thread_end(struct pv_engine *engine);
void fail(struct pv_engine *engine, uint64_t page, int error);

/* ---- install.c, remove.c: under the block's lock ---- */

/* Brings the bytes of pages that share a home, and leaves them where they are. 0 or -errno. */
int fetch(struct pv_engine *engine, uint64_t page, uint32_t count, uint8_t *to) PV_CHECKED;
/* MADV_COLLAPSE: 512 small pages become a large one. 0 or -errno. */
int collapse_small(void *block) PV_CHECKED;
/* Brings pages of one block back, the whole block where it is to be large and all of it is away. Answer or -errno. */
int bring(struct pv_engine *engine, uint64_t page, uint32_t count);
/* These pages and no others, as small ones. */
int bring_small(struct pv_engine *engine, uint64_t page, uint32_t count);
/* All of a block of which all is away, as a large page. Answer or -errno. */
int bring_block(struct pv_engine *engine, uint64_t page);
/* Pages whose bytes are at `from`, as small ones. 0 or -errno. */
int put_pages(struct pv_engine *engine, uint64_t page, uint32_t count, const uint8_t *from);
/* These pages have come, or need not come any more. moved: those that were aside are not there any more. */
void now_present(struct pv_engine *engine, uint64_t page, uint32_t count, bool moved);
/* A touch of a page that is PRESENT and not populated. Answer or -errno. */
int bring_untouched(struct pv_engine *engine, uint64_t page, bool written);

/* Takes what is populated into the aside area, and sets the words by what the kernel then has where. Pages gone, or
 * -errno. One block, its span held; without UFFDIO_MOVE, for write protection too. */
int take_out(struct pv_engine *engine, uint64_t page, uint32_t count);
void count_op(struct pv_engine *engine, int op, uint64_t since, int result);

/* ---- balloon.c: under the block's lock ---- */

/* After pages have come to the home BALLOON, or left it: by which pages does the block come back? */
void balloon_settle(struct pv_engine *engine, uint64_t block);
/* Is any page of it there? Who fills all of RAM leaves it. */
bool balloon_keeps(const struct pv_engine *engine, uint64_t block);

/* ---- unit.c: how much comes together ---- */

/* Others of a unit, which are in other blocks than the one that is locked. */
struct others {
    struct pv_unit unit;
    const uint8_t *bytes;
    uint64_t block;
};
/* A touch of a page that is away. Answer or -errno; call bring_others when the block is unlocked. */
int bring_touched(struct pv_engine *engine, uint64_t page, struct others *others);
void bring_others(struct pv_engine *engine, const struct others *others);
/* Pages of a block with units, by units of what is in this block. Answer or -errno. */
int bring_units(struct pv_engine *engine, uint64_t page, uint32_t count);
/* All of a block, as a large page where that can be: small pages that are there are put together with the rest. */
int bring_whole(struct pv_engine *engine, uint64_t page);
/* Pages of the locked block have come. */
void note_recorded(struct pv_engine *engine, uint64_t page, uint32_t count);

/* ---- sample.c ---- */

/* Called by block_lock() with the lock held: a block that is sampled is made as it was. */
void sample_before(struct pv_engine *engine, uint64_t block);
/* A touch of a page of a sampled block that is away. Answer or -errno. */
int bring_sampled(struct pv_engine *engine, uint64_t page);

/* ---- coarse.c: around whatever makes pages appear in the guest ---- */

void trace_enter(struct pv_engine *engine);
/* Marks what appeared, and may be written without a fault from now on. */
void trace_leave(struct pv_engine *engine, uint64_t page, uint32_t count);
/* A write to a protected page: marks it and lifts the protection. 0 or -errno. */
int trace_fault(struct pv_engine *engine, uint64_t page);

/* ---- sharing.c: blocks that the kernel may merge pages of; under the block's lock, but for the _all ---- */

bool block_mergeable(const struct pv_engine *engine, uint64_t block);
/* Gives merged pages of one block their own memory, and none is merged until share_go_on; nothing for other blocks. */
int share_suspend(struct pv_engine *engine, uint64_t page, uint32_t count) PV_CHECKED;
void share_go_on(struct pv_engine *engine, uint64_t page, uint32_t count);
int share_suspend_all(struct pv_engine *engine) PV_CHECKED;
void share_go_on_all(struct pv_engine *engine);
int share_begin(struct pv_engine *engine, uint64_t block) PV_CHECKED;
int share_end(struct pv_engine *engine, uint64_t block) PV_CHECKED;

/* ---- live.c ---- */

void live_init(struct live *live);
void live_deinit(struct live *live);
/* Called by block_lock() with the lock held. */
void live_before(struct pv_engine *engine, uint64_t block);
bool live_on(const struct pv_engine *engine);
/* From the first moment of a session to the last. */
bool live_claimed(struct pv_engine *engine);

/* ---- limit.c ---- */

void limit_init(struct limit *limit);
void limit_deinit(struct limit *limit);
/* Pages have come; have left memory. */
void limit_grown(struct pv_engine *engine);
void limit_shrunk(struct pv_engine *engine);
/* A block has come as a whole; all of one has gone. Under its lock. */
void limit_came_whole(struct pv_engine *engine, uint64_t block);
void limit_gone_whole(struct pv_engine *engine, uint64_t block);
/* A touch of a block that comes in pieces: is it dense, and to come whole from now on? */
bool limit_is_dense(struct pv_engine *engine, uint64_t block) PV_CHECKED;
/* Before a fault is answered that brings more: waits until there is room for that, or for long enough. No lock held. */
void limit_wait(struct pv_engine *engine, uint64_t page);
