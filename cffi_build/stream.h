/* stream.h: runs of guest pages over a connection, straight out of and into memory (docs/migration-protocol.md). All that
 * is received may be hostile: no byte is stored before the frame that brings it has been checked, and none outside `ram`.
 *
 * A stream is used by one thread at a time for each direction. Its descriptor may block or not: what cannot be done at
 * once is waited for by poll(2), or after pv_stream_wait within the call itself. Another thread ends a call by shutdown(2) of the socket. After an error other than
 * -EINVAL before anything was sent the stream is of no use any more. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PV_STREAM_VERSION 1
#define PV_RUN_FRAME 40 /* bytes of a frame of pages */
#define PV_RUN_MAX 512  /* pages that follow one, all of one block */

/* Types of frames of pages. */
#define PV_FRAME_BYTES 64
#define PV_FRAME_ZEROS 65
#define PV_FRAME_PULL 66
#define PV_FRAME_END 67
#define PV_FRAME_REQUEST 68

/* What a received frame broke: `fault` of a stream after -EBADMSG. */
#define PV_FAULT_NONE 0
#define PV_FAULT_MAGIC 1
#define PV_FAULT_VERSION 2
#define PV_FAULT_TYPE 3
#define PV_FAULT_FLAGS 4
#define PV_FAULT_LENGTH 5
#define PV_FAULT_SEQUENCE 6
#define PV_FAULT_CHECKSUM 7
#define PV_FAULT_RANGE 8 /* pages that are not RAM, none, too many, or not of one block */
#define PV_FAULT_ROUND 9
#define PV_FAULT_TWICE 10 /* a page that had come in this round */

#define PV_RECV_END 1 /* pv_recv_runs: the frame END has come */

/* A frame of pages, as it is sent. */
struct pv_run_frame {
    uint8_t magic[4];
    uint8_t version, type;
    uint16_t flags;
    uint32_t length, sequence;
    uint64_t checksum; /* of the frame, with 0 here */
    uint64_t first;    /* page */
    uint32_t count, round;
};

/* A frame that went or came, for a capture. */
struct pv_noted {
    uint64_t at; /* CLOCK_MONOTONIC, ns */
    struct pv_run_frame frame;
};

#define PV_STREAM_AHEAD 3 /* frames that are read together with the bytes before them */

struct pv_stream {
    int fd;
    uint32_t fault;      /* PV_FAULT_* */
    int64_t timeout_ns;  /* without any progress; < 0: for ever */
    uint32_t waits;      /* set by pv_stream_wait */
    uint32_t sending, receiving; /* sequence of the next frame each way */
    /* Counted: what went or came completely. */
    uint64_t runs, bytes_pages, zero_pages, wire_bytes;
    struct pv_noted *notes; /* NULL: no capture */
    uint64_t notes_room, notes_used, notes_lost;
    /* Both sides are on one host: pulled, at the source: PULL goes in place of BYTES. At the destination the process that
     * runs of bytes are read out of, and where page 0 lies there; 0: PULL is refused. */
    uint32_t pulled;
    int32_t pull_pid;
    uint64_t pull_ram;
    uint8_t ahead[PV_STREAM_AHEAD * PV_RUN_FRAME];
    uint32_t ahead_at, ahead_used;
};

/* Has the kernel wait in sendmsg(2) and recvmsg(2), with the stream's timeout, which stays as it is from then on: a tenth
 * faster than poll(2) over UNIX sockets. Changes the socket's options and that it blocks. -errno. */
int pv_stream_wait(struct pv_stream *stream) PV_CHECKED;

/* Sends runs of pages out of `ram`, cut at blocks of 2 MiB. With `zeros`, pages that hold nothing but zeros go as ZEROS.
 * They are read through the mapping: the caller has them present and pinned, and what is written to them meanwhile may be
 * sent, or not. -EINVAL, before anything is sent, for a run that is not in `pages`, or empty; -ETIMEDOUT, -EPIPE where
 * the other side has closed, or another errno of sendmsg(2), which may come after some of it was sent. */
int pv_send_runs(struct pv_stream *stream, const uint8_t *ram, uint64_t pages, const struct pv_run_pages *runs,
                 uint64_t count, uint32_t round, int zeros) PV_CHECKED;
/* Sends a frame without bytes: ZEROS, PULL, END, REQUEST. Errors as above. */
int pv_send_frame(struct pv_stream *stream, uint32_t type, uint64_t first, uint32_t count, uint32_t round) PV_CHECKED;

/* Receives a frame and checks it against `pages` of RAM. types: a bit for each allowed type, from PV_FRAME_BYTES on.
 * 0; -EBADMSG (`fault`, and *out is what came); -EPIPE where the other side has closed between two frames, -ECONNRESET
 * in one; -ETIMEDOUT, or an errno of recvmsg(2). */
int pv_recv_frame(struct pv_stream *stream, uint64_t pages, uint32_t types, struct pv_run_frame *out) PV_CHECKED;
/* Receives the bytes of a BYTES frame to `ram` + first * 4096: guest memory, or a staging area of the same layout.
 * -EINVAL where that is not in `pages`, else as pv_recv_frame. */
int pv_recv_run(struct pv_stream *stream, uint8_t *ram, uint64_t pages, uint64_t first, uint32_t count) PV_CHECKED;

/* Reads the bytes of a PULL frame out of the source's memory, likewise. -ECONNRESET where that process is gone, -EPERM
 * where it may not be read, -EFAULT where its pages are not there. */
int pv_pull_run(struct pv_stream *stream, uint8_t *ram, uint64_t pages, uint64_t first, uint32_t count) PV_CHECKED;
/* Whichever of both it is. */
int pv_take_run(struct pv_stream *stream, uint8_t *ram, uint64_t pages, const struct pv_run_frame *frame) PV_CHECKED;
/* What may come on a pages channel: for pv_recv_frame. */
uint32_t pv_run_types(const struct pv_stream *stream);

/* What the destination knows of its pages while they come; a bit a page or block, and shared by all streams. */
struct pv_arrivals {
    uint64_t *came;        /* pages in this round: cleared by the caller between rounds */
    uint64_t *held;        /* pages in which something may be stored; a page without its bit is zeros still */
    const uint64_t *large; /* blocks that are large at the source: their zeros are stored, so that they are large here (T1) */
    uint32_t round;
};

/* Receives BYTES and ZEROS of one round into RAM until END (PV_RECV_END, and *end), or until `limit` pages or more
 * have come (0): then it is to be called again. A frame of another round or a page that comes twice is -EBADMSG. A zero
 * page is stored where something else may be, or its block is large; and left alone, untouched, where nothing is.
 * Errors as pv_recv_frame; also -EINVAL. */
int pv_recv_runs(struct pv_stream *stream, uint8_t *ram, uint64_t pages, const struct pv_arrivals *arrivals,
                 uint64_t limit, struct pv_run_frame *end) PV_CHECKED;
