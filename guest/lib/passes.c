/* passes.c: the passes of the guests that check all of their memory. passes.h says what the host may rely on. */
#include "passes.h"

struct passes passes;
struct content (*content_of)(uint64_t page, uint64_t key, uint64_t version);
void (*on_wrong)(uint64_t page, uint64_t pass);

static bool writes(uint64_t key, uint64_t pass)
{
    return pass == 0 || mix(~key + pass * GOLDEN) % 100 < passes.write;
}

uint64_t version_of(uint64_t key, uint64_t pass)
{
    if (passes.write == 0)
        return 0;
    while (!writes(key, pass))
        pass--;
    return pass;
}

static void visit(unsigned cpu, uint64_t page, uint64_t pass)
{
    uint64_t *bytes = region_page(&passes.region, page), key = key_of(page);
    if (pass && !same(bytes, content_of(page, key, version_of(key, pass - 1))))
        on_wrong(page, pass);
    if (writes(key, pass)) {
        fill(bytes, content_of(page, key, pass));
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
    unsigned cpus = passes.cpus;
    uint64_t share = (passes.pages - cpu + cpus - 1) / cpus;
    for (uint64_t pass = 0; passes.passes == 0 || pass <= passes.passes; pass++) {
        struct shuffle shuffle = shuffle_of(share, mix(~passes.mixed_seed + pass));
        for (uint64_t i = 0; i < share; i++) {
            visit(cpu, cpu + cpus * (passes.shuffles ? shuffled(&shuffle, i) : i), pass);
            bool last = i + 1 == share;
            set_place(cpu, last ? pass + 1 : pass, last ? 0 : i + 1);
            progress->work[cpu].count += pass != 0;
        }
    }
}

void passes_options(uint64_t write)
{
    progress->seed = option_number("seed", 1);
    passes.mixed_seed = mix(progress->seed);
    passes.write = option_at_most("write", write, 100);
    passes.passes = option_number("passes", 0);
    passes.shuffles = option_is("order", "seq", "random");
    if (!passes.shuffles && !option_is("order", "seq", "seq"))
        refuse("order= is not seq or random: ", option("order", ""));
    passes.region = memory_region(BLOCK_SIZE);
    uint64_t all = passes.region.pages * PAGE_SIZE;
    passes.pages = option_at_most("size", all, all) / PAGE_SIZE;
    passes.cpus = cpu_count();
    if (passes.pages < passes.cpus)
        refuse("too little memory: a page for each CPU is needed", "");
}

int passes_run(void)
{
    progress->region_gpa = passes.region.first_gpa;
    progress->region_size = passes.pages * PAGE_SIZE;
    progress->cpus = passes.cpus; /* before the status: the host takes the pages' owners from it */
    progress->status = PV_STATUS_RUNNING;
    print(guest_name);
    print(": ");
    print_number(passes.pages);
    print(" pages, ");
    print_number(passes.cpus);
    print(passes.cpus == 1 ? " CPU\n" : " CPUs\n");
    on_all_cpus(passes.cpus, work);

    uint64_t checked = 0, written = 0;
    for (unsigned cpu = 0; cpu < passes.cpus; cpu++) {
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
