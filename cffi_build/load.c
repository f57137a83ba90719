/* load.c: storage blocks into RAM, many with one read. Several threads may load different blocks: no page is in two. */
#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>

#define BATCH_BLOCKS 64u
#define BATCH_PAGES 256u /* unless one block has more: what a CPU's own cache holds until it is summed up */
#define POPULATE (64u << 10) /* bytes from which on it is quicker to have the kernel populate than to fault */

/* Neighbours in the file. */
struct batch {
    uint32_t blocks, pages, parts;
    uint64_t offset, size; /* in the file, with what fills blocks up */
    struct pv_stored row[BATCH_BLOCKS];
    bool straight[BATCH_BLOCKS]; /* its pages are neighbours in RAM and all wanted: no copy */
    uint8_t *at[BATCH_BLOCKS];   /* where its stored bytes are read to */
    uint64_t page[PV_STORE_SLOTS];
    struct iovec part[BATCH_BLOCKS];
    uint8_t stored[PV_STORE_MAX], spare[PV_STORE_MAX];
};

static bool is_wanted(const uint64_t *wanted, uint64_t page)
{
    return __atomic_load_n(&wanted[page / 64], __ATOMIC_RELAXED) >> page % 64 & 1; /* other threads clear other bits */
}

/* Their bits are cleared: together where they share a word. */
static void have(uint64_t *wanted, const uint64_t *pages, uint32_t count)
{
    for (uint32_t i = 0; i < count;) {
        uint64_t word = pages[i] / 64, mask = 0;
        for (; i < count && pages[i] / 64 == word; i++)
            mask |= 1ull << pages[i] % 64;
        __atomic_fetch_and(&wanted[word], ~mask, __ATOMIC_RELAXED);
    }
}

static uint32_t whole_length(const struct pv_stored *row) { return (row->length + 7) & ~7u; }

/* Adds a block, unless it must be the first of another batch: returns 1. A block of which nothing is wanted is passed
 * over: *none. */
static int batch_add(const struct pv_snapshot *snapshot, struct batch *batch, uint64_t block, const uint64_t *wanted,
                     uint8_t *ram, bool *none)
{
    struct pv_stored row;
    uint64_t pages[PV_STORE_SLOTS], found = 0;
    int error = pv_snapshot_block(snapshot, block, &row, pages);
    if (error)
        return error;
    bool in_order = true;
    for (uint32_t slot = 0; slot < row.slots; slot++) {
        found += is_wanted(wanted, pages[slot]);
        in_order = in_order && pages[slot] == pages[0] + slot;
    }
    *none = !found;
    if (!found)
        return 0;
    uint32_t n = batch->blocks, whole = whole_length(&row);
    if (n && (n == BATCH_BLOCKS || batch->pages + row.slots > BATCH_PAGES ||
              row.offset != batch->offset + batch->size))
        return 1;
    if (!n)
        batch->offset = row.offset;
    batch->row[n] = row;
    batch->straight[n] = in_order && found == row.slots;
    bool direct = batch->straight[n] && row.codec == PV_CODEC_RAW; /* to where it is to go at last */
    uint8_t *at = batch->at[n] = direct ? ram + pages[0] * PV_PAGE : batch->stored + batch->size;
    struct iovec *last = batch->parts ? &batch->part[batch->parts - 1] : NULL;
    if (last && (uint8_t *)last->iov_base + last->iov_len == at)
        last->iov_len += whole;
    else
        batch->part[batch->parts++] = (struct iovec){.iov_base = at, .iov_len = whole};
    memcpy(batch->page + batch->pages, pages, row.slots * sizeof(*pages));
    batch->pages += row.slots;
    batch->size += whole;
    batch->blocks++;
    return 0;
}

