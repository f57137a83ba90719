/* lib.h: what a guest may call. Guests run in ring 3, identity-mapped, with ports 0..0x3ff open; physical addresses are
 * pointers. A guest is one file NAME.c: a GUEST(...) and guest_main(). hello.c is the smallest. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../abi.h"
#include "cpu.h"

#define PAGE_SIZE 4096ul
#define BLOCK_SIZE (2ul << 20)

/* ---- what a guest defines ---- */
/* GUEST("name", "what it does, one line", "option=VALUE what it means\n" "other=... ...\n"): the last two also go into an
 * ELF note, from where `pyvmm guests` reads them. An option on the command line that no line starts with is refused. */
#define GUEST(name, about, options)                                                                                   \
    const char guest_name[] = name;                                                                                   \
    const char guest_options[] = options;                                                                             \
    __attribute__((section(".note.pyvmm"), aligned(4), used)) static const struct {                                   \
        uint32_t name_size, size, type;                                                                               \
        char owner[8];                                                                                                \
        char text[(sizeof(about "\n" options) + 3) & ~3ul];                                                           \
    } guest_note = {6, sizeof(about "\n" options), PV_NOTE_ABOUT, "pyvmm", about "\n" options}
extern const char guest_name[];
extern const char guest_options[];
/* Runs on CPU 0; what it returns is the guest's exit status (0..255). */
int guest_main(void);

/* ---- entry.c: end ---- */
_Noreturn void leave(int status);
/* Prints "NAME: text" and leaves with status 2: a bad option, too little memory. */
_Noreturn void refuse(const char *text, const char *subject);

/* ---- console.c: serial output, whole strings at a time ---- */
void print(const char *text);
void print_bytes(const char *text, size_t size);
void print_number(uint64_t number);
void print_hex(uint64_t number);

/* ---- options.c ---- */
void options_init(void);
const char *option(const char *name, const char *otherwise);
bool option_is(const char *name, const char *otherwise, const char *value);
/* A number: decimal, or 0x...; with K, M or G behind it. Refuses anything else. */
uint64_t option_number(const char *name, uint64_t otherwise);
/* The same, at most `most`. */
uint64_t option_at_most(const char *name, uint64_t otherwise, uint64_t most);

/* ---- memory.c: RAM ---- */
/* The RAM that a guest works on: from 2 MiB to the end, without the MMIO hole, as one run of pages. */
struct region {
    uint64_t pages;
    uint64_t low_pages; /* of these, in front of the hole */
    uint64_t first_gpa;
};
#define HIGH_RAM (4ul << 30)

/* All RAM above `first_gpa` (>= 2 MiB). Maps it where it lies above 4 GiB. */
struct region memory_region(uint64_t first_gpa);
static inline uint64_t *region_page(const struct region *region, uint64_t index)
{
    uint64_t gpa = index < region->low_pages ? region->first_gpa + index * PAGE_SIZE
                                             : HIGH_RAM + (index - region->low_pages) * PAGE_SIZE;
    return (uint64_t *)gpa;
}
void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int byte, size_t size);
int memcmp(const void *a, const void *b, size_t size);
bool same_text(const char *a, const char *b);
size_t text_length(const char *text);

/* ---- smp.c ---- */
unsigned cpu_count(void); /* vCPUs that the machine has, or option cpus= where it cannot tell */
/* Runs work(cpu) on CPUs 0..count-1 at once, and returns when all have returned. */
void on_all_cpus(unsigned count, void (*work)(unsigned cpu));

/* ---- trap.c ---- */
struct trap { /* start.S fills it; offsets are in cpu.h */
    uint64_t vector, error, rip, rflags, rsp, cr2;
    uint64_t stack; /* where lib_trap runs */
    uint64_t spare;
};
extern struct trap traps[PV_MAX_CPUS];
extern volatile uint64_t interrupts[256]; /* taken so far, by vector */
/* Called in ring 3 for every exception; the default reports it and leaves with status 1. Must not return. */
extern void (*on_trap)(unsigned cpu, const struct trap *trap);
const char *exception_name(uint64_t vector);
/* Halts until interrupts[vector] is no longer `seen`. */
void wait_interrupt(unsigned vector, uint64_t seen);

