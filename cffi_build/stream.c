/* stream.c: see stream.h. The bytes of a page are touched by the kernel's copy alone, and by the look for zeros. */
#define _GNU_SOURCE
#include "native.h"
#include "clock.h"
#include "zero.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define PAGE 4096u
#define BATCH 64           /* runs in one call of sendmsg, and at most twice as many pieces of memory */
#define BATCH_PAGES 1024u  /* no run is added after so many: who looks for zeros goes ahead of the kernel by no more */

static const uint8_t MAGIC[4] = {0x93, 'P', 'V', 'M'};

_Static_assert(sizeof(struct pv_run_frame) == PV_RUN_FRAME, "a frame is sent as it is in memory");

int pv_stream_wait(struct pv_stream *stream)
{
    int64_t limit = stream->timeout_ns < 0 ? 0 : stream->timeout_ns < 1000 ? 1000 : stream->timeout_ns; /* 0: for ever */
    struct timeval time = {.tv_sec = limit / 1000000000, .tv_usec = limit % 1000000000 / 1000};
    int flags = fcntl(stream->fd, F_GETFL);
    if (flags < 0 || setsockopt(stream->fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof(time)) ||
        setsockopt(stream->fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof(time)) ||
        fcntl(stream->fd, F_SETFL, flags & ~O_NONBLOCK))
        return -errno;
    stream->waits = 1;
    return 0;
}

/* Until the descriptor is ready, or nothing has moved since `since` for as long as the stream says. */
static int wait_for(const struct pv_stream *stream, short events, int64_t since)
{
    for (;;) {
        int64_t left = stream->timeout_ns < 0 ? -1 : since + stream->timeout_ns - (int64_t)now_ns();
        if (stream->timeout_ns >= 0 && left <= 0)
            return -ETIMEDOUT;
        int64_t milliseconds = left < 0 ? -1 : (left + 999999) / 1000000; /* not 0: it would spin in the last one */
        struct pollfd polled = {.fd = stream->fd, .events = events};
        int ready = poll(&polled, 1, milliseconds > INT_MAX ? INT_MAX : (int)milliseconds);
        if (ready > 0)
            return polled.revents & POLLNVAL ? -EBADF : 0;
        if (ready < 0 && errno != EINTR)
            return -errno;
    }
}

/* What becomes of a call that moved nothing since `since`: 0, it is to be made again. */
static int after(const struct pv_stream *stream, short events, int64_t since)
{
    if (errno == EINTR) /* of many signals none may put the end off */
        return stream->timeout_ns >= 0 && (int64_t)now_ns() - since >= stream->timeout_ns ? -ETIMEDOUT : 0;
    if (errno != EAGAIN && errno != EWOULDBLOCK)
        return -errno;
    return stream->waits ? -ETIMEDOUT : wait_for(stream, events, since);
}

static int call_flags(const struct pv_stream *stream) { return stream->waits ? 0 : MSG_DONTWAIT; }

static void note(struct pv_stream *stream, const struct pv_run_frame *frame)
{
    stream->runs++;
    if (!stream->notes)
        return;
    if (stream->notes_used == stream->notes_room) {
        stream->notes_lost++;
        return;
    }
    stream->notes[stream->notes_used++] = (struct pv_noted){.at = now_ns(), .frame = *frame};
}

static uint64_t sum_of(const struct pv_run_frame *frame)
{
    struct pv_run_frame summed = *frame;
    summed.checksum = 0;
    return pv_hash((const uint8_t *)&summed, sizeof(summed), 0);
}

static bool in_ram(uint64_t pages, uint64_t first, uint64_t count)
{
    return count && first < pages && count <= pages - first;
}

/* ---- sending ---- */

struct batch {
    struct pv_stream *stream;
    uint32_t frames, pieces, pages;
    struct pv_run_frame frame[BATCH];
    struct iovec piece[2 * BATCH];
};