static int batch_read(const struct pv_snapshot *snapshot, struct batch *batch)
{
    struct iovec *part = batch->part, *end = part + batch->parts;
    for (uint64_t at = batch->offset; part < end;) {
        ssize_t got = preadv(snapshot->fd, part, (int)(end - part), (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got ? -errno : -ENODATA;
        at += (uint64_t)got;
        for (; part < end && (size_t)got >= part->iov_len; part++)
            got -= (ssize_t)part->iov_len;
        if (part < end) {
            part->iov_base = (uint8_t *)part->iov_base + got;
            part->iov_len -= (size_t)got;
        }
    }
    return 0;
}

/* Has the pages of a block that has been read and verified in RAM. */
static int block_put(const struct pv_stored *row, bool straight, const uint8_t *at, const uint64_t *pages,
                     uint8_t *spare, uint64_t *wanted, uint8_t *ram)
{
    const uint8_t *bytes = at;
    if (row->codec != PV_CODEC_RAW) {
        uint8_t *to = straight ? ram + pages[0] * PV_PAGE : spare;
        int error = pv_codec_decompress(row->codec, at, row->length, to, row->slots * PV_PAGE);
        if (error)
            return error;
        bytes = to;
    }
    for (uint32_t slot = 0; !straight && slot < row->slots; slot++)
        if (is_wanted(wanted, pages[slot]))
            memcpy(ram + pages[slot] * PV_PAGE, bytes + (size_t)slot * PV_PAGE, PV_PAGE);
    have(wanted, pages, row->slots);
    return 0;
}

/* Has runs of pages that are about to be written populated at once. Only a hint: what fails is found when it is written. */
static void populate(const struct batch *batch, uint8_t *ram)
{
    for (uint32_t i = 0, run; i < batch->pages; i += run) {
        for (run = 1; i + run < batch->pages && batch->page[i + run] == batch->page[i] + run;)
            run++;
        if (run * PV_PAGE >= POPULATE)
            (void)!madvise(ram + batch->page[i] * PV_PAGE, (size_t)run * PV_PAGE, MADV_POPULATE_WRITE);
    }
}

static int batch_load(const struct pv_snapshot *snapshot, struct batch *batch, uint64_t *wanted, uint8_t *ram,
                      uint32_t *failed)
{
    *failed = 0;
    if (!batch->blocks)
        return 0;
    populate(batch, ram);
    int error = batch_read(snapshot, batch);
    const uint64_t *pages = batch->page;
    uint32_t sizes[BATCH_BLOCKS];
    uint64_t sums[BATCH_BLOCKS];
    for (uint32_t i = 0; i < batch->blocks; i++)
        sizes[i] = whole_length(&batch->row[i]);
    if (!error)
        pv_hash_many((const uint8_t *const *)batch->at, sizes, batch->blocks, sums);
    for (uint32_t i = 0; !error && i < batch->blocks; i++) {
        error = sums[i] != batch->row[i].checksum ? -EBADMSG : 0;
        if (!error)
            error = block_put(&batch->row[i], batch->straight[i], batch->at[i], pages, batch->spare, wanted, ram);
        pages += batch->row[i].slots;
        *failed = i;
    }
    batch->blocks = batch->pages = batch->parts = 0;
    batch->size = 0;
    return error;
}

int pv_snapshot_load(const struct pv_snapshot *snapshot, uint64_t first, uint64_t count, uint64_t *wanted, uint8_t *ram,
                     uint64_t *block)
{
    if (first > snapshot->blocks || count > snapshot->blocks - first)
        return -EINVAL;
    struct batch *batch = malloc(sizeof(*batch));
    if (!batch)
        return -ENOMEM;
    batch->blocks = batch->pages = batch->parts = 0;
    batch->size = 0;
    int error = 0;
    uint64_t begin = first, next = first; /* the batch is blocks from begin to next */
    while (!error && next < first + count) {
        bool none = false;
        int result = batch_add(snapshot, batch, next, wanted, ram, &none);
        *block = next;
        if (result < 0)
            error = result;
        else if (!result && !none && ++next < first + count)
            continue;
        uint32_t failed;
        int other = batch_load(snapshot, batch, wanted, ram, &failed);
        if (other) {
            error = other; /* of an earlier block */
            *block = begin + failed;
        }
        next += none;
        begin = next;
    }
    free(batch);
    if (!error)
        *block = first + count;
    return error;
}
