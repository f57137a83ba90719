/* native.h: what the C side offers to Python, and the structs both look at. C prints nothing, exits never, calls no
 * Python and returns -errno. The Python side of these declarations is native.cdef. */
#pragma once

#include <pthread.h>
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

struct pv_rings;

struct pv_vcpu {
    int fd;
    uint32_t tid;         /* of the thread in pv_run; written by it before it sets place */
    struct kvm_run *run;
    struct pv_ports *ports;
    uint32_t request;     /* PV_REQUEST_*, a futex: the vCPU thread waits on it while parked */
    uint32_t place;       /* PV_PLACE_*, a futex: pv_wait_parked waits on it */
    uint64_t exits[PV_EXIT_REASONS]; /* by KVM_EXIT_*, written by the vCPU's thread alone */
    uint64_t interrupted; /* returns of KVM_RUN with EINTR */
    struct pv_rings *rings; /* NULL without dirty rings */
    uint32_t kicked;      /* 1: is to leave the guest once, a futex: pv_wait_kicked waits on it */
    uint64_t stretch_began; /* since it was last unparked, CLOCK_MONOTONIC in ns; 0: parked, ended or not begun */
    uint64_t stretch_awake; /* ns that the thread had been awake by then */
    uint64_t asleep_ns;     /* in earlier stretches */
    uint64_t entered;       /* when it first went to KVM_RUN, likewise; 0: not yet */
};

/* Runs until Python must decide: returns PV_RUN_*, or -errno of KVM_RUN. Obeys `request`; parks in here on PAUSE.
 * Call from the vCPU's own thread: all signals but the kick are blocked in it. */
int pv_run(struct pv_vcpu *vcpu) PV_CHECKED;

/* Enters KVM_RUN until it has returned `exits` times, and looks at nothing: the limit that benchmarks compare with. */
int pv_run_bare(int vcpu_fd, uint64_t exits) PV_CHECKED;

/* Sets the request and makes the vCPU thread look at it now, wherever it is. Any thread. */
void pv_request(struct pv_vcpu *vcpu, uint32_t request);

/* ns since its start in which the vCPU's thread neither ran, nor was ready to run, nor was parked. */
uint64_t pv_asleep(const struct pv_vcpu *vcpu);

/* The vCPU's thread will not call pv_run again: whoever waits for it to park is told. */
void pv_end(struct pv_vcpu *vcpu);

/* Waits until the vCPU is parked or ended: PV_PLACE_PARKED, PV_PLACE_ENDED, or -ETIMEDOUT. Any thread but the vCPU's
 * own. timeout_ns < 0: for ever. */
int pv_wait_parked(struct pv_vcpu *vcpu, int64_t timeout_ns) PV_CHECKED;

/* Makes the vCPU leave the guest, if it is there, and go on at once; pv_wait_kicked returns 0 when it has been outside
 * KVM_RUN since, or -ETIMEDOUT. For any one thread at a time, not the vCPU's own. timeout_ns < 0: for ever. */
void pv_kick(struct pv_vcpu *vcpu);
int pv_wait_kicked(struct pv_vcpu *vcpu, int64_t timeout_ns) PV_CHECKED;

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

/* Waits until it is another one than it is now; else the same. */
int pv_wait_change(const uint64_t *at, int64_t timeout_ns) PV_CHECKED;
/* Puts the file's first `size` bytes, shared, where pv_map mapped memory: the file then has its alignment. */
int pv_map_file(void *address, size_t size, int fd) PV_CHECKED;
/* Lets that process read our memory by process_vm_readv, where the kernel restricts it (Yama). 0: nobody. */
/* Gives up the space behind a range of a file (PV_FILE_HOLE), or keeps it (PV_FILE_ZEROS); it reads as zeros then. The
 * file keeps its size. */
#define PV_FILE_HOLE 0
#define PV_FILE_ZEROS 1
int pv_clear_file(int fd, int how, uint64_t offset, uint64_t size) PV_CHECKED;
int pv_allow_reader(int pid) PV_CHECKED;

/* ---- bits.c: page bitmaps, one bit a small page of RAM ---- */

struct pv_run_pages {
    uint64_t first, count; /* pages */
};

/* Sets `count` bits from `first` on. Any thread, also while another one takes. */
void pv_bits_set(uint64_t *bits, uint64_t first, uint64_t count);
/* Moves all bits of `from` into `to`, none of those set meanwhile is lost: how many there were. */
uint64_t pv_bits_take(uint64_t *to, uint64_t *from, uint64_t words);
void pv_bits_or(uint64_t *to, const uint64_t *from, uint64_t words);
/* Sets the bits of pages in any order. -EINVAL for one from `limit` on, -EEXIST for one whose bit is set. */
int pv_bits_mark(uint64_t *bits, const uint64_t *pages, uint64_t count, uint64_t limit) PV_CHECKED;
/* These two: of bitmaps that no other thread changes. */
void pv_bits_clear(uint64_t *bits, uint64_t first, uint64_t count);
void pv_bits_and_not(uint64_t *to, const uint64_t *from, uint64_t words);
uint64_t pv_bits_count(const uint64_t *bits, uint64_t pages);
/* How many runs of neighbouring set bits there are. */
uint64_t pv_bits_count_runs(const uint64_t *bits, uint64_t pages);
/* Writes the runs from page *next on, at most `room` of them, and returns how many; *next is then where to go on, and
 * no less than `pages` at the end. */