/* Sends all pieces, whatever the kernel takes at once. */
static int send_pieces(struct pv_stream *stream, struct iovec *piece, size_t pieces)
{
    int64_t since = (int64_t)now_ns();
    while (pieces) {
        struct msghdr message = {.msg_iov = piece, .msg_iovlen = pieces};
        ssize_t sent = sendmsg(stream->fd, &message, MSG_NOSIGNAL | call_flags(stream));
        if (sent < 0) {
            int error = after(stream, POLLOUT, since);
            if (error)
                return error;
            continue;
        }
        stream->wire_bytes += (uint64_t)sent;
        since = (int64_t)now_ns();
        size_t left = (size_t)sent;
        while (pieces && left >= piece->iov_len) {
            left -= piece->iov_len;
            piece++;
            pieces--;
        }
        if (left) {
            piece->iov_base = (uint8_t *)piece->iov_base + left;
            piece->iov_len -= left;
        }
    }
    return 0;
}

static int flush(struct batch *batch)
{
    int error = send_pieces(batch->stream, batch->piece, batch->pieces);
    if (error)
        return error;
    for (uint32_t i = 0; i < batch->frames; i++) {
        const struct pv_run_frame *frame = &batch->frame[i];
        if (frame->type == PV_FRAME_BYTES || frame->type == PV_FRAME_PULL)
            batch->stream->bytes_pages += frame->count;
        else if (frame->type == PV_FRAME_ZEROS)
            batch->stream->zero_pages += frame->count;
        note(batch->stream, frame);
    }
    batch->frames = batch->pieces = batch->pages = 0;
    return 0;
}

/* from: the bytes that follow, or NULL. */
static int add(struct batch *batch, uint32_t type, uint64_t first, uint32_t count, uint32_t round, const uint8_t *from)
{
    if (batch->frames == BATCH || batch->pages >= BATCH_PAGES) {
        int error = flush(batch);
        if (error)
            return error;
    }
    struct pv_run_frame *frame = &batch->frame[batch->frames++];
    *frame = (struct pv_run_frame){.version = PV_STREAM_VERSION, .type = (uint8_t)type, .length = PV_RUN_FRAME - 24,
                                   .sequence = batch->stream->sending++, .first = first, .count = count, .round = round};
    memcpy(frame->magic, MAGIC, sizeof(MAGIC));
    frame->checksum = sum_of(frame);
    batch->piece[batch->pieces++] = (struct iovec){.iov_base = frame, .iov_len = sizeof(*frame)};
    if (!from)
        return 0;
    batch->pages += count;
    batch->piece[batch->pieces++] = (struct iovec){.iov_base = (void *)from, /* sendmsg only reads it */
                                                       .iov_len = (size_t)count * PAGE};
    return 0;
}

/* A run of zeros that has not been added yet: it may go on in the next block. */
struct zeros {
    uint64_t first;
    uint32_t count;
};

static int add_zeros(struct batch *batch, struct zeros *zeros, uint32_t round)
{
    int error = zeros->count ? add(batch, PV_FRAME_ZEROS, zeros->first, zeros->count, round, NULL) : 0;
    zeros->count = 0;
    return error;
}

/* Pages with their bytes behind them, or for the other side to read. */
static int add_bytes(struct batch *batch, const uint8_t *ram, uint64_t page, uint32_t count, uint32_t round)
{
    if (batch->stream->pulled)
        return add(batch, PV_FRAME_PULL, page, count, round, NULL);
    return add(batch, PV_FRAME_BYTES, page, count, round, ram + page * PAGE);
}

static int add_run(struct batch *batch, const uint8_t *ram, uint64_t first, uint64_t count, uint32_t round, bool scan)
{
    struct zeros zeros = {0};
    for (uint64_t page = first, end = first + count; page < end;) {
        if (scan && is_zero(ram + page * PAGE)) {
            if (!zeros.count++)
                zeros.first = page;
            page++;
            continue;
        }
        int error = add_zeros(batch, &zeros, round);
        uint64_t stop = (page / PV_RUN_MAX + 1) * PV_RUN_MAX, next = page + 1;
        stop = stop < end ? stop : end;
        while (next < stop && !(scan && is_zero(ram + next * PAGE)))
            next++;
        if (!error)
            error = add_bytes(batch, ram, page, (uint32_t)(next - page), round);
        if (error)
            return error;
        page = next;
    }
    return add_zeros(batch, &zeros, round);
}

int pv_send_runs(struct pv_stream *stream, const uint8_t *ram, uint64_t pages, const struct pv_run_pages *runs,
                 uint64_t count, uint32_t round, int zeros)
{
    for (uint64_t i = 0; i < count; i++)
        if (!in_ram(pages, runs[i].first, runs[i].count))
            return -EINVAL;
    struct batch batch = {.stream = stream};
    for (uint64_t i = 0; i < count; i++) {
        int error = add_run(&batch, ram, runs[i].first, runs[i].count, round, zeros);
        if (error)
            return error;
    }
    return flush(&batch);
}

