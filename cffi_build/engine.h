/* engine.h: guest memory in which every page has a home. What Python sees of it; its inside is engine_inside.h.
 *
 * A page is PRESENT (whatever the guest's mapping has there is its content, an unpopulated page reading as zeros) or
 * away, in exactly one home. Only the functions here put pages away and bring them back, under the lock of their 2 MiB
 * block, and whoever holds such a lock never touches guest memory through the guest's mapping: that could wait for a
 * fault that needs the lock. Pages and blocks are numbered by their place in the mapping of all RAM. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define PV_PAGE 4096u
#define PV_BLOCK (2u << 20)
#define PV_BLOCK_PAGES 512u

/* A page's word: its home in the low 4 bits, flags in the next 8, a locator for the home's own use in the rest. */
#define PV_HOME_PRESENT 0
#define PV_HOME_ZERO 1    /* all zeros, stored nowhere */
#define PV_HOME_ASIDE 2   /* in the aside area, at the same offset as in RAM */
#define PV_HOME_FILE 3    /* a block of a snapshot */
#define PV_HOME_SWAP 4    /* a slot of the swap file */
#define PV_HOME_PEER 5    /* still with the migration source */
#define PV_HOME_BALLOON 6 /* given up by the guest: zeros when it comes back */
#define PV_HOME_SHARED 7  /* one copy for several pages */
#define PV_HOMES 8
#define PV_PAGE_HOME 0xfull
#define PV_PAGE_FAILED (1ull << 4) /* could not be brought back when it was touched; waits for pv_engine_retry */
#define PV_PAGE_LOCATOR_SHIFT 12

/* A block's word. The low half is a futex. */
#define PV_BLOCK_LOCKED (1u << 0)
#define PV_BLOCK_WAITED (1u << 1)         /* someone sleeps on the lock */
#define PV_BLOCK_SMALL (1u << 2)          /* to be mapped by small pages: SPLIT or BROKEN, or asked for from the start */
#define PV_BLOCK_BROKEN (1u << 3)         /* its physical large page is given up, or there never was one */
#define PV_BLOCK_ASIDE_LARGE (1u << 4)    /* wholly aside, as one large page */
#define PV_BLOCK_PENDING (1u << 5)        /* the words of its pages are not filled in: the source of all RAM knows */
#define PV_BLOCK_UNITS (1u << 6)          /* some of its pages are, or were, in a home that gathers */
#define PV_BLOCK_TOUCHED (1u << 7)        /* and one such page has been touched */
#define PV_BLOCK_PIECES (1u << 10)        /* wholly gone, for want of memory: touches bring parts of it, until it is dense */
#define PV_BLOCK_BALLOONED (1u << 11)     /* SMALL only because the guest has given up a part of it: balloon.c */
#define PV_BLOCK_SAMPLED (1u << 8)        /* aside as one large page; those PRESENT are copies of it: sample.c */
#define PV_BLOCK_MERGEABLE (1u << 9)      /* the kernel may merge its pages with equal ones (KSM) */
#define PV_BLOCK_AWAY_SHIFT 16            /* pages away, 0 to 512: 10 bits */
#define PV_BLOCK_PINS_SHIFT 32            /* holders of a view, or copies under way: nothing is removed meanwhile */

#define PV_LATENCY_BUCKETS 40 /* bucket b counts faults that took 2^b to 2^(b+1)-1 ns */

/* How to work, for pv_engine_equip. */
#define PV_ENGINE_MOVE 1u   /* UFFDIO_MOVE; else by UFFDIO_COPY and MADV_COLLAPSE */
#define PV_ENGINE_POISON 2u /* 0xA5 into staging memory that holds nothing: debugging */

/* What to put away, for pv_engine_remove. */
#define PV_REMOVE_ASIDE 0 /* all pages; what was never populated goes to ZERO */
#define PV_REMOVE_ZERO 1  /* pages of zeros only, to ZERO: whole large pages, and small pages */

