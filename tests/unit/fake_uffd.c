/* fake_uffd.c: stands for userfaultfd and large pages, so that the memory engine's C files run without either, and fail
 * where a test says. They are compiled with ioctl, madvise and clock_gettime replaced by the functions here.
 *
 * What is populated is real: all memory is of small pages, /proc/self/pagemap tells, what is absent reads as zeros. What
 * is registered, write-protected, large, merged by KSM or the shared zero page is only noted here. Touches by the "guest" are made by
 * guest_write() and guest_read(), which post a fault where the kernel would, and wait for the engine's thread. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* ---- what may fail ---- */

enum { MOVE, COPY, ZERO, PROTECT, REGISTER, UNREGISTER, SCAN, DROP, COLLAPSE, POPULATE, ADVISE, FETCH, STORE, WRITE,
       PUT, GET, CALLS }; /* PUT, GET: fake_swap.c */

static struct injection {
    uint64_t skip, pages; /* calls that go well before; pages done before it fails */
    int error, times;     /* times that it fails then */
} injections[CALLS];

void fake_inject(int call, uint64_t skip, uint64_t pages, int error, int times)
{
    injections[call] = (struct injection){skip, pages, error, times};
}

/* Is one still to come? */
int fake_pending(void)
{
    int pending = 0;
    for (int call = 0; call < CALLS; call++)
        pending += injections[call].times != 0;
    return pending;
}

void fake_clear(void) { memset(injections, 0, sizeof(injections)); }

/* The error that this call has, 0 for none; *pages: so many it does before, of at most *pages. */
static int failing(int call, uint64_t *pages)
{
    struct injection *own = &injections[call];
    if (!own->times)
        return 0;
    if (own->skip) {
        own->skip--;
        return 0;
    }
    if (pages && own->pages && own->pages < *pages) { /* partial: the kernel then says EAGAIN, and the error next time */
        *pages = own->pages;
        own->pages = 0;
        return EAGAIN;
    }
    if (pages)
        *pages = 0;
    own->times--;
    return own->error;
}

/* ---- the model: of RAM, the aside area and staging ---- */

#define AREAS 3
#define MOST (8u * PV_BLOCK_PAGES)

static struct area {
    uint8_t *start;
    uint64_t pages;
    uint8_t modes[MOST], wp[MOST], shared[MOST], mergeable[MOST], merged[MOST], large[MOST / PV_BLOCK_PAGES];
} areas[AREAS];

static int pagemap = -1;
static int sender = -1;

static bool there(const void *address)
{
    uint64_t entry = 0;
    if (pread(pagemap, &entry, 8, (off_t)((uintptr_t)address / PV_PAGE * 8)) != 8)
        abort();
    return entry >> 62 != 0;
}

/* The same for all pages of an area: nonzero where something is. */
static void entries(uint64_t *out, const struct area *area)
{
    ssize_t size = (ssize_t)(area->pages * 8);
    if (pread(pagemap, out, (size_t)size, (off_t)((uintptr_t)area->start / PV_PAGE * 8)) != size)
        abort();
    for (uint64_t page = 0; page < area->pages; page++)
        out[page] >>= 62;
}

static struct area *area_of(uint64_t address, uint64_t *page)
{
    for (int i = 0; i < AREAS; i++) {
        uint64_t start = (uintptr_t)areas[i].start;
        if (areas[i].start && address >= start && address < start + areas[i].pages * PV_PAGE) {
            *page = (address - start) / PV_PAGE;
            return &areas[i];
        }
    }
    return NULL;
}

static void break_large(struct area *area, uint64_t page, uint64_t count)
{
    for (uint64_t i = page; i < page + count; i++)
        area->large[i / PV_BLOCK_PAGES] = 0;
}

static void drop(struct area *area, uint64_t page, uint64_t count)
{
    if (madvise(area->start + page * PV_PAGE, count * PV_PAGE, MADV_DONTNEED))
        abort();
    break_large(area, page, count);
    memset(area->wp + page, 0, count);
    memset(area->shared + page, 0, count);
    memset(area->merged + page, 0, count);
}

static int result(int error)
{
    errno = error;
    return error ? -1 : 0;
}

