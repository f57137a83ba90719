/* fuzz_stream.c: page streams, hostile, for the receivers of cffi_build/stream.c. An input is options and frames of 40
 * bytes; behind a BYTES frame the pages are put that it announces, so that inputs stay small. A model reads the same
 * stream by the words of docs/migration-protocol.md, and must agree in each result, bit and byte; and no page is written
 * that it does not write.
 *
 * stream.c is compiled with recvmsg renamed, so that here is decided how much comes with each call, and which fail. */
#include "fuzz.h"

#include <sys/socket.h>
#include <sys/uio.h>

#define PAGES 1100u /* two whole blocks, and a piece of a third */
#define WORDS (PAGES / 64 + 1)
#define FRAME PV_RUN_FRAME
#define WIRE_MOST (3u << 20)
#define CALLS_MOST 4096u

/* The first bytes of an input. */
struct options {
    uint8_t how, held, large, limit;
    uint8_t types, round, piece, cut;
};

#define HOW_FRAMES 1 /* pv_recv_frame and pv_recv_run, else pv_recv_runs */
#define HOW_RAW 2    /* the frames are all that comes: no pages are put behind them */
#define HOW_NOTES 4
#define HOW_WAITS 8
#define HOW_FAILS 16 /* now and then a call is interrupted, or would block */
#define HOW_PIECES 32
#define HOW_CUT 64

static struct area ram;
static uint8_t *wire; /* WIRE_MOST */
static size_t wire_size;

/* ---- what stream.c has for recvmsg ---- */

static struct {
    int writer; /* the socket's other end; -1: all has been sent */
    size_t sent;
    const struct options *options;
    uint32_t calls;
} feed;

static uint32_t mixed(uint32_t number)
{
    number = (number ^ 61) ^ number >> 16;
    number *= 0x27d4eb2d;
    return number ^ number >> 15;
}

static void feed_more(void)
{
    while (feed.writer >= 0 && feed.sent < wire_size) {
        ssize_t sent = send(feed.writer, wire + feed.sent, wire_size - feed.sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0)
            return; /* full */
        feed.sent += (size_t)sent;
    }
    if (feed.writer >= 0) {
        close(feed.writer);
        feed.writer = -1;
    }
}

ssize_t fuzz_recvmsg(int fd, struct msghdr *message, int flags)
{
    feed_more();
    uint32_t number = mixed(feed.calls++ + feed.options->piece * 977u);
    if (feed.options->how & HOW_FAILS && feed.calls < CALLS_MOST && number % 4 == 0) {
        errno = number % 8 && !(feed.options->how & HOW_WAITS) ? EAGAIN : EINTR;
        return -1;
    }
    struct iovec piece[2];
    CHECK(message->msg_iovlen <= 2);
    size_t left = SIZE_MAX;
    if (feed.options->how & HOW_PIECES && feed.calls < CALLS_MOST)
        left = number % 3 ? 1 + number % (2 * FRAME) : 1 + number % (3 * PAGE);
    for (size_t i = 0; i < message->msg_iovlen; i++) {
        piece[i] = message->msg_iov[i];
        piece[i].iov_len = piece[i].iov_len < left ? piece[i].iov_len : left;
        left -= piece[i].iov_len;
    }
    struct msghdr less = *message;
    less.msg_iov = piece;
    ssize_t came = recvmsg(fd, &less, flags);
    CHECK(came >= 0 || errno != EFAULT); /* beyond RAM, or what it was to be stored in */
    return came;
}

/* ---- the model ---- */

#define UNTOUCHED ((const uint8_t *)0)
static const uint8_t zeros[PAGE], anything[1];

static struct {
    size_t at; /* in the wire */
    uint32_t sequence, round, fault;
    uint64_t heads, bytes_pages, zero_pages;
    bool came[PAGES], held[PAGES], large[PAGES / PV_RUN_MAX + 1];
    const uint8_t *stored[PAGES]; /* what a page holds: bytes of the wire, zeros, anything or UNTOUCHED */
} model;

static uint64_t sum_of(struct pv_run_frame frame)
{
    frame.checksum = 0;
    return pv_hash((const uint8_t *)&frame, sizeof(frame), 0);
}

