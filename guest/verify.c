/* verify.c: stamps every page of its region, then checks them over and over while it rewrites some: what any mechanism
 * of the host does to memory must leave all of them as they are. pyvmm/testing/verify_model.py computes the same.
 *
 * Nothing is remembered: the bytes of page p follow from (seed, p, version), and the version is the last pass so far in
 * which a hash of (seed, p, pass) said "write". Pass 0 writes all. Pass n >= 1 looks at each page once: it must have
 * the version of pass n - 1, and is rewritten if the hash says so for n.
 *
 *     key     = mix(mix(seed) + p * GOLDEN)
 *     writes  = n == 0 or mix(~key + n * GOLDEN) % 100 < write=
 *     base    = mix(key + version)
 *     word j  = base + j * GOLDEN, or all zeros where mix(base) % 1000 < zeros=
 *
 * Two contents that differ do so in each 8-byte word, so that a page that is stale, misplaced, zeroed or torn is seen
 * at its first wrong word. Compressors make nothing of it (zlib and zstd find no repetition).
 *
 * Page p is CPU p % cpus's. Its pages in order are cpu + cpus * i, or with order=random cpu + cpus * shuffled(i) with
 * the key mix(~mix(seed) + n). CPUs do not wait for each other.
 *
 * What the host may rely on, at whatever instruction a CPU is stopped: work[cpu].pass = n, the present pass, and
 * work[cpu].index = i, the place in it, change together, by one 16-byte store, after the last store to the page. So the
 * CPU's pages at places < i have the version of pass n, those at places > i that of pass n - 1 (before that of pass 0:
 * anything), and of the page at i each 8-byte word is of one or the other. After the last pass, N: n = N + 1, i = 0.
 * count (pages checked: not pass 0) and writes follow later, and are for people. */
#include "lib/lib.h"

GUEST("verify", "stamps all memory, then checks and rewrites it page by page",
      "seed=N what is written where (default 1)\n"
      "write=PERCENT of the pages rewritten in a pass (default 25)\n"
      "zeros=PERMILLE of contents that are all zeros (default 0)\n"
      "order=ORDER seq (default), or random: another order each pass\n"
      "passes=N checking passes (default 0 = for ever)\n"
      "size=SIZE bytes of memory from 2 MiB on (default all)\n");

#define WORDS (PAGE_SIZE / sizeof(uint64_t))
typedef uint64_t pair __attribute__((vector_size(16), may_alias));

struct content {
    uint64_t base, step; /* word j = base + j * step */
};

/* progress->detail of a failure: what the wrong page looks like. */
enum { LOOKS_UNKNOWN, LOOKS_ZERO, LOOKS_STALE, LOOKS_OTHER_PAGE, LOOKS_BIT_FLIP, LOOKS_HEALED };

static struct region region;
static uint64_t pages, mixed_seed, write, zeros, passes;
static unsigned cpus;
static bool shuffles;

static uint64_t key_of(uint64_t page) { return mix(mixed_seed + page * GOLDEN); }

static bool writes(uint64_t key, uint64_t pass) { return pass == 0 || mix(~key + pass * GOLDEN) % 100 < write; }

static uint64_t version_of(uint64_t key, uint64_t pass)
{
    if (write == 0)
        return 0;
    while (!writes(key, pass))
        pass--;
    return pass;
}

static struct content content_of(uint64_t key, uint64_t version)
{
    uint64_t base = mix(key + version);
    if (zeros && mix(base) % 1000 < zeros)
        return (struct content){0, 0};
    return (struct content){base, GOLDEN};
}

/* ---- whole pages, a cache line at a time ---- */
static void first_line(pair line[4], struct content content)
{
#pragma GCC unroll 4
    for (unsigned i = 0; i < 4; i++) {
        uint64_t first = content.base + 2 * i * content.step;
        line[i] = (pair){first, first + content.step};
    }
}