uint64_t pv_bits_runs(const uint64_t *bits, uint64_t pages, uint64_t *next, struct pv_run_pages *runs, uint64_t room);
/* The next *limit pages of these runs, from page *done of run *run on, as at most `room` runs; these say where to go on,
 * and how many pages are missing. Returns how many runs. */
uint32_t pv_runs_cut(const struct pv_run_pages *runs, uint64_t count, uint64_t *run, uint64_t *done, uint64_t *limit,
                     struct pv_run_pages *out, uint32_t room);

/* ---- ring.c: dirty rings ---- */

#define PV_SLOTS 2 /* memory slots: RAM below and above the hole */

struct pv_ring {
    struct pv_vcpu *vcpu;
    struct kvm_dirty_gfn *gfns; /* `entries` of them, shared with KVM */
    uint32_t next;              /* the entry to be read next, counted without end */
};

/* The rings of one VM. `lock` guards all that changes: next, taken, and who resets. */
struct pv_rings {
    int vm_fd;
    uint32_t entries; /* of each ring, a power of two */
    uint32_t count;   /* rings */
    uint32_t slots;
    struct {
        uint64_t first_page, pages; /* of RAM */
    } slot[PV_SLOTS];
    struct pv_ring ring[PV_MAX_CPUS];
    uint64_t *bits; /* pages harvested and not collected yet */
    uint64_t words;
    uint64_t taken; /* entries harvested so far */
    uint64_t owed;  /* of these, not given back to KVM yet */
    uint32_t blind; /* 1: pages may be unprotected of which there is no entry: all count as written, until the next trace */
    pthread_mutex_t lock;
};

int pv_rings_init(struct pv_rings *rings) PV_CHECKED;
void pv_rings_deinit(struct pv_rings *rings);
int pv_ring_map(int vcpu_fd, uint32_t entries, struct kvm_dirty_gfn **out) PV_CHECKED;
void pv_ring_unmap(struct kvm_dirty_gfn *gfns, uint32_t entries);

/* Moves the entries of all rings into `bits` of the rings and gives them back to KVM: 0 or more, or -errno. Any thread. */
int pv_rings_harvest(struct pv_rings *rings) PV_CHECKED;
/* The same, after every vCPU has left the guest once, and moves the bits into `bits`. Any thread but a vCPU's. */
int pv_rings_collect(struct pv_rings *rings, uint64_t *bits, int64_t timeout_ns) PV_CHECKED;

/* ---- bare.c: what benchmarks compare with ---- */

/* Answers `faults` page faults of small pages, in the barest loop there is: from `from`, by UFFDIO_MOVE of the page at
 * the same offset there (move), or by UFFDIO_COPY of its first page. base: of the registered range. 0 or -errno;
 * -ETIMEDOUT where none comes for a second. *nanoseconds: spent from a message read to its answer, all together. */
int pv_uffd_bare(int fd, uint8_t *base, uint8_t *from, int move, uint64_t faults, uint64_t *nanoseconds) PV_CHECKED;
/* Reads one byte each `stride` bytes, `count` times: nanoseconds that took. */
uint64_t pv_touch(const volatile uint8_t *at, uint64_t count, uint64_t stride);

/* ---- measure.c: what benchmarks of snapshots need ---- */

/* Waits until a word, that a guest writes, is `least` or more; or -ETIMEDOUT. Without the GIL: the page may be away. */
int pv_wait_word(const uint64_t *at, uint64_t least, int64_t timeout_ns) PV_CHECKED;
/* Puts the file's first `size` bytes, copied on write, where memory is mapped: lazy restore by the kernel alone. */
int pv_map_private(void *address, size_t size, int fd) PV_CHECKED;
/* How many pages of the file's first `size` bytes are in the page cache. */
int pv_resident(int fd, size_t size, uint64_t *pages) PV_CHECKED;

/* ---- engine.h: pages with homes ---- */

#include "engine.h"

/* ---- snapshot.h: pages in a file ---- */

#include "snapshot.h"

/* ---- stream.h: pages over a connection ---- */

#include "stream.h"

/* ---- peer.h: pages that stay with the source of a migration until they are needed ---- */

#include "peer.h"

/* ---- swap.h: pages in a file of our own ---- */

#include "swap.h"
