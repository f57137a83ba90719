/* fault.c: the thread that answers touches of pages that are away, and what happens where it cannot. No Python, no GIL:
 * a vCPU waits for every line here. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MESSAGES 32
#define MESSAGES_SHARED 1 /* where there are several threads: what one has read, no other can answer */

/* A vCPU with a signal pending that touches a page in kernel mode does not wait: the kernel has it touch the page again
 * and again. Where that page has failed already, nothing is to be done but to keep the storm small. */
#define FAILED_US 200

/* Who waits for a fault: a vCPU's thread, another of ours, or a worker of KVM's asynchronous page faults, which stands
 * for a vCPU that it has halted meanwhile (of several vCPUs it cannot be told for which). */
static struct pv_stall *stall_of(struct pv_engine *engine, uint32_t tid)
{
    uint32_t cpus = 0;
    for (; cpus < PV_MAX_CPUS && engine->vcpus[cpus]; cpus++)
        if (__atomic_load_n(&engine->vcpus[cpus]->tid, __ATOMIC_RELAXED) == tid)
            return &engine->stats.stalls[cpus];
    if (syscall(SYS_tgkill, getpid(), (pid_t)tid, 0) == 0)
        return &engine->stats.others;
    return cpus == 1 ? &engine->stats.stalls[0] : &engine->stats.workers;
}

static void note(struct pv_engine *engine, uint32_t home, int answer, uint32_t tid, uint64_t nanoseconds)
{
    struct pv_stall *stall = stall_of(engine, tid);
    int bucket = nanoseconds ? 63 - __builtin_clzll(nanoseconds) : 0;
    count_up(&engine->stats.faults, 1);
    count_up(&engine->stats.by_home[home], 1);
    count_up(&engine->stats.answers[answer < 0 ? PV_ANSWER_FAILED : answer], 1);
    count_up(&engine->stats.latency[bucket < PV_LATENCY_BUCKETS ? bucket : PV_LATENCY_BUCKETS - 1], 1);
    count_up(&engine->stats.nanoseconds, nanoseconds);
    count_up(&stall->faults, 1);
    count_up(&stall->nanoseconds, nanoseconds);
    note_longest(&stall->longest, nanoseconds);
}

static int answer_write(struct pv_engine *engine, uint64_t page)
{
    int error = trace_fault(engine, page);
    if (error == -ENOENT) { /* no longer registered: see bring_untouched() */
        uffd_wake(engine, ram_at(engine, page), PV_PAGE);
        return PV_ANSWER_TRACE;
    }
    return error ? error : PV_ANSWER_TRACE;
}

static void serve(struct pv_engine *engine, const struct uffd_msg *message, uint64_t begin)
{
    uint64_t flags = message->arg.pagefault.flags;
    uint64_t page = (message->arg.pagefault.address - (uintptr_t)engine->ram) / PV_PAGE, block = page / PV_BLOCK_PAGES;
    struct others others;
    int answer;
    others.unit.count = 0;
    if (page_home(engine, page) != PV_HOME_PRESENT && page_home(engine, page) != PV_HOME_ASIDE)
        limit_wait(engine, page);
    block_lock_as_is(engine, block);
    uint32_t home = page_home(engine, page);
    bool sampled = block_word(engine, block) & PV_BLOCK_SAMPLED;
    if (engine->page_words[page] & PV_PAGE_FAILED) {
        block_unlock(engine, block);
        (void)!usleep(FAILED_US);
        note(engine, home, -EIO, message->arg.pagefault.feat.ptid, pv_now() - begin);
        return;
    }
    if (home != PV_HOME_PRESENT) {
        answer = sampled ? bring_sampled(engine, page) : bring_touched(engine, page, &others);
        /* A writer held by protection while its page was taken out waits for this page and is woken by its arrival;
         * so is every other that waits for a page of what arrived. */
    } else if (flags & UFFD_PAGEFAULT_FLAG_WP) {
        answer = answer_write(engine, page);
    } else {
        answer = bring_untouched(engine, page, flags & UFFD_PAGEFAULT_FLAG_WRITE);
    }
    if (answer < 0)
        fail(engine, page, -answer);
    block_unlock(engine, block);
    bring_others(engine, &others);
    if (sampled)
        count_up(&engine->sampling.touch_ns, pv_now() - begin);
    note(engine, home, answer, message->arg.pagefault.feat.ptid, pv_now() - begin);
}

