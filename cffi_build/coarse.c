/* coarse.c: write traces by userfaultfd write protection in units larger than a page (technique T7, US11995459B2): the
 * first write marks the whole unit and lifts its trace, and large pages stay large. A block that is written round after
 * round is traced by small pages, unless so many of them turn out to be written that it is not worth the faults.
 *
 * The mutex is held while a page's mark and its protection change together: else a mark could be collected while the
 * protection it stands for is just being lifted, and writes would be lost. So it is while a block is copied out, which
 * relies on the block's protection (remove.c). Pages that come back while a trace runs come unprotected, so they are
 * marked: a superset, which is counted. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#define REFINED 255
#define DENSE 254        /* was refined in vain: coarse from then on */
#define TO_MERGE 253     /* the same, and to be made large again at the next collection */
#define DENSE_FAULTS 32  /* in one round, in a refined block: the 512 pages would be sent in the time of these faults */
#define FINE_FAULTS 16   /* of all refined blocks together in a round, and 2 a ms: at 50 us each, a tenth of the */
#define FINE_NS 500000ull /* guest's time */
#define STRIDE ((uint64_t)2 << 20) /* bytes protected in one call at first; then as many as take STRIDE_NS: what a */
#define STRIDE_NS 30000ull         /* fault may have to wait for */

static uint64_t mark_words(const struct pv_engine *engine) { return (engine->pages + 63) / 64; }

static void mark(struct pv_engine *engine, uint64_t page, uint64_t count)
{
    uint64_t *marks = engine->trace.marks;
    for (uint64_t end = page + count; page < end;) {
        uint64_t bit = page % 64, part = 64 - bit < end - page ? 64 - bit : end - page;
        marks[page / 64] |= (part == 64 ? ~0ull : ((1ull << part) - 1)) << bit;
        page += part;
    }
}

static bool marked(const struct pv_engine *engine, uint64_t page, uint64_t count)
{
    const uint64_t *marks = engine->trace.marks;
    if (count == 1)
        return marks[page / 64] >> page % 64 & 1;
    for (uint64_t i = page; i < page + count; i = (i / 64 + 1) * 64) { /* units above a page: at least 2, aligned */
        uint64_t word = marks[i / 64] >> i % 64;
        if (count < 64)
            word &= (1ull << count) - 1;
        if (word)
            return true;
    }
    return false;
}

static bool is_refined(const struct trace *trace, uint64_t page)
{
    return trace->streaks[page / PV_BLOCK_PAGES] == REFINED;
}

/* The unit of a page, cut to RAM. */
static uint64_t unit_of(const struct pv_engine *engine, uint64_t page, uint64_t *count)
{
    const struct trace *trace = &engine->trace;
    uint64_t unit = is_refined(trace, page) ? 1 : 1ull << (trace->shift - 12), first = page / unit * unit;
    *count = engine->pages - first < unit ? engine->pages - first : unit;
    return first;
}

