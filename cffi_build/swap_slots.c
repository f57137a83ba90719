/* swap_slots.c: which parts of the swap file are whose, and which are given back to the file system. */
#define _GNU_SOURCE
#include "swap_inside.h"

#include <fcntl.h>

#define LOOK (4ull << 20) /* slots to look at for a run that is long enough, before a shorter one will do */
#define HOLE 16           /* pages of the file from which on a hole is made */
#define HOLES (PV_BLOCK_PAGES / (HOLE + 1) + 1) /* of a region of 2 MiB, at most */

static uint64_t *count_of(struct pv_swap *swap, uint32_t state)
{
    return state == PLACE_LIVE ? &swap->told.live : state == PLACE_KEPT ? &swap->told.kept : NULL;
}

void place_state(struct pv_swap *swap, uint64_t page, uint32_t state)
{
    struct record *record = &swap->records[page];
    uint64_t *before = count_of(swap, record->state), *after = count_of(swap, state);
    if (before)
        --*before;
    record->state = state & 7;
    if (after)
        ++*after;
}

/* Which page of the file a slot is in. */
static uint64_t file_page(const struct pv_swap *swap, uint64_t slot) { return slot >> (PAGE_SHIFT - swap->shift); }

void place_give(struct pv_swap *swap, uint64_t page, uint64_t slot, uint32_t size)
{
    uint32_t count = slots_for(swap, size);
    swap->slot_of[page] = (uint32_t)slot + 1;
    swap->page_at[slot] = (uint32_t)page + 1;
    swap->records[page].size = size & 0x1fff;
    for (uint64_t each = slot; each < slot + count; each++) {
        put_bit(swap->taken, each, true);
        put_bit(swap->filled, file_page(swap, each), true);
    }
    swap->told.free -= count;
    place_state(swap, page, PLACE_BUSY);
}

void slots_free(struct pv_swap *swap, uint64_t slot, uint32_t count)
{
    for (uint64_t each = slot; each < slot + count; each++) {
        uint64_t region = file_page(swap, each) / PV_BLOCK_PAGES;
        put_bit(swap->taken, each, false);
        swap->loosened += !has_bit_at(swap->loose, region);
        put_bit(swap->loose, region, true);
    }
    swap->told.free += count;
}

void place_free(struct pv_swap *swap, uint64_t page)
{
    uint64_t slot = slot_at(swap, page);
    place_state(swap, page, PLACE_NONE);
    swap->slot_of[page] = 0;
    swap->page_at[slot] = 0;
    if (swap->holders[slot])
        swap->told.held += slots_of(swap, page);
    else
        slots_free(swap, slot, slots_of(swap, page));
}

uint64_t bytes_stored(const struct pv_swap *swap) { return (swap->told.slots - swap->told.free - swap->told.held) << swap->shift; }

/* ---- free ones ---- */

/* Slots that are kept for pages which are back, of the next 2 MiB of the file in which there are any: so that what goes
 * out next can lie together. How many slots that looked at, and from where; 0: none are kept. */
static uint64_t give_up(struct pv_swap *swap, uint64_t *from)
{
    uint64_t region = (uint64_t)PV_BLOCK_PAGES << (PAGE_SHIFT - swap->shift), before = swap->told.given_up;
    while (swap->told.kept && swap->told.given_up == before) {
        uint64_t end = swap->hand + region < swap->told.slots ? swap->hand + region : swap->told.slots;
        *from = swap->hand;
        for (; swap->hand < end; swap->hand++) {
            uint64_t page = swap->page_at[swap->hand];
            if (page && swap->records[page - 1].state == PLACE_KEPT) {
                place_free(swap, page - 1);
                swap->told.given_up++;
            }
        }
        swap->hand = end < swap->told.slots ? end : 0;
    }
    return swap->told.given_up == before ? 0 : region;
}

uint32_t free_at(const struct pv_swap *swap, uint64_t at, uint32_t most)
{
    uint32_t run = 0;
    while (run < most) { /* behind the last slot there is one that is taken */
        uint64_t here = at + run, taken = swap->taken[here / 64] >> here % 64;
        uint32_t left = 64 - (uint32_t)(here % 64), open = taken ? (uint32_t)__builtin_ctzll(taken) : left;
        run += open;
        if (open < left)
            break;
    }
    return run < most ? run : most;
}

