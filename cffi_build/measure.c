/* measure.c: what benchmarks of snapshots need of C: to wait for a guest's work without the GIL, the page cache's view of
 * a file, and a file as a guest's RAM. */
#define _GNU_SOURCE
#include "native.h"
#include "clock.h"

#include <errno.h>
#include <stdlib.h>

#define PAGE 4096ull
#define LOOK_NS 20000 /* from one look to the next; the kernel's timer slack comes on top */

int pv_wait_word(const uint64_t *at, uint64_t least, int64_t timeout_ns)
{
    int64_t end = (int64_t)now_ns() + timeout_ns;
    while (__atomic_load_n(at, __ATOMIC_RELAXED) < least) {
        struct timespec pause = {0, LOOK_NS};
        if ((int64_t)now_ns() >= end)
            return -ETIMEDOUT;
        nanosleep(&pause, NULL);
    }
    return 0;
}

int pv_wait_change(const uint64_t *at, int64_t timeout_ns)
{
    int64_t end = (int64_t)now_ns() + timeout_ns;
    uint64_t first = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (__atomic_load_n(at, __ATOMIC_RELAXED) == first) {
        struct timespec pause = {0, LOOK_NS};
        if ((int64_t)now_ns() >= end)
            return -ETIMEDOUT;
        nanosleep(&pause, NULL);
    }
    return 0;
}

int pv_map_private(void *address, size_t size, int fd)
{
    int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
    return mmap(address, size, PROT_READ | PROT_WRITE, flags, fd, 0) == MAP_FAILED ? -errno : 0;
}

int pv_resident(int fd, size_t size, uint64_t *pages)
{
    size_t count = (size + PAGE - 1) / PAGE;
    void *file = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    if (file == MAP_FAILED)
        return -errno;
    unsigned char *found = malloc(count);
    int error = !found ? -ENOMEM : mincore(file, size, found) ? -errno : 0;
    *pages = 0;
    for (size_t i = 0; !error && i < count; i++)
        *pages += found[i] & 1;
    free(found);
    munmap(file, size);
    return error;
}