static void *answer_faults(void *argument)
{
    struct pv_engine *engine = argument;
    struct pollfd ready[] = {{.fd = engine->uffd, .events = POLLIN}, {.fd = engine->wake, .events = POLLIN}};
    struct uffd_msg messages[MESSAGES];
    for (;;) {
        if (poll(ready, 2, -1) < 0)
            continue; /* EINTR: all signals are blocked, but a debugger may stop us */
        if (ready[1].revents)
            return NULL;
        uint32_t most = engine->workers > 1 ? MESSAGES_SHARED : MESSAGES;
        ssize_t got = read(engine->uffd, messages, most * sizeof(messages[0]));
        uint64_t begin = pv_now();
        for (ssize_t i = 0; i < got / (ssize_t)sizeof(messages[0]); i++)
            if (messages[i].event == UFFD_EVENT_PAGEFAULT) {
                __atomic_fetch_add(&engine->waiting, 1, __ATOMIC_RELAXED);
                serve(engine, &messages[i], begin);
                __atomic_fetch_sub(&engine->waiting, 1, __ATOMIC_RELAXED);
            }
    }
}

int fault_thread_start(struct pv_engine *engine)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* inherited: the program's signals are for its other threads */
    int error = 0;
    while (!error && engine->threaded < engine->workers) {
        pthread_t *thread = &engine->threads[engine->threaded];
        error = pthread_create(thread, NULL, answer_faults, engine);
        if (!error)
            (void)pthread_setname_np(*thread, "pyvmm faults");
        engine->threaded += !error;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return engine->threaded ? 0 : -error; /* fewer threads than wanted answer all faults too */
}

void fault_thread_end(struct pv_engine *engine)
{
    if (engine->threaded)
        (void)!eventfd_write(engine->wake, 1);
    while (engine->threaded)
        pthread_join(engine->threads[--engine->threaded], NULL);
}

/* ---- where no answer can be given: nobody goes on with a wrong byte; whoever cares is told ---- */

void fail(struct pv_engine *engine, uint64_t page, int error)
{
    pthread_mutex_lock(&engine->fail_mutex);
    engine->failure = (struct pv_failure){page, page_home(engine, page), error, engine->failure.count + 1};
    if (page_home(engine, page) != PV_HOME_PRESENT) {
        bool first = engine->failed_first == engine->failed_end;
        engine->page_words[page] |= PV_PAGE_FAILED;
        engine->failed_first = first || page < engine->failed_first ? page : engine->failed_first;
        engine->failed_end = first || page >= engine->failed_end ? page + 1 : engine->failed_end;
    }
    pthread_cond_broadcast(&engine->fail_news);
    pthread_mutex_unlock(&engine->fail_mutex);
}

int pv_engine_wait_failure(struct pv_engine *engine, struct pv_failure *out)
{
    pthread_mutex_lock(&engine->fail_mutex);
    while (!engine->failures_ended && engine->failures_told == engine->failure.count)
        pthread_cond_wait(&engine->fail_news, &engine->fail_mutex);
    int news = engine->failures_told != engine->failure.count && !engine->failures_ended;
    engine->failures_told = engine->failure.count;
    *out = engine->failure;
    pthread_mutex_unlock(&engine->fail_mutex);
    return news;
}

void pv_engine_end_failures(struct pv_engine *engine)
{
    pthread_mutex_lock(&engine->fail_mutex);
    engine->failures_ended = true;
    pthread_cond_broadcast(&engine->fail_news);
    pthread_mutex_unlock(&engine->fail_mutex);
}

uint64_t pv_engine_retry(struct pv_engine *engine)
{
    if (!pv_engine_equipped(engine))
        return 0;
    pthread_mutex_lock(&engine->fail_mutex);
    uint64_t first = engine->failed_first, end = engine->failed_end;
    uint64_t failures = engine->failure.count;
    engine->failed_first = engine->failed_end = 0;
    pthread_mutex_unlock(&engine->fail_mutex);
    for (uint64_t page = first; page < end; page++) {
        if (!(engine->page_words[page] & PV_PAGE_FAILED))
            continue;
        block_lock(engine, page / PV_BLOCK_PAGES);
        engine->page_words[page] &= ~PV_PAGE_FAILED;
        block_unlock(engine, page / PV_BLOCK_PAGES);
    }
    uffd_wake(engine, engine->ram, engine->size);
    return failures;
}