static uint32_t broken_rule(const struct pv_run_frame *frame, uint32_t types)
{
    static const uint8_t magic[4] = "\x93PVM";
    if (memcmp(frame->magic, magic, 4))
        return PV_FAULT_MAGIC;
    if (frame->version != 1)
        return PV_FAULT_VERSION;
    if (frame->type < 64 || frame->type > 68 || !(types & 1u << (frame->type - 64)))
        return PV_FAULT_TYPE;
    if (frame->flags)
        return PV_FAULT_FLAGS;
    if (frame->length != 16)
        return PV_FAULT_LENGTH;
    if (frame->sequence != model.sequence)
        return PV_FAULT_SEQUENCE;
    if (frame->checksum != sum_of(*frame))
        return PV_FAULT_CHECKSUM;
    if (frame->type == PV_FRAME_END)
        return frame->count == 0 && frame->first <= PAGES ? PV_FAULT_NONE : PV_FAULT_RANGE;
    if (frame->first >= PAGES || frame->count < 1 || frame->count > PAGES || frame->first + frame->count > PAGES)
        return PV_FAULT_RANGE;
    for (uint64_t page = frame->first; frame->type != PV_FRAME_ZEROS && page < frame->first + frame->count; page++)
        if (page / PV_RUN_MAX != frame->first / PV_RUN_MAX)
            return PV_FAULT_RANGE;
    return PV_FAULT_NONE;
}

static int model_frame(uint32_t types, struct pv_run_frame *frame)
{
    size_t left = wire_size - model.at;
    if (left < FRAME) {
        model.at = wire_size;
        return left ? -ECONNRESET : -EPIPE;
    }
    memcpy(frame, wire + model.at, FRAME);
    model.at += FRAME;
    model.heads++;
    model.fault = broken_rule(frame, types);
    if (model.fault)
        return -EBADMSG;
    model.sequence++;
    if (frame->type == PV_FRAME_ZEROS)
        model.zero_pages += frame->count;
    return 0;
}

static int model_bytes(const struct pv_run_frame *frame)
{
    bool whole = wire_size - model.at >= (size_t)frame->count * PAGE;
    for (uint64_t i = 0; i < frame->count; i++)
        model.stored[frame->first + i] = whole ? wire + model.at + i * PAGE : anything;
    model.at = whole ? model.at + (size_t)frame->count * PAGE : wire_size;
    model.bytes_pages += whole ? frame->count : 0;
    return whole ? 0 : -ECONNRESET;
}

/* A frame of a round, and what it brings: PV_RECV_END, 0 or -errno. */
static int model_run(struct pv_run_frame *frame)
{
    int error = model_frame(1 | 2 | 8, frame);
    if (error)
        return error;
    model.fault = frame->round == model.round ? PV_FAULT_NONE : PV_FAULT_ROUND;
    if (model.fault)
        return -EBADMSG;
    if (frame->type == PV_FRAME_END)
        return PV_RECV_END;
    for (uint64_t page = frame->first; page < frame->first + frame->count; page++)
        if (model.came[page])
            model.fault = PV_FAULT_TWICE;
    if (model.fault)
        return -EBADMSG;
    for (uint64_t page = frame->first; page < frame->first + frame->count; page++) {
        model.came[page] = true;
        if (frame->type == PV_FRAME_BYTES)
            model.held[page] = true;
        else if (model.held[page] || model.large[page / PV_RUN_MAX])
            model.stored[page] = zeros;
    }
    return frame->type == PV_FRAME_BYTES ? model_bytes(frame) : 0;
}

/* ---- an input ---- */