int pv_send_frame(struct pv_stream *stream, uint32_t type, uint64_t first, uint32_t count, uint32_t round)
{
    if (type <= PV_FRAME_BYTES || type > PV_FRAME_REQUEST)
        return -EINVAL;
    struct batch batch = {.stream = stream};
    int error = add(&batch, type, first, count, round, NULL);
    return error ? error : flush(&batch);
}

/* ---- receiving ---- */

static uint32_t ahead(const struct pv_stream *stream) { return stream->ahead_used - stream->ahead_at; }

/* Moves what was read ahead to the front, so that there is room behind it. */
static void settle_ahead(struct pv_stream *stream)
{
    memmove(stream->ahead, stream->ahead + stream->ahead_at, ahead(stream));
    stream->ahead_used -= stream->ahead_at;
    stream->ahead_at = 0;
}

/* Receives `size` bytes to `to`, and perhaps some of the frames that follow. begun: it is an error that nothing comes. */
static int receive(struct pv_stream *stream, uint8_t *to, size_t size, bool begun)
{
    int64_t since = (int64_t)now_ns();
    size_t had = ahead(stream) < size ? ahead(stream) : size;
    memcpy(to, stream->ahead + stream->ahead_at, had);
    stream->ahead_at += (uint32_t)had;
    settle_ahead(stream);
    for (size_t got = had; got < size;) {
        /* While bytes are wanted nothing is ahead. */
        struct iovec piece[2] = {{.iov_base = to + got, .iov_len = size - got},
                                 {.iov_base = stream->ahead, .iov_len = sizeof(stream->ahead)}};
        struct msghdr message = {.msg_iov = piece, .msg_iovlen = 2};
        ssize_t came = recvmsg(stream->fd, &message, call_flags(stream));
        if (came == 0)
            return got || begun ? -ECONNRESET : -EPIPE;
        if (came < 0) {
            int error = after(stream, POLLIN, since);
            if (error)
                return error;
            continue;
        }
        since = (int64_t)now_ns();
        stream->wire_bytes += (uint64_t)came;
        size_t own = (size_t)came < size - got ? (size_t)came : size - got;
        stream->ahead_used = (uint32_t)((size_t)came - own);
        got += own;
    }
    return 0;
}

/* One round's frames: those with pages are of one block, but for ZEROS. */
static uint32_t fault_of(const struct pv_stream *stream, const struct pv_run_frame *frame, uint64_t pages,
                         uint32_t types)
{
    if (memcmp(frame->magic, MAGIC, sizeof(MAGIC)))
        return PV_FAULT_MAGIC;
    if (frame->version != PV_STREAM_VERSION)
        return PV_FAULT_VERSION;
    if (frame->type < PV_FRAME_BYTES || frame->type > PV_FRAME_REQUEST || !(types >> (frame->type - PV_FRAME_BYTES) & 1))
        return PV_FAULT_TYPE;
    if (frame->flags)
        return PV_FAULT_FLAGS;
    if (frame->length != PV_RUN_FRAME - 24)
        return PV_FAULT_LENGTH;
    if (frame->sequence != stream->receiving)
        return PV_FAULT_SEQUENCE;
    if (frame->checksum != sum_of(frame))
        return PV_FAULT_CHECKSUM;
    if (frame->type == PV_FRAME_END)
        return frame->count || frame->first > pages ? PV_FAULT_RANGE : PV_FAULT_NONE;
    if (!in_ram(pages, frame->first, frame->count))
        return PV_FAULT_RANGE;
    uint64_t last = frame->first + frame->count - 1;
    if (frame->type != PV_FRAME_ZEROS && frame->first / PV_RUN_MAX != last / PV_RUN_MAX)
        return PV_FAULT_RANGE;
    return PV_FAULT_NONE;
}

int pv_recv_frame(struct pv_stream *stream, uint64_t pages, uint32_t types, struct pv_run_frame *out)
{
    int error = receive(stream, (uint8_t *)out, sizeof(*out), false);
    if (error)
        return error;
    note(stream, out);
    stream->fault = fault_of(stream, out, pages, types);
    if (stream->fault)
        return -EBADMSG;
    stream->receiving++;
    if (out->type == PV_FRAME_ZEROS)
        stream->zero_pages += out->count;
    return 0;
}