static void fill(uint64_t *page, struct content content)
{
    pair line[4], step = {8 * content.step, 8 * content.step};
    first_line(line, content);
    for (pair *at = (pair *)page, *end = at + WORDS / 2; at < end; at += 4)
#pragma GCC unroll 4
        for (unsigned i = 0; i < 4; i++) {
            at[i] = line[i];
            line[i] += step;
        }
}

static bool same(const uint64_t *page, struct content content)
{
    pair line[4], step = {8 * content.step, 8 * content.step}, wrong[4] = {{0}};
    first_line(line, content);
    for (const pair *at = (const pair *)page, *end = at + WORDS / 2; at < end; at += 4)
#pragma GCC unroll 4
        for (unsigned i = 0; i < 4; i++) {
            wrong[i] |= at[i] ^ line[i];
            line[i] += step;
        }
    pair all = (wrong[0] | wrong[1]) | (wrong[2] | wrong[3]);
    return (all[0] | all[1]) == 0;
}

/* ---- a wrong page ---- */
struct diagnosis {
    uint64_t looks, page, version; /* the last two of LOOKS_STALE and LOOKS_OTHER_PAGE */
};

/* Whose content has this base? Of other pages, the versions about the pass that their CPU is in are looked at. */
static struct diagnosis find_base(uint64_t base, uint64_t page, uint64_t pass)
{
    for (uint64_t v = pass + 1; v-- > 0;)
        if (mix(key_of(page) + v) == base)
            return (struct diagnosis){LOOKS_STALE, page, v};
    for (uint64_t p = 0; p < pages; p++) {
        uint64_t now = progress->work[p % cpus].pass;
        for (uint64_t n = now < 4 ? 0 : now - 4; n <= now; n++) {
            uint64_t v = version_of(key_of(p), n);
            if (mix(key_of(p) + v) == base)
                return (struct diagnosis){LOOKS_OTHER_PAGE, p, v};
        }
    }
    return (struct diagnosis){LOOKS_UNKNOWN, 0, 0};
}

static void print_diagnosis(struct diagnosis diagnosis, uint64_t wrong_words)
{
    if (diagnosis.looks == LOOKS_HEALED) {
        print("; it was right when read again\n");
        return;
    }
    print("; ");
    print_number(wrong_words);
    print(" of 512 words are wrong");
    if (diagnosis.looks == LOOKS_ZERO)
        print(", looks like zeros");
    if (diagnosis.looks == LOOKS_BIT_FLIP)
        print(", by one bit");
    if (diagnosis.looks == LOOKS_STALE || diagnosis.looks == LOOKS_OTHER_PAGE) {
        print(", looks like version ");
        print_number(diagnosis.version);
        print(" of page ");
        print_number(diagnosis.page);
    }
    print("\n");
}

static __attribute__((noinline, cold)) void fail(uint64_t page, uint64_t pass)
{
    static bool failed;
    while (__atomic_exchange_n(&failed, true, __ATOMIC_ACQ_REL)) /* another CPU is about to end the guest */
        __builtin_ia32_pause();
    const volatile uint64_t *bytes = region_page(&region, page);
    uint64_t version = version_of(key_of(page), pass - 1), word = 0, found = 0, expected = 0, count = 0;
    struct content content = content_of(key_of(page), version);
    for (uint64_t i = WORDS; i-- > 0;) { /* backwards: the first wrong word is met last */
        uint64_t now = bytes[i], right = content.base + i * content.step;
        if (now != right)
            count++, word = i, found = now, expected = right;
    }
    unsigned byte = count ? (unsigned)__builtin_ctzl(found ^ expected) / 8 : 0;
    uint64_t at = word * 8 + byte;
    progress->wrong_gpa = (uint64_t)bytes + at;
    progress->wrong_expected = expected >> 8 * byte & 0xff;
    progress->wrong_found = found >> 8 * byte & 0xff;
    uint64_t bits = found ^ expected;
    struct diagnosis diagnosis = {LOOKS_HEALED, 0, 0};
    if (count && found == 0)
        diagnosis.looks = LOOKS_ZERO;
    else if (count == 1 && (bits & (bits - 1)) == 0)
        diagnosis.looks = LOOKS_BIT_FLIP;
    else if (count)
        diagnosis = find_base(found - word * GOLDEN, page, pass);
    progress->detail = (uint32_t)diagnosis.looks;
    progress->status = PV_STATUS_FAILED;

    print("FAIL: page ");
    print_number(page);
    print(" (gpa ");
    print_hex((uint64_t)bytes);
    print(") byte ");
    print_hex(at);
    print(": expected ");
    print_hex(progress->wrong_expected);
    print(", found ");
    print_hex(progress->wrong_found);
    print(", in pass ");
    print_number(pass);
    print(", version ");
    print_number(version);
    print(" expected");
    print_diagnosis(diagnosis, count);
    leave(1);
}

