/* timer.c: LAPIC timer interrupts, slept for. Checks that every tick comes and that the TSC never goes backwards. Being
 * paused, saved and restored or migrated is no failure: what comes late on that account is counted, not judged.
 * Progress: work[0].count = ticks, work[0].index = of these, late ones. */
#include "lib/lib.h"

GUEST("timer", "sleeps from one LAPIC timer interrupt to the next, checks ticks and TSC",
      "ticks=N ticks to wait for (default 100); 0 = for ever\n"
      "period=US microseconds between them, 10 to 1000000 (default 1000)\n"
      "mode=MODE periodic (default), oneshot, or deadline (by TSC)\n"
      "wait=HOW halt (default), or spin: in a loop, by which a tick that never comes is noticed\n");

#define VECTOR 0x30
#define LVT_PERIODIC 0x20000
#define LVT_DEADLINE 0x40000
#define LATE_PERIODS 1000
#define PATIENCE_MS 10000

static enum { PERIODIC, ONESHOT, DEADLINE } mode;
static uint64_t period;       /* TSC ticks */
static uint32_t timer_counts; /* LAPIC timer counts in a period */
static uint64_t last_tsc;

static _Noreturn void fail(const char *text)
{
    print("FAIL: ");
    print(text);
    print(" after tick ");
    print_number(progress->work[0].count);
    print("\n");
    leave(1);
}

static uint64_t now(void)
{
    uint64_t tsc = ticks();
    if (tsc < last_tsc)
        fail("the TSC went backwards");
    last_tsc = tsc;
    return tsc;
}

static bool has_deadline(void)
{
    uint32_t r[4];
    cpuid(1, 0, r);
    return r[2] >> 24 & 1;
}

static void parse(void)
{
    if (option_is("mode", "periodic", "oneshot"))
        mode = ONESHOT;
    else if (option_is("mode", "periodic", "deadline"))
        mode = DEADLINE;
    else if (!option_is("mode", "periodic", "periodic"))
        refuse("mode= is not periodic, oneshot or deadline: ", option("mode", ""));
    if (!option_is("wait", "halt", "halt") && !option_is("wait", "halt", "spin"))
        refuse("wait= is not halt or spin: ", option("wait", ""));
    uint64_t us = option_number("period", 1000);
    if (us < 10 || us > 1000000)
        refuse("period= is not 10 to 1000000: ", option("period", ""));
    if (mode == DEADLINE && !has_deadline())
        refuse("this CPU's LAPIC timer has no mode=deadline", "");
    period = us * ticks_per_ms() / 1000;
    if (mode != DEADLINE) {
        uint64_t counts = us * lapic_per_ms() / 1000;
        if (counts == 0 || counts > UINT32_MAX)
            refuse("the LAPIC timer cannot count such a period=: ", option("period", "1000"));
        timer_counts = (uint32_t)counts;
    }
}

/* Makes the next tick come. The periodic timer needs that once only. */
static void arm(void)
{
    if (mode == DEADLINE)
        gate(GATE_SET_DEADLINE, period, 0);
    else
        *lapic(LAPIC_TIMER_INITIAL) = timer_counts;
}

static void spin(uint64_t seen)
{
    struct patience patience = patience_ms(PATIENCE_MS);
    while (interrupts[VECTOR] == seen) {
        if (!patience_left(&patience))
            fail("no timer interrupt in 10 s");
        __builtin_ia32_pause();
    }
}

static void report(uint64_t counted, uint64_t intervals, uint64_t sum, uint64_t late)
{
    print("SUCCESS: ");
    print_number(counted);
    print(" ticks, mean period ");
    print_number(intervals ? sum / intervals * 1000 / ticks_per_ms() : 0);
    print(" us, ");
    print_number(late);
    print(" late\n");
}

int guest_main(void)
{
    uint64_t wanted = option_number("ticks", 100);
    irq_init();
    parse();
    bool spins = option_is("wait", "halt", "spin");
    progress->status = PV_STATUS_RUNNING;
    *lapic(LAPIC_LVT_TIMER) = VECTOR | (mode == PERIODIC ? LVT_PERIODIC : mode == DEADLINE ? LVT_DEADLINE : 0);

    uint64_t intervals = 0, sum = 0, late = 0, seen = interrupts[VECTOR], count = 0, before = 0;
    arm();
    while (wanted == 0 || count < wanted) {
        if (spins || count == 0) /* the first always so: a machine without a timer would sleep for ever */
            spin(seen);
        else
            wait_interrupt(VECTOR, seen);
        uint64_t tsc = now(), taken = interrupts[VECTOR] - seen;
        seen += taken;
        if (count) {
            if (tsc - before > LATE_PERIODS * period)
                progress->work[0].index = ++late; /* the host may want to know at once */
            else
                intervals += taken, sum += tsc - before;
        }
        before = tsc;
        count += taken;
        progress->work[0].count = count;
        if (mode != PERIODIC)
            arm();
    }
    *lapic(LAPIC_LVT_TIMER) = 0x10000; /* masked */
    report(count, intervals, sum, late);
    return 0;
}
