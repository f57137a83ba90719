/* touch.c: writes (or reads) one 8-byte word here, one there, by a pattern and at a rate: what working sets, dirty rates
 * and hot pages are made of. The region is cut into slots of stride= bytes; a touch is one access to a slot's start.
 * Touch k of a CPU writes (seed + k) * GOLDEN ^ gpa. CPU c of T has the slots c, c + T, ... in pattern=sequential, and
 * any slot in the others; there, a pass means no more than as many touches.
 *
 * Progress: work[cpu].count = touches, writes = of these writes, pass = passes completed, index = touches since; with
 * gaps=1 longest_gap = the longest time between two touches, in which the pace of rate= is contained. */
#include "lib/lib.h"

GUEST("touch", "writes or reads memory by a pattern, at a rate",
      "pattern=PATTERN sequential (default), uniform, zipf (the r-th hottest slot gets 1/r), or hotset\n"
      "hot=PERCENT of the slots are hot in hotset (default 10)\n"
      "heat=PERCENT of the touches go to hot slots (default 90)\n"
      "scatter=0 hot slots lie side by side (default 1: all over the region)\n"
      "start=OFFSET bytes behind 2 MiB where the region starts (default 0)\n"
      "size=SIZE bytes in the region (default all)\n"
      "stride=BYTES from slot to slot, a multiple of 8 (default 4096)\n"
      "rate=N touches per ms and CPU (default 0 = as fast as it can)\n"
      "threads=N CPUs that take part (default all)\n"
      "seed=N of the order and of what is written (default 1)\n"
      "passes=N times the slots' number of touches, then the end (default 0 = for ever)\n"
      "touches=N of all CPUs together, then the end (default 0 = for ever)\n"
      "read=1 read, do not write (default 0)\n"
      "gaps=1 keep the longest time between two touches of a CPU, for the host (default 0)\n"
      "wait=1 wait for a byte on the serial port before the first touch (default 0)\n");

#define BURSTS_A_MS 100 /* pacing looks at the clock no more often */

#define UART_RBR PV_PORT_SERIAL
#define UART_IER (PV_PORT_SERIAL + 1)
#define UART_LSR (PV_PORT_SERIAL + 5)
#define IER_RDI 1
#define LSR_DATA_READY 1

static enum { SEQUENTIAL, UNIFORM, ZIPF, HOTSET } pattern;
static struct region region;
static struct shuffle scattering;
static uint64_t start, slots, stride, seed, rate, passes, touches;
static uint64_t hot_slots, heat, tsc_per_ms;
static unsigned threads;
static bool reads, scatters, keeps_gaps;

static uint64_t slot_gpa(uint64_t slot)
{
    uint64_t offset = start + slot * stride;
    return (uint64_t)region_page(&region, offset / PAGE_SIZE) + offset % PAGE_SIZE;
}

static uint64_t share_of(unsigned cpu) { return (slots - cpu + threads - 1) / threads; }

static uint64_t limit_of(unsigned cpu)
{
    return touches ? touches / threads + (cpu < touches % threads) : passes * share_of(cpu);
}

/* ---- which slot ---- */
/* Ranks 2^b - 1 .. 2^(b + 1) - 2 are as likely together for each b: the density falls as 1 / rank, in steps. */
static uint64_t zipf_rank(uint64_t *state)
{
    unsigned bits = 64 - (unsigned)__builtin_clzl(slots);
    for (;;) {
        uint64_t width = 1ul << random_below(state, bits), rank = width - 1 + random_below(state, width);
        if (rank < slots)
            return rank;
    }
}

static uint64_t hotset_rank(uint64_t *state)
{
    if (hot_slots == slots || random_below(state, 100) < heat)
        return random_below(state, hot_slots);
    return hot_slots + random_below(state, slots - hot_slots);
}

static uint64_t random_slot(uint64_t *state)
{
    if (pattern == UNIFORM)
        return random_below(state, slots);
    uint64_t rank = pattern == ZIPF ? zipf_rank(state) : hotset_rank(state);
    return scatters ? shuffled(&scattering, rank) : rank;
}

/* ---- the work ---- */
static uint64_t value_of(uint64_t touch, uint64_t gpa) { return (seed + touch) * GOLDEN ^ gpa; }

struct pace {
    uint64_t burst, left; /* touches */
    uint64_t step, due;   /* TSC ticks: a burst's length, when the next may start */
};

static struct pace pace_start(void)
{
    uint64_t burst = rate / BURSTS_A_MS + 1;
    return (struct pace){.burst = burst, .left = burst, .step = burst * tsc_per_ms / rate, .due = ticks()};
}

/* After each touch. What the guest missed while it was paused is not caught up. */
static void pace(struct pace *pace)
{
    if (--pace->left)
        return;
    pace->left = pace->burst;
    pace->due += pace->step;
    int64_t early;
    while ((early = (int64_t)(pace->due - ticks())) > 0 && early <= 2 * (int64_t)pace->step)
        __builtin_ia32_pause();
    if (early < -10 * (int64_t)tsc_per_ms || early > 0) /* far behind, or the TSC was set back */
        pace->due = ticks();
}

/* After each touch, with the time of the one before. The host may set longest_gap back at any time. */
static uint64_t note_gap(volatile struct pv_work *own, uint64_t last)
{
    uint64_t now = ticks(), gap = now - last;
    if (gap > own->longest_gap && now > last) /* a TSC that was set back is no gap */
        own->longest_gap = gap;
    return now;
}

