/* smp.c: all vCPUs count, each for itself and all in one place, by locked adds; now and then a token goes round, so that
 * a CPU that is lost is noticed. CPU 0 checks the sums: an add that is lost is a broken machine. */
#include "lib/lib.h"

GUEST("smp", "all vCPUs count together, CPU 0 checks that no add was lost",
      "count=N adds a CPU (default 10000000); 0 = for ever\n"
      "cpus=N vCPUs that take part (default all)\n");

#define ROUNDS_A_TOKEN 0x40000
#define PATIENCE_MS 30000

static uint64_t rounds;
static unsigned cpus;

static struct {
    uint64_t value;
} __attribute__((aligned(64))) shared, token;

static void lost(unsigned cpu, unsigned awaited)
{
    print("FAIL: CPU ");
    print_number(cpu);
    print(" waits in vain for CPU ");
    print_number(awaited);
    print("\n");
    leave(1);
}

/* Waits for the CPU before this one, then lets the next one go: the line of `token` visits all. */
static void pass_token(unsigned cpu, uint64_t lap)
{
    uint64_t turn = lap * cpus + cpu;
    struct patience patience = patience_ms(PATIENCE_MS);
    while (__atomic_load_n(&token.value, __ATOMIC_ACQUIRE) != turn) { /* pairs with the store below, of another CPU */
        if (!patience_left(&patience))
            lost(cpu, (cpu + cpus - 1) % cpus);
        __builtin_ia32_pause();
    }
    __atomic_store_n(&token.value, turn + 1, __ATOMIC_RELEASE);
    progress->work[cpu].pass = lap + 1;
}

static void count(unsigned cpu)
{
    uint64_t *own = (uint64_t *)&progress->work[cpu].count;
    for (uint64_t done = 0; rounds == 0 || done < rounds;) {
        uint64_t stop = done + ROUNDS_A_TOKEN;
        if (rounds && stop > rounds)
            stop = rounds;
        for (; done < stop; done++) {
            __atomic_fetch_add(own, 1, __ATOMIC_RELAXED);
            __atomic_fetch_add(&shared.value, 1, __ATOMIC_RELAXED);
        }
        pass_token(cpu, (done - 1) / ROUNDS_A_TOKEN);
    }
}

static bool is(const char *what, uint64_t found, uint64_t expected)
{
    if (found == expected)
        return true;
    print("FAIL: ");
    print(what);
    print(" is ");
    print_number(found);
    print(", not ");
    print_number(expected);
    print("\n");
    return false;
}

int guest_main(void)
{
    rounds = option_number("count", 10000000);
    cpus = cpu_count();
    if (rounds > UINT64_MAX / PV_MAX_CPUS)
        refuse("too large a number: ", option("count", ""));
    ticks_per_ms(); /* known before all CPUs ask */
    progress->status = PV_STATUS_RUNNING;
    on_all_cpus(cpus, count);

    bool good = is("the shared count", shared.value, rounds * cpus);
    for (unsigned cpu = 0; cpu < cpus; cpu++)
        good &= is("a CPU's count", progress->work[cpu].count, rounds);
    good &= is("the token", token.value, (rounds + ROUNDS_A_TOKEN - 1) / ROUNDS_A_TOKEN * cpus);
    if (!good)
        return 1;
    print("SUCCESS: ");
    print_number(cpus);
    print(cpus == 1 ? " CPU, " : " CPUs, ");
    print_number(shared.value);
    print(" adds\n");
    return 0;
}
