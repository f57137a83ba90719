/* time.c: how fast the time-stamp counter ticks. */
#include "lib.h"

#define CPUID_TIMING 0x40000010 /* hypervisors' leaf: eax = TSC kHz, ebx = APIC bus kHz */
#define PIT_HZ 1193182
#define PIT_CHANNEL2 0x42
#define PIT_COMMAND 0x43
#define PIT_GATE 0x61

/* Counts TSC ticks while channel 2 of the 8254 runs down from 10 ms. */
static uint64_t measure(void)
{
    uint16_t count = PIT_HZ / 100;
    out8(PIT_GATE, (in8(PIT_GATE) & ~2u) | 1u); /* gate on, speaker off */
    out8(PIT_COMMAND, 0xb0);                    /* channel 2, both bytes, mode 0 */
    out8(PIT_CHANNEL2, count & 0xff);
    out8(PIT_CHANNEL2, count >> 8);
    uint64_t start = ticks();
    while (!(in8(PIT_GATE) & 0x20))
        ;
    return (ticks() - start) / 10;
}

uint64_t ticks_per_ms(void)
{
    static uint64_t known;
    if (!known) {
        uint32_t r[4];
        cpuid(0x40000000, 0, r);
        if (r[0] >= CPUID_TIMING) {
            cpuid(CPUID_TIMING, 0, r);
            known = r[0];
        }
        if (!known)
            known = measure();
    }
    return known;
}
