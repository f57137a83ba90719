/* fake_swap.c: the home SWAP on the stand-in for userfaultfd: its file is real, and its reads and writes fail, or do a
 * part, where a test says. While a batch is written, "the guest" may touch what is in it. */
#include "fake_uffd.c"
#include "swap_inside.h"

#include <fcntl.h>
#include <sys/stat.h>

#undef preadv
#undef pwritev
#undef fallocate

static struct pv_engine *own;
static struct pv_swap *swap;
#define DISK 64
static struct pv_swap_ref disk[DISK]; /* blocks of a disk, which refer to places of the file */
static struct {
    int what; /* 0: nothing; 1: read; 2: written; 3: written, and out again; 4: ... and another writer is at work */
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
    if (what >= 3)
        (void)!pv_swap_out(swap, meanwhile.page, (uint32_t)meanwhile.count);
    if (what == 4 && swap->writers > 1)
        (void)!batch_write(&swap->batches[1]);
}

/* As the kernel: it may do less than it was asked for. */
static ssize_t some(vector_call *call, int which, int fd, const struct iovec *parts, int count, off_t offset)
{
    struct iovec less[2 * PV_BLOCK_PAGES];
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

static int holes_fail; /* an errno */

int fake_fallocate(int fd, int mode, off_t offset, off_t length)
{
    if (!holes_fail)
        return fallocate(fd, mode, offset, length);
    errno = holes_fail;
    return -1;
}

void fake_no_holes(int error) { holes_fail = error; }

static off_t place_of(uint64_t page) { return (off_t)slot_at(swap, page) << swap->shift; }

static uint64_t value_in_file(uint64_t word)
{
    static uint8_t page[PV_PAGE] __attribute__((aligned(8))), stored[PV_PAGE];
    uint64_t owner = swap->page_at[word >> PV_PAGE_LOCATOR_SHIFT] - 1;
    uint32_t size = swap->records[owner].size;
    if (pread(swap->fd, stored, size, place_of(owner)) != size)
        return UINT64_MAX - 2;
    if (size == PV_PAGE)
        memcpy(page, stored, PV_PAGE);
    else if (pv_codec_decompress(swap->codec, stored, size, page, PV_PAGE))
        return UINT64_MAX - 3;
    return value_at(page);
}

struct pv_swap *fake_swap_open(struct pv_engine *engine, uint64_t slots, int codec)
{
    struct pv_home swap_home;
    int fd = memfd_create("swap", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)(slots * pv_swap_slot(codec))) || pv_swap_open(engine, fd, slots, codec, &swap))
        abort();
    own = engine;
    meanwhile.what = 0;
    holes_fail = 0;
    memset(disk, 0, sizeof(disk));
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

/* Changes a bit of what is stored of a page, or has the file end there. Whoever does it twice has it as it was. */
void fake_damage(uint64_t page, uint32_t bit, int shorter)
{
    uint8_t byte;
    off_t at = place_of(page) + bit / 8 % swap->records[page].size;
    if (shorter) {
        if (ftruncate(swap->fd, at))
            abort();
        return;
    }
    if (pread(swap->fd, &byte, 1, at) != 1)
        abort();
    byte ^= (uint8_t)(1u << bit % 8);
    if (pwrite(swap->fd, &byte, 1, at) != 1)
        abort();
}

/* The file's bytes on disk. */
uint64_t fake_disk(void)
{
    struct stat seen;
    if (fstat(swap->fd, &seen))
        abort();
    return (uint64_t)seen.st_blocks * 512;
}

/* Bytes that are stored of a page, 0 where it has no place; and where. */
uint32_t fake_stored(uint64_t page) { return swap->slot_of[page] ? swap->records[page].size : 0; }
uint64_t fake_place(uint64_t page) { return swap->slot_of[page]; }

/* ---- references, of blocks of a disk ---- */

/* So many pages are written to blocks from `block` on: bits of those that became references, or zeros. */
uint64_t fake_refer(uint32_t block, uint64_t page, uint32_t count)
{
    uint8_t became[DISK];
    uint64_t bits = 0;
    if (pv_swap_refer(swap, page, count, &disk[block], became, 0))
        abort();
    for (uint32_t i = 0; i < count; i++)
        bits |= (uint64_t)(became[i] == PV_REFER_SLOT || became[i] == PV_REFER_ZERO) << i;
    return bits;
}

void fake_unrefer(uint32_t block, uint32_t count) { pv_swap_unrefer(swap, &disk[block], count); }

/* One block's reference becomes another's too. */
void fake_copy_ref(uint32_t from, uint32_t to)
{
    struct pv_swap_ref copy = disk[from];
    pv_swap_hold(swap, &copy, 1);
    pv_swap_unrefer(swap, &disk[to], 1);
    disk[to] = copy;
}

/* The values of all blocks; what is none, or of which a read failed, has UINT64_MAX. */
int fake_read_refs(uint64_t *values)
{
    static uint8_t bytes[DISK][PV_PAGE] __attribute__((aligned(8)));
    memset(bytes, 0x5a, sizeof(bytes));
    int error = pv_swap_read_refs(swap, disk, DISK, bytes[0]);
    for (uint32_t i = 0; i < DISK; i++)
        values[i] = error < 0 || disk[i].what == PV_REF_NONE ? UINT64_MAX : value_at(bytes[i]);
    return error < 0 ? error : 0;
}

