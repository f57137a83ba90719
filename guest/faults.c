/* faults.c: each CPU exception on request: caught and checked, or let through as a crash that the host explains.
 *
 * All but three are raised by what raises them in real programs. #OF and #BR are not: 64-bit mode has neither INTO nor
 * BOUND. #TS is not: only ring 0 can load a bad TSS. These are `int N`, of which a host may deliver 4 alone.
 *
 * Frame pointers and calls that are no jumps: a crash is explained by its call chain. */
#pragma GCC optimize("no-omit-frame-pointer", "no-optimize-sibling-calls")
#include "lib/lib.h"

GUEST("faults", "raises an exception: caught and checked, or (catch=0) a crash",
      "kind=KIND de db bp of br ud nm df ts np ss gp pf (default) mf ac xm; triple (a triple fault), hang (an endless "
      "loop), hlt-off (halts with interrupts off)\n"
      "catch=1 checks what the handler is given; 0: without an IDT it becomes a triple fault\n");

#define FAULTY __attribute__((noinline, noclone)) static void
/* The place of an asm label that does not show up among the symbols, where it would hide the function's name. */
#define PLACE(label) extern const char place_of_##label[] __asm__(".Lplace_of_" #label)
#define HERE(label) ".Lplace_of_" #label ": "
#define NON_CANONICAL 0x800000000000ul
#define UNMAPPED 0x600d00000000ul /* beyond the 512 GiB that are mapped */

PLACE(de); PLACE(db); PLACE(bp); PLACE(of); PLACE(br); PLACE(ud); PLACE(nm); PLACE(ts); PLACE(np); PLACE(ss);
PLACE(gp); PLACE(pf); PLACE(mf); PLACE(ac); PLACE(xm);

extern uint64_t idt[512];
#define IDT_PRESENT (1ul << 47)
#define OPCODE_INT 0xcd

/* ---- the exceptions ---- */

FAULTY divide_by_zero(void)
{
    uint32_t low = 1, high = 0;
    __asm__ volatile(HERE(de) "divl %2" : "+a"(low), "+d"(high) : "r"(0));
}

FAULTY single_step(void) /* a trap, not a fault: it comes when the instruction behind popf has ended */
{
    __asm__ volatile("pushfq; orl %0, (%%rsp); popfq; nop;" HERE(db) "nop" ::"i"(RFLAGS_TF) : "memory", "cc");
}

FAULTY breakpoint(void) /* a trap */
{
    __asm__ volatile("int3;" HERE(bp) "nop");
}

FAULTY overflow_by_int4(void)
{
    __asm__ volatile("int $4;" HERE(of) "nop" ::"a"(0)); /* lib: 0 is none of the gate's functions */
}

FAULTY bound_by_int5(void)
{
    __asm__ volatile("int $5;" HERE(br) "nop");
}

FAULTY undefined_instruction(void) { __asm__ volatile(HERE(ud) "ud2"); }

static void set_ts(void) { gate(GATE_SET_TS, 0, 0); }

FAULTY sse_while_task_switched(void) /* of a device's register: some hosts heed TS only where they emulate */
{
    __asm__ volatile(HERE(nm) "movups (%0), %%xmm0" ::"r"(lapic(LAPIC_ID)) : "xmm0");
}

FAULTY fault_in_fault(void) /* #NP while #DE is being delivered */
{
    uint32_t low = 1, high = 0;
    idt[0] &= ~IDT_PRESENT;
    __asm__ volatile("divl %2" : "+a"(low), "+d"(high) : "r"(0) : "memory");
}

FAULTY invalid_tss_by_int10(void)
{
    __asm__ volatile("int $10;" HERE(ts) "nop");
}

FAULTY load_absent_segment(void) { __asm__ volatile(HERE(np) "movl %0, %%ds" ::"r"(SELECTOR_ABSENT)); }

FAULTY load_absent_stack(void) { __asm__ volatile(HERE(ss) "movl %0, %%ss" ::"r"(SELECTOR_ABSENT)); }

FAULTY read_non_canonical(void)
{
    uint64_t value;
    __asm__ volatile(HERE(gp) "movq (%1), %0" : "=r"(value) : "r"(NON_CANONICAL));
}

struct item {
    struct item *next;
    uint64_t value;
};

FAULTY write_to_unmapped_page(struct item *item)
{
    __asm__ volatile(HERE(pf) "movq %1, (%0)" ::"r"(item), "r"(1ul) : "memory");
}

FAULTY walk_list(struct item *item, unsigned length)
{
    while (length--)
        item = item->next;
    write_to_unmapped_page(item);
}

FAULTY damaged_list(void) /* the last item's link is rubbish */
{
    static struct item third = {(struct item *)UNMAPPED, 3}, second = {&third, 2}, first = {&second, 1};
    walk_list(&first, 3);
}

FAULTY x87_divide_by_zero(void) /* reported by the next x87 instruction that waits */
{
    uint16_t control = 0x37b; /* all masked but zero divide */
    __asm__ volatile("fldcw %0; fld1; fldz; fdivrp;" HERE(mf) "fwait" ::"m"(control) : "memory");
}

