/* peerhome.c: the home PEER: pages that are still with the migration source, asked for when they are touched, and
 * received ahead of that. Whoever fetches holds a block's lock, also while it waits for the other side. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define WINDOW 32u     /* requests under way: their frames go into any socket's buffer, so that to send them never waits */
#define STORE_PAGES 16u /* what a touch brings with PV_UNIT_STORE */
#define RUNS (PV_BLOCK_PAGES / 2)

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

/* Pages that this very thread has received and is installing: they are fetched from here. */
struct staged {
    const struct pv_peer *peer;
    const struct pv_inbox *inbox;
};
static __thread struct staged staged;

static bool has(const uint64_t *bits, uint64_t at) { return bits[at / 64] >> at % 64 & 1; }

static bool is_staged(const struct pv_peer *peer, uint64_t page)
{
    return staged.peer == peer && page / PV_BLOCK_PAGES == staged.inbox->block &&
           has(staged.inbox->pages, page % PV_BLOCK_PAGES);
}

/* ---- the connection ---- */

int pv_peer_open(struct pv_engine *engine, const uint64_t *large, int store, struct pv_peer **out)
{
    struct pv_peer *peer = calloc(1, sizeof(*peer));
    size_t size = (engine->blocks + 63) / 64 * sizeof(*large);
    if (peer && large && (peer->large = malloc(size)))
        memcpy(peer->large, large, size);
    if (!peer || (large && !peer->large)) {
        free(peer);
        return -ENOMEM;
    }
    peer->engine = engine;
    peer->store = store;
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&peer->asking, NULL);
    pthread_mutex_init(&peer->mutex, NULL);
    pthread_cond_init(&peer->news, &clock);
    pthread_condattr_destroy(&clock);
    *out = peer;
    return 0;
}

void pv_peer_close(struct pv_peer *peer)
{
    pthread_mutex_destroy(&peer->asking);
    pthread_mutex_destroy(&peer->mutex);
    pthread_cond_destroy(&peer->news);
    free(peer->large);
    free(peer);
}

/* Under the mutex: the stream is not used any more when this returns; its owner may close it from then on. */
static void part(struct pv_peer *peer, uint32_t state, int error)
{
    if (peer->stream)
        (void)shutdown(peer->stream->fd, SHUT_RDWR);
    peer->stream = NULL;
    peer->told.breaks += peer->told.state == PV_PEER_CONNECTED;
    if (peer->told.state == PV_PEER_CONNECTED || state == PV_PEER_ENDED) {
        peer->told.error = error;
        peer->told.fault = PV_FAULT_NONE;
    }
    peer->told.state = state;
    pthread_cond_broadcast(&peer->news);
    while (peer->busy)
        pthread_cond_wait(&peer->news, &peer->mutex);
}

int pv_peer_connect(struct pv_peer *peer, struct pv_stream *stream)
{
    pthread_mutex_lock(&peer->mutex);
    if (peer->told.state != PV_PEER_ENDED)
        part(peer, PV_PEER_APART, ECONNABORTED);
    int error = peer->told.state == PV_PEER_ENDED ? -ECANCELED : 0;
    if (!error) {
        peer->stream = stream;
        peer->told.state = PV_PEER_CONNECTED;
        pthread_cond_broadcast(&peer->news);
    }
    pthread_mutex_unlock(&peer->mutex);
    return error;
}

void pv_peer_break(struct pv_peer *peer)
{
    pthread_mutex_lock(&peer->mutex);
    if (peer->told.state != PV_PEER_ENDED)
        part(peer, PV_PEER_APART, ECONNABORTED);
    pthread_mutex_unlock(&peer->mutex);
}

void pv_peer_end(struct pv_peer *peer, int error)
{
    pthread_mutex_lock(&peer->mutex);
    if (peer->told.state != PV_PEER_ENDED)
        part(peer, PV_PEER_ENDED, error > 0 ? error : ECANCELED);
    pthread_mutex_unlock(&peer->mutex);
}

int pv_peer_wait(struct pv_peer *peer, uint32_t milliseconds)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += milliseconds % 1000 * 1000000l;
    until.tv_sec += milliseconds / 1000 + until.tv_nsec / 1000000000l;
    until.tv_nsec %= 1000000000l;
    pthread_mutex_lock(&peer->mutex);
    int late = 0;
    while (!late && peer->told.state == PV_PEER_CONNECTED)
        late = pthread_cond_timedwait(&peer->news, &peer->mutex, &until);
    int state = (int)peer->told.state;
    pthread_mutex_unlock(&peer->mutex);
    return state;
}

void pv_peer_look(struct pv_peer *peer, struct pv_peer_told *out)
{
    pthread_mutex_lock(&peer->mutex);
    *out = peer->told;
    pthread_mutex_unlock(&peer->mutex);
}

