/* fake_swap.c: the home SWAP on the stand-in for userfaultfd: its file is real, and its reads and writes fail, or do a
 * part, where a test says. While a batch is written, "the guest" may touch what is in it. */
#include "fake_uffd.c"
#include "swap_inside.h"

#undef preadv
#undef pwritev

static struct pv_engine *own;
static struct pv_swap *swap;
static struct {
    int what; /* 0: nothing; 1: read; 2: written; 3: written, and out again */
    uint64_t page, count, value, done;
} meanwhile;

/* What the guest does to pages while they are being written. */
void fake_meanwhile(int what, uint64_t page, uint64_t count, uint64_t value)
{
    meanwhile.what = what;
    meanwhile.page = page;
    meanwhile.count = count;
    meanwhile.value = value;
    meanwhile.done = 0;
}

/* So many of the pages were written: the others could not be brought. */
uint64_t fake_done(void) { return meanwhile.done; }

static void touch_meanwhile(void)
{
    int what = meanwhile.what;
    meanwhile.what = 0;
    for (uint64_t i = 0; what && i < meanwhile.count; i++) {
        uint64_t page = meanwhile.page + i;
        if (what == 1 ? guest_read(own, page) == UINT64_MAX - 1 : guest_write(own, page, meanwhile.value))
            break;
        meanwhile.done += what > 1;
    }
    if (what == 3)
        (void)!pv_swap_out(swap, meanwhile.page, (uint32_t)meanwhile.count);
}

/* As the kernel: it may do less than it was asked for. */
static ssize_t some(vector_call *call, int which, int fd, const struct iovec *parts, int count, off_t offset)
{
    struct iovec less[PV_BLOCK_PAGES];
    uint64_t bytes = 0, allowed;
    for (int i = 0; i < count; i++)
        bytes += parts[i].iov_len;
    allowed = bytes;
    int error = failing(which, &allowed);
    if (error && !allowed) {
        errno = error;
        return -1;
    }
    for (int i = 0; i < count; i++) {
        less[i] = parts[i];
        less[i].iov_len = parts[i].iov_len < allowed ? parts[i].iov_len : allowed;
        allowed -= less[i].iov_len;
    }
    return call(fd, less, count, offset);
}

ssize_t fake_pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    touch_meanwhile();
    return some(pwritev, PUT, fd, parts, count, offset);
}

ssize_t fake_preadv(int fd, const struct iovec *parts, int count, off_t offset)
{
    return some(preadv, GET, fd, parts, count, offset);
}

static uint64_t value_in_file(uint64_t word)
{
    static uint8_t page[PV_PAGE] __attribute__((aligned(8)));
    if (pread(swap->fd, page, PV_PAGE, (off_t)((word >> PV_PAGE_LOCATOR_SHIFT) * PV_PAGE)) != PV_PAGE)
        return UINT64_MAX - 2;
    return value_at(page);
}

struct pv_swap *fake_swap_open(struct pv_engine *engine, uint64_t slots)
{
    struct pv_home swap_home;
    int fd = memfd_create("swap", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)(slots * PV_PAGE)) || pv_swap_open(engine, fd, slots, &swap))
        abort();
    own = engine;
    meanwhile.what = 0;
    elsewhere = value_in_file;
    pv_swap_home(swap, &swap_home);
    pv_engine_home(engine, PV_HOME_SWAP, &swap_home);
    return swap;
}

void fake_swap_close(void)
{
    fake_close(own);
    pv_swap_end(swap);
    pv_swap_close(swap);
}

/* Changes a byte of a page's slot; or has the file end there. */
void fake_damage(uint64_t page, int shorter)
{
    uint8_t byte;
    off_t at = (off_t)((own->page_words[page] >> PV_PAGE_LOCATOR_SHIFT) * PV_PAGE + 100);
    if (shorter) {
        if (ftruncate(swap->fd, at))
            abort();
        return;
    }
    if (pread(swap->fd, &byte, 1, at) != 1)
        abort();
    byte ^= 1;
    if (pwrite(swap->fd, &byte, 1, at) != 1)
        abort();
}

/* What is wrong with the slots: the length of a text. */
int fake_slots(char *text, size_t size)
{
    uint64_t live = 0, kept = 0, taken = 0;
    for (uint64_t slot = 0; slot < swap->told.slots; slot++) {
        uint32_t state = slot_state(&swap->table[slot]);
        uint64_t page = slot_page(&swap->table[slot]);
        MUST(state != SLOT_BUSY, "slot %lu is busy", slot);
        MUST((state != SLOT_FREE) == has_bit_at(swap->taken, slot), "slot %lu is %u, by its bit it is not", slot, state);
        taken += state != SLOT_FREE;
        live += state == SLOT_LIVE;
        kept += state == SLOT_KEPT;
        MUST(state == SLOT_FREE || swap->slot_of[page] == slot + 1, "slot %lu is page %lu's, which has %u", slot, page,
             swap->slot_of[page]);
        MUST((state == SLOT_LIVE) == (state != SLOT_FREE && page_home(own, page) == PV_HOME_SWAP),
             "slot %lu is %u, its page %lu in home %u", slot, state, page, page_home(own, page));
    }
    for (uint64_t page = 0; page < own->pages; page++) {
        uint64_t word = own->page_words[page];
        MUST(!swap->slot_of[page] || slot_page(&swap->table[swap->slot_of[page] - 1]) == page, "page %lu has a slot of %lu",
             page, slot_page(&swap->table[swap->slot_of[page] - 1]));
        MUST((word & PV_PAGE_HOME) != PV_HOME_SWAP || swap->slot_of[page] == (word >> PV_PAGE_LOCATOR_SHIFT) + 1,
             "page %lu is in slot %lu, it has %u", page, word >> PV_PAGE_LOCATOR_SHIFT, swap->slot_of[page]);
    }
    MUST(live == swap->told.live && kept == swap->told.kept && swap->told.slots - taken == swap->told.free,
         "%lu live, %lu kept, %lu taken; counted %lu, %lu, %lu free", live, kept, taken, swap->told.live,
         swap->told.kept, swap->told.free);
    MUST(!swap->busy, "the writer is still busy");
    return 0;
}