/* ---- the ioctls ---- */

static int do_move(struct uffdio_move *move)
{
    uint64_t to, from, pages = move->len / PV_PAGE, done = 0;
    struct area *target = area_of(move->dst, &to), *source = area_of(move->src, &from);
    int error = failing(MOVE, &pages);
    bool whole = pages == PV_BLOCK_PAGES && to % PV_BLOCK_PAGES == 0 && from % PV_BLOCK_PAGES == 0 &&
                 source->large[from / PV_BLOCK_PAGES];
    int stopped = 0;
    for (; done < pages; done++) {
        uint8_t *old = source->start + (from + done) * PV_PAGE, *new = target->start + (to + done) * PV_PAGE;
        stopped = target == &areas[0] && !target->modes[to + done] ? ENOENT : there(new) ? EEXIST : 0;
        stopped = source->merged[from + done] ? EBUSY : stopped;
        if (stopped)
            break;
        if (!there(old))
            continue; /* a hole */
        if (source->shared[from + done])
            (void)*(volatile uint8_t *)new;
        else
            memcpy(new, old, PV_PAGE);
        target->shared[to + done] = source->shared[from + done];
        target->wp[to + done] = 0;
        drop(source, from + done, 1);
        break_large(target, to + done, 1);
    }
    if (whole && done == PV_BLOCK_PAGES)
        target->large[to / PV_BLOCK_PAGES] = 1;
    error = stopped ? stopped : error;
    move->move = done ? (int64_t)(done * PV_PAGE) : -error;
    return result(error && done ? EAGAIN : error);
}

/* UFFDIO_COPY, and with source NULL UFFDIO_ZEROPAGE. */
static int do_fill(int call, uint64_t address, const uint8_t *source, uint64_t size, int64_t *out)
{
    uint64_t page, pages = size / PV_PAGE, done = 0;
    struct area *area = area_of(address, &page);
    int error = failing(call, &pages), stopped = 0;
    for (; done < pages; done++) {
        uint8_t *to = area->start + (page + done) * PV_PAGE;
        stopped = !area->modes[page + done] ? ENOENT : there(to) ? EEXIST : 0;
        if (stopped)
            break;
        if (source)
            memcpy(to, source + done * PV_PAGE, PV_PAGE);
        else
            (void)*(volatile uint8_t *)to;
        area->shared[page + done] = source == NULL;
        area->wp[page + done] = 0;
    }
    error = stopped ? stopped : error;
    *out = done ? (int64_t)(done * PV_PAGE) : -error;
    return result(error && done ? EAGAIN : error);
}

static bool unlifted; /* protection could not be taken away: it stays until a write faults */

static int do_protect(const struct uffdio_writeprotect *protect)
{
    uint64_t page, pages = protect->range.len / PV_PAGE;
    struct area *area = area_of(protect->range.start, &page);
    int error = failing(PROTECT, NULL);
    unlifted = unlifted || (error && !protect->mode);
    for (uint64_t i = page; !error && i < page + pages; i++)
        error = area->modes[i] & UFFDIO_REGISTER_MODE_WP ? 0 : ENOENT;
    for (uint64_t i = page; !error && i < page + pages; i++) {
        area->wp[i] = protect->mode && there(area->start + i * PV_PAGE);
        if (pages < PV_BLOCK_PAGES)
            break_large(area, i, 1);
    }
    return result(error);
}

static int do_register(const struct uffdio_range *range, uint64_t modes)
{
    uint64_t page;
    struct area *area = area_of(range->start, &page);
    if (!area)
        return 0; /* the aside area, before it is known here */
    int error = failing(modes ? REGISTER : UNREGISTER, NULL);
    for (uint64_t i = page; !error && i < page + range->len / PV_PAGE; i++) {
        area->modes[i] = (area->modes[i] & modes) == modes && modes ? area->modes[i] : (uint8_t)modes;
        if (!(area->modes[i] & UFFDIO_REGISTER_MODE_WP))
            area->wp[i] = 0;
    }
    return result(error);
}

static uint64_t word_of(uint64_t value, uint32_t i);