/* A vCPU may wait for what the caller is about to do. */
static void lock_urgently(struct trace *trace)
{
    __atomic_fetch_add(&trace->urgent, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_lock(&trace->mutex);
    __atomic_fetch_sub(&trace->urgent, 1, __ATOMIC_SEQ_CST);
}

/* For loops over all memory: a mutex that is taken again at once would never be had by anybody else. */
static void lock_politely(struct trace *trace)
{
    while (__atomic_load_n(&trace->urgent, __ATOMIC_SEQ_CST))
        sched_yield();
    pthread_mutex_lock(&trace->mutex);
}

void trace_enter(struct pv_engine *engine) { lock_urgently(&engine->trace); }

void trace_leave(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    if (engine->trace.on) {
        mark(engine, page, count);
        engine->trace.stats.installed += count;
    }
    pthread_mutex_unlock(&engine->trace.mutex);
}

/* Of a refined block: is it still worth it? Under the mutex. */
static void note_fault(struct trace *trace, uint64_t block)
{
    if (trace->streaks[block] != REFINED)
        return;
    trace->fine_faults++;
    uint64_t allowed = FINE_FAULTS + (pv_now() - trace->round_began) / FINE_NS;
    if (++trace->hits[block] < DENSE_FAULTS && trace->fine_faults < allowed)
        return;
    trace->streaks[block] = TO_MERGE;
    trace->stats.refined--;
    trace->stats.dense++;
}

int trace_fault(struct pv_engine *engine, uint64_t page)
{
    struct trace *trace = &engine->trace;
    /* Without a trace it is a straggler: its block, which is locked, is free of protection, but for part of a large page
     * the kernel would split that. */
    uint64_t first = page / PV_BLOCK_PAGES * PV_BLOCK_PAGES, count = pages_of_block(engine, page / PV_BLOCK_PAGES);
    lock_urgently(trace);
    if (trace->on) {
        note_fault(trace, page / PV_BLOCK_PAGES);
        first = unit_of(engine, page, &count);
        mark(engine, first, count);
        trace->stats.faults++;
    }
    int error = uffd_protect(engine, ram_at(engine, first), count * PV_PAGE, false);
    pthread_mutex_unlock(&trace->mutex);
    return error;
}

/* Under the mutex, since a block that is being copied out relies on its protection. */
static int protect_all(struct pv_engine *engine, bool on)
{
    for (uint64_t at = 0, size, stride = STRIDE; at < engine->size; at += size) {
        size = engine->size - at < stride ? engine->size - at : stride;
        lock_politely(&engine->trace);
        uint64_t begin = pv_now();
        int error = uffd_protect(engine, engine->ram + at, size, on);
        engine->trace.stats.protected += on && !error ? size : 0;
        uint64_t spent = pv_now() - begin;
        pthread_mutex_unlock(&engine->trace.mutex);
        if (error)
            return error;
        if (spent < STRIDE_NS / 2 && stride < STRIDE << 2)
            stride *= 2;
        else if (spent > STRIDE_NS && stride > STRIDE)
            stride /= 2;
    }
    return 0;
}

/* Not while a live save uses the same protection (nor the other way: live.c). 0 or -EBUSY. */
static int set_on(struct pv_engine *engine, bool on)
{
    struct trace *trace = &engine->trace;
    pthread_mutex_lock(&trace->mutex);
    int error = on && live_claimed(engine) ? -EBUSY : 0;
    trace->on = on && !error;
    pthread_mutex_unlock(&trace->mutex);
    return error;
}

/* Under the mutex: somebody may be looking at the trace before. */
static int begin(struct pv_engine *engine, uint32_t shift, uint32_t refine)
{
    struct trace *trace = &engine->trace;
    pthread_mutex_lock(&trace->mutex);
    int error = trace->on ? -EBUSY : 0;
    if (!error) {
        free(trace->marks);
        free(trace->streaks);
        free(trace->hits);
        trace->marks = calloc(mark_words(engine), sizeof(uint64_t));
        trace->streaks = calloc(engine->blocks, 1);
        trace->hits = calloc(engine->blocks, 1);
        error = trace->marks && trace->streaks && trace->hits ? 0 : -ENOMEM;
        trace->shift = shift;
        trace->refine = refine;
        memset(&trace->stats, 0, sizeof(trace->stats));
        trace->fine_faults = 0;
        trace->round_began = pv_now();
    }
    pthread_mutex_unlock(&trace->mutex);
    return error;
}

int pv_trace_start(struct pv_engine *engine, uint32_t shift, uint32_t refine)
{
    if (shift < 12 || shift > 30 || refine >= TO_MERGE)
        return -EINVAL;
    int fresh = begin(engine, shift, refine);
    if (fresh)
        return fresh;
    int error = span_hold_all(engine, true);
    if (error)
        return error;
    error = set_on(engine, true); /* before the first page is protected: from here on all that appears is marked */
    if (error) {
        span_release_all(engine, true);
        return error;
    }
    error = protect_all(engine, true);
    if (error)
        (void)!pv_trace_stop(engine);
    return error;
}

/* A block that was written in enough successive rounds is refined; `written`: in this one. Under the mutex. */
static void note_round(struct trace *trace, uint64_t block, bool written)
{
    uint8_t *streak = &trace->streaks[block];
    trace->hits[block] = 0;
    if (*streak >= TO_MERGE || !trace->refine)
        return;
    *streak = written ? (uint8_t)(*streak + 1) : 0;
    if (*streak >= trace->refine) {
        *streak = REFINED;
        trace->stats.refined++;
    }
}

/* Of a block that the kernel merges pages of: one that is merged loses its protection, and who writes to it then is not
 * seen. So what has none was written, maybe. Protected again is that and no more: a page that loses it just now must be
 * found next time. */
static int protect_mergeable(struct pv_engine *engine, uint64_t first, uint32_t count)
{
    struct populated bare;
    int error = look_unprotected(engine, first, count, &bare);
    for (uint32_t i = 0, run; !error && i < count; i += run) {
        for (run = 1; i + run < count && is_populated(&bare, i + run) == is_populated(&bare, i); run++)
            ;
        if (!is_populated(&bare, i))
            continue;
        mark(engine, first + i, run);
        engine->trace.stats.protected += (uint64_t)run * PV_PAGE;
        error = uffd_protect(engine, ram_at(engine, first + i), (uint64_t)run * PV_PAGE, true);
    }
    return error;
}

/* Under the mutex: runs of blocks whose pages are merged, and of those whose are not. */
static int protect_again(struct pv_engine *engine, uint64_t first, uint64_t count)
{
    int error = 0;
    for (uint64_t end = first + count, stop; !error && first < end; first = stop) {
        uint64_t block = first / PV_BLOCK_PAGES;
        bool shared = block_mergeable(engine, block);
        for (stop = (block + 1) * PV_BLOCK_PAGES; !shared && stop < end; stop += PV_BLOCK_PAGES)
            if (block_mergeable(engine, stop / PV_BLOCK_PAGES))
                break;
        stop = stop < end ? stop : end;
        if (shared) {
            error = protect_mergeable(engine, first, (uint32_t)(stop - first));
            continue;
        }
        error = uffd_protect(engine, ram_at(engine, first), (stop - first) * PV_PAGE, true);
        engine->trace.stats.protected += error ? 0 : (stop - first) * PV_PAGE;
    }
    return error;
}

/* Takes the marks of [first, first+count) into bits and protects it again. */
static int take(struct pv_engine *engine, uint64_t first, uint64_t count, uint64_t *bits)
{
    struct trace *trace = &engine->trace;
    lock_politely(trace);
    int error = protect_again(engine, first, count);
    if (!error) {
        for (uint64_t page = first; page < first + count;) {
            uint64_t bit = page % 64, part = 64 - bit < first + count - page ? 64 - bit : first + count - page;
            uint64_t mask = (part == 64 ? ~0ull : ((1ull << part) - 1)) << bit;
            bits[page / 64] |= trace->marks[page / 64] & mask;
            trace->marks[page / 64] &= ~mask;
            page += part;
        }
    }
    pthread_mutex_unlock(&trace->mutex);
    return error;
}

static bool range_marked(const struct pv_engine *engine, uint64_t first, uint64_t count)
{
    for (uint64_t word = first / 64; word < (first + count + 63) / 64; word++)
        if (__atomic_load_n(&engine->trace.marks[word], __ATOMIC_RELAXED))
            return true;
    return false;
}

/* Small pages in a block that is traced whole would cost KVM a fault each, in every round. */
static void merge_dense(struct pv_engine *engine)
{
    struct trace *trace = &engine->trace;
    for (uint64_t block = 0; block < engine->blocks; block++) {
        pthread_mutex_lock(&trace->mutex);
        bool wanted = trace->streaks[block] == TO_MERGE;
        if (wanted)
            trace->streaks[block] = DENSE;
        pthread_mutex_unlock(&trace->mutex);
        if (wanted && !(block_word(engine, block) & PV_BLOCK_SMALL))
            (void)!pv_engine_merge(engine, block); /* where it fails the block stays small, and right */
    }
}

static bool any_mergeable(const struct pv_engine *engine, uint64_t first, uint64_t count)
{
    for (uint64_t block = first / PV_BLOCK_PAGES; block * PV_BLOCK_PAGES < first + count; block++)
        if (block_mergeable(engine, block))
            return true;
    return false;
}

int pv_trace_collect(struct pv_engine *engine, uint64_t *bits)
{
    struct trace *trace = &engine->trace;
    if (!trace->on)
        return -EINVAL;
    merge_dense(engine);
    pthread_mutex_lock(&trace->mutex);
    trace->fine_faults = 0;
    trace->round_began = pv_now();
    pthread_mutex_unlock(&trace->mutex);
    uint64_t unit = 1ull << (trace->shift - 12);
    uint64_t step = unit > PV_BLOCK_PAGES ? unit : PV_BLOCK_PAGES; /* a block, or a unit of several */
    for (uint64_t first = 0; first < engine->pages; first += step) {
        uint64_t count = engine->pages - first < step ? engine->pages - first : step;
        bool written = range_marked(engine, first, count);
        bool merges = any_mergeable(engine, first, count);
        if (written || merges) {
            /* Runs of marked units: what is not marked is still protected. A refined block is protected whole. */
            for (uint64_t at = first; at < first + count;) {
                uint64_t length, start = unit_of(engine, at, &length);
                if (is_refined(trace, at) && unit <= PV_BLOCK_PAGES) {
                    start = first;
                    length = count;
                }
                if (marked(engine, start, length) || length == count || any_mergeable(engine, start, length)) {
                    int error = take(engine, start, length, bits);
                    if (error)
                        return error;
                }
                at = start + length;
            }
        }
        pthread_mutex_lock(&trace->mutex);
        for (uint64_t block = first / PV_BLOCK_PAGES; block * PV_BLOCK_PAGES < first + count; block++)
            note_round(trace, block, written);
        pthread_mutex_unlock(&trace->mutex);
    }
    return 0;
}

void pv_trace_put_back(struct pv_engine *engine, const uint64_t *bits)
{
    struct trace *trace = &engine->trace;
    pthread_mutex_lock(&trace->mutex);
    for (uint64_t word = 0; trace->on && word < mark_words(engine); word++)
        trace->marks[word] |= bits[word];
    pthread_mutex_unlock(&trace->mutex);
}

int pv_trace_stop(struct pv_engine *engine)
{
    if (!engine->trace.on)
        return -EINVAL;
    (void)!set_on(engine, false);
    /* Whoever still waits in a fault is answered by the engine, or woken when the last range is unregistered. */
    int error = protect_all(engine, false);
    span_release_all(engine, true);
    return error;
}

void pv_trace_look(struct pv_engine *engine, struct pv_trace_stats *out, uint8_t *refined)
{
    struct trace *trace = &engine->trace;
    pthread_mutex_lock(&trace->mutex);
    *out = trace->stats;
    for (uint64_t block = 0; refined && block < engine->blocks; block++)
        refined[block] = trace->streaks && trace->streaks[block] == REFINED;
    pthread_mutex_unlock(&trace->mutex);
}
