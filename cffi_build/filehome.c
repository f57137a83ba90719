/* filehome.c: the home FILE: pages that are still in a snapshot file (technique T3, US9053065B2). Without the GIL, from
 * the engine's threads and any other. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>
#include <string.h>

/* A locator: how many parents up the file is, the storage block there, the slot in it. */
#define SLOT_BITS 9
#define BLOCK_BITS 37
#define UNKNOWN ((1ull << 52) - 1) /* the file's index could not be read: each fetch tries again, and says why */
#define STRAIGHT 64u /* storage blocks that are read at once */

_Static_assert(PV_FILE_CHAIN < 1u << (52 - SLOT_BITS - BLOCK_BITS), "a locator has room for each file of a chain");

static uint64_t locator_of(uint64_t word) { return word >> PV_PAGE_LOCATOR_SHIFT; }
static uint32_t slot_of(uint64_t locator) { return locator & (PV_STORE_SLOTS - 1); }
static uint64_t block_of(uint64_t locator) { return locator >> SLOT_BITS & ((1ull << BLOCK_BITS) - 1); }
static uint32_t up_of(uint64_t locator) { return (uint32_t)(locator >> (SLOT_BITS + BLOCK_BITS)); }

static uint64_t word_of(uint64_t locator) { return locator << PV_PAGE_LOCATOR_SHIFT | PV_HOME_FILE; }

/* The word of a page that nobody has touched: zeros, or where the youngest file of the chain that has it keeps it. */
static int word_for(const struct pv_file_home *home, uint64_t page, uint64_t *word)
{
    for (uint32_t up = 0; up < home->files; up++) {
        uint64_t found;
        int error = pv_snapshot_page(home->file[up], page, &found);
        if (error)
            return error;
        if ((found & PV_INDEX_KIND) == PV_INDEX_PARENT)
            continue;
        uint64_t locator = (uint64_t)up << (SLOT_BITS + BLOCK_BITS) | found >> PV_INDEX_SLOT_SHIFT;
        *word = (found & PV_INDEX_KIND) == PV_INDEX_ZERO ? PV_HOME_ZERO : word_of(locator);
        return 0;
    }
    return -EUCLEAN; /* the oldest file refers to a parent */
}

uint32_t pv_file_find(void *self, uint64_t page, uint32_t count, uint64_t *words)
{
    struct pv_file_home *home = self;
    uint32_t stored = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (word_for(home, page + i, &words[i]))
            words[i] = word_of(UNKNOWN);
        stored += (words[i] & PV_PAGE_HOME) == PV_HOME_FILE;
    }
    uint32_t flags = stored ? PV_BLOCK_UNITS : 0;
    if (home->as_it_was && stored && stored < SPARSE && !pv_snapshot_large(home->file[0], page / PV_BLOCK_PAGES))
        flags |= PV_BLOCK_SMALL | PV_BLOCK_BROKEN;
    return flags;
}

static void count_read(struct pv_file_home *home, const struct pv_stored *row)
{
    count_up(&home->reads, 1);
    count_up(&home->bytes_read, row->length);
}

int pv_file_gather(void *self, uint64_t page, uint64_t word, struct pv_unit *unit)
{
    struct pv_file_home *home = self;
    uint64_t locator = locator_of(word);
    struct pv_stored row;
    unit->count = 0;
    if (locator == UNKNOWN)
        return 0;
    if (up_of(locator) >= home->files)
        return -EUCLEAN;
    int error = pv_snapshot_block(home->file[up_of(locator)], block_of(locator), &row, unit->pages);
    if (error)
        return error;
    if (slot_of(locator) >= row.slots || unit->pages[slot_of(locator)] != page)
        return -EUCLEAN; /* the file's maps do not agree */
    unit->count = row.slots;
    for (uint32_t slot = 0; slot < row.slots; slot++)
        unit->words[slot] = word_of((locator & ~(uint64_t)(PV_STORE_SLOTS - 1)) | slot);
    return 0;
}

int pv_file_read(void *self, const struct pv_unit *unit, const uint8_t **bytes)
{
    struct pv_file_home *home = self;
    uint64_t locator = locator_of(unit->words[0]), pages[PV_STORE_SLOTS];
    struct pv_stored row;
    uint8_t *room = pv_kept_pages(PV_KEPT_UNIT);
    if (!room)
        return -ENOMEM;
    int error = pv_snapshot_read(home->file[up_of(locator)], block_of(locator), &row, pages, room);
    if (error)
        return error;
    if (row.slots != unit->count)
        return -EUCLEAN;
    count_read(home, &row);
    *bytes = room;
    return 0;
}