/* What KSM does to a page: it is not write-protected any more, though it was; it cannot be moved. */
static bool merge_one(struct area *area, uint64_t page)
{
    if (!area->mergeable[page] || !there(area->start + page * PV_PAGE) || area->shared[page])
        return false;
    break_large(area, page, 1);
    area->merged[page] = 1;
    area->wp[page] = 0;
    return true;
}

void fake_merge(uint64_t page, uint64_t count)
{
    for (uint64_t i = page; i < page + count; i++)
        (void)merge_one(&areas[0], i);
}

/* The same, and a write by the guest, just after the next look for pages without protection. */
static uint64_t late_page, late_value;
static int late; /* 1: to come; 2: has come */

void fake_merge_later(uint64_t page, uint64_t value)
{
    late_page = page;
    late_value = value;
    late = 1;
}

int fake_merged_later(void)
{
    int came = late == 2;
    late = 0;
    return came;
}

static void merge_late(void)
{
    if (late != 1 || !merge_one(&areas[0], late_page))
        return;
    for (uint32_t i = 0; i < 512; i++)
        ((uint64_t *)(areas[0].start + late_page * PV_PAGE))[i] = word_of(late_value, i);
    areas[0].merged[late_page] = 0;
    late = 2;
}

static bool scans = true;

void fake_scans(int on) { scans = on; }

static int do_scan(struct pm_scan_arg *scan)
{
    uint64_t page;
    struct area *area = area_of(scan->start, &page);
    int error = scans ? failing(SCAN, NULL) : ENOTTY;
    if (error || !area)
        return result(error);
    struct page_region *out = (struct page_region *)(uintptr_t)scan->vec;
    uint64_t count = 0, at = scan->start;
    for (; at < scan->end; at += PV_PAGE, page++) {
        if (!there((void *)(uintptr_t)at))
            continue;
        uint64_t is = PAGE_IS_PRESENT | (area->large[page / PV_BLOCK_PAGES] ? PAGE_IS_HUGE : 0);
        is |= area->wp[page] ? 0 : PAGE_IS_WRITTEN;
        if ((is & scan->category_mask) != scan->category_mask)
            continue;
        is &= scan->return_mask;
        if (count && out[count - 1].end == at && out[count - 1].categories == is) {
            out[count - 1].end += PV_PAGE;
            continue;
        }
        if (count == scan->vec_len)
            break;
        out[count++] = (struct page_region){at, at + PV_PAGE, is};
    }
    scan->walk_end = at;
    if (scan->category_mask & PAGE_IS_WRITTEN)
        merge_late();
    return (int)count;
}

static uint64_t woken; /* where the last range begins that was woken */

int fake_ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    (void)fd;
    switch (request) {
    case UFFDIO_API:
        return 0;
    case UFFDIO_WAKE: /* whoever waits looks again and again */
        woken = ((struct uffdio_range *)argument)->start;
        return 0;
    case UFFDIO_MOVE:
        return do_move(argument);
    case UFFDIO_COPY: {
        struct uffdio_copy *copy = argument;
        return do_fill(COPY, copy->dst, (const uint8_t *)(uintptr_t)copy->src, copy->len, (int64_t *)&copy->copy);
    }
    case UFFDIO_ZEROPAGE: {
        struct uffdio_zeropage *zero = argument;
        return do_fill(ZERO, zero->range.start, NULL, zero->range.len, (int64_t *)&zero->zeropage);
    }
    case UFFDIO_WRITEPROTECT:
        return do_protect(argument);
    case UFFDIO_REGISTER: {
        struct uffdio_register *request_ = argument;
        return do_register(&request_->range, request_->mode);
    }
    case UFFDIO_UNREGISTER:
        return do_register(argument, 0);
    case PAGEMAP_SCAN:
        return do_scan(argument);
    }
    abort();
}

static int do_collapse(struct area *area, uint64_t page)
{
    int error = failing(COLLAPSE, NULL);
    for (uint64_t i = page; !error && i < page + PV_BLOCK_PAGES; i++)
        error = area->wp[i] ? EINVAL : area->merged[i] ? EAGAIN : area->shared[i] || !there(area->start + i * PV_PAGE) ? EBUSY : 0;
    if (!error)
        area->large[page / PV_BLOCK_PAGES] = 1;
    return result(error);
}

