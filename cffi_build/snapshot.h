/* snapshot.h: the pages of a snapshot file: checksums, codecs, storage blocks, and the three maps that lead from a page
 * to its bytes and back. docs/snapshot-format.md describes the file. All that is read from one may be hostile: nothing
 * is used before its checksum and its range have been looked at, and whoever changes the file meanwhile changes nothing
 * that has been looked at, since that is a copy of ours. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define PV_CODEC_RAW 0
#define PV_CODEC_LZ4 1
#define PV_CODEC_ZSTD 2
#define PV_CODECS 3

#define PV_STORE_MIN (16u << 10) /* bytes of pages in a storage block */
#define PV_STORE_MAX (2u << 20)
#define PV_STORE_SLOTS 512u      /* pages in the largest one */
#define PV_CHUNK (64u << 10)     /* bytes of a section under one checksum */
#define PV_PACK_OUT (1u << 20)   /* bytes of pages that are written at once, unless a block is larger */

/* A word of INDEX: what a page is, and where: the low 12 bits are one of these, slot and block lie above. */
#define PV_INDEX_ZERO 0   /* all zeros, or never touched */
#define PV_INDEX_BLOCK 1  /* in a storage block of this file */
#define PV_INDEX_PARENT 2 /* as in the parent */
#define PV_INDEX_KIND 0xfffull
#define PV_INDEX_SLOT_SHIFT 12 /* 9 bits */
#define PV_INDEX_BLOCK_SHIFT 21

/* A storage block, as BLOCKS has it. */
struct pv_stored {
    uint64_t offset;   /* in the file, a multiple of 8 */
    uint64_t checksum; /* of the stored bytes with the zeros behind them up to a multiple of 8 */
    uint64_t first;    /* of its entries in BACK */
    uint32_t length;   /* stored bytes, at most slots * 4096 */
    uint16_t slots;    /* pages in it, 1 to 512 */
    uint16_t codec;    /* the snapshot's, or RAW where that makes it no smaller */
};

/* ---- checksum.c ---- */

/* XXH64. */
uint64_t pv_hash(const uint8_t *data, uint64_t size, uint64_t seed);
/* The same, seed 0, of several pieces of data: faster where neighbours are equally long and the CPU has AVX-512. */
void pv_hash_many(const uint8_t *const *data, const uint32_t *sizes, uint32_t count, uint64_t *hashes);

/* ---- codec.c: all from any thread ---- */

/* 0, -ELIBACC where the codec's library is not there or too old, -EINVAL where there is no such codec. */
int pv_codec_available(int codec) PV_CHECKED;
/* Returns the bytes written; -ENOSPC where `room` is too small, -ENOMEM, -ELIBACC, -EINVAL. Sizes: 1 to PV_STORE_MAX.
 * level: zstd's. RAW compresses nothing: -EINVAL. */
int pv_codec_compress(int codec, int level, const uint8_t *from, uint32_t size, uint8_t *to, uint32_t room) PV_CHECKED;
/* 0 if that gives exactly `size` bytes, else -EILSEQ; -ENOMEM, -ELIBACC, -EINVAL. */
int pv_codec_decompress(int codec, const uint8_t *from, uint32_t stored, uint8_t *to, uint32_t size) PV_CHECKED;
/* Reads stored bytes and what fills them up to a multiple of 8, verifies the checksum of both, and decompresses to
 * exactly raw_length bytes. 0; -ENODATA where the file ends before, -EBADMSG for a wrong checksum, -EILSEQ for what
 * does not decompress, -EINVAL for lengths that cannot be, or an errno of pread. `out` holds anything after an error. */
int pv_block_read(int fd, uint64_t offset, uint32_t stored_length, uint64_t checksum, int codec, uint32_t raw_length,
                  uint8_t *out) PV_CHECKED;

/* Reads all of it. 0, -ENODATA where the file ends before, or an errno of pread. */
int pv_read_whole(int fd, uint8_t *to, uint64_t size, uint64_t offset) PV_CHECKED;
/* Room for the pages of a storage block, this thread's own, for each use; NULL where there is no memory. A unit that has
 * been read stays while pages are fetched: who installs it locks blocks, and that may make a live save fetch some. */
#define PV_KEPT_UNIT 0
#define PV_KEPT_FETCH 1
#define PV_KEPT_PACKED 2 /* stored bytes of the home SWAP, on their way to one of these */
#define PV_KEPT 3
uint8_t *pv_kept_pages(uint32_t use);

/* ---- pack.c: writing ---- */

