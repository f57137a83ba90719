/* classes.c: a kernel with a heap and a page cache, as far as a balloon can tell: of each class of pages it has a set
 * share, uses its memory, gives up what it can best spare when the balloon inflates, and tells truly what it has.
 * pyvmm/testing/classes_model.py knows the same.
 *
 * The table, in blocks of its own in front of the region, has two words a page of the region: what = kind << 28 | id, and
 * the version of its content:
 *
 *     word j = base + j * GOLDEN with base = mix(mix(mix(seed) + (group << 32 | id) * GOLDEN) + version)
 *
 * for the groups fixed (kind FIXED), heap (HEAP) and file (CLEAN, DIRTY). Pages that are FREE or GIVEN may have anything.
 * Files are as long as the cache is at first. A clean page can be dropped, and is made from its stamp when it is "read
 * again", which is counted: a refault. The first hot= percent of heap and files are touched nine times in ten, and count
 * as active; so do dirty pages.
 *
 * It gives up free pages first, whole blocks where it can, then clean ones that are not active, then dirty ones it has
 * written out, and active clean ones last; never heap. When it needs a page and has none, it drops one, or takes some
 * back from the balloon (oom=1).
 *
 * What the host may rely on, at whatever instruction it is stopped, once it is running: each page is as the table says,
 * but for page work[0].index, of which each word may be of the next version. detail: refaults; pass: times that the
 * balloon was changed. */
#include "lib/balloon.h"
#include "lib/stamp.h"

GUEST("classes", "a heap and a page cache, which give up memory by a balloon and tell what they use",
      "heap=PERCENT of the memory (default 25)\n"
      "cache=PERCENT of the memory (default 40)\n"
      "fixed=PERCENT of the memory can never be given up (default 5); the rest is free\n"
      "dirty=PERCENT of the cache, at most (default 10)\n"
      "hot=PERCENT of heap and cache are active (default 25)\n"
      "grow=PERCENT of the memory: the heap grows by that, and shrinks again, over and over (default 0)\n"
      "oom=1 takes pages back when it has none left (default 1)\n"
      "report=1 reports free blocks (default 0)\n"
      "standard=1 tells what a stock Linux would (default 0)\n"
      "touches=N then all pages are checked, and the end (default 0 = for ever)\n"
      "seed=N of all that is random (default 1)\n"
      "size=SIZE bytes of memory from 2 MiB on (default all)\n");

#define VECTOR 0x41
#define A_BLOCK 512u
#define GROUP_FIXED 1ul
#define GROUP_HEAP 2ul
#define GROUP_FILE 3ul
#define ROOM 64u          /* free pages that it keeps, where it can */
#define LOOK_EVERY 16u    /* touches from one look at the balloon to the next */
#define QUIET 4000u       /* touches after it was short of memory, in which the balloon does not inflate */
#define GROW_EVERY 8000u  /* touches from one size of the heap to the other */

typedef uint64_t __attribute__((may_alias)) whole_entry;
enum { FREE, FIXED, HEAP, CLEAN, DIRTY, GIVEN };

static struct region region;
static struct entry {
    uint32_t what, version;
} *table;
static struct file {
    uint32_t page, version; /* page + 1; 0: it is not in memory */
} *files;
static uint32_t *heap, *given; /* pages; given: a stack */
static uint8_t *reported;      /* by block */
static uint32_t pages, heap_base, heap_count, heap_most, file_count, fixed_count, given_count, free_count, dirty_count;
static uint32_t dirty_most, hot, first_frame, target, scan;
static uint64_t mixed_seed, state, now, quiet_until;
static bool standard;

static uint32_t kind_of(uint32_t page) { return table[page].what >> 28; }
static uint32_t id_of(uint32_t page) { return table[page].what & 0xfffffff; }
static uint64_t *bytes_of(uint32_t page) { return region_page(&region, first_frame + page); }
static uint32_t frame_of(uint32_t page) { return (uint32_t)((uint64_t)bytes_of(page) / PAGE_SIZE); }