FAULTY misaligned_access(void)
{
    static const uint64_t pair[2];
    uint64_t value;
    __asm__ volatile("pushfq; orl %2, (%%rsp); popfq;" HERE(ac) "movq 1(%1), %0"
                     : "=r"(value)
                     : "r"(pair), "i"(RFLAGS_AC)
                     : "memory", "cc");
}

FAULTY sse_divide_by_zero(void)
{
    uint32_t mxcsr = 0x1d80; /* all masked but zero divide */
    const float one = 1, zero = 0;
    __asm__ volatile("ldmxcsr %0; movss %1, %%xmm0;" HERE(xm) "divss %2, %%xmm0" ::"m"(mxcsr), "m"(one), "m"(zero)
                     : "xmm0");
}

/* ---- the ends that no handler sees: catch= means nothing to them ---- */

static void drop_idt(void) { gate(GATE_DROP_IDT, 0, 0); }

FAULTY endless_loop(void)
{
    for (;;)
        __builtin_ia32_pause();
}

FAULTY halt_with_interrupts_off(void) { gate(GATE_HALT_OFF, 0, 0); }

/* ---- */

#define NONE 32

struct kind {
    const char *name;
    void (*raise)(void);
    void (*prepare)(void); /* while ring 0 can still be called: without an IDT it cannot */
    uint64_t vector; /* NONE: no handler sees it */
    uint64_t error;
    const char *rip; /* NULL: the architecture does not say */
};

static const struct kind kinds[] = {
    {"de", divide_by_zero, NULL, 0, 0, place_of_de},
    {"db", single_step, NULL, 1, 0, place_of_db},
    {"bp", breakpoint, NULL, 3, 0, place_of_bp},
    {"of", overflow_by_int4, NULL, 4, 0, place_of_of},
    {"br", bound_by_int5, NULL, 5, 0, place_of_br},
    {"ud", undefined_instruction, NULL, 6, 0, place_of_ud},
    {"nm", sse_while_task_switched, set_ts, 7, 0, place_of_nm},
    {"df", fault_in_fault, NULL, 8, 0, NULL},
    {"ts", invalid_tss_by_int10, NULL, 10, 0, place_of_ts},
    {"np", load_absent_segment, NULL, 11, SELECTOR_ABSENT & ~3, place_of_np},
    {"ss", load_absent_stack, NULL, 12, SELECTOR_ABSENT & ~3, place_of_ss},
    {"gp", read_non_canonical, NULL, 13, 0, place_of_gp},
    {"pf", damaged_list, NULL, 14, 6 /* write, from ring 3, to a page that is not present */, place_of_pf},
    {"mf", x87_divide_by_zero, NULL, 16, 0, place_of_mf},
    {"ac", misaligned_access, NULL, 17, 0, place_of_ac},
    {"xm", sse_divide_by_zero, NULL, 19, 0, place_of_xm},
    {"triple", undefined_instruction, drop_idt, NONE, 0, NULL},
    {"hang", endless_loop, NULL, NONE, 0, NULL},
    {"hlt-off", halt_with_interrupts_off, NULL, NONE, 0, NULL},
};

static const struct kind *kind;

static bool is(const char *what, uint64_t found, uint64_t expected)
{
    if (found == expected)
        return true;
    print("FAIL: ");
    print(what);
    print(" is ");
    print_hex(found);
    print(", not ");
    print_hex(expected);
    print("\n");
    return false;
}

static void check(unsigned cpu, const struct trap *trap)
{
    (void)cpu;
    progress->detail = (uint32_t)trap->vector;
    bool good = is("the vector", trap->vector, kind->vector);
    if (good) {
        good &= is("the error code", trap->error, kind->error);
        good &= !kind->rip || is("rip", trap->rip, (uint64_t)kind->rip);
        good &= trap->vector != 14 || is("cr2", trap->cr2, UNMAPPED);
    } else if (trap->vector == 6 && *(const uint8_t *)trap->rip == OPCODE_INT)
        print("this host does not let ring 3 raise that one by `int`\n");
    print(good ? "SUCCESS: caught " : "caught ");
    print(exception_name(trap->vector));
    print(" at rip ");
    print_hex(trap->rip);
    print(good ? ", as expected\n" : "\n");
    leave(good ? 0 : 1);
}

int guest_main(void)
{
    const char *name = option("kind", "pf");
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
        if (same_text(name, kinds[i].name))
            kind = &kinds[i];
    if (!kind)
        refuse("no such kind=: ", name);
    bool catch = option_is("catch", "1", "1");
    if (!catch && !option_is("catch", "1", "0"))
        refuse("catch= is not 0 or 1: ", option("catch", ""));
    on_trap = check;
    progress->status = PV_STATUS_RUNNING;
    if (kind->prepare)
        kind->prepare();
    if (!catch && kind->vector != NONE)
        drop_idt();
    kind->raise();
    print("FAIL: no exception\n");
    return 1;
}
