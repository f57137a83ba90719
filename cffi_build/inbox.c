/* inbox.c: pages that the migration source sends by itself, ahead of touches: received into memory of our own, without a
 * lock, and installed block by block. */
#include "peer_inside.h"

#include <errno.h>
#include <string.h>

/* Runs of the received pages in `got`, as small ones; zeros in a block that is small anyway need not be there at all. */
static int put_small(struct pv_engine *engine, const struct pv_inbox *inbox, const uint64_t *got, bool leave)
{
    uint64_t first = inbox->block * PV_BLOCK_PAGES;
    int error = 0;
    for (uint32_t i = 0, run; i < PV_BLOCK_PAGES; i += run) {
        bool zero = leave && has_bit(inbox->zeros, i);
        for (run = 1; i + run < PV_BLOCK_PAGES; run++)
            if (has_bit(got, i + run) != has_bit(got, i) || (leave && has_bit(inbox->zeros, i + run)) != zero)
                break;
        if (!has_bit(got, i))
            continue;
        int one = 0;
        if (zero)
            now_present(engine, first + i, run, false);
        else
            one = put_pages(engine, first + i, run, inbox->bytes + (size_t)i * PV_PAGE);
        error = error ? error : one;
    }
    return error;
}

static uint32_t count_bits(const uint64_t *bits)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < PV_BLOCK_PAGES / 64; i++)
        count += (uint32_t)__builtin_popcountll(bits[i]);
    return count;
}

/* Under the block's lock. *left: pages of it that were with the source until now. 0 or -errno. */
static int install_inbox(struct pv_peer *peer, struct pv_inbox *inbox, uint32_t *left)
{
    struct pv_engine *engine = peer->engine;
    uint64_t block = inbox->block, first = block * PV_BLOCK_PAGES;
    uint64_t got[PV_BLOCK_PAGES / 64] = {0}, zeros[PV_BLOCK_PAGES / 64];
    uint32_t pages = pages_of_block(engine, block);
    *left = 0;
    for (uint32_t i = 0; i < pages; i++) {
        if (page_home(engine, first + i) != PV_HOME_PEER)
            continue;
        ++*left;
        if (has_bit(inbox->pages, i))
            got[i / 64] |= 1ull << i % 64;
    }
    for (uint32_t i = 0; i < PV_BLOCK_PAGES / 64; i++)
        zeros[i] = got[i] & inbox->zeros[i];
    uint32_t count = count_bits(got), blank = count_bits(zeros);
    inbox->dropped += inbox->count - count;
    if (!count)
        return 0;
    bool all = count == *left;
    if (all && count == pages && peer_small(peer, block, count - blank))
        block_flags(engine, block, PV_BLOCK_SMALL | PV_BLOCK_BROKEN, 0);
    if (!all || blank == pages || !to_be_large(engine, block))
        return put_small(engine, inbox, got, blank == pages || !to_be_large(engine, block));
    peer_stage(peer, inbox);
    int answer = bring_whole(engine, first); /* fetches from the inbox: nothing is asked for under the lock */
    peer_stage(NULL, NULL);
    return answer < 0 ? answer : 0;
}

static void deliver(struct pv_peer *peer, struct pv_inbox *inbox)
{
    struct pv_engine *engine = peer->engine;
    if (!inbox->count)
        return;
    uint32_t left;
    block_lock(engine, inbox->block);
    inbox->failed += install_inbox(peer, inbox, &left) != 0;
    bool merges = !left && !block_away(engine, inbox->block) && to_be_large(engine, inbox->block);
    block_unlock(engine, inbox->block);
    if (merges && inbox->settled != inbox->block + 1) /* single touches have brought all of it: it is small pages still */
        inbox->failed += pv_engine_merge(engine, inbox->block) != 0;
    inbox->settled = merges ? inbox->block + 1 : inbox->settled;
    inbox->count = 0;
    memset(inbox->pages, 0, sizeof(inbox->pages));
    memset(inbox->zeros, 0, sizeof(inbox->zeros));
}

/* Pages of a block have been received: what is to be done with them now? Without the lock: what is wrong for the moment is
 * seen under it. */