static struct content content_of(uint32_t kind, uint32_t id, uint32_t version)
{
    uint64_t group = kind == FIXED ? GROUP_FIXED : kind == HEAP ? GROUP_HEAP : GROUP_FILE;
    return content_from(mix(mix(mixed_seed + (group << 32 | id) * GOLDEN) + version));
}

static bool is_hot(uint32_t kind, uint32_t id)
{
    uint64_t all = kind == HEAP ? heap_base : file_count;
    return id < all * hot / 100;
}

/* The counts follow from the kinds; the compiler keeps the order of stores to what the host may look at. */
static void set(uint32_t page, uint32_t kind, uint32_t id, uint32_t version)
{
    uint32_t before = kind_of(page);
    free_count += (kind == FREE) - (before == FREE);
    dirty_count += (kind == DIRTY) - (before == DIRTY);
    given_count += (kind == GIVEN) - (before == GIVEN);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    __atomic_store_n((whole_entry *)&table[page], (uint64_t)version << 32 | kind << 28 | id, __ATOMIC_RELEASE);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static void check(uint32_t page)
{
    struct content right = content_of(kind_of(page), id_of(page), table[page].version);
    if (same(bytes_of(page), right))
        return;
    tell_wrong(page, bytes_of(page), right);
    print(", kind ");
    print_number(kind_of(page));
    print("\n");
    leave(1);
}

/* ---- memory: found, and given up ---- */
static bool is_spare(uint32_t page, bool active)
{
    return kind_of(page) == CLEAN && (active || !is_hot(CLEAN, id_of(page)));
}

static void evict(uint32_t page)
{
    files[id_of(page)].page = 0;
    set(page, FREE, 0, 0);
}

/* Dirty pages are as good as written: what was lost can be made from its stamp. */
static void clean(uint32_t page) { set(page, CLEAN, id_of(page), table[page].version); }

/* From where the last search ended. pages: there is none. */
static uint32_t find(bool (*fits)(uint32_t page))
{
    for (uint32_t i = 0; i < pages; i++) {
        scan = scan + 1 < pages ? scan + 1 : 0;
        if (fits(scan))
            return scan;
    }
    return pages;
}
static bool is_free(uint32_t page) { return kind_of(page) == FREE; }
static bool is_inactive(uint32_t page) { return is_spare(page, false); }
static bool is_clean(uint32_t page) { return is_spare(page, true); }
static bool is_dirty(uint32_t page) { return kind_of(page) == DIRTY; }

static void take_back(uint32_t count)
{
    static uint32_t frames[BALLOON_MOST];
    count = count < given_count ? count : given_count;
    count = count < BALLOON_MOST ? count : BALLOON_MOST;
    uint32_t top = given_count;
    for (uint32_t i = 0; i < count; i++)
        frames[i] = frame_of(given[top - 1 - i]);
    balloon_take(frames, count);
    for (uint32_t i = 0; i < count; i++)
        set(given[top - 1 - i], FREE, 0, 0);
    progress->work[0].pass++;
    balloon_actual(given_count);
}

static bool make_room(bool (*fits)(uint32_t page))
{
    uint32_t page = find(fits);
    if (page < pages && is_dirty(page))
        clean(page);
    if (page < pages)
        evict(page);
    return page < pages;
}

static uint32_t find_free(void)
{
    if (!free_count && !make_room(is_inactive)) {
        if (given_count && balloon_has(BALLOON_F_DEFLATE_ON_OOM)) {
            quiet_until = now + QUIET;
            take_back(ROOM);
        } else if (!make_room(is_clean) && !make_room(is_dirty)) {
            print("FAIL: out of memory\n");
            leave(1);
        }
    }
    uint32_t page = find(is_free);
    reported[page / A_BLOCK] = 0;
    return page;
}

static void give(const uint32_t *chosen, uint32_t count)
{
    static uint32_t frames[BALLOON_MOST];
    for (uint32_t i = 0; i < count; i++) {
        frames[i] = frame_of(chosen[i]);
        given[given_count] = chosen[i];
        set(chosen[i], GIVEN, 0, 0); /* from now on it may have anything */
    }
    balloon_give(frames, count);
    progress->work[0].pass++;
    balloon_actual(given_count);
}

/* A block of which all is free, or can be had: it goes whole, as one large page. */
static bool give_block(bool spare)
{
    static uint32_t chosen[A_BLOCK];
    for (uint32_t first = 0; first + A_BLOCK <= pages; first += A_BLOCK) {
        uint32_t i = 0;
        while (i < A_BLOCK && (is_free(first + i) || (spare && is_inactive(first + i))))
            i++;
        if (i < A_BLOCK)
            continue;
        for (i = 0; i < A_BLOCK; i++) {
            chosen[i] = first + i;
            if (!is_free(first + i))
                evict(first + i);
        }
        give(chosen, A_BLOCK);
        return true;
    }
    return false;
}

static bool give_pages(uint32_t most)
{
    static uint32_t chosen[BALLOON_MOST];
    uint32_t count = 0, spare = free_count > ROOM ? free_count - ROOM : 0;
    most = most < spare ? most : spare;
    for (uint32_t page = 0; page < pages && count < most && count < BALLOON_MOST; page++)
        if (is_free(page))
            chosen[count++] = page;
    if (count)
        give(chosen, count);
    return count;
}

static bool drop_pages(uint32_t most, bool (*fits)(uint32_t page))
{
    uint32_t count = 0;
    while (count < most && count < BALLOON_MOST && make_room(fits))
        count++;
    return count;
}

/* One step towards the target; false: it is reached, or nothing can be done. */
static bool balance(void)
{
    if (given_count > target) {
        take_back(given_count - target);
        return true;
    }
    uint32_t left = target - given_count;
    if (!left || now < quiet_until)
        return false;
    if (left >= A_BLOCK && ((free_count >= A_BLOCK + ROOM && give_block(false)) || give_block(true)))
        return true;
    if (give_pages(left))
        return true;
    left += ROOM;
    return drop_pages(left, is_inactive) || drop_pages(left, is_dirty) || drop_pages(left, is_clean);
}

/* ---- what it tells ---- */
static uint8_t class_of_page(uint32_t page)
{
    uint32_t kind = kind_of(page);
    bool active = kind == DIRTY || is_hot(kind, id_of(page));
    switch (kind) {
    case FREE: return CLASS_FREE;
    case FIXED: return CLASS_UNRECLAIMABLE;
    case HEAP: return active ? CLASS_ACTIVE_ANONYMOUS : CLASS_INACTIVE_ANONYMOUS;
    case GIVEN: return CLASS_UNKNOWN;
    default: return active ? CLASS_ACTIVE_BUFFER : CLASS_INACTIVE_BUFFER;
    }
}

static uint8_t class_of(uint32_t frame)
{
    uint64_t low = region.first_gpa / PAGE_SIZE, high = HIGH_RAM / PAGE_SIZE, at;
    if (frame >= high)
        at = region.low_pages + (frame - high);
    else
        at = frame >= low && frame - low < region.low_pages ? frame - low : 0; /* low memory: as the table */
    if (at < first_frame)
        return CLASS_UNRECLAIMABLE;
    return at - first_frame < pages ? class_of_page((uint32_t)(at - first_frame)) : CLASS_UNRECLAIMABLE;
}

static unsigned stats(struct balloon_stat *out)
{
    uint64_t bytes[CLASSES] = {0}, whole = region.pages + BLOCK_SIZE / PAGE_SIZE, used = given_count;
    for (uint32_t page = 0; page < pages; page++)
        if (class_of_page(page) < CLASSES) {
            bytes[class_of_page(page)] += PAGE_SIZE;
            used++;
        }
    bytes[CLASS_UNRECLAIMABLE] += (whole - used) * PAGE_SIZE; /* all that is not of the region */
    uint64_t cached = bytes[CLASS_ACTIVE_BUFFER] + bytes[CLASS_INACTIVE_BUFFER];
    out[0] = (struct balloon_stat){TAG_FREE, bytes[CLASS_FREE]};
    out[1] = (struct balloon_stat){TAG_TOTAL, (whole - given_count) * PAGE_SIZE};
    out[2] = (struct balloon_stat){TAG_AVAILABLE, bytes[CLASS_FREE] + bytes[CLASS_INACTIVE_BUFFER]};
    out[3] = (struct balloon_stat){TAG_CACHES, cached};
    out[4] = (struct balloon_stat){TAG_MAJOR_FAULTS, progress->detail};
    if (standard)
        return 5;
    for (uint16_t i = 0; i < CLASSES; i++)
        out[5 + i] = (struct balloon_stat){(uint16_t)(TAG_CLASS + i), bytes[i]};
    out[5 + CLASSES] = (struct balloon_stat){TAG_REFAULTS, progress->detail};
    return 6 + CLASSES;
}

static void report_free(void)
{
    for (uint32_t block = 0; block < pages / A_BLOCK; block++) {
        uint32_t i = 0;
        while (i < A_BLOCK && is_free(block * A_BLOCK + i))
            i++;
        if (i < A_BLOCK || reported[block])
            continue;
        reported[block] = 1;
        balloon_report(bytes_of(block * A_BLOCK), BLOCK_SIZE);
        return;
    }
}

/* ---- its work ---- */
static void touch(uint32_t page, bool writes)
{
    progress->work[0].index = page;
    __atomic_signal_fence(__ATOMIC_SEQ_CST); /* only now may the page differ from the table */
    check(page);
    progress->work[0].count++;
    if (!writes)
        return;
    uint32_t kind = kind_of(page), id = id_of(page), version = table[page].version + 1;
    fill(bytes_of(page), content_of(kind, id, version));
    if (kind != HEAP) {
        kind = DIRTY;
        files[id].version = version;
    }
    set(page, kind, id, version);
    progress->work[0].writes++;
}

static uint32_t pick(uint32_t count)
{
    uint64_t some = (uint64_t)count * hot / 100;
    return (uint32_t)(some && random_below(&state, 10) ? random_below(&state, some) : random_below(&state, count));
}

static void read_again(uint32_t id)
{
    uint32_t page = find_free();
    fill(bytes_of(page), content_of(CLEAN, id, files[id].version));
    set(page, CLEAN, id, files[id].version);
    files[id].page = page + 1;
    progress->detail++;
}

static void grow(uint32_t wanted)
{
    for (; heap_count < wanted; heap_count++) {
        uint32_t page = find_free();
        fill(bytes_of(page), content_of(HEAP, heap_count, 0));
        set(page, HEAP, heap_count, 0);
        heap[heap_count] = page;
    }
    for (; heap_count > wanted; heap_count--)
        set(heap[heap_count - 1], FREE, 0, 0);
}

static void work(void)
{
    now++;
    bool writes = random_below(&state, 100) < 50;
    if (heap_count && (!file_count || random_below(&state, 2))) {
        touch(heap[pick(heap_count)], writes);
    } else if (file_count) {
        uint32_t id = pick(file_count);
        if (!files[id].page)
            read_again(id);
        touch(files[id].page - 1, writes && dirty_most);
    }
    if (dirty_count > dirty_most) {
        uint32_t page = find(is_dirty);
        clean(page);
    }
    if (now % GROW_EVERY == 0)
        grow(now / GROW_EVERY % 2 ? heap_most : heap_base);
    if (now % LOOK_EVERY)
        return;
    if (balloon_changed())
        target = balloon_target();
    balloon_serve(stats, class_of);
    (void)balance();
    if (balloon_has(BALLOON_F_REPORTING))
        report_free();
}

/* ---- the beginning ---- */
static uint64_t share(const char *name, uint64_t otherwise, uint64_t of) { return of * option_at_most(name, otherwise, 100) / 100; }

static void parse_memory(void)
{
    region = memory_region(BLOCK_SIZE);
    uint64_t all = option_at_most("size", region.pages * PAGE_SIZE, region.pages * PAGE_SIZE) / PAGE_SIZE;
    uint64_t bytes = all * (sizeof(*table) + sizeof(*files) + 2 * sizeof(*heap)) + all / A_BLOCK + 1;
    first_frame = (uint32_t)((bytes + BLOCK_SIZE - 1) / BLOCK_SIZE * A_BLOCK);
    if (all < first_frame + 2 * A_BLOCK || all >= 1ul << 28)
        refuse("the memory is too small (8 MiB are needed) or too large", "");
    if (first_frame > region.low_pages)
        refuse("too much memory: the table does not fit below 3 GiB", "");
    pages = (uint32_t)(all - first_frame);
    table = (struct entry *)region_page(&region, 0);
    files = (struct file *)(table + all);
    heap = (uint32_t *)(files + all);
    given = heap + all;
    reported = (uint8_t *)(given + all);
    memset(table, 0, bytes);
    progress->region_gpa = (uint64_t)bytes_of(0);
    progress->region_size = (uint64_t)pages * PAGE_SIZE;
}

static void parse_shares(void)
{
    fixed_count = (uint32_t)share("fixed", 5, pages);
    heap_base = (uint32_t)share("heap", 25, pages);
    file_count = (uint32_t)share("cache", 40, pages);
    heap_most = heap_base + (uint32_t)share("grow", 0, pages);
    dirty_most = (uint32_t)share("dirty", 10, file_count);
    hot = (uint32_t)option_at_most("hot", 25, 100);
    standard = option_number("standard", 0);
    if ((uint64_t)fixed_count + heap_most + file_count > pages)
        refuse("fixed=, heap=, cache= and grow= are more than 100", "");
}

static void fill_all(void)
{
    uint32_t page = 0;
    free_count = pages;
    for (uint32_t i = 0; i < fixed_count; i++, page++) {
        fill(bytes_of(page), content_of(FIXED, i, 0));
        set(page, FIXED, i, 0);
    }
    for (uint32_t i = 0; i < heap_base; i++, page++) {
        fill(bytes_of(page), content_of(HEAP, i, 0));
        set(page, HEAP, i, 0);
        heap[i] = page;
    }
    heap_count = heap_base;
    for (uint32_t i = 0; i < file_count; i++, page++) {
        fill(bytes_of(page), content_of(CLEAN, i, 0));
        set(page, CLEAN, i, 0);
        files[i].page = page + 1;
    }
}

int guest_main(void)
{
    uint64_t features = BALLOON_F_MUST_TELL_HOST | BALLOON_F_STATS | BALLOON_F_CLASSES;
    features |= option_number("oom", 1) ? BALLOON_F_DEFLATE_ON_OOM : 0;
    features |= option_number("report", 0) ? BALLOON_F_REPORTING : 0;
    uint64_t touches = option_number("touches", 0);
    progress->seed = option_number("seed", 1);
    mixed_seed = mix(progress->seed);
    state = mixed_seed;
    parse_memory();
    parse_shares();
    irq_init();
    if (!balloon_begin(features, VECTOR))
        refuse("there is no balloon: give the VM one", "");
    fill_all();
    target = balloon_target();
    progress->cpus = 1;
    progress->status = PV_STATUS_RUNNING;
    print("classes: ");
    print_number(pages);
    print(" pages\n");
    while (touches == 0 || now < touches)
        work();
    for (uint32_t page = 0; page < pages; page++)
        if (kind_of(page) != FREE && kind_of(page) != GIVEN)
            check(page);
    print("SUCCESS: ");
    print_number(progress->work[0].count);
    print(" touches, ");
    print_number(progress->detail);
    print(" pages read again\n");
    return 0;
}