/* The first run of `count`, or the longest one; behind LOOK slots, one of `least` will do. */
static uint32_t look_for(const struct pv_swap *swap, uint64_t at, uint64_t span, uint32_t count, uint32_t least,
                         uint64_t *first)
{
    uint32_t best = 0;
    for (uint64_t looked = 0; best < count && looked <= span && (looked < LOOK || best < least);) {
        uint64_t step = 64 - at % 64, open = ~swap->taken[at / 64] >> at % 64;
        if (open) {
            at += step = (uint64_t)__builtin_ctzll(open);
            uint32_t run = free_at(swap, at, count);
            if (run > best) {
                best = run;
                *first = at;
            }
            step += run;
            at += run;
        } else {
            at += step;
        }
        at = at < swap->told.slots ? at : 0;
        looked += step ? step : 1;
    }
    return best;
}

uint32_t slots_find(struct pv_swap *swap, uint32_t count, uint32_t least, uint64_t *first)
{
    uint64_t from = 0, region;
    while (swap->told.free < count && give_up(swap, &from))
        ;
    uint32_t best = swap->told.free >= least ? look_for(swap, swap->cursor, swap->told.slots, count, least, first) : 0;
    while (best < least && (region = give_up(swap, &from))) { /* all runs are too short: see what has become of some */
        from -= from < least ? from : least;
        best = look_for(swap, from, region + 2 * least, count, least, first);
    }
    if (best < least)
        return 0;
    swap->cursor = *first + best < swap->told.slots ? *first + best : 0;
    return best;
}

/* ---- holes ---- */

/* Of the slots of a hole: nobody is given them while it is made. */
static void reserve(struct pv_swap *swap, uint64_t page, uint64_t pages, bool on)
{
    uint32_t each = 1u << (PAGE_SHIFT - swap->shift);
    for (uint64_t slot = page * each; slot < (page + pages) * each; slot++)
        put_bit(swap->taken, slot, on);
    swap->reserved += (on ? pages : -pages) * each;
    swap->told.free -= (on ? pages : -pages) * each;
}

/* Of one region of 2 MiB of the file: runs that are free, and take disk space. How many; `length` in pages. */
static uint32_t find_holes(struct pv_swap *swap, uint64_t region, uint64_t first[HOLES], uint64_t length[HOLES])
{
    uint32_t each = 1u << (PAGE_SHIFT - swap->shift), found = 0;
    uint64_t at = region * PV_BLOCK_PAGES, end = at + PV_BLOCK_PAGES, last = swap->told.slots / each;
    end = end < last ? end : last;
    for (uint64_t next = at; at < end; at = next + 1) {
        for (next = at; next < end && has_bit_at(swap->filled, next) && free_at(swap, next * each, each) == each;)
            next++;
        if (next - at < HOLE)
            continue;
        first[found] = at;
        length[found++] = next - at;
        reserve(swap, at, next - at, true);
        for (uint64_t page = at; page < next; page++)
            put_bit(swap->filled, page, false);
    }
    return found;
}

static uint64_t make_holes(struct pv_swap *swap, const uint64_t *first, const uint64_t *length, uint32_t count)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < count && !swap->no_holes; i++) {
        if (!fallocate(swap->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(first[i] * PV_PAGE),
                       (off_t)(length[i] * PV_PAGE)))
            bytes += length[i] * PV_PAGE;
        else
            swap->no_holes = errno == EOPNOTSUPP || errno == ENOSYS;
    }
    return bytes;
}

uint64_t pv_swap_punch(struct pv_swap *swap)
{
    uint64_t first[HOLES], length[HOLES], bytes = 0, regions = swap->told.slots / PV_BLOCK_PAGES / 64 + 1;
    for (uint64_t i = 0; i < regions && !swap->no_holes; i++) {
        for (;;) {
            pthread_mutex_lock(&swap->mutex);
            bool stop = swap->told.queued || swap->ending, any = !stop && swap->loose[i];
            uint32_t found = 0;
            if (any) {
                uint64_t region = i * 64 + (uint64_t)__builtin_ctzll(swap->loose[i]);
                put_bit(swap->loose, region, false);
                swap->loosened--;
                found = find_holes(swap, region, first, length);
            }
            pthread_mutex_unlock(&swap->mutex);
            if (stop)
                return bytes;
            if (!any)
                break;
            uint64_t part = make_holes(swap, first, length, found);
            pthread_mutex_lock(&swap->mutex);
            for (uint32_t hole = 0; hole < found; hole++)
                reserve(swap, first[hole], length[hole], false);
            swap->told.given_back += part;
            pthread_cond_broadcast(&swap->news);
            pthread_mutex_unlock(&swap->mutex);
            bytes += part;
        }
    }
    return bytes;
}
