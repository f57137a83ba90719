/* bare.c: the least that a page fault answered by userfaultfd can cost: the limit that the engine is compared with. */
#define _GNU_SOURCE
#include "native.h"
#include "clock.h"

#include <errno.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define PAGE 4096ull
#define PATIENCE_MS 1000

static int answer(int fd, uint64_t page, uint64_t from, int move)
{
    struct uffdio_move moved = {page, from, PAGE, 0, 0};
    struct uffdio_copy copied = {page, from, PAGE, 0, 0};
    int result = move ? ioctl(fd, UFFDIO_MOVE, &moved) : ioctl(fd, UFFDIO_COPY, &copied);
    return result < 0 ? -errno : 0;
}

int pv_uffd_bare(int fd, uint8_t *base, uint8_t *from, int move, uint64_t faults, uint64_t *nanoseconds)
{
    *nanoseconds = 0;
    for (uint64_t answered = 0; answered < faults;) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        struct uffd_msg message;
        int events = poll(&ready, 1, PATIENCE_MS);
        if (events <= 0)
            return events < 0 ? -errno : -ETIMEDOUT;
        if (read(fd, &message, sizeof(message)) != (ssize_t)sizeof(message))
            continue; /* EAGAIN: who waited has gone */
        uint64_t begin = now_ns(), page = message.arg.pagefault.address & -PAGE;
        int error = answer(fd, page, (uintptr_t)from + (move ? page - (uintptr_t)base : 0), move);
        if (error && error != -EEXIST)
            return error;
        *nanoseconds += now_ns() - begin;
        answered++;
    }
    return 0;
}

uint64_t pv_touch(const volatile uint8_t *at, uint64_t count, uint64_t stride)
{
    uint64_t begin = now_ns();
    for (uint64_t i = 0; i < count; i++)
        (void)at[i * stride];
    return now_ns() - begin;
}