/* What can be asked of blocks: indices of pv_engine_stats.ops. */
#define PV_OP_REMOVE 0
#define PV_OP_INSTALL 1
#define PV_OP_SPLIT 2
#define PV_OP_MERGE 3
#define PV_OP_BREAK 4
#define PV_OP_STORE 5
#define PV_OPS 6

/* How a fault was answered: indices of pv_engine_stats.answers. */
#define PV_ANSWER_BLOCK 0     /* the whole block came back as a large page */
#define PV_ANSWER_COLLAPSED 1 /* ... of small pages, made large by MADV_COLLAPSE */
#define PV_ANSWER_PAGES 2     /* small pages */
#define PV_ANSWER_MERGED 3    /* it had come by an answer to another fault */
#define PV_ANSWER_TRACE 4     /* a write trace was lifted */
#define PV_ANSWER_FAILED 5
#define PV_ANSWER_UNIT 6 /* a unit of its home, as small pages */
#define PV_ANSWERS 7

struct pv_op_count {
    uint64_t done, failed, nanoseconds, longest;
};

struct pv_stall { /* of one vCPU, from where the engine read its fault to the answer */
    uint64_t faults, nanoseconds, longest;
};

struct pv_engine_stats {
    uint64_t faults;             /* messages read */
    uint64_t by_home[PV_HOMES];  /* PRESENT: pages never populated, write traces, and faults merged with others */
    uint64_t answers[PV_ANSWERS];
    uint64_t latency[PV_LATENCY_BUCKETS];
    uint64_t nanoseconds;        /* all latencies together */
    uint64_t retries;            /* EAGAIN: the kernel asked to try again */
    uint64_t arms, disarms;      /* registrations with userfaultfd */
    uint64_t kept_large, collapsed, stayed_small; /* whole large blocks that were installed */
    struct pv_op_count ops[PV_OPS];
    struct pv_stall stalls[PV_MAX_CPUS];
    struct pv_stall workers;     /* KVM's asynchronous page faults, for one of several vCPUs */
    struct pv_stall others;      /* threads of ours that are no vCPU */
};

/* How much comes with a touched page whose home gathers, for pv_engine_unit. */
#define PV_UNIT_ADAPTIVE 0 /* the unit of its home; with a second touch of the same block all of that, as a large page */
#define PV_UNIT_PAGE 1
#define PV_UNIT_STORE 2 /* the unit of its home */
#define PV_UNIT_LARGE 3 /* 2 MiB */

#define PV_MAX_WORKERS 8 /* threads that answer faults */

/* Pages that a home keeps together: their numbers, and the words that they have while they are there. */
struct pv_unit {
    uint32_t count;
    uint64_t pages[PV_BLOCK_PAGES], words[PV_BLOCK_PAGES];
};

/* A home that Python or another part of C provides. All return 0 or -errno (what else they return counts as -EIO); called under the block's lock, from the
 * engine's thread or any other, never from two threads for one block. */
struct pv_home {
    /* Brings `count` pages from `page` on, whose words are words[0..count), into `to`. */
    int (*fetch)(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to);
    /* Stores pages and says in locators[0..count) (52 bits) where. NULL: takes none. */
    int (*store)(void *self, uint64_t page, uint32_t count, const uint8_t *from, uint64_t *locators);
    /* The pages are back in the guest: their places may be given to others. NULL: nothing to do. */
    void (*forget)(void *self, uint64_t page, uint32_t count, const uint64_t *words);
    /* Of a source of all RAM: the words of `count` pages, the whole of a block. Returns flags of the block: UNITS, SMALL,
     * BROKEN. A page that cannot be found gets a word with which fetch() says why. NULL: it cannot be one. */
    uint32_t (*find)(void *self, uint64_t page, uint32_t count, uint64_t *words);
    /* Which pages come together with one whose word is `word`; none where that cannot be said. NULL: each for itself. */
    int (*gather)(void *self, uint64_t page, uint64_t word, struct pv_unit *unit);
    /* The bytes of all these pages; they stay until the thread's next read(), whatever it fetches meanwhile. */
    int (*read)(void *self, const struct pv_unit *unit, const uint8_t **bytes);
    /* As fetch(), but of `count` words only those of pages in this home, each page to its place in `to`: for a home that
     * answers faster when it is asked for all at once. NULL: run by run, by fetch(). */
    int (*scatter)(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to);
    void *self;
    uint32_t paced; /* gather() says by itself how much is to come: a second touch of a block brings no more than that */
};

