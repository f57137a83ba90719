/* uffd.c: userfaultfd's ioctls as the engine needs them (Documentation/admin-guide/mm/userfaultfd.rst), and which parts
 * of RAM are registered. */
#define _GNU_SOURCE
#include "engine_inside.h"
#include "clock.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>

#define PATIENCE_NS 2000000000ull /* with EAGAIN: whoever changes the mapping should be through long before */
#define BUSY_NS 5000000ull        /* with EBUSY: the kernel may hold a page for the moment, or for long */

uint64_t pv_now(void) { return now_ns(); }

/* After an ioctl failed: has it done a part, or is it worth another try? Else -errno. */
static int another_try(struct pv_engine *engine, int error, int64_t part, uint64_t *done, uint64_t *since)
{
    if (part > 0) {
        *done += (uint64_t)part;
        *since = 0;
        return 0;
    }
    if (error != EAGAIN && error != EINTR && error != EBUSY)
        return -error;
    count_up(&engine->stats.retries, 1);
    uint64_t now = pv_now();
    *since = *since ? *since : now;
    if (now - *since > (error == EBUSY ? BUSY_NS : PATIENCE_NS))
        return -error;
    sched_yield();
    return 0;
}

int uffd_copy(struct pv_engine *engine, void *to, const void *from, uint64_t size, uint64_t mode)
{
    for (uint64_t done = 0, since = 0; done < size;) {
        struct uffdio_copy copy = {(uintptr_t)to + done, (uintptr_t)from + done, size - done, mode, 0};
        if (ioctl(engine->uffd, UFFDIO_COPY, &copy) == 0)
            return 0;
        int error = another_try(engine, errno, copy.copy, &done, &since);
        if (error)
            return error;
    }
    return 0;
}

int uffd_zero(struct pv_engine *engine, void *to, uint64_t size)
{
    for (uint64_t done = 0, since = 0; done < size;) {
        struct uffdio_zeropage zero = {{(uintptr_t)to + done, size - done}, 0, 0};
        if (ioctl(engine->uffd, UFFDIO_ZEROPAGE, &zero) == 0)
            return 0;
        int error = another_try(engine, errno, zero.zeropage, &done, &since);
        if (error)
            return error;
    }
    return 0;
}

int uffd_move(struct pv_engine *engine, int fd, void *to, void *from, uint64_t size)
{
    for (uint64_t done = 0, since = 0; done < size;) {
        struct uffdio_move move = {(uintptr_t)to + done, (uintptr_t)from + done, size - done,
                                   UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES, 0};
        if (ioctl(fd, UFFDIO_MOVE, &move) == 0)
            return 0;
        int error = another_try(engine, errno, move.move, &done, &since);
        if (error)
            return error;
    }
    return 0;
}

int uffd_protect(struct pv_engine *engine, void *address, uint64_t size, bool on)
{
    struct uffdio_writeprotect protect = {{(uintptr_t)address, size}, on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
    for (uint64_t done = 0, since = 0; ioctl(engine->uffd, UFFDIO_WRITEPROTECT, &protect) < 0;) {
        int error = another_try(engine, errno, 0, &done, &since);
        if (error)
            return error;
    }
    return 0;
}

void uffd_wake(struct pv_engine *engine, void *address, uint64_t size)
{
    struct uffdio_range range = {(uintptr_t)address, size};
    (void)!ioctl(engine->uffd, UFFDIO_WAKE, &range); /* fails only for a range that is no range */
}

/* ---- spans ---- */

static uint64_t span_of(uint64_t page) { return page >> (SPAN_SHIFT - 12); }

static struct uffdio_range span_range(const struct pv_engine *engine, uint64_t span)
{
    uint64_t start = span << SPAN_SHIFT, left = engine->size - start;
    return (struct uffdio_range){(uintptr_t)engine->ram + start, left < 1ull << SPAN_SHIFT ? left : 1ull << SPAN_SHIFT};
}

/* Registers what the users need. Write protection once registered stays until nobody is left: to unregister would let
 * touches of pages that are away read zeros for a moment. */
static int span_update(struct pv_engine *engine, uint64_t span)
{
    struct span *own = &engine->spans[span];
    uint64_t modes = own->users ? UFFDIO_REGISTER_MODE_MISSING : 0;
    if (own->users && (own->wp_users || own->modes & UFFDIO_REGISTER_MODE_WP))
        modes |= UFFDIO_REGISTER_MODE_WP;
    if (modes == own->modes)
        return 0;
    if (modes) {
        int error = engine->threaded ? 0 : fault_thread_start(engine);
        struct uffdio_register request = {.range = span_range(engine, span), .mode = modes};
        if (!error && ioctl(engine->uffd, UFFDIO_REGISTER, &request) < 0)
            error = -errno;
        if (error)
            return error;
        count_up(&engine->stats.arms, own->modes == 0);
    } else {
        struct uffdio_range range = span_range(engine, span);
        if (ioctl(engine->uffd, UFFDIO_UNREGISTER, &range) < 0)
            return -errno; /* it stays registered: faults are still answered */
        count_up(&engine->stats.disarms, 1);
    }
    own->modes = modes;
    return 0;
}

int span_hold(struct pv_engine *engine, uint64_t page, bool wp)
{
    struct span *own = &engine->spans[span_of(page)];
    pthread_mutex_lock(&engine->span_mutex);
    own->users++;
    own->wp_users += wp;
    int error = span_update(engine, span_of(page));
    if (error) {
        own->users--;
        own->wp_users -= wp;
    }
    pthread_mutex_unlock(&engine->span_mutex);
    return error;
}

bool span_keep(struct pv_engine *engine, uint64_t page)
{
    struct span *own = &engine->spans[span_of(page)];
    pthread_mutex_lock(&engine->span_mutex);
    bool armed = own->modes != 0;
    own->users += armed;
    pthread_mutex_unlock(&engine->span_mutex);
    return armed;
}

void span_add(struct pv_engine *engine, uint64_t page, uint64_t users)
{
    pthread_mutex_lock(&engine->span_mutex);
    engine->spans[span_of(page)].users += users;
    pthread_mutex_unlock(&engine->span_mutex);
}

void span_release(struct pv_engine *engine, uint64_t page, uint64_t users, bool wp)
{
    struct span *own = &engine->spans[span_of(page)];
    pthread_mutex_lock(&engine->span_mutex);
    own->users -= users;
    own->wp_users -= wp;
    (void)!span_update(engine, span_of(page));
    pthread_mutex_unlock(&engine->span_mutex);
}

int span_hold_all(struct pv_engine *engine, bool wp)
{
    for (uint64_t page = 0; page < engine->pages; page += 1ull << (SPAN_SHIFT - 12)) {
        int error = span_hold(engine, page, wp);
        if (!error)
            continue;
        while (page) {
            page -= 1ull << (SPAN_SHIFT - 12);
            span_release(engine, page, 1, wp);
        }
        return error;
    }
    return 0;
}

void span_release_all(struct pv_engine *engine, bool wp)
{
    for (uint64_t page = 0; page < engine->pages; page += 1ull << (SPAN_SHIFT - 12))
        span_release(engine, page, 1, wp);
}