static void put_on_wire(const uint8_t *data, size_t size, const struct options *options)
{
    wire_size = 0;
    while (size && wire_size + FRAME <= WIRE_MOST) {
        size_t part = size < FRAME ? size : FRAME;
        memcpy(wire + wire_size, data, part);
        struct pv_run_frame frame = {0};
        memcpy(&frame, data, part);
        wire_size += part;
        data += part;
        size -= part;
        if (options->how & HOW_RAW || part < FRAME || frame.type != PV_FRAME_BYTES || frame.count > PV_RUN_MAX)
            continue;
        for (uint32_t i = 0; i < frame.count && wire_size + PAGE <= WIRE_MOST; i++, wire_size += PAGE) {
            memset(wire + wire_size, (int)(frame.sequence * 31 + i), PAGE); /* may be zeros */
            memcpy(wire + wire_size + 8, &wire_size, sizeof(wire_size));
        }
    }
    if (options->how & HOW_CUT)
        wire_size -= wire_size < options->cut * 37u ? wire_size : options->cut * 37u;
}

static void begin(const struct options *options, uint64_t *held, uint64_t *large)
{
    memset(&model, 0, sizeof(model));
    model.round = options->round;
    for (uint32_t page = 0; page < PAGES; page++)
        if ((model.held[page] = options->held >> page % 8 & 1))
            held[page / 64] |= 1ull << page % 64;
    for (uint32_t block = 0; block <= PAGES / PV_RUN_MAX; block++)
        if ((model.large[block] = options->large >> block & 1))
            large[0] |= 1ull << block;
}

static int receive_runs(struct pv_stream *stream, uint64_t *came, uint64_t *held, const uint64_t *large, uint32_t limit)
{
    for (;;) {
        struct pv_arrivals arrivals = {.came = came, .held = held, .large = large, .round = model.round};
        struct pv_run_frame end, expected;
        int result = pv_recv_runs(stream, ram.at, PAGES, &arrivals, limit, &end), error = 0;
        for (uint64_t pages = 0; !error && pages < limit; pages += expected.count)
            error = model_run(&expected);
        CHECK(result == error);
        if (result < 0)
            return result;
        CHECK(!memcmp(&end, &expected, sizeof(end)));
        if (result == PV_RECV_END) { /* the next round */
            memset(came, 0, WORDS * sizeof(*came));
            memset(model.came, 0, sizeof(model.came));
            model.round++;
        }
    }
}

static int receive_frames(struct pv_stream *stream, uint32_t types)
{
    for (;;) {
        struct pv_run_frame frame, expected;
        int result = pv_recv_frame(stream, PAGES, types, &frame);
        CHECK(result == model_frame(types, &expected));
        if (result)
            return result;
        CHECK(!memcmp(&frame, &expected, sizeof(frame)));
        CHECK(pv_recv_run(stream, ram.at, PAGES, PAGES - frame.count, frame.count + 1) == -EINVAL);
        CHECK(pv_recv_run(stream, ram.at, PAGES, UINT64_MAX - frame.first, 2) == -EINVAL);
        if (frame.type != PV_FRAME_BYTES)
            continue;
        result = pv_recv_run(stream, ram.at, PAGES, frame.first, frame.count);
        CHECK(result == model_bytes(&expected));
        if (result)
            return result;
    }
}

