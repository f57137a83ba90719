/* hotcold.c: touches few blocks of 2 MiB, and of these few small pages, while all others are left alone, and goes on to
 * other blocks from phase to phase: what finds working sets, and what reclaims the rest, is judged by that.
 * pyvmm/testing/hotcold_model.py knows the same: what is hot in a phase, and what each page must be like.
 *
 * Of B blocks H = max(1, B * hot= / 100) are hot. S = H * shift= / 100 of these go, and as many others come, from phase
 * to phase:
 *
 *     hot in phase n   shuffled((n * S + i) % B) for i < H, of B by the key mix(mix(seed))
 *     pages of block b shuffled(i) for i < pages=, of 512 by the key mix(mix(seed) + (b + 1) * GOLDEN): what is touched
 *                      of it while it is hot. All 512 are there, in that order; with i % cpus == c it is CPU c's.
 *
 * A touch checks a page, and unless it is one that reads stamps it with its next version. stray= of the touches go to
 * any page of any block. The versions are in a table, four bytes a page, in blocks of its own in front of the region.
 *
 *     word j = base + j * GOLDEN with base = mix(mix(mix(seed) + p * GOLDEN) + version)
 *
 * What the host may rely on, at whatever instruction a CPU is stopped, once the guest is running: work[cpu].pass is the
 * phase that its touches are of; it changes before the first touch of a phase. Each page has the version that the table
 * says, but for page work[cpu].index, of which each 8-byte word may be of the next one. CPU 0 begins a phase, the others
 * follow when they touch next. count = touches, writes = of these writes; both follow later, and are for people. */
#include "lib/stamp.h"

GUEST("hotcold", "touches known hot blocks of 2 MiB, others from phase to phase",
      "hot=PERCENT of the blocks are hot (default 25)\n"
      "pages=N small pages of a hot block are touched, of 512 (default 64)\n"
      "shift=PERCENT of the hot blocks turn cold with each phase (default 100)\n"
      "touches=N of CPU 0 make a phase (default 100000)\n"
      "ms=N make a phase, of the time that the guest ran, and not touches\n"
      "phases=N then all pages are checked, and the end (default 0 = for ever)\n"
      "read=PERCENT of the touches only read (default 50)\n"
      "stray=PERMILLE of the touches go to any page of any block (default 0)\n"
      "seed=N of all that is random (default 1)\n"
      "size=SIZE bytes of memory from 2 MiB on (default all)\n");

#define PAGES_A_BLOCK (BLOCK_SIZE / PAGE_SIZE)

static struct region region;
static uint32_t *versions;
static uint64_t first_page; /* of the region: the table lies in front */
static uint64_t blocks, hot, shift, hot_pages, reads, stray, mixed_seed;
static uint64_t touches, ms, phases;
static unsigned cpus;
static struct shuffle block_order;
static uint64_t phase; /* CPU 0 alone writes it */

static uint64_t *bytes_of(uint64_t page) { return region_page(&region, first_page + page); }

static struct content content_of(uint64_t page, uint64_t version)
{
    return content_from(mix(mix(mixed_seed + page * GOLDEN) + version));
}

/* Page `place` of a block, in the order in which its pages are touched. */
static uint64_t page_at(uint64_t block, uint64_t place)
{
    struct shuffle order = shuffle_of(PAGES_A_BLOCK, mix(mixed_seed + (block + 1) * GOLDEN));
    return block * PAGES_A_BLOCK + shuffled(&order, place);
}

/* How many of the first `limit` places of a block are this CPU's. */
static uint64_t share_of(unsigned cpu, uint64_t limit) { return (limit - cpu + cpus - 1) / cpus; }

static void stamp_all(unsigned cpu)
{
    for (uint64_t block = 0; block < blocks; block++)
        for (uint64_t place = cpu; place < PAGES_A_BLOCK; place += cpus) {
            uint64_t page = page_at(block, place);
            versions[page] = 0;
            fill(bytes_of(page), content_of(page, 0));
        }
}

static void check(uint64_t page)
{
    struct content right = content_of(page, versions[page]);
    if (same(bytes_of(page), right))
        return;
    tell_wrong(page, bytes_of(page), right);
    print(", version ");
    print_number(versions[page]);
    print(" expected\n");
    leave(1);
}

static void check_all(unsigned cpu)
{
    for (uint64_t block = 0; block < blocks; block++)
        for (uint64_t place = cpu; place < PAGES_A_BLOCK; place += cpus)
            check(page_at(block, place));
}

