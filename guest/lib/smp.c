/* smp.c: application processors, started one by one with INIT and SIPI (Intel SDM vol. 3, 9.4). */
#include "lib.h"

extern uint8_t trampoline[], trampoline_end[];
extern uint32_t trampoline_index;

static unsigned online = 1;
static void (*volatile job)(unsigned cpu);
static volatile unsigned job_cpus, job_number;
static unsigned done;

unsigned cpu_count(void)
{
    uint32_t r[4], threads = 1;
    cpuid(0, 0, r);
    if (r[0] >= 0xb)
        for (uint32_t level = 0; level < 4; level++) { /* x2APIC topology: the last level's count is the package's */
            cpuid(0xb, level, r);
            if (((r[2] >> 8) & 0xff) == 0)
                break;
            threads = r[1] & 0xffff;
        }
    uint64_t count = option_number("cpus", threads ? threads : 1);
    if (count < 1 || count > PV_MAX_CPUS)
        refuse("cpus= is not 1 to 64", "");
    return (unsigned)count;
}

void lib_start_cpu(unsigned cpu);
void lib_start_cpu(unsigned cpu) /* an application processor, for ever */
{
    unsigned seen = 0;
    __atomic_store_n(&online, cpu + 1, __ATOMIC_RELEASE); /* pairs with start_cpu */
    for (;;) {
        while (__atomic_load_n(&job_number, __ATOMIC_ACQUIRE) == seen)
            __builtin_ia32_pause();
        seen++;
        if (cpu < job_cpus)
            job(cpu);
        __atomic_fetch_add(&done, 1, __ATOMIC_RELEASE); /* pairs with on_all_cpus */
    }
}

static void interrupt_cpu(unsigned cpu, uint32_t command)
{
    *lapic(LAPIC_ICR_HIGH) = cpu << 24;
    *lapic(LAPIC_ICR_LOW) = command;
    while (*lapic(LAPIC_ICR_LOW) & 0x1000) /* delivery pending */
        __builtin_ia32_pause();
}

static void start_cpu(unsigned cpu)
{
    size_t at = (size_t)((uint8_t *)&trampoline_index - trampoline);
    memcpy((void *)PV_TRAMPOLINE_GPA, trampoline, (size_t)(trampoline_end - trampoline));
    *(volatile uint32_t *)(PV_TRAMPOLINE_GPA + at) = cpu;
    *lapic(LAPIC_SVR) = 0x1ff; /* enable this LAPIC: firmware may not have */
    interrupt_cpu(cpu, 0x4500); /* INIT, assert */
    interrupt_cpu(cpu, 0x4600 | PV_TRAMPOLINE_GPA >> 12);
    uint64_t start = ticks(), patience = 2000 * ticks_per_ms();
    while (__atomic_load_n(&online, __ATOMIC_ACQUIRE) <= cpu)
        if (ticks() - start > patience) {
            print("CPU ");
            print_number(cpu);
            print(" does not start\n");
            leave(1);
        }
}

void on_all_cpus(unsigned count, void (*work)(unsigned cpu))
{
    while (online < count)
        start_cpu(online);
    progress->cpus = count;
    job = work;
    job_cpus = count;
    done = 0;
    __atomic_store_n(&job_number, job_number + 1, __ATOMIC_RELEASE);
    work(0);
    while (__atomic_load_n(&done, __ATOMIC_ACQUIRE) != online - 1)
        __builtin_ia32_pause();
}