static void compare(const uint64_t *came, const uint64_t *held, bool runs)
{
    area_look(&ram);
    bool unsure = model.fault == PV_FAULT_TWICE; /* marked halfway */
    for (uint64_t page = 0; page < PAGES; page++) {
        if (runs) {
            CHECK(unsure || (came[page / 64] >> page % 64 & 1) == model.came[page]);
            CHECK((held[page / 64] >> page % 64 & 1) == model.held[page]);
        }
        if (model.stored[page] == UNTOUCHED)
            CHECK(!area_written(&ram, page));
        else if (model.stored[page] != anything)
            CHECK(!memcmp(ram.at + page * PAGE, model.stored[page], PAGE));
    }
    for (uint64_t page = PAGES; page < WORDS * 64; page++)
        CHECK(!((came[page / 64] | held[page / 64]) >> page % 64 & 1));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!ram.at) {
        area_make(&ram, PAGES);
        CHECK((wire = malloc(WIRE_MOST + PAGE)));
    }
    struct options options;
    if (size < sizeof(options))
        return 0;
    memcpy(&options, data, sizeof(options));
    put_on_wire(data + sizeof(options), size - sizeof(options), &options);
    uint64_t came[WORDS] = {0}, held[WORDS] = {0}, large[1] = {0};
    begin(&options, held, large);

    int ends[2];
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
    feed = (__typeof__(feed)){.writer = ends[1], .options = &options};
    struct pv_noted notes[5];
    struct pv_stream stream = {.fd = ends[0], .timeout_ns = 20000000000};
    if (options.how & HOW_NOTES) {
        stream.notes = notes;
        stream.notes_room = 5;
    }
    if (options.how & HOW_WAITS)
        CHECK(!pv_stream_wait(&stream));
    bool runs = !(options.how & HOW_FRAMES);
    int result = runs ? receive_runs(&stream, came, held, large, 1 + options.limit * 5u)
                      : receive_frames(&stream, options.types);
    CHECK(result == -EPIPE || result == -ECONNRESET || result == -EBADMSG);
    CHECK(stream.fault == model.fault);
    CHECK(stream.receiving == model.sequence && stream.runs == model.heads);
    CHECK(stream.bytes_pages == model.bytes_pages && stream.zero_pages == model.zero_pages);
    if (options.how & HOW_NOTES) {
        CHECK(stream.notes_used + stream.notes_lost == model.heads && stream.notes_used <= 5);
        CHECK(!stream.notes_used || !memcmp(&notes[0].frame, wire, FRAME));
    }
    compare(came, held, runs);
    area_clear(&ram);
    close(ends[0]);
    if (feed.writer >= 0)
        close(feed.writer);
    return 0;
}

/* ---- mutations ---- */

static void repair(uint8_t *data, size_t size, uint32_t seed)
{
    struct options options;
    memcpy(&options, data, sizeof(options));
    uint32_t round = options.round, left_alone = seed % 3 ? UINT32_MAX : mixed(seed) % (uint32_t)(size / FRAME + 1);
    uint32_t number = 0;
    for (size_t at = sizeof(options); at + FRAME <= size; at += FRAME, number++) {
        struct pv_run_frame frame;
        memcpy(&frame, data + at, sizeof(frame));
        if (number != left_alone) {
            memcpy(frame.magic, "\x93PVM", 4);
            frame.version = 1;
            frame.type = frame.type < 64 || frame.type > 68 ? (uint8_t)(64 + frame.type % 5) : frame.type;
            frame.flags = 0;
            frame.length = 16;
            frame.sequence = number;
            frame.first %= frame.type == PV_FRAME_END ? PAGES + 1 : PAGES;
            uint32_t room = frame.type == PV_FRAME_ZEROS ? PAGES - (uint32_t)frame.first
                                                         : PV_RUN_MAX - (uint32_t)frame.first % PV_RUN_MAX;
            room = room < PAGES - frame.first ? room : PAGES - (uint32_t)frame.first;
            frame.count = frame.type == PV_FRAME_END ? 0 : 1 + (frame.count - 1) % room;
            frame.round = round;
            round += frame.type == PV_FRAME_END;
        }
        frame.checksum = sum_of(frame);
        memcpy(data + at, &frame, sizeof(frame));
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed)
{
    const size_t head = sizeof(struct options);
    uint32_t number = mixed(seed), what = number % 8;
    if (what < 5 || most < head + FRAME || size < head) {
        size = LLVMFuzzerMutate(data, size, most);
        if (what == 0 || size < head)
            return size;
    } else {
        size_t frames = (size - head) / FRAME, at = head + mixed(number) % (frames + 1) * FRAME;
        if (what == 5 && frames) { /* one goes */
            at -= at == head + frames * FRAME ? FRAME : 0;
            memmove(data + at, data + at + FRAME, size - at - FRAME);
            size -= FRAME;
        } else if (size + FRAME <= most) { /* one comes, any, or that which is at the front */
            memmove(data + at + FRAME, data + at, size - at);
            size += FRAME;
            struct pv_run_frame frame = {.type = (uint8_t)(64 + number % 5), .first = mixed(number + 1), .count = mixed(number + 2)};
            if (what == 7 && at > head)
                memcpy(&frame, data + head, sizeof(frame));
            else if (number & 64)
                frame.count %= 9;
            memcpy(data + at, &frame, sizeof(frame));
        }
    }
    repair(data, size, seed >> 4);
    return size;
}