int fake_madvise(void *address, size_t size, int advice)
{
    uint64_t page, pages = size / PV_PAGE;
    struct area *area = area_of((uintptr_t)address, &page);
    int error = 0;
    switch (advice) {
    case MADV_DONTNEED:
        error = area == &areas[0] ? failing(DROP, NULL) : 0;
        if (!error)
            drop(area, page, pages);
        return result(error);
    case MADV_COLLAPSE:
        return do_collapse(area, page);
    case MADV_POPULATE_WRITE:
        if (!area) /* a live save's own buffers */
            return madvise(address, size, advice);
        error = failing(POPULATE, NULL);
        for (uint64_t i = page; !error && i < page + pages; i++) {
            ((volatile uint8_t *)area->start)[i * PV_PAGE] = area->start[i * PV_PAGE];
            area->shared[i] = area->merged[i] = 0;
        }
        if (!error && area == &areas[2])
            area->large[page / PV_BLOCK_PAGES] = 1;
        return result(error);
    case MADV_MERGEABLE:
    case MADV_UNMERGEABLE:
        error = failing(ADVISE, NULL);
        if (!error)
            memset(area->mergeable + page, advice == MADV_MERGEABLE, pages);
        if (!error && advice == MADV_UNMERGEABLE)
            memset(area->merged + page, 0, pages);
        return result(error);
    case MADV_HUGEPAGE:
    case MADV_NOHUGEPAGE:
        if (!area) /* a fresh mapping */
            return madvise(address, size, MADV_NOHUGEPAGE);
        error = failing(ADVISE, NULL);
        if (!error && advice == MADV_NOHUGEPAGE && pages < PV_BLOCK_PAGES)
            break_large(area, page, pages);
        return result(error);
    }
    return madvise(address, size, advice);
}

/* Time goes by 5 ms a look: whoever waits has soon waited long. */
int fake_clock_gettime(clockid_t clock, struct timespec *now)
{
    static uint64_t nanoseconds;
    (void)clock;
    uint64_t at = __atomic_add_fetch(&nanoseconds, 5000000, __ATOMIC_RELAXED);
    *now = (struct timespec){(time_t)(at / 1000000000), (long)(at % 1000000000)};
    return 0;
}

/* ---- a home ---- */

#define NOISY 1000 /* of a page of value NOISY + n, n times 64 words are noise; all of others are their value */

static uint64_t word_of(uint64_t value, uint32_t i)
{
    if (!i || value < NOISY || value > NOISY + 8 || i >= 64 * (value - NOISY))
        return value;
    uint64_t mixed = (value << 32 | i) * 0x9e3779b97f4a7c15;
    mixed = (mixed ^ mixed >> 29) * 0xbf58476d1ce4e5b9;
    return mixed ^ mixed >> 32;
}

static uint64_t value_at(const uint8_t *page)
{
    const uint64_t *words = (const uint64_t *)page;
    for (uint32_t i = 1; i < 512; i++)
        if (words[i] != word_of(words[0], i))
            return UINT64_MAX; /* torn */
    return words[0];
}

static uint64_t shelf[MOST]; /* a page is all of one word; 0: nothing there */

static int shelf_fetch(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to)
{
    (void)self;
    (void)page;
    int error = failing(FETCH, NULL);
    for (uint32_t i = 0; i < (error ? count / 2 : count); i++) {
        uint64_t value = shelf[words[i] >> PV_PAGE_LOCATOR_SHIFT];
        if (!value)
            abort();
        for (uint32_t j = 0; j < 512; j++)
            ((uint64_t *)to)[i * 512 + j] = value - 1;
    }
    return -error;
}

static int shelf_store(void *self, uint64_t page, uint32_t count, const uint8_t *from, uint64_t *locators)
{
    (void)self;
    int error = failing(STORE, NULL);
    for (uint32_t i = 0; !error && i < count; i++) {
        locators[i] = page + i;
        if (shelf[page + i])
            abort();
        shelf[page + i] = *(const uint64_t *)(from + i * PV_PAGE) + 1;
    }
    return -error;
}

