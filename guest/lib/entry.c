/* entry.c: a guest's first C code and its end. */
#include "lib.h"

void lib_start_cpu(unsigned cpu);
void lib_start(unsigned cpu);

_Noreturn void leave(int status)
{
    if (progress->status != PV_STATUS_FAILED)
        progress->status = status ? PV_STATUS_FAILED : PV_STATUS_DONE;
    out8(PV_PORT_EXIT, (uint8_t)status);
    for (;;) /* no such port: nothing more can be done */
        ;
}

_Noreturn void refuse(const char *text, const char *subject)
{
    print(guest_name);
    print(": ");
    print(text);
    print(subject);
    print("\n");
    leave(2);
}

static void progress_init(void)
{
    /* Where the host has prepared the page, its magic is there, and in front of `work` all else is zeros but what the
     * host says (machine/generation.py). */
    size_t kept = progress->magic == PV_PROGRESS_MAGIC ? offsetof(struct pv_progress, work) : 0;
    memset((void *)(PV_PROGRESS_GPA + kept), 0, sizeof(struct pv_progress) - kept);
    for (size_t i = 0; i < sizeof(progress->guest) - 1 && guest_name[i]; i++)
        progress->guest[i] = guest_name[i];
    progress->version = PV_PROGRESS_VERSION;
    progress->cpus = 1;
    /* release: the host believes the rest of the page once it sees the magic */
    __atomic_store_n(&progress->magic, PV_PROGRESS_MAGIC, __ATOMIC_RELEASE);
}

/* From start.S, in ring 3, on each CPU. */
void lib_start(unsigned cpu)
{
    static uint8_t trap_stacks[PV_MAX_CPUS][1024] __attribute__((aligned(16)));
    traps[cpu].stack = (uint64_t)(trap_stacks[cpu] + sizeof(trap_stacks[cpu]));
    if (cpu != 0)
        lib_start_cpu(cpu);
    progress_init();
    options_init();
    leave(guest_main());
}
