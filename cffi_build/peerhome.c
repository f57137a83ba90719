/* peerhome.c: the home PEER: pages that are still with the migration source, asked for when they are touched. Whoever
 * fetches holds a block's lock, also while it waits for the other side. */
#define _GNU_SOURCE
#include "peer_inside.h"
#include "clock.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define WINDOW 32u     /* requests under way: their frames go into any socket's buffer, so that to send them never waits */
#define STORE_PAGES 16u /* what a touch brings with PV_UNIT_STORE */
#define RUNS (PV_BLOCK_PAGES / 2)

/* Pages that this very thread has received and is installing: they are fetched from here. */
static __thread struct {
    const struct pv_peer *peer;
    const struct pv_inbox *inbox;
} staged;

void peer_stage(const struct pv_peer *peer, const struct pv_inbox *inbox)
{
    staged.peer = peer;
    staged.inbox = inbox;
}

static bool is_staged(const struct pv_peer *peer, uint64_t page)
{
    return staged.peer == peer && page / PV_BLOCK_PAGES == staged.inbox->block &&
           has_bit(staged.inbox->pages, page % PV_BLOCK_PAGES);
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
    struct timespec until = time_after(milliseconds * MILLISECOND_NS);
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

static uint32_t peer_find(void *self, uint64_t page, uint32_t count, uint64_t *words)
{
    for (uint32_t i = 0; i < count; i++)
        words[i] = (page + i) << PV_PAGE_LOCATOR_SHIFT | PV_HOME_PEER;
    bool small = peer_small(self, page / PV_BLOCK_PAGES, count);
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