struct pv_crew; /* the pack's threads, and what they write next */

/* A snapshot that is being written, by one thread at a time and threads of its own. Arrays are the caller's, stay until
 * pv_pack_close, and are zero at the start but for `index`. */
struct pv_pack {
    int fd, codec, level;
    uint32_t slots;          /* pages in a full block */
    uint64_t pages;          /* of RAM: length of index and back, and of `table`, since a block may hold one page */
    uint64_t *index, *back;
    uint64_t *given;         /* a bit a page */
    struct pv_stored *table; /* right, as is `offset`, after pv_pack_write */
    uint64_t offset;         /* where the next block goes */
    uint64_t blocks, backs, zeros;
    uint64_t page;           /* the one that was given twice */
    uint32_t used;           /* pages in the block that has been begun */
    struct pv_crew *crew;    /* NULL at the start */
};

/* Takes neighbouring pages: they are copied when this returns. 0; -EEXIST for one given before, -EINVAL beyond RAM,
 * -ENOMEM, or an errno of pwrite, which may be that of pages given before: after one the pack is of no use any more. */
int pv_pack_add(struct pv_pack *pack, uint64_t page, uint64_t count, const uint8_t *from) PV_CHECKED;
/* Ends the block that has been begun. Errors as above. */
int pv_pack_flush(struct pv_pack *pack) PV_CHECKED;
/* Writes all whole blocks, and waits until they are written. Errors as above. */
int pv_pack_write(struct pv_pack *pack) PV_CHECKED;
/* Ends the pack's threads, at the latest when what each is writing is written. Also after an error; twice is once. */
void pv_pack_close(struct pv_pack *pack);
/* Writes all of it: 0 or -errno. */
int pv_write_whole(int fd, const uint8_t *from, uint64_t size, uint64_t offset) PV_CHECKED;

/* ---- unpack.c: reading. All from any thread, and from several at once ---- */

/* A section of the file that is read and verified chunk by chunk when it is first needed. */
struct pv_section {
    uint64_t offset, length; /* bytes, multiples of 8 */
    uint8_t *data;           /* `length` bytes, of which those in chunks that are ready are the file's */
    const uint64_t *sums;    /* one a chunk, verified already */
    uint8_t *ready;          /* one a chunk */
};

struct pv_snapshot {
    int fd, codec;
    uint32_t slots;       /* pages in a full block */
    uint32_t has_parent;
    uint64_t pages, blocks, backs;
    uint64_t begin, end;  /* where storage blocks lie in the file */
    struct pv_section index, table, back, large;
};

/* Makes bytes of a section readable in its `data`. 0; -EBADMSG, -ENODATA, -EINVAL, or an errno of pread. */
int pv_section_need(const struct pv_snapshot *snapshot, const struct pv_section *section, uint64_t at,
                    uint64_t size) PV_CHECKED;
/* The word of a page. -EUCLEAN where it is none of the words that can be; else as pv_section_need. */
int pv_snapshot_page(const struct pv_snapshot *snapshot, uint64_t page, uint64_t *word) PV_CHECKED;
/* Was a block of 2 MiB a large page? Also where that cannot be read. */
uint32_t pv_snapshot_large(const struct pv_snapshot *snapshot, uint64_t block);
/* A row of BLOCKS, and the pages in its slots (PV_STORE_SLOTS of room). -EUCLEAN where they cannot be, or where INDEX
 * says otherwise; else as pv_section_need. */
int pv_snapshot_block(const struct pv_snapshot *snapshot, uint64_t block, struct pv_stored *row,
                      uint64_t *pages) PV_CHECKED;
/* The same, and its bytes: row->slots pages to `out`. */
int pv_snapshot_read(const struct pv_snapshot *snapshot, uint64_t block, struct pv_stored *row, uint64_t *pages,
                     uint8_t *out) PV_CHECKED;
/* Which pages this file is to bring: of those whose bit is set in `missing`, the ones in its blocks are set in `wanted`.
 * Those that are the parent's stay missing. */
int pv_snapshot_choose(const struct pv_snapshot *snapshot, uint64_t *missing, uint64_t *wanted) PV_CHECKED;

/* ---- load.c: from several threads at once, for different blocks ---- */

/* Reads blocks from `first` on into RAM: those of their pages whose bit is set in `wanted`, which is cleared then.
 * *block is where an error came from, or behind the last. */
int pv_snapshot_load(const struct pv_snapshot *snapshot, uint64_t first, uint64_t count, uint64_t *wanted, uint8_t *ram,
                     uint64_t *block) PV_CHECKED;