static void work(unsigned cpu)
{
    volatile struct pv_work *own = &progress->work[cpu];
    uint64_t share = share_of(cpu), limit = limit_of(cpu), index = 0, slot = cpu;
    uint64_t state = mix(mix(seed) + cpu);
    bool endless = passes == 0 && touches == 0;
    struct pace clock = {0};
    if (rate)
        clock = pace_start();
    uint64_t last = ticks();
    for (uint64_t touch = 0; endless || touch < limit; touch++) {
        uint64_t gpa = slot_gpa(pattern == SEQUENTIAL ? slot : random_slot(&state));
        if (reads)
            (void)*(volatile uint64_t *)gpa;
        else
            *(volatile uint64_t *)gpa = value_of(touch, gpa);
        own->count = touch + 1; /* after the touch: the host never sees more of them than there were */
        own->writes = reads ? 0 : touch + 1;
        slot += threads;
        if (++index == share) {
            index = 0;
            slot = cpu;
            own->pass++;
        }
        own->index = index;
        if (keeps_gaps)
            last = note_gap(own, last);
        if (rate)
            pace(&clock);
    }
}

/* pattern=sequential: does each slot of this CPU have what its last touch wrote? */
static void check(unsigned cpu)
{
    uint64_t share = share_of(cpu), limit = limit_of(cpu);
    for (uint64_t i = 0; i < share && i < limit; i++) {
        uint64_t gpa = slot_gpa(cpu + i * threads), last = i + (limit - 1 - i) / share * share;
        uint64_t found = *(volatile uint64_t *)gpa, expected = value_of(last, gpa);
        if (found == expected)
            continue;
        unsigned byte = (unsigned)__builtin_ctzl(found ^ expected) / 8;
        progress->wrong_gpa = gpa + byte;
        progress->wrong_expected = expected >> 8 * byte & 0xff;
        progress->wrong_found = found >> 8 * byte & 0xff;
        progress->status = PV_STATUS_FAILED;
        print("FAIL: gpa ");
        print_hex(gpa);
        print(": expected ");
        print_hex(expected);
        print(", found ");
        print_hex(found);
        print("\n");
        leave(1);
    }
}

/* ---- options ---- */
static void parse_pattern(void)
{
    const char *name = option("pattern", "sequential");
    static const char *const names[] = {"sequential", "uniform", "zipf", "hotset"};
    for (pattern = SEQUENTIAL; !same_text(name, names[pattern]); pattern++)
        if (pattern == HOTSET)
            refuse("pattern= is not sequential, uniform, zipf or hotset: ", name);
    hot_slots = (uint64_t)((unsigned __int128)slots * option_at_most("hot", 10, 100) / 100);
    hot_slots = hot_slots ? hot_slots : 1;
    heat = option_at_most("heat", 90, 100);
    scatters = option_number("scatter", 1) != 0;
    scattering = shuffle_of(slots, mix(seed));
}

static void parse_region(void)
{
    region = memory_region(BLOCK_SIZE);
    uint64_t all = region.pages * PAGE_SIZE;
    if (all == 0)
        refuse("too little memory", "");
    start = option_number("start", 0);
    stride = option_number("stride", PAGE_SIZE);
    if (start % 8 || start >= all)
        refuse("start= is not a multiple of 8 in memory: ", option("start", "0"));
    uint64_t size = option_number("size", all - start);
    if (size < 8 || size > all - start)
        refuse("size= is more than there is, or nothing: ", option("size", "0"));
    if (stride % 8 || stride == 0)
        refuse("stride= is not a multiple of 8: ", option("stride", ""));
    slots = (size - 8) / stride + 1;
    progress->region_gpa = (uint64_t)region_page(&region, start / PAGE_SIZE) + start % PAGE_SIZE;
    progress->region_size = size;
}

/* A host that wants to see the first touch, such as in a VM that it restores, keeps the guest here until then. */
static void wait_for_byte(void)
{
    out8(UART_IER, IER_RDI); /* says that somebody listens; OUT2 is off, so that no interrupt comes */
    while (!(in8(UART_LSR) & LSR_DATA_READY))
        __builtin_ia32_pause();
    (void)in8(UART_RBR);
    out8(UART_IER, 0);
}

int guest_main(void)
{
    progress->seed = seed = option_number("seed", 1);
    parse_region();
    parse_pattern();
    unsigned cpus = cpu_count();
    uint64_t wanted = option_number("threads", cpus);
    if (wanted < 1 || wanted > cpus || wanted > slots)
        refuse("threads= is not 1 to the number of CPUs and of slots: ", option("threads", "all"));
    threads = (unsigned)wanted;
    rate = option_number("rate", 0);
    passes = option_number("passes", 0);
    touches = option_number("touches", 0);
    reads = option_number("read", 0) != 0;
    keeps_gaps = option_number("gaps", 0) != 0;
    if (passes && touches)
        refuse("passes= and touches= do not go together", "");
    if (passes > UINT64_MAX / slots || rate > 1ul << 32)
        refuse("too large a number: ", passes > UINT64_MAX / slots ? "passes" : "rate");
    tsc_per_ms = ticks_per_ms();
    progress->tsc_khz = keeps_gaps ? tsc_per_ms : 0;
    progress->cpus = threads;
    progress->status = PV_STATUS_RUNNING;
    if (option_number("wait", 0))
        wait_for_byte();
    uint64_t began = ticks();
    on_all_cpus(threads, work);
    uint64_t ms = (ticks() - began) / tsc_per_ms;
    if (pattern == SEQUENTIAL && !reads)
        on_all_cpus(threads, check);

    uint64_t total = 0;
    for (unsigned cpu = 0; cpu < threads; cpu++)
        total += progress->work[cpu].count;
    print("SUCCESS: ");
    print_number(total);
    print(reads ? " reads of " : " writes to ");
    print_number(slots);
    print(" slots in ");
    print_number(ms);
    print(" ms\n");
    return 0;
}
