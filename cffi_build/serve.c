/* serve.c: the source's side of post-copy: pages of a VM that stands still, to whom asks for them, and the rest. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>

#define RUNS (PV_BLOCK_PAGES / 2)

/* Pages on their way to a stream: runs of those that may hold something, and zeros that may go on in the next block. */
struct outgoing {
    struct pv_engine *engine;
    struct pv_stream *stream;
    int zeros;
    struct pv_run_pages runs[RUNS], blank;
    uint32_t used;
};

static int send_held(struct outgoing *out)
{
    if (!out->used)
        return 0;
    int error = pv_engine_pin_runs(out->engine, out->runs, out->used);
    if (error)
        return error;
    error = pv_send_runs(out->stream, out->engine->ram, out->engine->pages, out->runs, out->used, 0, out->zeros);
    pv_engine_unpin_runs(out->engine, out->runs, out->used);
    out->used = 0;
    return error;
}

static int send_blank(struct outgoing *out)
{
    uint64_t count = out->blank.count;
    out->blank.count = 0;
    return count ? pv_send_frame(out->stream, PV_FRAME_ZEROS, out->blank.first, (uint32_t)count, 0) : 0;
}

static int add_run(struct outgoing *out, uint64_t first, uint32_t count, bool held)
{
    if (held) {
        int error = send_blank(out);
        out->runs[out->used++] = (struct pv_run_pages){.first = first, .count = count};
        return error;
    }
    int error = send_held(out);
    if (out->blank.count && (out->blank.first + out->blank.count != first || out->blank.count > UINT32_MAX - count))
        error = error ? error : send_blank(out);
    if (!out->blank.count)
        out->blank.first = first;
    out->blank.count += count;
    return error;
}

/* Pages of one block, those of them that have their bit in `mine`, in order. What was never populated, and what is in a
 * home of zeros, is not touched: to read it would make it resident. */
static int add_pages(struct outgoing *out, uint64_t page, uint32_t count, const uint64_t *mine, uint64_t *blank)
{
    struct pv_engine *engine = out->engine;
    struct populated seen;
    block_lock_plain(engine, page / PV_BLOCK_PAGES); /* nothing of it changes: a live save need not copy it */
    int error = look_held(engine, page, count, &seen);
    block_unlock(engine, page / PV_BLOCK_PAGES);
    for (uint32_t i = 0, run; !error && i < count; i += run) {
        bool own = mine[i / 64] >> i % 64 & 1, held = is_populated(&seen, i);
        for (run = 1; i + run < count && (mine[(i + run) / 64] >> (i + run) % 64 & 1) == own; run++)
            if (is_populated(&seen, i + run) != held)
                break;
        if (!own)
            continue;
        error = add_run(out, page + i, run, held);
        *blank += held ? 0 : run;
    }
    return error ? error : send_held(out);
}

int pv_serve(struct pv_engine *engine, struct pv_stream *stream, uint64_t *sent, struct pv_served *told,
             struct pv_run_frame *frame)
{
    uint64_t all[PV_BLOCK_PAGES / 64];
    for (uint32_t i = 0; i < PV_BLOCK_PAGES / 64; i++)
        all[i] = ~0ull;
    for (;;) {
        int error = pv_recv_frame(stream, engine->pages, 1u << (PV_FRAME_REQUEST - PV_FRAME_BYTES), frame);
        if (error)
            return error == -EPIPE ? 0 : error;
        if (frame->round) {
            stream->fault = PV_FAULT_ROUND;
            return -EBADMSG;
        }
        uint64_t begin = pv_now(), blank = 0;
        struct outgoing out = {.engine = engine, .stream = stream, .zeros = true};
        pv_bits_set(sent, frame->first, frame->count);
        error = add_pages(&out, frame->first, frame->count, all, &blank);
        error = error ? error : send_blank(&out);
        if (error)
            return error;
        uint64_t spent = pv_now() - begin;
        count_up(&told->requests, 1);
        count_up(&told->pages, frame->count);
        count_up(&told->zero_pages, blank);
        count_up(&told->nanoseconds, spent);
        note_longest(&told->longest, spent);
        __atomic_store_n(&told->touched, frame->first + 1, __ATOMIC_RELAXED);
    }
}

/* Of a block, those pages that nobody has sent, which are ours from now on: how many. */
static uint32_t claim(const struct pv_engine *engine, uint64_t *sent, uint64_t block, uint64_t *mine)
{
    uint32_t pages = pages_of_block(engine, block), found = 0;
    for (uint32_t i = 0; i < PV_BLOCK_PAGES / 64; i++) {
        uint32_t left = pages > i * 64 ? pages - i * 64 : 0;
        uint64_t mask = left >= 64 ? ~0ull : (1ull << left) - 1;
        /* relaxed: the pages stay as they are */
        mine[i] = mask ? mask & ~__atomic_fetch_or(&sent[block * 8 + i], mask, __ATOMIC_RELAXED) : 0;
        found += (uint32_t)__builtin_popcountll(mine[i]);
    }
    return found;
}

int pv_send_rest(struct pv_engine *engine, struct pv_stream *stream, uint64_t *sent, uint64_t block, uint64_t blocks,
                 int zeros, uint64_t *pages)
{
    struct outgoing out = {.engine = engine, .stream = stream, .zeros = zeros};
    uint64_t mine[PV_BLOCK_PAGES / 64], blank = 0;
    if (block > engine->blocks || blocks > engine->blocks - block)
        return -EINVAL;
    for (uint64_t end = block + blocks; block < end; block++) {
        uint32_t found = claim(engine, sent, block, mine);
        int error = found ? add_pages(&out, block * PV_BLOCK_PAGES, pages_of_block(engine, block), mine, &blank) : 0;
        if (error)
            return error;
        *pages += found;
    }
    return send_blank(&out);
}
