/* trap.c: exceptions, as ring 3 sees them, and waiting for interrupts. */
#include "lib.h"

static const char *const names[32] = {
    "#DE divide error", "#DB debug", "NMI", "#BP breakpoint", "#OF overflow", "#BR bound range", "#UD invalid opcode",
    "#NM device not available", "#DF double fault", "vector 9", "#TS invalid TSS", "#NP segment not present",
    "#SS stack fault", "#GP general protection", "#PF page fault", "vector 15", "#MF x87 error", "#AC alignment check",
    "#MC machine check", "#XM SIMD error", "#VE virtualization", "#CP control protection",
};

const char *exception_name(uint64_t vector)
{
    return vector < 32 && names[vector] ? names[vector] : "unknown exception";
}

static void report(unsigned cpu, const struct trap *trap)
{
    progress->detail = (uint32_t)trap->vector;
    print("FAIL: ");
    print(exception_name(trap->vector));
    print(" on CPU ");
    print_number(cpu);
    print(" at rip ");
    print_hex(trap->rip);
    print(", error ");
    print_hex(trap->error);
    print(", cr2 ");
    print_hex(trap->cr2);
    print("\n");
    leave(1);
}

void (*on_trap)(unsigned cpu, const struct trap *trap) = report;

void lib_trap(void);
void lib_trap(void) /* on the trap stack of the CPU that trapped: its place tells which CPU this is */
{
    uint64_t here = (uint64_t)__builtin_frame_address(0);
    unsigned cpu = 0;
    for (unsigned i = 0; i < PV_MAX_CPUS; i++)
        if (traps[i].stack >= here && traps[i].stack - here < 1024)
            cpu = i;
    on_trap(cpu, &traps[cpu]);
    leave(1);
}

void wait_interrupt(unsigned vector, uint64_t seen)
{
    gate(GATE_WAIT, vector, seen);
}
