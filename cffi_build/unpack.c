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

int pv_snapshot_page(const struct pv_snapshot *snapshot, uint64_t page, uint64_t *word)
{
    if (page >= snapshot->pages)
        return -EINVAL;
    int error = pv_section_need(snapshot, &snapshot->index, page * 8, 8);
    if (error)
        return error;
    *word = ((const uint64_t *)snapshot->index.data)[page];
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
    if ((error = pv_section_need(snapshot, &snapshot->back, row->first * 8, row->slots * 8)))
        return error;
    memcpy(pages, (const uint64_t *)snapshot->back.data + row->first, row->slots * sizeof(*pages));
    const uint64_t *index = (const uint64_t *)snapshot->index.data;
    for (uint64_t slot = 0, chunk = UINT64_MAX; slot < row->slots; slot++) {
        if (pages[slot] >= snapshot->pages)
            return -EUCLEAN;
        if (pages[slot] * 8 / PV_CHUNK != chunk) {
            chunk = pages[slot] * 8 / PV_CHUNK;
            if ((error = pv_section_need(snapshot, &snapshot->index, pages[slot] * 8, 8)))
                return error;
        }
        if (index[pages[slot]] != (block << PV_INDEX_BLOCK_SHIFT | slot << PV_INDEX_SLOT_SHIFT | PV_INDEX_BLOCK))
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
