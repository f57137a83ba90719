/* swap_refs.c: references to places of the swap file by others than pages (technique T6, US9342248B2): a guest writes a page
 * to its disk while the host has that in the swap file, and the disk's block becomes a reference. A place's bytes do not
 * change while anybody holds it: it is given to others only when its slots are free, and each write of a page whose place is
 * still taken goes elsewhere. */
#define _GNU_SOURCE
#include "swap_inside.h"

#include <stdlib.h>
#include <string.h>

/* Of all slots, so many at most are referred to: the rest is for what goes out. */
#define MOST(swap) ((swap)->told.slots / 2)

static void drop(struct pv_swap *swap, struct pv_swap_ref *ref)
{
    uint32_t count = slots_for(swap, ref->size);
    if (ref->what == PV_REF_SLOT) {
        swap->told.references--;
        if (!--swap->holders[ref->slot]) {
            swap->told.referred -= count;
            if (!swap->page_at[ref->slot]) {
                swap->told.held -= count;
                slots_free(swap, ref->slot, count);
            }
        }
    }
    *ref = (struct pv_swap_ref){.what = PV_REF_NONE};
}

/* There is no sum of holders beyond 32 bits: references are of a disk's blocks, of which there are fewer. */
static void hold(struct pv_swap *swap, const struct pv_swap_ref *ref)
{
    if (ref->what != PV_REF_SLOT)
        return;
    swap->told.references++;
    if (!swap->holders[ref->slot]++)
        swap->told.referred += slots_for(swap, ref->size);
}

/* Under the page's block lock, and the mutex: the page's place is LIVE. */
static uint8_t refer_to(struct pv_swap *swap, uint64_t page, struct pv_swap_ref *ref)
{
    const struct record *record = &swap->records[page];
    uint32_t slot = (uint32_t)slot_at(swap, page);
    struct pv_swap_ref now = {{record->digest[0], record->digest[1]}, slot, record->size, PV_REF_SLOT};
    if (!swap->holders[slot] && swap->told.referred + slots_for(swap, now.size) > MOST(swap))
        return PV_REFER_FULL;
    hold(swap, &now); /* before the old one goes: it may be the same */
    drop(swap, ref);
    *ref = now;
    return PV_REFER_SLOT;
}

static void refer_block(struct pv_swap *swap, uint64_t page, uint32_t count, struct pv_swap_ref *refs, uint8_t *became,
                        int look)
{
    struct pv_engine *engine = swap->engine;
    uint64_t block = page / PV_BLOCK_PAGES;
    block_lock_plain(engine, block); /* what it holds stays as it is, so that a live save need not know */
    bool known = !(block_word(engine, block) & PV_BLOCK_PENDING);
    pthread_mutex_lock(&swap->mutex);
    for (uint32_t i = 0; i < count && known; i++) {
        uint32_t home = page_home(engine, page + i);
        if (home == PV_HOME_SWAP) {
            became[i] = look ? PV_REFER_FULL : refer_to(swap, page + i, &refs[i]);
        } else if ((home == PV_HOME_ZERO || home == PV_HOME_BALLOON) && !look) {
            drop(swap, &refs[i]);
            refs[i].what = PV_REF_ZERO;
            became[i] = PV_REFER_ZERO;
        }
    }
    pthread_mutex_unlock(&swap->mutex);
    block_unlock(engine, block);
}

int pv_swap_refer(struct pv_swap *swap, uint64_t page, uint32_t count, struct pv_swap_ref *refs, uint8_t *became, int look)
{
    if (count > PV_BLOCK_PAGES || page > swap->pages || count > swap->pages - page)
        return -EINVAL;
    memset(became, PV_REFER_BYTES, count);
    for (uint32_t i = 0, part; i < count; i += part) {
        part = PV_BLOCK_PAGES - (uint32_t)((page + i) % PV_BLOCK_PAGES);
        part = part < count - i ? part : count - i;
        refer_block(swap, page + i, part, look ? NULL : refs + i, became + i, look);
    }
    return 0;
}

void pv_swap_hold(struct pv_swap *swap, const struct pv_swap_ref *refs, uint32_t count)
{
    pthread_mutex_lock(&swap->mutex);
    for (uint32_t i = 0; i < count; i++)
        hold(swap, &refs[i]);
    pthread_mutex_unlock(&swap->mutex);
}

void pv_swap_unrefer(struct pv_swap *swap, struct pv_swap_ref *refs, uint32_t count)
{
    pthread_mutex_lock(&swap->mutex);
    for (uint32_t i = 0; i < count; i++)
        drop(swap, &refs[i]);
    pthread_mutex_unlock(&swap->mutex);
}

static int by_slot(const void *first, const void *second)
{
    uint64_t one = ((const struct piece *)first)->slot, other = ((const struct piece *)second)->slot;
    return one < other ? -1 : one > other;
}

int pv_swap_read_refs(struct pv_swap *swap, const struct pv_swap_ref *refs, uint32_t count, uint8_t *to)
{
    struct piece pieces[PV_BLOCK_PAGES];
    uint64_t reads = 0, bytes = 0;
    uint32_t used = 0;
    int error = 0;
    for (uint32_t i = 0; i < count && !error; i++) {
        const struct pv_swap_ref *ref = &refs[i];
        uint8_t *place = to + (size_t)i * PV_PAGE;
        if (ref->what == PV_REF_ZERO)
            memset(place, 0, PV_PAGE);
        else if (ref->what == PV_REF_SLOT)
            pieces[used++] = (struct piece){ref->slot, ref->digest, place, NULL, ref->size};
        if (used && (used == PV_BLOCK_PAGES || i == count - 1)) {
            qsort(pieces, used, sizeof(*pieces), by_slot);
            error = read_pieces(swap, pieces, used, &reads, &bytes);
            used = 0;
        }
    }
    count_up(&swap->told.ref_reads, reads);
    count_up(&swap->told.ref_bytes_read, bytes);
    return error ? error : (int)reads;
}
