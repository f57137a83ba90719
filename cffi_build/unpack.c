/* unpack.c: from the file to pages. What the file says is believed only as far as checksums, ranges and the agreement of
 * its three maps go: INDEX (page -> slot of a block), BLOCKS, BACK (slot -> page). */
#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static int chunk_need(const struct pv_snapshot *snapshot, const struct pv_section *section, uint64_t chunk)
{
    /* acquire: pairs with the release below */
    if (__atomic_load_n(&section->ready[chunk], __ATOMIC_ACQUIRE))
        return 0;
    uint64_t at = chunk * PV_CHUNK, left = section->length - at;
    uint32_t size = left < PV_CHUNK ? (uint32_t)left : PV_CHUNK;
    /* Verified before it is copied to where others look: two threads that come at once copy the same bytes there. */
    uint64_t copy[PV_CHUNK / 8];
    int error = pv_block_read(snapshot->fd, section->offset + at, size, section->sums[chunk], PV_CODEC_RAW, size,
                              (uint8_t *)copy);
    if (error)
        return error;
    memcpy(section->data + at, copy, size);
    __atomic_store_n(&section->ready[chunk], 1, __ATOMIC_RELEASE);
    return 0;
}

int pv_section_need(const struct pv_snapshot *snapshot, const struct pv_section *section, uint64_t at, uint64_t size)
{
    if (at > section->length || size > section->length - at)
        return -EINVAL;
    int error = 0;
    for (uint64_t chunk = at / PV_CHUNK; !error && size && chunk <= (at + size - 1) / PV_CHUNK; chunk++)
        error = chunk_need(snapshot, section, chunk);
    return error;
}

/* Word i of INDEX or BACK. */
static int word_of(const struct pv_snapshot *snapshot, const struct pv_section *section, uint64_t i, uint64_t *word)
{
    int error = pv_section_need(snapshot, section, i * 8, 8);
    if (!error)
        *word = ((const uint64_t *)section->data)[i];
    return error;
}

int pv_snapshot_page(const struct pv_snapshot *snapshot, uint64_t page, uint64_t *word)
{
    if (page >= snapshot->pages)
        return -EINVAL;
    int error = word_of(snapshot, &snapshot->index, page, word);
    if (error)
        return error;
    uint64_t slot = *word >> PV_INDEX_SLOT_SHIFT & (PV_STORE_SLOTS - 1);
    switch (*word & PV_INDEX_KIND) {
    case PV_INDEX_BLOCK:
        return *word >> PV_INDEX_BLOCK_SHIFT < snapshot->blocks && slot < snapshot->slots ? 0 : -EUCLEAN;
    case PV_INDEX_PARENT:
        return *word == PV_INDEX_PARENT && snapshot->has_parent ? 0 : -EUCLEAN;
    default:
        return *word == PV_INDEX_ZERO ? 0 : -EUCLEAN;
    }
}

uint32_t pv_snapshot_large(const struct pv_snapshot *snapshot, uint64_t block)
{
    if (pv_section_need(snapshot, &snapshot->large, block / 8, 1))
        return 1;
    return snapshot->large.data[block / 8] >> block % 8 & 1;
}

static bool row_ok(const struct pv_snapshot *snapshot, const struct pv_stored *row)
{
    uint32_t size = row->slots * PV_PAGE;
    bool raw = row->codec == PV_CODEC_RAW;
    return row->slots && row->slots <= snapshot->slots && row->first <= snapshot->backs &&
           row->slots <= snapshot->backs - row->first && (raw ? row->length == size : row->codec == snapshot->codec) &&
           row->length && row->length <= size && row->offset % 8 == 0 && row->offset >= snapshot->begin &&
           row->offset <= snapshot->end && ((uint64_t)row->length + 7) / 8 * 8 <= snapshot->end - row->offset;
}

int pv_snapshot_block(const struct pv_snapshot *snapshot, uint64_t block, struct pv_stored *row, uint64_t *pages)
{
    if (block >= snapshot->blocks)
        return -EINVAL;
    int error = pv_section_need(snapshot, &snapshot->table, block * sizeof(*row), sizeof(*row));
    if (error)
        return error;
    *row = ((const struct pv_stored *)snapshot->table.data)[block];
    if (!row_ok(snapshot, row))
        return -EUCLEAN;
    for (uint64_t slot = 0; slot < row->slots; slot++) {
        uint64_t word;
        if ((error = word_of(snapshot, &snapshot->back, row->first + slot, &pages[slot])))
            return error;
        if (pages[slot] >= snapshot->pages)
            return -EUCLEAN;
        if ((error = word_of(snapshot, &snapshot->index, pages[slot], &word)))
            return error;
        if (word != (block << PV_INDEX_BLOCK_SHIFT | slot << PV_INDEX_SLOT_SHIFT | PV_INDEX_BLOCK))
            return -EUCLEAN;
    }
    return 0;
}

static int bytes_of(const struct pv_snapshot *snapshot, const struct pv_stored *row, uint8_t *out)
{
    return pv_block_read(snapshot->fd, row->offset, row->length, row->checksum, row->codec, row->slots * PV_PAGE, out);
}

int pv_snapshot_read(const struct pv_snapshot *snapshot, uint64_t block, struct pv_stored *row, uint64_t *pages,
                     uint8_t *out)
{
    int error = pv_snapshot_block(snapshot, block, row, pages);
    return error ? error : bytes_of(snapshot, row, out);
}

int pv_snapshot_choose(const struct pv_snapshot *snapshot, uint64_t *missing, uint64_t *wanted)
{
    for (uint64_t page = 0; page < snapshot->pages; page++) {
        uint64_t bit = 1ull << page % 64, word;
        if (!(missing[page / 64] & bit))
            continue;
        int error = pv_snapshot_page(snapshot, page, &word);
        if (error)
            return error;
        if ((word & PV_INDEX_KIND) == PV_INDEX_BLOCK)
            wanted[page / 64] |= bit;
        if ((word & PV_INDEX_KIND) != PV_INDEX_PARENT)
            missing[page / 64] &= ~bit;
    }
    return 0;
}

static bool is_wanted(const uint64_t *wanted, uint64_t page) { return wanted[page / 64] >> page % 64 & 1; }

/* One block; `spare` has room for the largest. */
static int load_block(const struct pv_snapshot *snapshot, uint64_t block, uint64_t *wanted, uint8_t *ram, uint8_t *spare)
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
    if (!found)
        return 0;
    bool direct = in_order && found == row.slots; /* to where it is to go at last: no copy */
    error = bytes_of(snapshot, &row, direct ? ram + pages[0] * PV_PAGE : spare);
    for (uint32_t slot = 0; !error && slot < row.slots; slot++) {
        uint64_t page = pages[slot];
        if (!direct && is_wanted(wanted, page))
            memcpy(ram + page * PV_PAGE, spare + (size_t)slot * PV_PAGE, PV_PAGE);
        wanted[page / 64] &= ~(1ull << page % 64);
    }
    return error;
}

int pv_snapshot_load(const struct pv_snapshot *snapshot, uint64_t first, uint64_t count, uint64_t *wanted, uint8_t *ram,
                     uint64_t *block)
{
    if (first > snapshot->blocks || count > snapshot->blocks - first)
        return -EINVAL;
    uint8_t *spare = malloc(PV_STORE_MAX);
    int error = spare ? 0 : -ENOMEM;
    for (*block = first; !error && *block < first + count; *block += !error)
        error = load_block(snapshot, *block, wanted, ram, spare);
    free(spare);
    return error;
}