static void shelf_forget(void *self, uint64_t page, uint32_t count, const uint64_t *words)
{
    (void)self;
    (void)page;
    for (uint32_t i = 0; i < count; i++) {
        if (!shelf[words[i] >> PV_PAGE_LOCATOR_SHIFT])
            abort(); /* forgotten twice */
        shelf[words[i] >> PV_PAGE_LOCATOR_SHIFT] = 0;
    }
}

/* Where a home SWAP of another kind has a page: what is in it. */
static uint64_t (*elsewhere)(uint64_t word);

void fake_put(uint64_t locator, uint64_t value) { shelf[locator] = value + 1; }

/* ---- a source of all RAM, which keeps pages in units of pages from two blocks; 0: zeros, kept nowhere ---- */

static uint64_t stock[MOST], stocked;

static uint64_t stock_word(uint64_t page) { return page << PV_PAGE_LOCATOR_SHIFT | PV_HOME_PEER; }

static uint32_t stock_find(void *self, uint64_t page, uint32_t count, uint64_t *words)
{
    (void)self;
    bool any = false;
    for (uint32_t i = 0; i < count; i++) {
        words[i] = stock[page + i] ? stock_word(page + i) : PV_HOME_ZERO;
        any = any || stock[page + i];
    }
    return any ? PV_BLOCK_UNITS : 0;
}

static int stock_fetch(void *self, uint64_t page, uint32_t count, const uint64_t *words, uint8_t *to)
{
    (void)self;
    int error = failing(FETCH, NULL);
    for (uint32_t i = 0; i < count; i++) {
        if (words[i] >> PV_PAGE_LOCATOR_SHIFT != page + i)
            abort();
        for (uint32_t j = 0; j < 512; j++)
            ((uint64_t *)to)[i * 512 + j] = error ? 0xbad : stock[page + i];
    }
    return -error;
}

/* Four neighbours, and their neighbours in the next block: those of them that are kept. */
static int stock_gather(void *self, uint64_t page, uint64_t word, struct pv_unit *unit)
{
    (void)self;
    (void)word;
    int error = failing(FETCH, NULL);
    uint64_t first = page % PV_BLOCK_PAGES / 4 * 4, odd = page / PV_BLOCK_PAGES / 2 * 2;
    unit->count = 0;
    for (uint64_t i = 0; !error && i < 8; i++) {
        uint64_t each = (odd + i / 4) * PV_BLOCK_PAGES + first + i % 4;
        if (each >= stocked || !stock[each])
            continue;
        unit->pages[unit->count] = each;
        unit->words[unit->count++] = stock_word(each);
    }
    return -error;
}

static int stock_read(void *self, const struct pv_unit *unit, const uint8_t **bytes)
{
    static __thread uint64_t room[8 * 512];
    (void)self;
    int error = failing(FETCH, NULL);
    for (uint32_t i = 0; i < unit->count; i++)
        for (uint32_t j = 0; j < 512; j++)
            room[i * 512 + j] = error ? 0xbad : stock[unit->pages[i]];
    *bytes = (uint8_t *)room;
    return -error;
}

/* What pages hold that are in the home PEER. */
void fake_stock(struct pv_engine *engine, const uint64_t *values)
{
    memcpy(stock, values, engine->pages * sizeof(*values));
    stocked = engine->pages;
}

/* Of fresh RAM: what its pages hold, and how much comes with a touch. */
int fake_source(struct pv_engine *engine, const uint64_t *values, uint32_t unit)
{
    static const struct pv_home source = {
        .fetch = stock_fetch, .find = stock_find, .gather = stock_gather, .read = stock_read};
    fake_stock(engine, values);
    pv_engine_home(engine, PV_HOME_PEER, &source);
    pv_engine_unit(engine, unit);
    return pv_engine_assign_all(engine, PV_HOME_PEER);
}

/* ---- a snapshot: what a live save gives ---- */

static uint64_t packed[MOST];
static uint8_t given[MOST];
static int gate, waiting; /* may the drain thread go on; does it wait for that */

