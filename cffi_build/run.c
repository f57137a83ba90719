/* run.c: the loop around KVM_RUN, and how other threads pause, kick and stop a vCPU. */
#define _GNU_SOURCE
#include "native.h"
#include "clock.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Interrupts KVM_RUN; its handler does nothing. The first real-time signal is left to the embedding program. */
#define KICK_SIGNAL (SIGRTMIN + 1)

static void on_kick(int signal) { (void)signal; }

static pthread_once_t kick_once = PTHREAD_ONCE_INIT;

static void kick_init(void)
{
    struct sigaction action = {.sa_handler = on_kick}; /* no SA_RESTART: KVM_RUN must return */
    sigemptyset(&action.sa_mask);
    sigaction(KICK_SIGNAL, &action, NULL);
}

/* Leaves the program's signals to its other threads: Python handles them in its main thread, which waits elsewhere. */
static void block_foreign_signals(void)
{
    sigset_t set;
    sigfillset(&set);
    sigdelset(&set, KICK_SIGNAL);
    sigdelset(&set, SIGSEGV);
    sigdelset(&set, SIGBUS);
    sigdelset(&set, SIGFPE);
    sigdelset(&set, SIGILL);
    sigdelset(&set, SIGABRT);
    pthread_sigmask(SIG_SETMASK, &set, NULL);
}

static int futex_wait(uint32_t *word, uint32_t value, const struct timespec *deadline)
{
    /* FUTEX_WAIT_BITSET: an absolute CLOCK_MONOTONIC deadline, so that a spurious return does not extend the wait. */
    if (syscall(SYS_futex, word, FUTEX_WAIT_BITSET_PRIVATE, value, deadline, NULL, FUTEX_BITSET_MATCH_ANY) == 0)
        return 0;
    return -errno;
}

static void futex_wake(uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }

/* On the vCPU's thread, outside KVM_RUN: whoever kicked it is told. */
static void answer_kick(struct pv_vcpu *vcpu)
{
    /* seq_cst: pairs with pv_kick, see there */
    if (__atomic_load_n(&vcpu->kicked, __ATOMIC_SEQ_CST)) {
        __atomic_store_n(&vcpu->kicked, 0, __ATOMIC_SEQ_CST);
        futex_wake(&vcpu->kicked);
    }
}

static void set_place(struct pv_vcpu *vcpu, uint32_t place)
{
    /* release: pairs with the acquire in pv_wait_parked, so that whoever sees PARKED sees all the vCPU did before */
    __atomic_store_n(&vcpu->place, place, __ATOMIC_SEQ_CST);
    answer_kick(vcpu);
}

/* ns in which the vCPU's thread ran or was ready to, by the kernel (Documentation/scheduler/sched-stats.rst). */
static uint64_t awake_ns(const struct pv_vcpu *vcpu)
{
    char path[64], text[96];
    unsigned long long ran, ready;
    snprintf(path, sizeof(path), "/proc/self/task/%u/schedstat", vcpu->tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);
    if (fd >= 0)
        close(fd);
    text[size > 0 ? size : 0] = '\0';
    return sscanf(text, "%llu %llu", &ran, &ready) == 2 ? ran + ready : 0;
}

/* A stretch of time in which the vCPU is not parked. */
static void stretch_begins(struct pv_vcpu *vcpu)
{
    vcpu->stretch_awake = awake_ns(vcpu);
    __atomic_store_n(&vcpu->stretch_began, now_ns(), __ATOMIC_RELEASE);
}

static uint64_t asleep_in_stretch(const struct pv_vcpu *vcpu)
{
    uint64_t began = __atomic_load_n(&vcpu->stretch_began, __ATOMIC_ACQUIRE); /* 0: parked, ended, or not begun */
    uint64_t all = began ? now_ns() - began : 0, awake = began ? awake_ns(vcpu) - vcpu->stretch_awake : 0;
    return all > awake ? all - awake : 0;
}

static void stretch_ends(struct pv_vcpu *vcpu)
{
    uint64_t asleep = asleep_in_stretch(vcpu);
    __atomic_store_n(&vcpu->stretch_began, 0, __ATOMIC_RELEASE);
    __atomic_fetch_add(&vcpu->asleep_ns, asleep, __ATOMIC_RELAXED);
}

uint64_t pv_asleep(const struct pv_vcpu *vcpu)
{
    return __atomic_load_n(&vcpu->asleep_ns, __ATOMIC_RELAXED) + asleep_in_stretch(vcpu);
}

static void park(struct pv_vcpu *vcpu)
{
    stretch_ends(vcpu);
    set_place(vcpu, PV_PLACE_PARKED);
    futex_wake(&vcpu->place);
    while (__atomic_load_n(&vcpu->request, __ATOMIC_ACQUIRE) == PV_REQUEST_PAUSE)
        futex_wait(&vcpu->request, PV_REQUEST_PAUSE, NULL);
    set_place(vcpu, PV_PLACE_RUNNING);
    stretch_begins(vcpu);
}

/* A port access that no device claims: answered here. Returns 0 if a device claims any of its bytes. */
static int float_port(struct pv_vcpu *vcpu, struct kvm_run *run)
{
    struct pv_ports *ports = vcpu->ports;
    uint32_t port = run->io.port;
    for (uint32_t i = 0; i < run->io.size; i++)
        if (ports->action[(port + i) % PV_PORTS] != PV_PORT_FLOAT)
            return 0;
    uint32_t *counts = run->io.direction == KVM_EXIT_IO_IN ? ports->reads : ports->writes;
    __atomic_fetch_add(&counts[port], run->io.count, __ATOMIC_RELAXED);
    if (run->io.direction == KVM_EXIT_IO_IN)
        /* SAFETY: KVM puts size * count bytes at data_offset, inside the mapping of kvm_run */
        memset((uint8_t *)run + run->io.data_offset, 0xff, (size_t)run->io.size * run->io.count);
    return 1;
}