static void note_pages(struct pv_peer *peer, struct pv_inbox *inbox, uint32_t at, uint32_t count, bool zeros)
{
    struct pv_engine *engine = peer->engine;
    for (uint32_t i = at; i < at + count; i++) {
        uint64_t bit = 1ull << i % 64;
        inbox->pages[i / 64] |= bit;
        inbox->zeros[i / 64] = (inbox->zeros[i / 64] & ~bit) | (zeros ? bit : 0);
    }
    inbox->count += count;
    bool pending = block_word(engine, inbox->block) & PV_BLOCK_PENDING;
    for (uint32_t i = 0; i < pages_of_block(engine, inbox->block); i++)
        if (!has_bit(inbox->pages, i) &&
            (pending || page_home(engine, inbox->block * PV_BLOCK_PAGES + i) == PV_HOME_PEER))
            return;
    deliver(peer, inbox);
}

static void turn_to(struct pv_peer *peer, struct pv_inbox *inbox, uint64_t block)
{
    if (inbox->block != block)
        deliver(peer, inbox);
    inbox->block = block;
}

/* A block of zeros that nobody has asked for anything of: as one that was never touched, and no word is written for it. */
static bool leave_block(struct pv_engine *engine, uint64_t block)
{
    if (!(block_word(engine, block) & PV_BLOCK_PENDING) || engine->source != PV_HOME_PEER)
        return false;
    block_lock_plain(engine, block); /* what it holds stays as it is, for a live save too */
    bool pending = block_word(engine, block) & PV_BLOCK_PENDING;
    if (pending) {
        block_flags(engine, block, 0, PV_BLOCK_PENDING);
        span_release(engine, block * PV_BLOCK_PAGES, 1, false);
    }
    block_unlock(engine, block);
    return pending;
}

static void take_zeros(struct pv_peer *peer, struct pv_inbox *inbox, const struct pv_run_frame *frame)
{
    for (uint64_t page = frame->first, end = page + frame->count; page < end;) {
        uint64_t block = page / PV_BLOCK_PAGES, next = (block + 1) * PV_BLOCK_PAGES;
        uint32_t at = page % PV_BLOCK_PAGES, count = (uint32_t)((next < end ? next : end) - page);
        bool waits = inbox->count && inbox->block == block;
        page += count;
        if (!waits && count == pages_of_block(peer->engine, block) && leave_block(peer->engine, block))
            continue;
        turn_to(peer, inbox, block);
        memset(inbox->bytes + (size_t)at * PV_PAGE, 0, (size_t)count * PV_PAGE);
        note_pages(peer, inbox, at, count, true);
    }
}

static int take_bytes(struct pv_peer *peer, struct pv_inbox *inbox, struct pv_stream *stream,
                      const struct pv_run_frame *frame)
{
    uint32_t at = frame->first % PV_BLOCK_PAGES;
    turn_to(peer, inbox, frame->first / PV_BLOCK_PAGES);
    int error = pv_take_run(stream, frame, inbox->bytes + (size_t)at * PV_PAGE);
    if (!error)
        note_pages(peer, inbox, at, frame->count, false);
    return error;
}

int pv_peer_receive(struct pv_peer *peer, struct pv_inbox *inbox, struct pv_stream *stream, uint64_t limit,
                    struct pv_run_frame *end)
{
    const uint32_t types = pv_run_types(stream);
    if (!limit)
        return -EINVAL;
    for (uint64_t came = 0; came < limit; came += end->count) {
        int error = pv_recv_frame(stream, peer->engine->pages, types, end);
        if (!error && end->round) {
            stream->fault = PV_FAULT_ROUND;
            error = -EBADMSG;
        }
        if (!error && end->type == PV_FRAME_END) {
            deliver(peer, inbox);
            return PV_RECV_END;
        }
        if (!error && end->type == PV_FRAME_ZEROS)
            take_zeros(peer, inbox, end);
        else if (!error)
            error = take_bytes(peer, inbox, stream, end);
        if (error) {
            inbox->count = 0; /* a page may be half written; the source sends what is not installed again */
            memset(inbox->pages, 0, sizeof(inbox->pages));
            memset(inbox->zeros, 0, sizeof(inbox->zeros));
            return error;
        }
        inbox->came += end->count;
    }
    return 0;
}