/* Waits for a connection, which this thread may use then until stream_give. 0 or -errno of the end. */
static int stream_take(struct pv_peer *peer, struct pv_stream **out)
{
    pthread_mutex_lock(&peer->mutex);
    while (peer->told.state == PV_PEER_APART)
        pthread_cond_wait(&peer->news, &peer->mutex);
    int error = peer->told.state == PV_PEER_ENDED ? -peer->told.error : 0;
    peer->busy = !error;
    *out = peer->stream;
    pthread_mutex_unlock(&peer->mutex);
    return error;
}

static void stream_give(struct pv_peer *peer, const struct pv_stream *stream, int error,
                        const struct pv_run_frame *frame, const struct pv_peer_told *counted)
{
    pthread_mutex_lock(&peer->mutex);
    peer->busy = false;
    struct pv_peer_told *told = &peer->told;
    if (error && peer->stream == stream) { /* else somebody has given it up */
        part(peer, PV_PEER_APART, -error);
        told->fault = error == -EBADMSG ? stream->fault : PV_FAULT_NONE;
        told->frame = *frame;
    }
    told->requests += counted->requests;
    told->pages += counted->pages;
    told->nanoseconds += counted->nanoseconds;
    note_longest(&told->longest, counted->nanoseconds);
    pthread_cond_broadcast(&peer->news);
    pthread_mutex_unlock(&peer->mutex);
}

/* ---- requests ---- */

/* The answer to one: exactly these pages, in order, maybe in several frames. */
static int receive_answer(const struct pv_peer *peer, struct pv_stream *stream, const struct pv_run_pages *run,
                          uint8_t *to, struct pv_run_frame *frame)
{
    const uint32_t types = pv_run_types(stream) & ~(1u << (PV_FRAME_END - PV_FRAME_BYTES));
    for (uint64_t got = 0; got < run->count; got += frame->count) {
        int error = pv_recv_frame(stream, peer->engine->pages, types, frame);
        if (error)
            return error;
        bool asked = frame->first == run->first + got && frame->count <= run->count - got;
        stream->fault = !asked ? PV_FAULT_RANGE : frame->round ? PV_FAULT_ROUND : PV_FAULT_NONE;
        if (stream->fault)
            return -EBADMSG;
        if (frame->type == PV_FRAME_ZEROS)
            memset(to + got * PV_PAGE, 0, (size_t)frame->count * PV_PAGE);
        else
            error = pv_take_run(stream, frame, to + got * PV_PAGE);
        if (error)
            return error;
    }
    return 0;
}

/* Asks for all runs, some of them ahead of the answers, and receives each to its place: that of `base` is at `to`. */
static int exchange(const struct pv_peer *peer, struct pv_stream *stream, const struct pv_run_pages *runs, uint32_t count,
                    uint64_t base, uint8_t *to, struct pv_run_frame *frame)
{
    for (uint32_t asked = 0, answered = 0; answered < count; answered++) {
        for (; asked < count && asked < answered + WINDOW; asked++) {
            int error = pv_send_frame(stream, PV_FRAME_REQUEST, runs[asked].first, (uint32_t)runs[asked].count, 0);
            if (error)
                return error;
        }
        const struct pv_run_pages *run = &runs[answered];
        int error = receive_answer(peer, stream, run, to + (run->first - base) * PV_PAGE, frame);
        if (error)
            return error;
    }
    return 0;
}

static int ask(struct pv_peer *peer, const struct pv_run_pages *runs, uint32_t count, uint64_t base, uint8_t *to)
{
    int error, broken = 1;
    pthread_mutex_lock(&peer->asking);
    do {
        struct pv_stream *stream;
        struct pv_run_frame frame = {0};
        struct pv_peer_told counted = {0};
        error = stream_take(peer, &stream);
        if (error)
            break;
        uint64_t begin = pv_now();
        broken = exchange(peer, stream, runs, count, base, to, &frame);
        if (!broken) {
            counted.requests = count;
            counted.nanoseconds = pv_now() - begin;
            for (uint32_t i = 0; i < count; i++)
                counted.pages += runs[i].count;
        }
        stream_give(peer, stream, broken, &frame, &counted);
    } while (broken);
    pthread_mutex_unlock(&peer->asking);
    return error;
}

/* ---- the home's functions ---- */

static uint32_t add_to(struct pv_run_pages *runs, uint32_t used, uint64_t page)
{
    if (used && runs[used - 1].first + runs[used - 1].count == page) {
        runs[used - 1].count++;
        return used;
    }
    runs[used] = (struct pv_run_pages){.first = page, .count = 1};
    return used + 1;
}