/* ---- filehome.c: pages of a snapshot file and of those that it builds on ---- */

#define PV_FILE_CHAIN 33 /* a snapshot and 32 ancestors */

struct pv_snapshot;
struct pv_engine;

struct pv_file_home {
    const struct pv_snapshot *file[PV_FILE_CHAIN]; /* the youngest first */
    uint32_t files;
    uint32_t as_it_was;         /* blocks with few pages that were small stay so; else all are to be large */
    uint64_t reads, bytes_read; /* storage blocks, and their stored bytes */
};

/* The functions of a struct pv_home whose self is a struct pv_file_home. -EBADMSG, -EILSEQ, -ENODATA, -EUCLEAN for a file
 * that is damaged, or an errno of pread. */
int pv_file_fetch(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to) PV_CHECKED;
uint32_t pv_file_find(void *self, uint64_t page, uint32_t count, uint64_t *words);
int pv_file_gather(void *self, uint64_t page, uint64_t word, struct pv_unit *unit) PV_CHECKED;
int pv_file_read(void *self, const struct pv_unit *unit, const uint8_t **bytes) PV_CHECKED;

struct pv_failure {
    uint64_t page;
    uint32_t home;
    int error;      /* positive errno */
    uint64_t count; /* failures so far */
};

/* How blocks look, for pv_engine_look: what most of their pages are. */
#define PV_LOOK_UNTOUCHED 0
#define PV_LOOK_LARGE 1
#define PV_LOOK_SMALL 2
#define PV_LOOK_AWAY 3 /* + home: ZERO is 4, ASIDE 5, ... */


/* Makes the page map of RAM: `size` bytes at `ram`; 0 and *out, or -errno. small_blocks: so many blocks at the start
 * are small from the beginning (all of them: UINT64_MAX). No userfaultfd and no thread before pv_engine_equip. */
int pv_engine_open(uint8_t *ram, uint64_t size, uint64_t small_blocks, struct pv_engine **out) PV_CHECKED;
/* Ends the thread, lets all faults go, gives everything back. `ram` stays. No other call may be under way. */
void pv_engine_close(struct pv_engine *engine);

/* Two fresh userfaultfds, which the engine closes at its end (also if this fails): for RAM and for the aside area. */
int pv_engine_equip(struct pv_engine *engine, int uffd, int aside_uffd, uint32_t how) PV_CHECKED;
int pv_engine_equipped(const struct pv_engine *engine) PV_CHECKED;
/* Whose thread is vCPU `index`: for stalls. The vCPU must outlive the engine. */
void pv_engine_vcpu(struct pv_engine *engine, uint32_t index, const struct pv_vcpu *vcpu);
/* Who serves a home. `home` must stay where it is until the engine is closed. */
void pv_engine_home(struct pv_engine *engine, uint32_t number, const struct pv_home *home);

/* The words, for views without a copy. */
uint64_t *pv_engine_pages(struct pv_engine *engine);
uint64_t *pv_engine_blocks(struct pv_engine *engine);

/* Puts pages away; those that are away already stay where they are. Returns how many went, or -errno: -EBUSY where a
 * pin forbids it, or the kernel uses a page. The range must lie in one block. */
int pv_engine_remove(struct pv_engine *engine, uint64_t page, uint32_t count, int what) PV_CHECKED;
/* Runs of pages aside, each within one block; those in use stay. How many went, or -errno. */
int pv_engine_remove_runs(struct pv_engine *engine, const struct pv_run_pages *runs, uint64_t count) PV_CHECKED;
/* ---- balloon.c ---- */