static int run_loop(struct pv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    for (;;) {
        /* Order matters: immediate_exit is cleared before the request is read, and pv_request writes them the other
         * way round. A request that comes between the two is seen either here or by KVM_RUN. */
        __atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        answer_kick(vcpu);
        uint32_t request = __atomic_load_n(&vcpu->request, __ATOMIC_SEQ_CST);
        if (request != PV_REQUEST_RUN)
            /* KVM_RUN then only completes the I/O of the last exit, which must not be half done in a saved state. */
            run->immediate_exit = 1;

        if (ioctl(vcpu->fd, KVM_RUN, 0) == 0) {
            uint32_t reason = run->exit_reason;
            vcpu->exits[reason < PV_EXIT_REASONS ? reason : 0]++;
            if (reason == KVM_EXIT_IO && float_port(vcpu, run))
                continue;
            if (reason == KVM_EXIT_DIRTY_RING_FULL && vcpu->rings) {
                int result = pv_rings_harvest(vcpu->rings);
                if (result < 0)
                    return result;
                continue;
            }
            return PV_RUN_EXIT;
        }
        if (errno == EAGAIN) /* an application processor that has just had its INIT or SIPI */
            continue;
        if (errno != EINTR)
            return -errno;
        vcpu->interrupted++;
        if (request == PV_REQUEST_STOP)
            return PV_RUN_STOPPED;
        if (request == PV_REQUEST_PAUSE)
            park(vcpu);
    }
}

int pv_run(struct pv_vcpu *vcpu)
{
    pthread_once(&kick_once, kick_init);
    uint32_t tid = (uint32_t)gettid();
    if (vcpu->tid != tid) {
        block_foreign_signals();
        __atomic_store_n(&vcpu->tid, tid, __ATOMIC_SEQ_CST);
        stretch_begins(vcpu);
        vcpu->entered = vcpu->entered ? vcpu->entered : vcpu->stretch_began;
    }
    set_place(vcpu, PV_PLACE_RUNNING);
    int result = run_loop(vcpu);
    set_place(vcpu, PV_PLACE_OUTSIDE);
    return result;
}

int pv_run_bare(int vcpu_fd, uint64_t exits)
{
    while (exits--)
        if (ioctl(vcpu_fd, KVM_RUN, 0) < 0)
            return -errno;
    return 0;
}

void pv_end(struct pv_vcpu *vcpu)
{
    stretch_ends(vcpu);
    set_place(vcpu, PV_PLACE_ENDED);
    futex_wake(&vcpu->place);
}

/* Its thread is in pv_run or was a moment ago. */
static void interrupt(struct pv_vcpu *vcpu)
{
    syscall(SYS_tgkill, getpid(), (pid_t)__atomic_load_n(&vcpu->tid, __ATOMIC_SEQ_CST), KICK_SIGNAL);
}

void pv_request(struct pv_vcpu *vcpu, uint32_t request)
{
    __atomic_store_n(&vcpu->request, request, __ATOMIC_SEQ_CST);
    if (request != PV_REQUEST_RUN) /* cleared by the vCPU's thread alone: it may be set for a kick as well */
        __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    futex_wake(&vcpu->request);
    /* A thread outside pv_run reads the request when it comes back; one inside may sit in KVM_RUN. */
    if (request != PV_REQUEST_RUN && __atomic_load_n(&vcpu->place, __ATOMIC_SEQ_CST) == PV_PLACE_RUNNING)
        interrupt(vcpu);
}

void pv_kick(struct pv_vcpu *vcpu)
{
    /* The loop clears immediate_exit, then looks at `kicked`; we write them the other way round, as in pv_request. And it
     * writes `place`, then looks at `kicked`, where we write that and then look at `place`: one sees the other. */
    __atomic_store_n(&vcpu->kicked, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&vcpu->place, __ATOMIC_SEQ_CST) != PV_PLACE_RUNNING) {
        __atomic_store_n(&vcpu->kicked, 0, __ATOMIC_SEQ_CST);
        return;
    }
    __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    interrupt(vcpu);
}

int pv_wait_kicked(struct pv_vcpu *vcpu, int64_t timeout_ns)
{
    struct timespec deadline = time_after((uint64_t)timeout_ns);
    while (__atomic_load_n(&vcpu->kicked, __ATOMIC_ACQUIRE))
        if (futex_wait(&vcpu->kicked, 1, timeout_ns < 0 ? NULL : &deadline) == -ETIMEDOUT)
            return -ETIMEDOUT;
    return 0;
}

int pv_wait_parked(struct pv_vcpu *vcpu, int64_t timeout_ns)
{
    struct timespec deadline = time_after((uint64_t)timeout_ns);
    for (;;) {
        /* acquire: pairs with set_place */
        uint32_t place = __atomic_load_n(&vcpu->place, __ATOMIC_ACQUIRE);
        if (place == PV_PLACE_PARKED || place == PV_PLACE_ENDED)
            return (int)place;
        if (futex_wait(&vcpu->place, place, timeout_ns < 0 ? NULL : &deadline) == -ETIMEDOUT)
            return -ETIMEDOUT;
    }
}

struct kvm_run *pv_map_run(int vcpu_fd, size_t size)
{
    void *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, 0);
    return run == MAP_FAILED ? NULL : run;
}

void pv_unmap_run(struct kvm_run *run, size_t size) { munmap(run, size); }

uint32_t pv_system_event(const struct kvm_run *run) { return run->system_event.type; }