static uint64_t refs_to(uint64_t slot)
{
    uint64_t found = 0;
    for (uint32_t i = 0; i < DISK; i++)
        found += disk[i].what == PV_REF_SLOT && disk[i].slot == slot;
    return found;
}

/* What is wrong with the slots: the length of a text. */
int fake_slots(char *text, size_t size)
{
    uint64_t live = 0, kept = 0, taken = 0, heads = 0, bits = 0, loose = 0, held = 0, referred = 0, references = 0;
    static uint8_t owned[1 << 16];
    memset(owned, 0, sizeof(owned));
    for (uint64_t page = 0; page < own->pages; page++) {
        uint32_t state = swap->records[page].state;
        uint64_t word = own->page_words[page];
        MUST(state != PLACE_BUSY, "page %lu is busy", page);
        MUST((state == PLACE_LIVE) == (page_home(own, page) == PV_HOME_SWAP), "page %lu is %u, in home %u", page, state,
             page_home(own, page));
        MUST((state != PLACE_NONE) == (swap->slot_of[page] != 0), "page %lu is %u, of slot %u", page, state,
             swap->slot_of[page]);
        if (state == PLACE_NONE)
            continue;
        uint64_t slot = slot_at(swap, page);
        uint32_t count = slots_of(swap, page);
        live += state == PLACE_LIVE;
        kept += state == PLACE_KEPT;
        taken += count;
        MUST(swap->page_at[slot] == page + 1, "page %lu is at slot %lu, which is that of %u", page, slot,
             swap->page_at[slot]);
        MUST(count && slot + count <= swap->told.slots, "page %lu has %u slots from %lu on", page, count, slot);
        MUST((word & PV_PAGE_HOME) != PV_HOME_SWAP || slot == word >> PV_PAGE_LOCATOR_SHIFT,
             "page %lu is in slot %lu, it has %lu", page, word >> PV_PAGE_LOCATOR_SHIFT, slot);
        for (uint64_t each = slot; each < slot + count; each++) {
            MUST(!owned[each]++, "slot %lu is of page %lu and of another", each, page);
            MUST(has_bit_at(swap->taken, each), "slot %lu of page %lu is free by its bit", each, page);
            MUST(has_bit_at(swap->filled, each >> (PAGE_SHIFT - swap->shift)), "slot %lu is a hole", each);
        }
    }
    for (uint32_t i = 0; i < DISK; i++) {
        uint64_t slot = disk[i].slot, first = slot;
        uint32_t count = slots_for(swap, disk[i].size);
        if (disk[i].what != PV_REF_SLOT)
            continue;
        references++;
        MUST(swap->holders[slot] == refs_to(slot), "slot %lu has %u holders, and %lu references", slot,
             swap->holders[slot], refs_to(slot));
        for (uint32_t j = 0; j < i; j++)
            first = disk[j].what == PV_REF_SLOT && disk[j].slot == slot ? UINT64_MAX : first;
        if (first == UINT64_MAX)
            continue;
        referred += count;
        if (swap->page_at[slot]) {
            MUST(slots_of(swap, swap->page_at[slot] - 1) == count, "slot %lu: %u slots are referred to", slot, count);
            continue;
        }
        held += count;
        taken += count;
        for (uint64_t each = slot; each < slot + count; each++) {
            MUST(!owned[each]++, "slot %lu is held and a page's, or another's", each);
            MUST(has_bit_at(swap->taken, each), "slot %lu is held, and free by its bit", each);
            MUST(has_bit_at(swap->filled, each >> (PAGE_SHIFT - swap->shift)), "slot %lu is held, and a hole", each);
        }
    }
    MUST(held == swap->told.held && referred == swap->told.referred && references == swap->told.references,
         "%lu slots held, %lu referred to, %lu references; counted %lu, %lu, %lu", held, referred, references,
         swap->told.held, swap->told.referred, swap->told.references);
    MUST(referred <= swap->told.slots / 2, "%lu slots are referred to, of %lu", referred, swap->told.slots);
    for (uint64_t slot = 0; slot < swap->told.slots; slot++) {
        MUST(!swap->holders[slot] || refs_to(slot), "slot %lu has %u holders that nobody knows", slot, swap->holders[slot]);
        heads += swap->page_at[slot] != 0;
        bits += has_bit_at(swap->taken, slot);
    }
    for (uint64_t i = 0; i <= swap->told.slots / PV_BLOCK_PAGES / 64; i++)
        loose += (uint64_t)__builtin_popcountll(swap->loose[i]);
    MUST(heads == live + kept && bits == taken, "%lu places, of %lu slots; %lu by their pages, %lu by their bits",
         live + kept, taken, heads, bits);
    MUST(live == swap->told.live && kept == swap->told.kept && swap->told.slots - taken == swap->told.free,
         "%lu live, %lu kept, %lu taken; counted %lu, %lu, %lu free", live, kept, taken, swap->told.live,
         swap->told.kept, swap->told.free);
    MUST(loose == swap->loosened, "%lu regions are loose, counted %lu", loose, swap->loosened);
    MUST(!swap->busy, "a writer is still busy");
    for (uint64_t i = 0; i <= own->blocks / 64; i++)
        MUST(!swap->writing[i] && !swap->again[i], "blocks of %lu are in a batch", i * 64);
    return 0;
}