/* What becomes of pages, for pv_balloon. Nothing is brought, and no content is kept. */
#define PV_BALLOON_INFLATE 0 /* the guest has given them up: home BALLOON */
#define PV_BALLOON_DEFLATE 1 /* it may use them again: those in that home are as if nobody had touched them */
#define PV_BALLOON_FREE 2    /* both: it keeps them, and has nothing in them now */

struct pv_balloon_told {
    uint64_t gone, back; /* pages */
    uint64_t stayed;     /* pages that are in use by the host, or that the kernel would not give up */
    uint64_t blocks;     /* of 2 MiB that went whole */
};
/* Ballooned pages stay in that home while others of their block come. 0 or -errno; *told is added to. */
int pv_balloon(struct pv_engine *engine, const struct pv_run_pages *runs, uint64_t count, int how,
               struct pv_balloon_told *told) PV_CHECKED;

/* From ASIDE to another home; returns how many pages went, or -errno: what was not stored is still ASIDE. One block. */
int pv_engine_store(struct pv_engine *engine, uint64_t page, uint32_t count, uint32_t home) PV_CHECKED;
/* Gives pages that nobody has touched yet a home from which they will come. All of them must be unpopulated and
 * PRESENT, else none gets it; locator: of the first, each following one's is greater by one. */
int pv_engine_assign(struct pv_engine *engine, uint64_t page, uint64_t count, uint32_t home,
                     uint64_t locator) PV_CHECKED;
/* Makes a home the source of all RAM, of which nobody has touched anything: each page is where find() says. That is asked
 * block by block when it is needed, so that this takes no time. -EEXIST where a page has been touched. */
int pv_engine_assign_all(struct pv_engine *engine, uint32_t home) PV_CHECKED;
/* Makes pages of a VM that does not run yet those of a home: what they hold is out of date. bits: one a page; a word has
 * the page's number as its locator. What else is populated of a block that is to be large goes aside, so that the first
 * touch of it brings all as one large page. large: NULL, or a bit a block: one without it that holds little stays small.
 * All must be PRESENT, and nothing pinned: -EEXIST, -EBUSY. After an error the VM's RAM is of no use any more. */
int pv_engine_assign_bits(struct pv_engine *engine, uint32_t home, const uint64_t *bits,
                          const uint64_t *large) PV_CHECKED;
/* Fills in the words of all pages that have been assigned so. */
void pv_engine_find_all(struct pv_engine *engine);
/* The block of the last touch of a page that was away: what follows it may be touched next. */
uint64_t pv_engine_touched(struct pv_engine *engine);
/* PV_UNIT_*. */
void pv_engine_unit(struct pv_engine *engine, uint32_t unit);
/* How many threads answer faults, 1 to PV_MAX_WORKERS; before the first page goes away. */
void pv_engine_workers(struct pv_engine *engine, uint32_t workers);
/* From now on, notes the numbers of pages as they come back, up to `room` of them, in `pages`, which must stay. Units are
 * pages then, until RECORD_PAGES of a block have come: then the rest counts as touched. */
void pv_engine_record(struct pv_engine *engine, uint64_t *pages, uint64_t room);
uint64_t pv_engine_recorded(struct pv_engine *engine);
/* Brings pages back in this order: those of them that are kept together, together, and all of a block which is to be large
 * where `wanted` (a bit a page, all pages that will be asked for) has many of it. 0 or -errno of the first that failed. */
int pv_engine_prefetch(struct pv_engine *engine, const uint64_t *pages, uint64_t count,
                       const uint64_t *wanted) PV_CHECKED;
/* As pv_engine_install, but between blocks first come the faults that wait, and what cannot be brought is told to
 * pv_engine_wait_failure, the rest still brought. */
