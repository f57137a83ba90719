/* pack.c: pages into storage blocks, blocks into the file. Each page is copied before it is compressed and summed up, so
 * that a guest that writes to it meanwhile cannot make block and checksum differ.
 *
 * Who adds pages fills a piece, which is some storage blocks; threads of the pack take full pieces, compress them, sum
 * them up and write them, several at a time. A piece is given its place in the file when its turn has come, so that the
 * same pages make the same file whichever thread was quicker. */
#define _GNU_SOURCE
#include "native.h"
#include "zero.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MOST_THREADS 8
#define PIECES (MOST_THREADS + 2)
#define PIECE_BLOCKS (PV_PACK_OUT / PV_PAGE) /* a block may be ended after one page */

struct piece {
    uint8_t *pages, *packed; /* packed: for a codec. As large as all its pages: what would be larger is stored raw */
    uint64_t first;          /* block */
    uint32_t blocks, size;   /* size: bytes of pages in whole blocks */
    bool busy;               /* belongs to a thread */
};

struct pv_crew {
    pthread_mutex_t lock; /* of all below but the piece that is being filled */
    pthread_cond_t changed;
    pthread_t thread[MOST_THREADS];
    uint32_t threads, pieces;
    struct piece piece[PIECES]; /* piece n is number n % pieces */
    uint64_t given, taken, placed, done;
    int error;   /* the first one: for whoever calls next */
    bool ending;
    /* Of whoever adds pages: */
    bool filling;  /* the piece with number `given` is being filled */
    uint32_t room; /* bytes of pages in a piece */
};

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

static uint32_t block_size(const struct pv_pack *pack) { return pack->slots * PV_PAGE; }

/* Compresses one block from `from` to `to`, or leaves it where it is (*out); says in its row how. */
static int pack_block(const struct pv_pack *pack, struct pv_stored *row, uint8_t *from, uint8_t *to,
                      const uint8_t **out)
{
    uint32_t size = row->slots * PV_PAGE;
    int packed = -ENOSPC;
    if (pack->codec != PV_CODEC_RAW)
        packed = pv_codec_compress(pack->codec, pack->level, from, size, to, size - 8);
    if (packed < 0 && packed != -ENOSPC)
        return packed;
    if (packed < 0 && to)
        memcpy(to, from, size);
    uint8_t *bytes = to ? to : from;
    *out = bytes;
    row->codec = (uint16_t)(packed < 0 ? PV_CODEC_RAW : pack->codec);
    row->length = packed < 0 ? size : (uint32_t)packed;
    uint32_t whole = (row->length + 7) & ~7u;
    memset(bytes + row->length, 0, whole - row->length);
    return 0;
}

/* Its place: behind all pieces that were filled before it. */
static int place(struct pv_pack *pack, uint64_t number, uint64_t size, uint64_t *at)
{
    struct pv_crew *crew = pack->crew;
    pthread_mutex_lock(&crew->lock);
    while (crew->placed != number && !crew->error && !crew->ending)
        pthread_cond_wait(&crew->changed, &crew->lock);
    int error = crew->error ? crew->error : crew->ending ? -ECANCELED : 0;
    if (!error) {
        *at = pack->offset;
        pack->offset += size;
        crew->placed++;
        pthread_cond_broadcast(&crew->changed);
    }
    pthread_mutex_unlock(&crew->lock);
    return error;
}

static int write_piece(struct pv_pack *pack, struct piece *piece, uint64_t number)
{
    struct pv_stored *row = pack->table + piece->first;
    uint8_t *from = piece->pages, *to = piece->packed;
    const uint8_t *out[PIECE_BLOCKS];
    uint32_t wholes[PIECE_BLOCKS];
    uint64_t sums[PIECE_BLOCKS], size = 0, at = 0;
    for (uint32_t i = 0; i < piece->blocks; i++) {
        int error = pack_block(pack, &row[i], from, to, &out[i]);
        if (error)
            return error;
        uint32_t whole = wholes[i] = (row[i].length + 7) & ~7u;
        row[i].offset = size;
        size += whole;
        from += row[i].slots * PV_PAGE;
        to = to ? to + whole : NULL;
    }
    pv_hash_many(out, wholes, piece->blocks, sums);
    int error = place(pack, number, size, &at);
    for (uint32_t i = 0; !error && i < piece->blocks; i++) {
        row[i].offset += at;
        row[i].checksum = sums[i];
    }
    if (!error)
        error = pv_write_whole(pack->fd, piece->packed ? piece->packed : piece->pages, size, at);
    /* The disk begins now, so that fsync() at the end waits for little. A hint: fsync() will say what went wrong. */
    if (!error)
        (void)!sync_file_range(pack->fd, (off_t)at, (off_t)size, SYNC_FILE_RANGE_WRITE);
    return error;
}

static void end_piece(struct pv_crew *crew, struct piece *piece, int error)
{
    pthread_mutex_lock(&crew->lock);
    if (error && !crew->error)
        crew->error = error;
    piece->blocks = piece->size = 0;
    piece->busy = false;
    crew->done++;
    pthread_cond_broadcast(&crew->changed);
    pthread_mutex_unlock(&crew->lock);
}

static void *work(void *data)
{
    struct pv_pack *pack = data;
    struct pv_crew *crew = pack->crew;
    pthread_mutex_lock(&crew->lock);
    for (;;) {
        while (crew->taken == crew->given && !crew->ending)
            pthread_cond_wait(&crew->changed, &crew->lock);
        if (crew->ending)
            break;
        uint64_t number = crew->taken++;
        struct piece *piece = &crew->piece[number % crew->pieces];
        int error = crew->error; /* after one nothing is written any more */
        pthread_mutex_unlock(&crew->lock);
        end_piece(crew, piece, error ? error : write_piece(pack, piece, number));
        pthread_mutex_lock(&crew->lock);
    }
    pthread_mutex_unlock(&crew->lock);
    return NULL;
}