int pv_pack_add(struct pv_pack *pack, uint64_t page, uint64_t count, const uint8_t *from)
{
    (void)pack;
    __atomic_store_n(&waiting, 1, __ATOMIC_RELEASE);
    while (!__atomic_load_n(&gate, __ATOMIC_ACQUIRE))
        sched_yield();
    int error = failing(WRITE, NULL);
    for (uint64_t i = 0; !error && i < count; i++) {
        if (given[page + i])
            abort(); /* twice */
        given[page + i] = 1;
        packed[page + i] = value_at(from + i * PV_PAGE);
    }
    return -error;
}

/* The instant: returns once the drain thread stands at its gate, or has nothing to do. */
int fake_freeze(struct pv_engine *engine, int python_homes)
{
    gate = waiting = 0;
    memset(packed, 0, sizeof(packed));
    memset(given, 0, sizeof(given));
    int error = pv_live_freeze(engine, python_homes);
    while (__atomic_load_n(&engine->live.mode, __ATOMIC_ACQUIRE) == PV_LIVE_SAVING &&
           !__atomic_load_n(&waiting, __ATOMIC_ACQUIRE))
        sched_yield();
    return error;
}

/* Opens the gate and waits until all is saved, or something failed: the mode. */
int fake_drain(struct pv_engine *engine, struct pv_live_progress *told)
{
    int mode;
    __atomic_store_n(&gate, 1, __ATOMIC_RELEASE);
    while ((mode = pv_live_wait(engine, 1000, told)) == PV_LIVE_SAVING)
        ;
    return mode;
}

/* Of each page, what the snapshot has. */
void fake_packed(struct pv_engine *engine, uint64_t *values) { memcpy(values, packed, engine->pages * sizeof(*values)); }

/* ---- beginning and end ---- */

static const struct pv_home home = {.fetch = shelf_fetch, .store = shelf_store, .forget = shelf_forget};

struct pv_engine *fake_open(uint64_t pages, uint64_t small_blocks, uint32_t how)
{
    void *ram;
    struct pv_engine *engine;
    int pair[2];
    fake_clear();
    memset(areas, 0, sizeof(areas));
    memset(shelf, 0, sizeof(shelf));
    unlifted = false;
    pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0 || pv_map(pages * PV_PAGE, PV_BACKING_THP, &ram) ||
        pv_engine_open(ram, pages * PV_PAGE, small_blocks, &engine) ||
        socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) ||
        pv_engine_equip(engine, pair[0], open("/dev/null", O_RDONLY | O_CLOEXEC), how))
        abort();
    engine->scans = scans;
    sender = pair[1];
    areas[0].start = engine->ram;
    areas[1].start = engine->aside;
    areas[0].pages = areas[1].pages = pages;
    areas[2].start = engine->staging;
    areas[2].pages = SLOTS * PV_BLOCK_PAGES;
    pv_engine_home(engine, PV_HOME_SWAP, &home);
    return engine;
}

void fake_close(struct pv_engine *engine)
{
    uint8_t *ram = engine->ram;
    uint64_t size = engine->size;
    pv_engine_close(engine);
    (void)!pv_unmap(ram, size);
    close(sender);
    close(pagemap);
}

/* ---- the guest ---- */

static uint64_t faults(struct pv_engine *engine) { return __atomic_load_n(&engine->stats.faults, __ATOMIC_ACQUIRE); }

static void post(struct pv_engine *engine, uint64_t page, uint64_t flags)
{
    struct uffd_msg message = {.event = UFFD_EVENT_PAGEFAULT};
    message.arg.pagefault.flags = flags;
    message.arg.pagefault.address = (uintptr_t)ram_at(engine, page);
    uint64_t before = faults(engine);
    if (write(sender, &message, sizeof(message)) != sizeof(message))
        abort();
    while (faults(engine) == before)
        sched_yield();
    for (uint64_t block = 0; block < engine->blocks; block++) { /* acquire: all that the thread did under these is seen */
        block_lock_plain(engine, block);
        block_unlock(engine, block);
    }
}

/* A fault whose range has been unregistered meanwhile: is its thread woken? */
int fake_late_fault(struct pv_engine *engine, uint64_t page, int written)
{
    woken = 0;
    post(engine, page, written ? UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP : 0);
    return woken == (uintptr_t)ram_at(engine, page);
}