int pv_engine_fill(struct pv_engine *engine, uint64_t page, uint64_t count) PV_CHECKED;
/* Brings back what is away in the range, whole blocks as large pages. 0 or -errno of the first that failed. */
int pv_engine_install(struct pv_engine *engine, uint64_t page, uint64_t count) PV_CHECKED;
/* The same, and until pv_engine_unpin nothing in these blocks is removed. */
int pv_engine_pin(struct pv_engine *engine, uint64_t page, uint64_t count) PV_CHECKED;
void pv_engine_unpin(struct pv_engine *engine, uint64_t page, uint64_t count);
/* The same of many runs: all, or after an error none. */
int pv_engine_pin_runs(struct pv_engine *engine, const struct pv_run_pages *runs, uint64_t count) PV_CHECKED;
void pv_engine_unpin_runs(struct pv_engine *engine, const struct pv_run_pages *runs, uint64_t count);

/* Splits a large mapping into 512 small ones, the physical page staying whole. */
int pv_engine_split(struct pv_engine *engine, uint64_t block) PV_CHECKED;
/* Makes a block one large page again, bringing back what is away in it. */
int pv_engine_merge(struct pv_engine *engine, uint64_t block) PV_CHECKED;
/* Splits the mapping and the physical page. */
int pv_engine_break(struct pv_engine *engine, uint64_t block) PV_CHECKED;

/* Waits for a failed fetch or for the engine's end: 1 and *out, or 0. */
int pv_engine_wait_failure(struct pv_engine *engine, struct pv_failure *out) PV_CHECKED;
/* Lets pv_engine_wait_failure return 0, now and for ever. */
void pv_engine_end_failures(struct pv_engine *engine);
/* Lets the threads that wait for a page whose fetch failed try again. Before that, no touch has it fetched again.
 * Returns how many failures there were until then. */
uint64_t pv_engine_retry(struct pv_engine *engine);

void pv_engine_read_stats(struct pv_engine *engine, struct pv_engine_stats *out);
/* Pages by home (PV_HOMES of them), and whether any range is registered with userfaultfd now. */
void pv_engine_count(struct pv_engine *engine, uint64_t *by_home, int *armed);
/* Present pages by the kernel's page tables: in large mappings, in small ones. looks: NULL, or PV_LOOK_* a block. */
int pv_engine_look(struct pv_engine *engine, uint64_t *large, uint64_t *small, uint8_t *looks) PV_CHECKED;

/* Of each block, a byte: HOLDS, it may hold anything but zeros; LARGE, it is a large page, or is to come back as one. Of a
 * guest that stands still. */
#define PV_HOLDS 1
#define PV_HOLDS_LARGE 2
int pv_engine_holds(struct pv_engine *engine, uint8_t *blocks) PV_CHECKED;

/* Sets the bits (one a page of all RAM) of those pages in the range that may hold anything but zeros: they are populated,
 * or in a home that is not one of zeros. Makes nothing resident. The guest may run: what it writes first after its block
 * has been looked at is missed. */
int pv_engine_held(struct pv_engine *engine, uint64_t page, uint64_t count, uint64_t *bits) PV_CHECKED;

/* Sets the bits of the pages that are in a home, and counts them; of those that come back meanwhile, maybe. */
uint64_t pv_engine_at_home(struct pv_engine *engine, uint32_t home, uint64_t *bits);

/* ---- scan.c, sharing.c: pages with equal contents (technique T5, US9977747B2) ---- */

#define PV_SCAN_UNKNOWN 0 /* in a home that would have to be asked */
#define PV_SCAN_ZERO 1    /* a page of zeros that takes memory */
#define PV_SCAN_NOTHING 2 /* zeros that take none */
#define PV_SCAN_CONTENT 3 /* from here on: a hash of what the page holds (XXH64) */

