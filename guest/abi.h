/* abi.h: all that host and guests have agreed on: ports, fixed addresses, the progress page. Read by C, by assembly and
 * by the host's Python (through cffi). Physical addresses, bytes. */
#pragma once

/* ---- ports ---- */
#define PV_PORT_SERIAL 0x3f8 /* 16550A, IRQ 4 */
#define PV_IRQ_SERIAL 4
#define PV_PORT_EXIT 0xf4 /* isa-debug-exit: byte b ends the guest with status b (QEMU: 2b+1) */

/* ---- fixed addresses: 0x10000..0x1ffff is ours, no boot protocol puts anything there ---- */
#define PV_PROGRESS_GPA 0x10000 /* struct pv_progress */
#define PV_TRAMPOLINE_GPA 0x12000 /* where application processors start, in real mode: SIPI vector 0x12 */

#define PV_MAX_CPUS 64

/* ---- virtio-mmio: device n, of those that a VM was given, at PV_VIRTIO_GPA + n * PV_VIRTIO_STEP ---- */
#define PV_VIRTIO_GPA 0xd0000000
#define PV_VIRTIO_STEP 0x1000
#define PV_VIRTIO_SLOTS 7
#define PV_VIRTIO_IRQ(n) ((n) < 3 ? 5 + (n) : 6 + (n)) /* 5 to 12 without 8, which KVM keeps for a clock */

/* ---- ELF note of owner "pyvmm": a line that says what the guest does, then a line an option ---- */
#define PV_NOTE_ABOUT 1

/* ---- the progress page: written by the guest (but for some words), read by the host without an exit ---- */
#define PV_PROGRESS_MAGIC 0x5353524750565950 /* "PYVPGRSS" */
#define PV_PROGRESS_VERSION 1

#define PV_STATUS_BOOTING 0
#define PV_STATUS_RUNNING 1
#define PV_STATUS_DONE 2
#define PV_STATUS_FAILED 3

#ifndef __ASSEMBLER__
#include <stdint.h>

/* One vCPU's work; a cache line of its own, so that vCPUs do not slow each other. */
struct pv_work {
    uint64_t count;   /* units of work done: pages checked, pages written, ticks, ... */
    uint64_t writes;  /* of these, pages written */
    uint64_t pass;    /* passes over the region completed */
    uint64_t index;   /* place in the present pass */
    uint64_t longest_gap; /* TSC ticks between two units of work, where the guest keeps it; the host may write 0 */
    uint64_t spare[3];
};

struct pv_progress {
    uint64_t magic;
    uint32_t version;
    uint32_t cpus;    /* vCPUs that take part */
    uint32_t status;  /* PV_STATUS_* */
    uint32_t detail;  /* guest's own, such as an exception's vector */
    char guest[16];   /* name, NUL-padded */
    uint64_t seed;
    uint64_t region_gpa;  /* the memory worked on, where the guest works on one; it may go on above the MMIO hole */
    uint64_t region_size; /* bytes of RAM in it */
    /* The first wrong byte, where status is PV_STATUS_FAILED. */
    uint64_t wrong_gpa;
    uint64_t wrong_expected;
    uint64_t wrong_found;
    uint64_t tsc_khz; /* of longest_gap; 0 where the guest keeps none */
    /* Written by the host alone, all four while no vCPU runs: the guest looks at the generation to see whether it goes on
     * from a snapshot, and has a seed that no other VM has. */
    uint8_t generation[16]; /* random, another one after each restore; zeros in a VM that booted */
    uint64_t restores;      /* how often it was restored; snapshots of restored VMs count on */
    uint64_t random_seed;   /* at the first instruction, and with each generation; 0 where the loader gives none */
    struct pv_work work[PV_MAX_CPUS];
};
#endif