/* ---- the work ---- */
static uint64_t next_page(unsigned cpu, uint64_t now, uint64_t *state)
{
    bool strays = random_below(state, 1000) < stray;
    uint64_t block = random_below(state, strays ? blocks : hot);
    if (!strays)
        block = shuffled(&block_order, (now * shift + block) % blocks);
    return page_at(block, cpu + cpus * random_below(state, share_of(cpu, strays ? PAGES_A_BLOCK : hot_pages)));
}

static void touch(unsigned cpu, uint64_t page, bool writes)
{
    volatile struct pv_work *own = &progress->work[cpu];
    __atomic_signal_fence(__ATOMIC_SEQ_CST); /* the table has the page before; the CPU itself keeps stores in order */
    own->index = page;
    __atomic_signal_fence(__ATOMIC_SEQ_CST); /* only now may the page differ from the table */
    check(page);
    if (writes) {
        fill(bytes_of(page), content_of(page, versions[page] + 1));
        __atomic_store_n(&versions[page], versions[page] + 1, __ATOMIC_RELEASE); /* after the last word of the page */
    }
    own->count = own->count + 1;
    own->writes = own->writes + writes;
}

/* CPU 0 alone: is the phase over? */
static bool over(struct patience *time, uint64_t done)
{
    return ms ? !patience_left(time) : done == touches;
}

static void work(unsigned cpu)
{
    uint64_t state = mix(mixed_seed + ~(uint64_t)cpu), done = 0;
    struct patience time = patience_ms(ms);
    for (;;) {
        if (cpu == 0 && over(&time, done)) {
            done = 0;
            time = patience_ms(ms);
            __atomic_store_n(&phase, phase + 1, __ATOMIC_RELEASE);
        }
        uint64_t now = __atomic_load_n(&phase, __ATOMIC_ACQUIRE);
        if (phases && now == phases)
            return;
        progress->work[cpu].pass = now;
        uint64_t page = next_page(cpu, now, &state);
        touch(cpu, page, random_below(&state, 100) >= reads);
        done++;
    }
}

/* ---- options ---- */
static void parse_memory(void)
{
    region = memory_region(BLOCK_SIZE);
    uint64_t all = region.pages * PAGE_SIZE / BLOCK_SIZE;
    uint64_t most = option_at_most("size", all * BLOCK_SIZE, all * BLOCK_SIZE) / BLOCK_SIZE;
    uint64_t table = (most * PAGES_A_BLOCK * sizeof(*versions) + BLOCK_SIZE - 1) / BLOCK_SIZE;
    if (most < table + 1 || most == 0)
        refuse("too little memory: 6 MiB are needed", "");
    if (table * PAGES_A_BLOCK > region.low_pages)
        refuse("too much memory: the table of versions does not fit below 3 GiB", "");
    versions = (uint32_t *)region_page(&region, 0);
    blocks = most - table;
    first_page = table * PAGES_A_BLOCK;
    progress->region_gpa = (uint64_t)bytes_of(0);
    progress->region_size = blocks * BLOCK_SIZE;
}

static void parse_options(void)
{
    progress->seed = option_number("seed", 1);
    mixed_seed = mix(progress->seed);
    hot = blocks * option_at_most("hot", 25, 100) / 100;
    hot = hot ? hot : 1;
    shift = hot * option_at_most("shift", 100, 100) / 100;
    hot_pages = option_at_most("pages", 64, PAGES_A_BLOCK);
    reads = option_at_most("read", 50, 100);
    stray = option_at_most("stray", 0, 1000);
    touches = option_number("touches", 100000);
    ms = option_at_most("ms", 0, 1ul << 32);
    phases = option_number("phases", 0);
    if (hot_pages < cpus)
        refuse("pages= is less than there are CPUs: ", option("pages", "64"));
    if (touches == 0)
        refuse("touches= is 0", "");
    block_order = shuffle_of(blocks, mix(mixed_seed));
}

int guest_main(void)
{
    cpus = cpu_count();
    parse_memory();
    parse_options();
    ticks_per_ms(); /* asked of the hypervisor once, before all CPUs do */
    on_all_cpus(cpus, stamp_all);
    progress->cpus = cpus;
    progress->status = PV_STATUS_RUNNING;
    print("hotcold: ");
    print_number(blocks);
    print(" blocks, ");
    print_number(hot);
    print(" hot\n");
    on_all_cpus(cpus, work);
    on_all_cpus(cpus, check_all);

    uint64_t count = 0, written = 0;
    for (unsigned cpu = 0; cpu < cpus; cpu++) {
        count += progress->work[cpu].count;
        written += progress->work[cpu].writes;
    }
    print("SUCCESS: ");
    print_number(count);
    print(" touches, ");
    print_number(written);
    print(" writes in ");
    print_number(phase);
    print(phase == 1 ? " phase\n" : " phases\n");
    return 0;
}