/* Touches a page as a guest does: 0 once it may, -1 where the engine could not bring it. */
static int touch(struct pv_engine *engine, uint64_t page, bool written)
{
    for (int tries = 0; tries < 3; tries++) {
        uint64_t flags = written ? UFFD_PAGEFAULT_FLAG_WRITE : 0;
        pv_engine_retry(engine); /* as resume() does: a page that failed is not fetched again before */
        if (areas[0].modes[page] && !there(ram_at(engine, page)))
            post(engine, page, flags);
        else if (written && areas[0].wp[page])
            post(engine, page, flags | UFFD_PAGEFAULT_FLAG_WP);
        else
            return 0;
    }
    return -1;
}

int guest_write(struct pv_engine *engine, uint64_t page, uint64_t value)
{
    if (touch(engine, page, true))
        return -1;
    uint64_t *words = (uint64_t *)ram_at(engine, page);
    for (uint32_t i = 0; i < 512; i++)
        words[i] = word_of(value, i);
    areas[0].shared[page] = areas[0].merged[page] = 0;
    return 0;
}

/* What the guest sees; UINT64_MAX: torn; UINT64_MAX - 1: it cannot be brought. */
uint64_t guest_read(struct pv_engine *engine, uint64_t page)
{
    for (int tries = 0; tries < 3 && !touch(engine, page, false); tries++) {
        block_lock_plain(engine, page / PV_BLOCK_PAGES); /* another thread's fault may take it out again just now */
        bool here = !areas[0].modes[page] || there(ram_at(engine, page));
        uint64_t value = value_at(ram_at(engine, page));
        block_unlock(engine, page / PV_BLOCK_PAGES);
        if (here)
            return value;
    }
    return UINT64_MAX - 1;
}

/* ---- the judgement: where is each page's one copy, and what is in it? ---- */

void fake_values(struct pv_engine *engine, uint64_t *values)
{
    static uint64_t in_ram[MOST], in_aside[MOST];
    entries(in_ram, &areas[0]);
    entries(in_aside, &areas[1]);
    for (uint64_t page = 0; page < engine->pages; page++) {
        uint64_t word = engine->page_words[page];
        if (engine->block_words[page / PV_BLOCK_PAGES] & PV_BLOCK_PENDING)
            word = stock[page] ? stock_word(page) : PV_HOME_ZERO;
        switch (word & PV_PAGE_HOME) {
        case PV_HOME_PRESENT:
            values[page] = in_ram[page] ? value_at(ram_at(engine, page)) : 0;
            break;
        case PV_HOME_ASIDE:
            values[page] = in_aside[page] ? value_at(aside_at(engine, page)) : UINT64_MAX - 2;
            break;
        case PV_HOME_SWAP:
            values[page] = elsewhere ? elsewhere(word) : shelf[word >> PV_PAGE_LOCATOR_SHIFT] - 1;
            break;
        case PV_HOME_PEER:
            values[page] = stock[word >> PV_PAGE_LOCATOR_SHIFT];
            break;
        default:
            values[page] = 0;
        }
    }
}

#define MUST(condition, ...)                                                                                           \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return snprintf(text, size, __VA_ARGS__);                                                                  \
    } while (0)

