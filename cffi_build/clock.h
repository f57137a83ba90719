/* clock.h: the monotonic clock, in nanoseconds. */
#ifndef PYVMM_CLOCK_H
#define PYVMM_CLOCK_H

#include <stdint.h>
#include <time.h>

#define SECOND_NS 1000000000ull
#define MILLISECOND_NS 1000000ull

static inline uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

/* For waits that take a point in time. */
static inline struct timespec time_after(uint64_t nanoseconds)
{
    uint64_t until = now_ns() + nanoseconds;
    return (struct timespec){.tv_sec = (time_t)(until / SECOND_NS), .tv_nsec = (long)(until % SECOND_NS)};
}

#endif