/* ---- the passes ---- */
static void visit(unsigned cpu, uint64_t page, uint64_t pass)
{
    uint64_t *bytes = region_page(&region, page), key = key_of(page);
    if (pass && !same(bytes, content_of(key, version_of(key, pass - 1))))
        fail(page, pass);
    if (writes(key, pass)) {
        fill(bytes, content_of(key, pass));
        progress->work[cpu].writes++;
    }
}

static void set_place(unsigned cpu, uint64_t pass, uint64_t index)
{
    pair place = {pass, index};
    __asm__ volatile("movaps %1, %0" : "=m"(*(pair *)(uint64_t)&progress->work[cpu].pass) : "x"(place) : "memory");
}
_Static_assert(offsetof(struct pv_progress, work) % 64 == 0 && offsetof(struct pv_work, pass) % 16 == 0 &&
                   offsetof(struct pv_work, index) == offsetof(struct pv_work, pass) + 8,
               "pass and index are stored at once");

static void work(unsigned cpu)
{
    uint64_t share = (pages - cpu + cpus - 1) / cpus;
    for (uint64_t pass = 0; passes == 0 || pass <= passes; pass++) {
        struct shuffle shuffle = shuffle_of(share, mix(~mixed_seed + pass));
        for (uint64_t i = 0; i < share; i++) {
            visit(cpu, cpu + cpus * (shuffles ? shuffled(&shuffle, i) : i), pass);
            bool last = i + 1 == share;
            set_place(cpu, last ? pass + 1 : pass, last ? 0 : i + 1);
            progress->work[cpu].count += pass != 0;
        }
    }
}

static uint64_t at_most(const char *name, uint64_t otherwise, uint64_t most)
{
    uint64_t value = option_number(name, otherwise);
    if (value > most)
        refuse("too large: ", name);
    return value;
}

int guest_main(void)
{
    uint64_t seed = option_number("seed", 1);
    mixed_seed = mix(seed);
    write = at_most("write", 25, 100);
    zeros = at_most("zeros", 0, 1000);
    passes = option_number("passes", 0);
    shuffles = option_is("order", "seq", "random");
    if (!shuffles && !option_is("order", "seq", "seq"))
        refuse("order= is not seq or random: ", option("order", ""));
    region = memory_region(BLOCK_SIZE);
    pages = at_most("size", region.pages * PAGE_SIZE, region.pages * PAGE_SIZE) / PAGE_SIZE;
    cpus = cpu_count();
    if (pages < cpus)
        refuse("too little memory: a page for each CPU is needed", "");

    progress->seed = seed;
    progress->region_gpa = region.first_gpa;
    progress->region_size = pages * PAGE_SIZE;
    progress->cpus = cpus; /* before the status: the host takes the pages' owners from it */
    progress->status = PV_STATUS_RUNNING;
    print("verify: ");
    print_number(pages);
    print(" pages, ");
    print_number(cpus);
    print(cpus == 1 ? " CPU\n" : " CPUs\n");
    on_all_cpus(cpus, work);

    uint64_t checked = 0, written = 0;
    for (unsigned cpu = 0; cpu < cpus; cpu++) {
        checked += progress->work[cpu].count;
        written += progress->work[cpu].writes;
    }
    print("SUCCESS: ");
    print_number(checked);
    print(" pages checked, ");
    print_number(written);
    print(" written\n");
    return 0;
}