/* ---- irq.c: to be called on CPU 0 ---- */
void irq_init(void); /* LAPIC on: before irq_route, and before the LAPIC's timer is used */
/* An ISA interrupt, edge-triggered, is to arrive as `vector` (0x20..0xfe), to be awaited by wait_interrupt. */
void irq_route(unsigned irq, unsigned vector);

/* ---- time.c ---- */
static inline uint64_t ticks(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}
uint64_t ticks_per_ms(void);
uint64_t lapic_per_ms(void); /* the LAPIC timer's counts, undivided; needs irq_init() and the timer to itself */

/* A time limit on waiting in a loop. It counts the time that the guest ran, not the time for which it was paused. */
struct patience {
    uint64_t left, last; /* TSC ticks */
};
struct patience patience_ms(uint64_t ms);
/* To be called in the loop; false when the time is up. */
bool patience_left(struct patience *patience);

/* ---- random: the one generator; the host's model in Python computes the same ---- */
static inline uint64_t mix(uint64_t x) /* splitmix64's output function */
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}
#define GOLDEN 0x9e3779b97f4a7c15

/* The next of a sequence of random numbers, of which `state` is where it is. */
static inline uint64_t random_next(uint64_t *state) { return mix(*state += GOLDEN); }
static inline uint64_t random_below(uint64_t *state, uint64_t limit)
{
    return (uint64_t)((unsigned __int128)random_next(state) * limit >> 64);
}

/* A bijection of 0..count-1, another one for each key. Cheap, and good enough to scatter. */
struct shuffle {
    uint64_t count, mask, key;
    unsigned shift;
};
static inline struct shuffle shuffle_of(uint64_t count, uint64_t key)
{
    unsigned bits = count > 1 ? 64 - (unsigned)__builtin_clzl(count - 1) : 0;
    return (struct shuffle){.count = count, .mask = (1ul << bits) - 1, .key = key, .shift = bits / 2 + 1};
}
static inline uint64_t shuffled(const struct shuffle *shuffle, uint64_t x)
{
    do { /* each step is a bijection of 0..mask; going on while outside 0..count-1 makes it one of these */
        x = (x * (shuffle->key | 1) + (shuffle->key >> 32)) & shuffle->mask;
        x ^= x >> shuffle->shift;
        x = (x * GOLDEN) & shuffle->mask;
        x ^= x >> shuffle->shift;
    } while (x >= shuffle->count);
    return x;
}

/* ---- ports and devices ---- */
static inline void out8(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline uint8_t in8(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline volatile uint32_t *lapic(unsigned reg) { return (volatile uint32_t *)(LAPIC_GPA + (uint64_t)reg); }

/* ---- ring 0: start.S says what the functions of GATE_* in cpu.h do ---- */
/* Asks until ring 0 was heard, which clears CF. KVM leaves an `int 4` that is on its way out of a saved state
 * (KVM_GET_VCPU_EVENTS), trusting that it comes again; a host that has moved rip behind it by then loses it. */
#define GATE_CALL "1: stc; int %[vector]; jc 1b"
static inline void gate(uint32_t function, uint64_t first, uint64_t second)
{
    __asm__ volatile(GATE_CALL
                     : "+a"(function)
                     : [vector] "i"(GATE_VECTOR), "D"(first), "S"(second)
                     : "rcx", "rdx", "memory", "cc");
}

static inline void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    __asm__ volatile(GATE_CALL
                     : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3])
                     : [vector] "i"(GATE_VECTOR), "0"(GATE_CPUID), "D"(leaf), "S"(subleaf)
                     : "cc");
}

#define progress ((volatile struct pv_progress *)PV_PROGRESS_GPA)
