/* native.h: what the C side offers to Python, and the structs both look at. C prints nothing, exits never, calls no
 * Python and returns -errno. The Python side of these declarations is native.cdef. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../guest/abi.h"
#include "uapi.h"

#define PV_CHECKED __attribute__((warn_unused_result))

/* ---- run.c: the vCPU thread ---- */

/* What is asked of a vCPU thread. */
#define PV_REQUEST_RUN 0
#define PV_REQUEST_PAUSE 1
#define PV_REQUEST_STOP 2

/* Where a vCPU thread is. OUTSIDE: not in pv_run (Python decides about an exit, or the thread is not started). */
#define PV_PLACE_OUTSIDE 0
#define PV_PLACE_RUNNING 1
#define PV_PLACE_PARKED 2
#define PV_PLACE_ENDED 3

/* Why pv_run returned, if not with -errno. */
#define PV_RUN_EXIT 0    /* run->exit_reason is for Python to decide about */
#define PV_RUN_STOPPED 1 /* PV_REQUEST_STOP was seen, and no I/O is half done */

/* What an access to a port does. */
#define PV_PORT_FLOAT 0  /* nothing is there: reads all ones, writes vanish, both counted; never leaves C */
#define PV_PORT_PYTHON 1 /* a device's: returns to Python */
#define PV_PORTS 65536

#define PV_EXIT_REASONS 64

/* Ports of one VM, shared by its vCPUs. */
struct pv_ports {
    uint8_t action[PV_PORTS];
    uint32_t reads[PV_PORTS]; /* of floating ports; relaxed, a lost count is no harm */
    uint32_t writes[PV_PORTS];
};

struct pv_vcpu {
    int fd;
    uint32_t tid;         /* of the thread in pv_run; written by it before it sets place */
    struct kvm_run *run;
    struct pv_ports *ports;
    uint32_t request;     /* PV_REQUEST_*, a futex: the vCPU thread waits on it while parked */
    uint32_t place;       /* PV_PLACE_*, a futex: pv_wait_parked waits on it */
    uint64_t exits[PV_EXIT_REASONS]; /* by KVM_EXIT_*, written by the vCPU's thread alone */
    uint64_t interrupted; /* returns of KVM_RUN with EINTR */
};

/* Runs until Python must decide: returns PV_RUN_*, or -errno of KVM_RUN. Obeys `request`; parks in here on PAUSE.
 * Call from the vCPU's own thread: all signals but the kick are blocked in it. */
int pv_run(struct pv_vcpu *vcpu) PV_CHECKED;

/* Enters KVM_RUN until it has returned `exits` times, and looks at nothing: the limit that benchmarks compare with. */
int pv_run_bare(int vcpu_fd, uint64_t exits) PV_CHECKED;

/* Sets the request and makes the vCPU thread look at it now, wherever it is. Any thread. */
void pv_request(struct pv_vcpu *vcpu, uint32_t request);

/* The vCPU's thread will not call pv_run again: whoever waits for it to park is told. */
void pv_end(struct pv_vcpu *vcpu);

/* Waits until the vCPU is parked or ended: PV_PLACE_PARKED, PV_PLACE_ENDED, or -ETIMEDOUT. Any thread but the vCPU's
 * own. timeout_ns < 0: for ever. */
int pv_wait_parked(struct pv_vcpu *vcpu, int64_t timeout_ns) PV_CHECKED;

/* KVM_SYSTEM_EVENT_* of a KVM_EXIT_SYSTEM_EVENT. */
uint32_t pv_system_event(const struct kvm_run *run);

struct kvm_run *pv_map_run(int vcpu_fd, size_t size);
void pv_unmap_run(struct kvm_run *run, size_t size);

/* ---- map.c: memory ---- */

#define PV_BACKING_THP 0     /* MADV_HUGEPAGE */
#define PV_BACKING_SMALL 1   /* MADV_NOHUGEPAGE */
#define PV_BACKING_HUGETLB 2 /* MAP_HUGETLB of 2 MiB */

/* Maps `size` bytes of anonymous memory at a multiple of 2 MiB: 0 and *out, or -errno. */
int pv_map(size_t size, int backing, void **out) PV_CHECKED;
int pv_unmap(void *address, size_t size) PV_CHECKED;
int pv_madvise(void *address, size_t size, int advice) PV_CHECKED;

/* Reads or writes one byte, without the GIL (the page may have to be faulted in by another thread). */
uint8_t pv_peek(const volatile uint8_t *address);
void pv_poke(volatile uint8_t *address, uint8_t value);
/* Copies with the GIL released: either side may be guest memory. */
void pv_copy(void *to, const void *from, size_t size);
void pv_zero(void *to, size_t size);

/* ---- sys.c: system calls ---- */

int pv_ioctl(int fd, unsigned long request, void *argument) PV_CHECKED;
int pv_ioctl_value(int fd, unsigned long request, unsigned long argument) PV_CHECKED;
int pv_userfaultfd(int flags) PV_CHECKED;
/* Reads one message: its UFFD_EVENT_* with *flags and *address of a page fault, or -errno. */
int pv_uffd_read(int fd, uint64_t *flags, uint64_t *address) PV_CHECKED;

/* A userfaultfd from an open /dev/userfaultfd: a descriptor, or -errno. */
int pv_userfaultfd_device(int device, int flags) PV_CHECKED;

/* Puts the file's first `size` bytes, shared, where pv_map mapped memory: the file then has its alignment. */
int pv_map_file(void *address, size_t size, int fd) PV_CHECKED;

/* ---- engine.h: pages with homes ---- */

#include "engine.h"
