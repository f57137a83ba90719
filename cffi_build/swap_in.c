/* swap_in.c: how pages come back from the swap file: the functions of the home, each under the lock of its pages' block.
 * So their places stay LIVE meanwhile, and are read without the mutex. */
#define _GNU_SOURCE
#include "swap_inside.h"

#include <string.h>

int vector_whole(vector_call *call, int fd, struct iovec *parts, uint32_t count, uint64_t offset)
{
    while (count) {
        ssize_t done = call(fd, parts, (int)count, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done ? -errno : -ENODATA;
        offset += (uint64_t)done;
        for (; count && (size_t)done >= parts->iov_len; count--)
            done -= (ssize_t)parts++->iov_len;
        if (count) {
            parts->iov_base = (uint8_t *)parts->iov_base + done;
            parts->iov_len -= (size_t)done;
        }
    }
    return 0;
}

/* What is read with one call, and room for what is not stored as it was. */
struct reading {
    struct iovec parts[2 * PV_BLOCK_PAGES];
    uint32_t used;
    uint8_t *room;
    uint64_t taken, slots;
};

static void add_part(struct reading *reading, uint8_t *to, size_t size)
{
    if (reading->used) {
        struct iovec *last = &reading->parts[reading->used - 1];
        if ((uint8_t *)last->iov_base + last->iov_len == to) {
            last->iov_len += size;
            return;
        }
    }
    reading->parts[reading->used++] = (struct iovec){to, size};
}

static uint8_t *take_room(struct reading *reading, uint64_t size)
{
    uint8_t *room = reading->room + reading->taken;
    reading->taken += size;
    add_part(reading, room, size);
    return room;
}

/* Does it lie behind what is to be read already, or, where there are small slots, near that? Then it is read too. */
static bool add_piece(const struct pv_swap *swap, struct reading *reading, uint64_t first, struct piece *piece)
{
    uint32_t slots = slots_for(swap, piece->size);
    uint64_t slot = piece->slot, end = first + reading->slots, gap = slot - end;
    uint64_t stored = piece->size < PV_PAGE ? (uint64_t)slots << swap->shift : 0;
    if (slot < end || (gap && (!reading->room || gap > NEAR)) ||
        (reading->room && reading->taken + (gap << swap->shift) + stored > PV_STORE_MAX))
        return false;
    if (gap)
        (void)take_room(reading, gap << swap->shift);
    piece->packed = stored ? take_room(reading, stored) : NULL;
    if (!stored)
        add_part(reading, piece->to, PV_PAGE);
    reading->slots += gap + slots;
    return true;
}

/* Nothing of the file is believed: what is decompressed ends where the page does, and its digest is known. */
static int unpack(struct pv_swap *swap, const struct piece *piece)
{
    uint64_t digest[2];
    int error = piece->packed ? pv_codec_decompress(swap->codec, piece->packed, piece->size, piece->to, PV_PAGE) : 0;
    if (error)
        return error == -EILSEQ ? -EBADMSG : error;
    pv_digest(&swap->key, piece->to, digest);
    return memcmp(digest, piece->digest, sizeof(digest)) ? -EBADMSG : 0;
}

int read_pieces(struct pv_swap *swap, struct piece *pieces, uint32_t count, uint64_t *reads, uint64_t *bytes)
{
    struct reading reading;
    reading.room = swap->codec == PV_CODEC_RAW ? NULL : pv_kept_pages(PV_KEPT_PACKED);
    if (swap->codec != PV_CODEC_RAW && !reading.room)
        return -ENOMEM;
    for (uint32_t i = 0, run; i < count; i += run) {
        uint64_t first = pieces[i].slot;
        reading.used = 0;
        reading.taken = reading.slots = 0;
        for (run = 0; i + run < count && add_piece(swap, &reading, first, &pieces[i + run]);)
            run++;
        int error = vector_whole(preadv, swap->fd, reading.parts, reading.used, first << swap->shift);
        for (uint32_t j = 0; !error && j < run; j++)
            error = unpack(swap, &pieces[i + j]);
        if (error)
            return error;
        count_up(reads, 1);
        count_up(bytes, reading.slots << swap->shift);
    }
    return 0;
}

/* Is the page there? Its word and what is known of it say the same thing. */
static bool is_there(const struct pv_swap *swap, uint64_t page, uint64_t word)
{
    return page < swap->pages && swap->slot_of[page] == (word >> PV_PAGE_LOCATOR_SHIFT) + 1;
}

static struct piece piece_of(const struct pv_swap *swap, uint64_t page, uint8_t *to)
{
    const struct record *record = &swap->records[page];
    return (struct piece){slot_at(swap, page), record->digest, to, NULL, record->size};
}

static int read_pages(struct pv_swap *swap, struct piece *pieces, uint32_t count)
{
    return read_pieces(swap, pieces, count, &swap->told.reads, &swap->told.bytes_read);
}

int swap_scatter(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to)
{
    struct pv_swap *swap = self;
    struct piece pieces[PV_BLOCK_PAGES];
    uint32_t used = 0;
    for (uint32_t i = 0; i < count; i++) {
        if ((words[i] & PV_PAGE_HOME) != PV_HOME_SWAP)
            continue;
        if (!is_there(swap, page + i, words[i]))
            return -EUCLEAN;
        pieces[used++] = piece_of(swap, page + i, to + (size_t)i * PV_PAGE);
    }
    return read_pages(swap, pieces, used);
}

int swap_fetch(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to)
{
    return swap_scatter(self, page, count, words, to);
}

/* ---- ahead of touches: by slots, since pages that went out together lie together ---- */

/* How many slots are looked at around a page. Whether what came ahead was used is seen by the next touch: where it goes on
 * behind the last unit, or before it, the guest has gone through that. */
static struct stream *stream_of(struct pv_swap *swap, uint64_t page)
{
    struct stream *oldest = &swap->streams[0];
    for (struct stream *each = swap->streams; each < swap->streams + STREAMS; each++) {
        uint64_t reach = 1ull << (each->order < REACH ? each->order : REACH);
        if (each->used && ((page > each->last && page - each->last <= reach) ||
                           (page < each->first && each->first - page <= reach))) {
            each->order += each->order < MOST_ORDER;
            swap->order += swap->order < FIRST_ORDER;
            return each;
        }
        oldest = each->used < oldest->used ? each : oldest;
    }
    swap->order -= swap->order > 0;
    oldest->order = swap->order;
    return oldest;
}

/* Slots that so many pages take. */
static uint64_t window_of(const struct pv_swap *swap, uint32_t order)
{
    uint64_t pages = swap->told.live + swap->told.kept, slots = swap->told.slots - swap->told.free - swap->told.held;
    return (slots > pages && pages ? (slots + pages / 2) / pages : 1) << order;
}

/* Of the page's own block alone: elsewhere a slot may have other bytes by the time they are installed. */
int swap_gather(void *self, uint64_t page, uint64_t word, struct pv_unit *unit)
{
    struct pv_swap *swap = self;
    unit->count = 0;
    if (!is_there(swap, page, word))
        return -EUCLEAN;
    pthread_mutex_lock(&swap->mutex);
    struct stream *stream = stream_of(swap, page);
    stream->used = ++swap->touches;
    stream->first = stream->last = page;
    uint64_t window = window_of(swap, stream->order), first = slot_at(swap, page) / window * window;
    for (uint64_t each = first, next; each < first + window && each < swap->told.slots; each = next) {
        uint64_t owner = swap->page_at[each] ? swap->page_at[each] - 1 : swap->pages;
        next = each + (owner < swap->pages ? slots_of(swap, owner) : 1);
        if (owner / PV_BLOCK_PAGES != page / PV_BLOCK_PAGES || owner == swap->pages ||
            swap->records[owner].state != PLACE_LIVE)
            continue;
        unit->pages[unit->count] = owner;
        unit->words[unit->count++] = swap_word(each);
        stream->first = owner < stream->first ? owner : stream->first;
        stream->last = owner > stream->last ? owner : stream->last;
    }
    pthread_mutex_unlock(&swap->mutex);
    return 0;
}

int swap_read(void *self, const struct pv_unit *unit, const uint8_t **bytes)
{
    struct pv_swap *swap = self;
    struct piece pieces[PV_BLOCK_PAGES];
    uint8_t *room = pv_kept_pages(PV_KEPT_UNIT);
    if (!room)
        return -ENOMEM;
    for (uint32_t i = 0; i < unit->count; i++)
        pieces[i] = piece_of(swap, unit->pages[i], room + (size_t)i * PV_PAGE);
    int error = read_pages(swap, pieces, unit->count);
    if (!error)
        count_up(&swap->told.ahead, unit->count - 1);
    *bytes = room;
    return error;
}

void swap_forget(void *self, uint64_t page, uint32_t count, const uint64_t *words)
{
    struct pv_swap *swap = self;
    uint64_t resident = swap->engine->pages;
    (void)words;
    for (uint32_t home = PV_HOME_ZERO; home < PV_HOMES; home++) {
        uint64_t away = atomic_load_explicit(&swap->engine->home_counts[home], memory_order_relaxed);
        resident -= away < resident ? away : resident;
    }
    pthread_mutex_lock(&swap->mutex);
    for (uint64_t each = page; each < page + count; each++) {
        swap->told.refaults += swap->clock - swap->records[each].when <= resident;
        place_state(swap, each, PLACE_KEPT);
    }
    swap->told.came += count;
    pthread_mutex_unlock(&swap->mutex);
}
