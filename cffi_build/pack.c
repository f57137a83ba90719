/* pack.c: pages into storage blocks, blocks into the file. Each page is copied before it is compressed and summed up, so
 * that a guest that writes to it meanwhile cannot make block and checksum differ. */
#define _GNU_SOURCE
#include "native.h"
#include "zero.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

int pv_write_whole(int fd, const uint8_t *from, uint64_t size, uint64_t offset)
{
    while (size) {
        ssize_t put = pwrite(fd, from, size, (off_t)offset);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return put ? -errno : -EIO;
        from += put;
        offset += (uint64_t)put;
        size -= (uint64_t)put;
    }
    return 0;
}

int pv_pack_write(struct pv_pack *pack)
{
    uint64_t at = pack->offset - pack->ready;
    int error = pv_write_whole(pack->fd, pack->out, pack->ready, at);
    if (error)
        return error;
    /* The disk begins now, so that fsync() at the end waits for little. A hint: fsync() will say what went wrong. */
    (void)!sync_file_range(pack->fd, (off_t)at, (off_t)pack->ready, SYNC_FILE_RANGE_WRITE);
    pack->ready = 0;
    return 0;
}

/* Where pages wait for their block to be full: for RAW, where they are written from. */
static uint8_t *staging(const struct pv_pack *pack)
{
    return pack->codec == PV_CODEC_RAW ? pack->out + pack->ready : pack->staging;
}

int pv_pack_flush(struct pv_pack *pack)
{
    uint32_t size = pack->used * PV_PAGE, length = size;
    if (!size)
        return 0;
    int codec = pack->codec;
    uint8_t *out = pack->out + pack->ready;
    if (codec != PV_CODEC_RAW) {
        int packed = pv_codec_compress(codec, pack->level, pack->staging, size, out, size - 8);
        if (packed < 0 && packed != -ENOSPC)
            return packed;
        if (packed < 0) {
            codec = PV_CODEC_RAW;
            memcpy(out, pack->staging, size);
        } else {
            length = (uint32_t)packed;
        }
    }
    uint32_t whole = (length + 7) & ~7u;
    memset(out + length, 0, whole - length);
    pack->table[pack->blocks++] = (struct pv_stored){
        .offset = pack->offset, .checksum = pv_hash(out, whole, 0), .first = pack->backs - pack->used,
        .length = length, .slots = (uint16_t)pack->used, .codec = (uint16_t)codec,
    };
    pack->offset += whole;
    pack->ready += whole;
    pack->used = 0;
    return pack->ready < PV_PACK_OUT ? 0 : pv_pack_write(pack);
}

int pv_pack_add(struct pv_pack *pack, uint64_t page, uint64_t count, const uint8_t *from)
{
    if (page > pack->pages || count > pack->pages - page)
        return -EINVAL;
    for (uint64_t end = page + count; page < end; page++, from += PV_PAGE) {
        uint64_t bit = 1ull << page % 64;
        if (pack->given[page / 64] & bit) {
            pack->page = page;
            return -EEXIST;
        }
        pack->given[page / 64] |= bit;
        if (is_zero(from)) {
            pack->index[page] = PV_INDEX_ZERO;
            pack->zeros++;
            continue;
        }
        memcpy(staging(pack) + (size_t)pack->used * PV_PAGE, from, PV_PAGE);
        pack->index[page] = pack->blocks << PV_INDEX_BLOCK_SHIFT | (uint64_t)pack->used << PV_INDEX_SLOT_SHIFT |
                            PV_INDEX_BLOCK;
        pack->back[pack->backs++] = page;
        if (++pack->used == pack->slots) {
            int error = pv_pack_flush(pack);
            if (error)
                return error;
        }
    }
    return 0;
}