/* One thread for each CPU that we may use, and one more than the disk has at a time. */
static uint32_t threads_wanted(void)
{
    cpu_set_t set;
    int cpus = sched_getaffinity(0, sizeof(set), &set) ? 1 : CPU_COUNT(&set);
    return cpus < 2 ? 2 : cpus > MOST_THREADS ? MOST_THREADS : (uint32_t)cpus;
}

static int crew_make(struct pv_pack *pack)
{
    struct pv_crew *crew = calloc(1, sizeof(*crew));
    if (!crew)
        return -ENOMEM;
    pthread_mutex_init(&crew->lock, NULL);
    pthread_cond_init(&crew->changed, NULL);
    crew->pieces = threads_wanted() + 2;
    crew->room = block_size(pack) > PV_PACK_OUT ? block_size(pack) : PV_PACK_OUT;
    pack->crew = crew;
    return 0;
}

/* As many threads as can be had: none is no error, the caller does their work then. They leave signals to others. */
static void crew_start(struct pv_pack *pack)
{
    struct pv_crew *crew = pack->crew;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (crew->threads < crew->pieces - 2 && !pthread_create(&crew->thread[crew->threads], NULL, work, pack))
        crew->threads++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void pv_pack_close(struct pv_pack *pack)
{
    struct pv_crew *crew = pack->crew;
    if (!crew)
        return;
    pthread_mutex_lock(&crew->lock);
    crew->ending = true;
    pthread_cond_broadcast(&crew->changed);
    pthread_mutex_unlock(&crew->lock);
    for (uint32_t i = 0; i < crew->threads; i++)
        pthread_join(crew->thread[i], NULL);
    for (uint32_t i = 0; i < crew->pieces; i++) {
        free(crew->piece[i].pages);
        free(crew->piece[i].packed);
    }
    pthread_mutex_destroy(&crew->lock);
    pthread_cond_destroy(&crew->changed);
    free(crew);
    pack->crew = NULL;
}

/* The piece that is being filled, once no thread has it any more. */
static int piece_get(struct pv_pack *pack, struct piece **out)
{
    int error = pack->crew ? 0 : crew_make(pack);
    if (error)
        return error;
    struct pv_crew *crew = pack->crew;
    struct piece *piece = *out = &crew->piece[crew->given % crew->pieces]; /* `given` is changed by our caller alone */
    if (crew->filling)
        return 0;
    pthread_mutex_lock(&crew->lock);
    while (piece->busy)
        pthread_cond_wait(&crew->changed, &crew->lock);
    error = crew->error;
    pthread_mutex_unlock(&crew->lock);
    if (!error && !piece->pages) {
        piece->pages = malloc(crew->room);
        if (pack->codec != PV_CODEC_RAW)
            piece->packed = malloc(crew->room);
        if (!piece->pages || (pack->codec != PV_CODEC_RAW && !piece->packed))
            return -ENOMEM;
    }
    crew->filling = !error;
    return error;
}

static int piece_give(struct pv_pack *pack, struct piece *piece)
{
    struct pv_crew *crew = pack->crew;
    crew->filling = false;
    if (!crew->threads && piece->size + block_size(pack) > crew->room) /* there will be more: not for a small file */
        crew_start(pack);
    pthread_mutex_lock(&crew->lock);
    uint64_t number = crew->given++;
    piece->busy = true;
    crew->taken += !crew->threads;
    int error = crew->error;
    pthread_cond_broadcast(&crew->changed);
    pthread_mutex_unlock(&crew->lock);
    if (!crew->threads) {
        error = write_piece(pack, piece, number);
        end_piece(crew, piece, error);
    }
    return error;
}

int pv_pack_write(struct pv_pack *pack)
{
    struct pv_crew *crew = pack->crew;
    if (!crew)
        return 0;
    struct piece *piece = &crew->piece[crew->given % crew->pieces];
    int error = crew->filling && piece->size ? piece_give(pack, piece) : 0;
    pthread_mutex_lock(&crew->lock);
    while (crew->done < crew->given)
        pthread_cond_wait(&crew->changed, &crew->lock);
    error = error ? error : crew->error;
    pthread_mutex_unlock(&crew->lock);
    return error;
}

int pv_pack_flush(struct pv_pack *pack)
{
    struct piece *piece;
    if (!pack->used)
        return 0;
    int error = piece_get(pack, &piece);
    if (error)
        return error;
    if (!piece->blocks++)
        piece->first = pack->blocks;
    pack->table[pack->blocks++] = (struct pv_stored){.first = pack->backs - pack->used, .slots = (uint16_t)pack->used};
    piece->size += pack->used * PV_PAGE;
    pack->used = 0;
    return piece->size + block_size(pack) <= pack->crew->room ? 0 : piece_give(pack, piece);
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
        struct piece *piece;
        int error = piece_get(pack, &piece);
        if (error)
            return error;
        memcpy(piece->pages + piece->size + (size_t)pack->used * PV_PAGE, from, PV_PAGE);
        pack->index[page] = pack->blocks << PV_INDEX_BLOCK_SHIFT | (uint64_t)pack->used << PV_INDEX_SLOT_SHIFT |
                            PV_INDEX_BLOCK;
        pack->back[pack->backs++] = page;
        if (++pack->used == pack->slots && (error = pv_pack_flush(pack)))
            return error;
    }
    return 0;
}