/* What does not balance: the length of a text, 0 for nothing. users: of the span, besides pages away; pins: in all. */
int fake_check(struct pv_engine *engine, uint64_t users, uint64_t pins, char *text, size_t size)
{
    static uint64_t ram[MOST], aside[MOST], staging[MOST];
    uint64_t homes[PV_HOMES] = {0}, away = 0, pinned = 0, kept = 0, watched = 0;
    entries(ram, &areas[0]);
    entries(aside, &areas[1]);
    entries(staging, &areas[2]);
    for (uint64_t page = 0; page < engine->pages; page++) {
        uint32_t own = page_home(engine, page);
        homes[own]++;
        away += own != PV_HOME_PRESENT;
        MUST(own == PV_HOME_PRESENT || !ram[page], "page %lu is away (%u) and in the guest", page, own);
        bool sampled = engine->block_words[page / PV_BLOCK_PAGES] & PV_BLOCK_SAMPLED; /* its pages are copies */
        MUST((own == PV_HOME_ASIDE || sampled) == !!aside[page], "page %lu has home %u, and the aside area %d", page, own,
             !!aside[page]);
        /* OPEN, ARMED, SAVED: 0, 1, 2 */
        uint8_t state = engine->live.states ? engine->live.states[page / PV_BLOCK_PAGES] : 0;
        MUST(engine->trace.on || !areas[0].wp[page] || state == 1 || unlifted, "page %lu is still protected",
             page);
        MUST(engine->live.mode != PV_LIVE_SAVING || state == 2 || !ram[page] || areas[0].wp[page],
             "page %lu is not saved yet and can be written", page);
    }
    for (uint64_t locator = 0; locator < MOST; locator++)
        kept += shelf[locator] != 0;
    MUST(elsewhere || kept == homes[PV_HOME_SWAP], "the shelf has %lu pages, of %lu", kept, homes[PV_HOME_SWAP]);
    for (uint32_t own = PV_HOME_ZERO; own < PV_HOMES; own++)
        MUST(homes[own] == engine->home_counts[own], "home %u: %lu pages, counted %lu", own, homes[own],
             (unsigned long)engine->home_counts[own]);
    for (uint64_t block = 0; block < engine->blocks; block++) {
        uint64_t word = engine->block_words[block];
        uint32_t gone = 0;
        for (uint32_t i = 0; i < pages_of_block(engine, block); i++)
            gone += page_home(engine, block * PV_BLOCK_PAGES + i) != PV_HOME_PRESENT;
        MUST(block_away(engine, block) == gone, "block %lu: %u away, noted %u", block, gone, block_away(engine, block));
        MUST(!(word & (PV_BLOCK_LOCKED | PV_BLOCK_WAITED)), "block %lu is locked", block);
        MUST(gone || !(word & (PV_BLOCK_UNITS | PV_BLOCK_TOUCHED)), "block %lu has units, and all of it is there", block);
        users += (word & PV_BLOCK_PENDING) != 0;
        watched += word & PV_BLOCK_SAMPLED ? gone : 0;
        MUST(!(word & PV_BLOCK_SAMPLED) || !(word & PV_BLOCK_ASIDE_LARGE), "block %lu is sampled, and aside", block);
        MUST(!(word & PV_BLOCK_SAMPLED) || !block_pins(engine, block), "block %lu is sampled, and pinned", block);
        MUST(!(word & PV_BLOCK_SAMPLED) || engine->samples[block].told.touched == PV_BLOCK_PAGES - gone,
             "block %lu: %u touched, %u away", block, engine->samples[block].told.touched, gone);
        MUST(!(word & PV_BLOCK_ASIDE_LARGE) || gone == PV_BLOCK_PAGES, "block %lu: aside as a whole, %u", block, gone);
        pinned += block_pins(engine, block);
    }
    MUST(engine->sampling.aside == watched, "%lu pages aside to be sampled, counted %lu", watched,
         (unsigned long)engine->sampling.aside);
    MUST(pinned == pins, "%lu pins, not %lu", pinned, pins);
    MUST(!engine->slots_taken, "staging slots %#x are taken", engine->slots_taken);
    struct span *span = &engine->spans[0];
    MUST(span->users == away + users, "the span has %lu users, not %lu away + %lu", span->users, away, users);
    MUST(!span->users || span->modes, "pages are away, and the span is not registered");
    for (uint64_t page = 0; page < engine->pages; page++)
        MUST(!away || page_home(engine, page) == PV_HOME_PRESENT || areas[0].modes[page],
             "page %lu is away, and its faults are not reported", page);
    for (uint64_t page = 0; page < SLOTS * PV_BLOCK_PAGES; page++)
        MUST(!staging[page], "staging page %lu holds something", page);
    return 0;
}

/* Is anything registered? */
int fake_armed(void)
{
    for (uint64_t page = 0; page < areas[0].pages; page++)
        if (areas[0].modes[page])
            return 1;
    return 0;
}

uint32_t fake_block_flags(struct pv_engine *engine, uint64_t block) { return (uint32_t)engine->block_words[block]; }