static int peer_scatter(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to)
{
    struct pv_peer *peer = self;
    struct pv_run_pages runs[RUNS];
    uint32_t used = 0;
    for (uint32_t i = 0; i < count; i++) {
        if ((words[i] & PV_PAGE_HOME) != PV_HOME_PEER)
            continue;
        if (is_staged(peer, page + i))
            memcpy(to + (size_t)i * PV_PAGE, staged.inbox->bytes + (page + i) % PV_BLOCK_PAGES * PV_PAGE, PV_PAGE);
        else
            used = add_to(runs, used, page + i);
    }
    return used ? ask(peer, runs, used, page, to) : 0;
}

static bool stays_small(const struct pv_peer *peer, uint64_t block, uint32_t to_come)
{
    return peer->large && to_come < SPARSE && !has(peer->large, block);
}

static uint32_t peer_find(void *self, uint64_t page, uint32_t count, uint64_t *words)
{
    for (uint32_t i = 0; i < count; i++)
        words[i] = (page + i) << PV_PAGE_LOCATOR_SHIFT | PV_HOME_PEER;
    bool small = stays_small(self, page / PV_BLOCK_PAGES, count);
    return PV_BLOCK_UNITS | (small ? PV_BLOCK_SMALL | PV_BLOCK_BROKEN : 0);
}

/* Neighbours that are still with the source, under the lock of their block. */
static int peer_gather(void *self, uint64_t page, uint64_t word, struct pv_unit *unit)
{
    const struct pv_peer *peer = self;
    uint64_t first = page / STORE_PAGES * STORE_PAGES, end = first + STORE_PAGES;
    (void)word;
    unit->count = 0;
    if (staged.peer)
        return 0; /* a receiver asks for nothing */
    for (uint64_t each = first; each < end && each < peer->engine->pages; each++)
        if (page_home(peer->engine, each) == PV_HOME_PEER) {
            unit->pages[unit->count] = each;
            unit->words[unit->count++] = peer->engine->page_words[each] & ~PV_PAGE_FAILED;
        }
    return 0;
}

static int peer_read(void *self, const struct pv_unit *unit, const uint8_t **bytes)
{
    static __thread uint8_t room[STORE_PAGES * PV_PAGE];
    struct pv_run_pages runs[STORE_PAGES];
    uint32_t used = 0;
    for (uint32_t i = 0; i < unit->count; i++)
        used = add_to(runs, used, unit->pages[i]);
    int error = ask(self, runs, used, unit->pages[0], room);
    for (uint32_t i = 0; !error && i < unit->count; i++) /* without the gaps; none moves up */
        memmove(room + (size_t)i * PV_PAGE, room + (unit->pages[i] - unit->pages[0]) * PV_PAGE, PV_PAGE);
    *bytes = room;
    return error;
}

void pv_peer_home(struct pv_peer *peer, struct pv_home *out)
{
    *out = (struct pv_home){.fetch = peer_scatter, .find = peer_find, .scatter = peer_scatter, .self = peer};
    if (peer->store) {
        out->gather = peer_gather;
        out->read = peer_read;
    }
}

/* ---- ahead of touches ---- */

/* Runs of the received pages in `got`, as small ones; zeros in a block that is small anyway need not be there at all. */
static int put_small(struct pv_engine *engine, const struct pv_inbox *inbox, const uint64_t *got, bool leave)
{
    uint64_t first = inbox->block * PV_BLOCK_PAGES;
    int error = 0;
    for (uint32_t i = 0, run; i < PV_BLOCK_PAGES; i += run) {
        bool zero = leave && has(inbox->zeros, i);
        for (run = 1; i + run < PV_BLOCK_PAGES; run++)
            if (has(got, i + run) != has(got, i) || (leave && has(inbox->zeros, i + run)) != zero)
                break;
        if (!has(got, i))
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
        if (has(inbox->pages, i))
            got[i / 64] |= 1ull << i % 64;
    }
    for (uint32_t i = 0; i < PV_BLOCK_PAGES / 64; i++)
        zeros[i] = got[i] & inbox->zeros[i];
    uint32_t count = count_bits(got), blank = count_bits(zeros);
    inbox->dropped += inbox->count - count;
    if (!count)
        return 0;
    bool all = count == *left;
    if (all && count == pages && stays_small(peer, block, count - blank))
        block_flags(engine, block, PV_BLOCK_SMALL | PV_BLOCK_BROKEN, 0);
    if (!all || blank == pages || !to_be_large(engine, block))
        return put_small(engine, inbox, got, blank == pages || !to_be_large(engine, block));
    staged = (struct staged){.peer = peer, .inbox = inbox};
    int answer = bring_whole(engine, first);
    staged.peer = NULL;
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
        if (!has(inbox->pages, i) &&
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