/* Do the pages of a storage block follow each other, from this one on, all within the next `count`? */
static bool in_place(const struct pv_stored *row, const uint64_t *pages, uint64_t page, uint32_t count,
                     const uint64_t *words)
{
    if (row->slots > count)
        return false;
    for (uint32_t i = 0; i < row->slots; i++)
        if (pages[i] != page + i || locator_of(words[i]) != locator_of(words[0]) + i)
            return false;
    return true;
}

/* Pages of one storage block that lie together, from `page` on: how many they are, or -errno. */
static int fetch_some(struct pv_file_home *home, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to)
{
    uint64_t word = words[0], pages[PV_STORE_SLOTS];
    struct pv_stored row;
    if (locator_of(word) == UNKNOWN) {
        int error = word_for(home, page, &word);
        if (error)
            return error;
        if (word == PV_HOME_ZERO) {
            memset(to, 0, PV_PAGE);
            return 1;
        }
        count = 1;
    }
    uint64_t locator = locator_of(word);
    uint32_t slot = slot_of(locator), done = 0;
    if (up_of(locator) >= home->files)
        return -EUCLEAN;
    const struct pv_snapshot *file = home->file[up_of(locator)];
    int error = pv_snapshot_block(file, block_of(locator), &row, pages);
    if (error)
        return error;
    if (slot >= row.slots || pages[slot] != page)
        return -EUCLEAN;
    count_read(home, &row);
    if (slot == 0 && in_place(&row, pages, page, count, words)) { /* to where it is to go: no copy */
        error = pv_block_read(file->fd, row.offset, row.length, row.checksum, row.codec, row.slots * PV_PAGE, to);
        return error ? error : row.slots;
    }
    uint8_t *room = pv_kept_pages(PV_KEPT_FETCH);
    if (!room)
        return -ENOMEM;
    error = pv_block_read(file->fd, row.offset, row.length, row.checksum, row.codec, row.slots * PV_PAGE, room);
    if (error)
        return error;
    do
        memcpy(to + (size_t)done * PV_PAGE, room + (size_t)(slot + done) * PV_PAGE, PV_PAGE);
    while (++done < count && slot + done < row.slots && pages[slot + done] == page + done &&
           locator_of(words[done]) == locator + done);
    return (int)done;
}

/* Storage blocks whose pages follow each other in RAM and in the file, uncompressed, with one read to where they are to
 * go. How many pages, 0 where there are no such, or -errno. */
static int fetch_straight(struct pv_file_home *home, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to)
{
    struct pv_stored row[STRAIGHT];
    const uint8_t *at[STRAIGHT];
    uint32_t sizes[STRAIGHT], blocks = 0, done = 0, up = up_of(locator_of(words[0]));
    uint64_t sums[STRAIGHT], pages[PV_STORE_SLOTS];
    if (up >= home->files)
        return 0;
    const struct pv_snapshot *file = home->file[up];
    for (; blocks < STRAIGHT && done < count; blocks++) {
        uint64_t locator = locator_of(words[done]);
        if (locator == UNKNOWN || up_of(locator) != up || slot_of(locator))
            break;
        struct pv_stored *next = &row[blocks];
        int error = pv_snapshot_block(file, block_of(locator), next, pages);
        if (error && !blocks)
            return error;
        if (error || next->codec != PV_CODEC_RAW || (blocks && next->offset != next[-1].offset + next[-1].length) ||
            !in_place(next, pages, page + done, count - done, words + done))
            break;
        at[blocks] = to + (size_t)done * PV_PAGE;
        sizes[blocks] = next->length;
        count_read(home, next);
        done += next->slots;
    }
    if (!blocks)
        return 0;
    int error = pv_read_whole(file->fd, to, (uint64_t)done * PV_PAGE, row[0].offset);
    if (error)
        return error;
    pv_hash_many(at, sizes, blocks, sums);
    for (uint32_t i = 0; i < blocks; i++)
        if (sums[i] != row[i].checksum)
            return -EBADMSG;
    return (int)done;
}

int pv_file_fetch(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to)
{
    for (uint32_t i = 0; i < count;) {
        int straight = fetch_straight(self, page + i, count - i, words + i, to + (size_t)i * PV_PAGE);
        if (straight < 0)
            return straight;
        i += (uint32_t)straight;
        if (straight)
            continue;
        int done = fetch_some(self, page + i, count - i, words + i, to + (size_t)i * PV_PAGE);
        if (done < 0)
            return done;
        i += (uint32_t)done;
    }
    return 0;
}
