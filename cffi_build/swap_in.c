/* swap_in.c: how pages come back from the swap file: the functions of the home, each under the lock of its pages' block.
 * So their slots stay LIVE meanwhile, and are read without the mutex. */
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

/* A page to be read: from where, and to where it goes. */
struct piece {
    uint64_t slot;
    uint8_t *to;
};

static int verify(struct pv_swap *swap, const struct piece *piece)
{
    uint64_t digest[2];
    pv_digest(&swap->key, piece->to, digest);
    return memcmp(digest, swap->table[piece->slot].digest, sizeof(digest)) ? -EBADMSG : 0;
}

/* A call for each run of slots, wherever its pages go. */
static int read_pieces(struct pv_swap *swap, const struct piece *pieces, uint32_t count)
{
    struct iovec parts[PV_BLOCK_PAGES];
    for (uint32_t i = 0, run; i < count; i += run) {
        uint32_t used = 0;
        for (run = 0; i + run < count && pieces[i + run].slot == pieces[i].slot + run; run++) {
            uint8_t *to = pieces[i + run].to;
            if (used && (uint8_t *)parts[used - 1].iov_base + parts[used - 1].iov_len == to)
                parts[used - 1].iov_len += PV_PAGE;
            else
                parts[used++] = (struct iovec){to, PV_PAGE};
        }
        int error = vector_whole(preadv, swap->fd, parts, used, pieces[i].slot * PV_PAGE);
        for (uint32_t j = 0; !error && j < run; j++)
            error = verify(swap, &pieces[i + j]);
        if (error)
            return error;
        count_up(&swap->told.reads, 1);
        count_up(&swap->told.bytes_read, (uint64_t)run * PV_PAGE);
    }
    return 0;
}

int swap_scatter(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to)
{
    struct pv_swap *swap = self;
    struct piece pieces[PV_BLOCK_PAGES];
    uint32_t used = 0;
    (void)page;
    for (uint32_t i = 0; i < count; i++) {
        if ((words[i] & PV_PAGE_HOME) != PV_HOME_SWAP)
            continue;
        uint64_t slot = words[i] >> PV_PAGE_LOCATOR_SHIFT;
        if (slot >= swap->told.slots)
            return -EUCLEAN;
        pieces[used++] = (struct piece){slot, to + (size_t)i * PV_PAGE};
    }
    return read_pieces(swap, pieces, used);
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

/* Of the page's own block alone: elsewhere a slot may have other bytes by the time they are installed. */
int swap_gather(void *self, uint64_t page, uint64_t word, struct pv_unit *unit)
{
    struct pv_swap *swap = self;
    uint64_t slot = word >> PV_PAGE_LOCATOR_SHIFT;
    unit->count = 0;
    if (slot >= swap->told.slots)
        return -EUCLEAN;
    pthread_mutex_lock(&swap->mutex);
    struct stream *stream = stream_of(swap, page);
    stream->used = ++swap->touches;
    stream->first = stream->last = page;
    uint64_t window = 1ull << stream->order, first = slot / window * window;
    for (uint64_t each = first; each < first + window && each < swap->told.slots; each++) {
        uint64_t owner = slot_page(&swap->table[each]);
        if (slot_state(&swap->table[each]) != SLOT_LIVE || owner / PV_BLOCK_PAGES != page / PV_BLOCK_PAGES)
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
        pieces[i] = (struct piece){unit->words[i] >> PV_PAGE_LOCATOR_SHIFT, room + (size_t)i * PV_PAGE};
    int error = read_pieces(swap, pieces, unit->count);
    if (!error)
        count_up(&swap->told.ahead, unit->count - 1);
    *bytes = room;
    return error;
}

void swap_forget(void *self, uint64_t page, uint32_t count, const uint64_t *words)
{
    struct pv_swap *swap = self;
    uint64_t resident = swap->engine->pages;
    for (uint32_t home = PV_HOME_ZERO; home < PV_HOMES; home++) {
        uint64_t away = atomic_load_explicit(&swap->engine->home_counts[home], memory_order_relaxed);
        resident -= away < resident ? away : resident;
    }
    pthread_mutex_lock(&swap->mutex);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t slot = words[i] >> PV_PAGE_LOCATOR_SHIFT;
        swap->told.refaults += swap->clock - swap->table[slot].when <= resident;
        slot_set(swap, slot, page + i, SLOT_KEPT);
    }
    swap->told.came += count;
    pthread_mutex_unlock(&swap->mutex);
}