/* One of these for each page in the range. Fetches nothing, makes nothing resident, breaks and marks nothing. */
int pv_scan(struct pv_engine *engine, uint64_t page, uint64_t count, uint64_t *hashes) PV_CHECKED;
/* Lets the kernel merge pages of a block that is mapped by small pages (-EINVAL for one that is not), or undoes that: each
 * page takes memory of its own again. pv_engine_merge undoes it too. While a live save runs, nothing is merged. */
int pv_engine_share(struct pv_engine *engine, uint64_t block, int on) PV_CHECKED;

/* ---- coarse write traces (technique T7, US11995459B2) ---- */

struct pv_trace_stats {
    uint64_t faults;    /* writes that lifted a trace */
    uint64_t installed; /* pages marked because they came back while traced: written or not */
    uint64_t refined;   /* blocks traced by small pages now */
    uint64_t dense;     /* blocks that were, and had so many pages written that they are traced whole again */
    uint64_t protected; /* bytes protected, again and again */
};

/* Write-protects all RAM in units of 2^shift bytes, 12 to 30, while vCPUs run. A block written in `refine` successive
 * rounds is traced by small pages from then on, unless most of it is written; 0: never. */
int pv_trace_start(struct pv_engine *engine, uint32_t shift, uint32_t refine) PV_CHECKED;
/* ORs into `bits` (one a page) what was written since the last call, and protects it again. On -errno what was
 * written is still marked. */
int pv_trace_collect(struct pv_engine *engine, uint64_t *bits) PV_CHECKED;
/* Marks pages as written: those in `bits`. */
void pv_trace_put_back(struct pv_engine *engine, const uint64_t *bits);
int pv_trace_stop(struct pv_engine *engine) PV_CHECKED;
/* Blocks that are refined, one byte each, and counts. */
void pv_trace_look(struct pv_engine *engine, struct pv_trace_stats *out, uint8_t *refined);

/* ---- sample.c: how active large blocks are (technique T8, US9501422B2, US9330015B2) ---- */

#define PV_SAMPLE_NONE 0
#define PV_SAMPLE_RUNNING 1    /* of one that has ended: at the end of its window */
#define PV_SAMPLE_ACTIVE 2     /* ended by its limit */
#define PV_SAMPLE_BROKEN_OFF 3 /* ended by whoever needed the block, as it was before */

struct pv_sample {
    uint64_t bits[PV_BLOCK_PAGES / 64]; /* touched pages */
    uint64_t nanoseconds;               /* that it has gone on, or did */
    uint32_t touched, state;            /* how many; PV_SAMPLE_* */
    uint64_t small;                     /* it has ended, and the kernel made small pages of it on the way back */
};

struct pv_sample_counts {
    uint64_t begun, ended;
    uint64_t active, broken_off; /* of these */
    uint64_t touches;            /* pages that were brought */
    uint64_t touch_ns;           /* in which vCPUs waited for these, from where their faults were read */
    uint64_t moved_ns;           /* in which blocks were moved aside and back; in part of touch_ns too */
    uint64_t aside;              /* pages that are aside for that now: as good as in the guest */
};

/* Moves a large page aside, so that each touch of a page of it is noted; once `limit` pages have been, it is back in the
 * guest (0: no limit). -EALREADY: it is sampled, or its last sample has not been ended; -EBUSY: pinned, in use, or a
 * coarse trace runs; -ENXIO: it is not a large page now. -EOPNOTSUPP: the kernel does not tell large pages. */
int pv_sample_begin(struct pv_engine *engine, uint64_t block, uint32_t limit) PV_CHECKED;
/* How a sample is, that has begun and has not been ended: 0, or -ENOENT. */
int pv_sample_look(struct pv_engine *engine, uint64_t block, struct pv_sample *out) PV_CHECKED;
/* Its state alone, at once. */
int pv_sample_state(const struct pv_engine *engine, uint64_t block) PV_CHECKED;
/* Ends one: 0 and what it has seen, -ENOENT, or another -errno, with *out too: the large page did not come back. keep: the
 * block is a large page in the guest again; else pages that were not touched stay aside. */
