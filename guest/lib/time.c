/* time.c: how fast the time-stamp counter and the LAPIC timer tick, and limits on waiting. */
#include "lib.h"

#define CPUID_TIMING 0x40000010 /* hypervisors' leaf: eax = TSC kHz, ebx = APIC bus kHz */
#define PIT_HZ 1193182
#define PIT_CHANNEL0 0x40
#define PIT_COMMAND 0x43
#define PIT_PERIODIC 0x34 /* channel 0, both bytes, mode 2 */
#define PIT_LATCH 0x00    /* channel 0 */
#define A_GUESS 2000000

/* Channel 0's count and, in `at`, when it was taken. */
static uint16_t pit_count(uint64_t *at)
{
    out8(PIT_COMMAND, PIT_LATCH);
    *at = ticks();
    uint16_t low = in8(PIT_CHANNEL0);
    return (uint16_t)(low | in8(PIT_CHANNEL0) << 8);
}

/* Counts TSC ticks while channel 0 of the 8254 runs down for 10 ms: the one channel that needs no port 0x61, which not
 * every machine has. Its interrupt goes nowhere: start.S has masked the 8259. Without an 8254 the answer is a guess. */
static uint64_t measure(void)
{
    uint64_t start, now;
    uint16_t passed = 0;
    out8(PIT_COMMAND, PIT_PERIODIC);
    out8(PIT_CHANNEL0, 0);
    out8(PIT_CHANNEL0, 0); /* 65536 */
    uint16_t first = pit_count(&start);
    for (unsigned polls = 0; passed < PIT_HZ / 100; polls++) {
        passed = (uint16_t)(first - pit_count(&now));
        if (passed == 0 && polls > 100)
            return A_GUESS;
    }
    return (now - start) * PIT_HZ / 1000 / passed;
}

/* A rate in kHz from the hypervisors' leaf, or 0. */
static uint64_t told(unsigned index)
{
    uint32_t r[4];
    cpuid(0x40000000, 0, r);
    if (r[0] < CPUID_TIMING)
        return 0;
    cpuid(CPUID_TIMING, 0, r);
    return r[index];
}

uint64_t ticks_per_ms(void)
{
    static uint64_t known;
    if (!known)
        known = told(0);
    if (!known)
        known = measure();
    return known;
}

/* By the TSC, over 10 ms. Of three the lowest: a pause between two readings can only make the timer look fast. */
static uint64_t measure_lapic(void)
{
    uint64_t best = 0, span = 10 * ticks_per_ms();
    for (unsigned i = 0; i < 3; i++) {
        *lapic(LAPIC_TIMER_INITIAL) = UINT32_MAX;
        uint64_t start = ticks(), now;
        while ((now = ticks()) - start < span)
            ;
        uint64_t rate = (uint64_t)(UINT32_MAX - *lapic(LAPIC_TIMER_CURRENT)) * ticks_per_ms() / (now - start);
        if (best == 0 || rate < best)
            best = rate;
    }
    *lapic(LAPIC_TIMER_INITIAL) = 0;
    return best;
}

uint64_t lapic_per_ms(void)
{
    static uint64_t known;
    *lapic(LAPIC_TIMER_DIVIDE) = 0xb; /* by 1 */
    if (!known)
        known = told(1);
    if (!known) {
        *lapic(LAPIC_LVT_TIMER) = 0x10000; /* masked */
        known = measure_lapic();
    }
    return known;
}

struct patience patience_ms(uint64_t ms)
{
    return (struct patience){.left = ms * ticks_per_ms(), .last = ticks()};
}

bool patience_left(struct patience *patience)
{
    uint64_t now = ticks(), passed = now - patience->last, most = ticks_per_ms();
    patience->last = now;
    if (passed > most) /* the guest or this vCPU stood still; or the TSC went backwards, which others find */
        passed = most;
    patience->left -= passed < patience->left ? passed : patience->left;
    return patience->left != 0;
}