int pv_recv_run(struct pv_stream *stream, uint8_t *ram, uint64_t pages, uint64_t first, uint32_t count)
{
    if (!in_ram(pages, first, count))
        return -EINVAL;
    int error = receive(stream, ram + first * PAGE, (size_t)count * PAGE, true);
    if (!error)
        stream->bytes_pages += count;
    return error;
}

static int pull(struct pv_stream *stream, uint64_t first, uint8_t *to, size_t size)
{
    for (size_t done = 0; done < size;) {
        struct iovec here = {.iov_base = to + done, .iov_len = size - done};
        struct iovec there = {.iov_base = (void *)(uintptr_t)(stream->pull_ram + first * PAGE + done),
                              .iov_len = size - done};
        ssize_t read = process_vm_readv(stream->pull_pid, &here, 1, &there, 1, 0);
        if (read < 0)
            return errno == ESRCH ? -ECONNRESET : -errno;
        if (read == 0)
            return -EFAULT;
        done += (size_t)read;
    }
    return 0;
}

int pv_take_run(struct pv_stream *stream, const struct pv_run_frame *frame, uint8_t *to)
{
    size_t size = (size_t)frame->count * PAGE;
    int error = frame->type == PV_FRAME_PULL ? pull(stream, frame->first, to, size) : receive(stream, to, size, true);
    if (!error)
        stream->bytes_pages += frame->count;
    return error;
}

uint32_t pv_run_types(const struct pv_stream *stream)
{
    return 1u | 1u << (PV_FRAME_ZEROS - PV_FRAME_BYTES) | 1u << (PV_FRAME_END - PV_FRAME_BYTES) |
           (stream->pull_pid > 0 ? 1u << (PV_FRAME_PULL - PV_FRAME_BYTES) : 0);
}

static bool is_set(const uint64_t *bits, uint64_t at)
{
    /* relaxed: other streams set bits of other pages in the same word */
    return __atomic_load_n(&bits[at / 64], __ATOMIC_RELAXED) >> at % 64 & 1;
}

static void store_zeros(uint8_t *ram, const struct pv_arrivals *arrivals, const struct pv_run_frame *frame)
{
    for (uint64_t page = frame->first, end = page + frame->count; page < end; page++)
        if (is_set(arrivals->large, page / PV_RUN_MAX) || is_set(arrivals->held, page))
            memset(ram + page * PAGE, 0, PAGE);
}

/* Marks pages that come. One stream of several may find its page marked by another. */
static bool claim(uint64_t *bits, uint64_t first, uint64_t count)
{
    for (uint64_t page = first, end = first + count, next; page < end; page = next) {
        next = (page / 64 + 1) * 64;
        next = next < end ? next : end;
        uint64_t mask = (next - page == 64 ? ~0ull : (1ull << (next - page)) - 1) << page % 64;
        if (__atomic_fetch_or(&bits[page / 64], mask, __ATOMIC_RELAXED) & mask)
            return false;
    }
    return true;
}

int pv_recv_runs(struct pv_stream *stream, uint8_t *ram, uint64_t pages, const struct pv_arrivals *arrivals,
                 uint64_t limit, struct pv_run_frame *end)
{
    const uint32_t types = pv_run_types(stream);
    if (!limit)
        return -EINVAL;
    for (uint64_t came = 0; came < limit; came += end->count) {
        int error = pv_recv_frame(stream, pages, types, end);
        if (error)
            return error;
        if (end->round != arrivals->round) {
            stream->fault = PV_FAULT_ROUND;
            return -EBADMSG;
        }
        if (end->type == PV_FRAME_END)
            return PV_RECV_END;
        if (!claim(arrivals->came, end->first, end->count)) {
            stream->fault = PV_FAULT_TWICE;
            return -EBADMSG;
        }
        if (end->type == PV_FRAME_ZEROS) {
            store_zeros(ram, arrivals, end);
            continue;
        }
        pv_bits_set(arrivals->held, end->first, end->count); /* before: some bytes may be stored when it fails */
        error = pv_take_run(stream, end, ram + end->first * PAGE);
        if (error)
            return error;
    }
    return 0;
}