int pv_sample_end(struct pv_engine *engine, uint64_t block, int keep, struct pv_sample *out) PV_CHECKED;
void pv_sample_counts(struct pv_engine *engine, struct pv_sample_counts *out);

/* ---- live.c: all RAM as it was at one instant, while the guest runs on ---- */

#define PV_LIVE_OFF 0
#define PV_LIVE_ARMING 1
#define PV_LIVE_SAVING 2
#define PV_LIVE_DONE 3    /* all of it is in the pack */
#define PV_LIVE_STOPPED 4 /* by pv_live_cancel, or by an error */

/* What an error of a live save came from. */
#define PV_LIVE_CANCELLED 0
#define PV_LIVE_FETCH 1   /* a page that is away does not come */
#define PV_LIVE_WRITE 2   /* pv_pack_add */
#define PV_LIVE_PROTECT 3 /* UFFDIO_WRITEPROTECT */
#define PV_LIVE_LOOK 4    /* PAGEMAP_SCAN, or memory for a copy */

struct pv_live_progress {
    uint64_t blocks, saved; /* of RAM; of these, copied or empty */
    uint64_t copied;        /* by whoever was about to change them */
    uint64_t waits;         /* of these, for a buffer */
    uint64_t page;          /* of PV_LIVE_FETCH */
    uint32_t home;
    uint32_t cause;         /* PV_LIVE_* */
    int error;              /* positive errno, or 0 */
};

struct pv_pack;

/* Protects RAM while the guest runs, for a save into `pack`, with so many buffers of 2 MiB for what is written before it
 * is saved. python_homes: a home is in Python. -EBUSY while a coarse trace runs, -EALREADY while another save does,
 * -ECANCELED when the engine is being closed. After 0, pv_live_end must come. */
int pv_live_begin(struct pv_engine *engine, struct pv_pack *pack, uint32_t buffers, int python_homes) PV_CHECKED;
/* The vCPUs stand still: what RAM holds when this returns is what is saved. python_homes: whoever holds a view has had
 * all pages of its blocks brought back, and no other view is made meanwhile. On -errno the save is over. */
int pv_live_freeze(struct pv_engine *engine, int python_homes) PV_CHECKED;
/* Waits until the save is DONE or STOPPED, for so long at most. The mode. */
int pv_live_wait(struct pv_engine *engine, uint32_t milliseconds, struct pv_live_progress *out) PV_CHECKED;
/* Ends it soon. closing: no other begins. */
void pv_live_cancel(struct pv_engine *engine, int closing);
/* Ends it now, and takes all protection away. large (or NULL): of each block, whether it was a large page. */
void pv_live_end(struct pv_engine *engine, uint8_t *large, struct pv_live_progress *out);

/* ---- limit.c: how many pages take memory of the host: those that are PRESENT or ASIDE ---- */

struct pv_limit_told {
    uint64_t waits, overruns, nanoseconds, longest; /* faults that waited for room; for so long that they went on */
};

/* Pages that nobody has touched go to ZERO, so that none takes memory without a word that says so. 0 or -errno. */
int pv_limit_begin(struct pv_engine *engine) PV_CHECKED;
uint64_t pv_limit_resident(const struct pv_engine *engine);
/* From now on faults wait where more than `most` pages would be resident, and pv_limit_wait returns above `wake`, which is
 * at least a block below `most`. UINT64_MAX: never. */
void pv_limit_set(struct pv_engine *engine, uint64_t most, uint64_t wake);
/* 1: more is resident than `wake`; 0: it is not, after so long, or since pv_limit_end. */
int pv_limit_wait(struct pv_engine *engine, uint32_t milliseconds) PV_CHECKED;
/* Nothing more can go, or something can again: whether faults wait for it. */
void pv_limit_stuck(struct pv_engine *engine, int stuck);
/* Nobody reclaims any more. */
void pv_limit_end(struct pv_engine *engine);
void pv_limit_look(struct pv_engine *engine, struct pv_limit_told *out);
