/* map.c: guest memory in our address space. */
#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <string.h>

#define BLOCK ((size_t)2 << 20)

/* Reserves more than asked and trims, since mmap aligns to 4 KiB only and a large page needs 2 MiB. */
static int map_aligned(size_t size, void **out)
{
    if (size > SIZE_MAX - BLOCK)
        return -ENOMEM;
    uint8_t *raw = mmap(NULL, size + BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED)
        return -errno;
    size_t head = -(uintptr_t)raw & (BLOCK - 1);
    if (head)
        munmap(raw, head);
    munmap(raw + head + size, BLOCK - head);
    *out = raw + head;
    return 0;
}

int pv_map(size_t size, int backing, void **out)
{
    if (size == 0 || size % 4096)
        return -EINVAL;
    if (backing == PV_BACKING_HUGETLB) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_2MB;
        void *raw = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (raw == MAP_FAILED)
            return -errno;
        *out = raw;
        return 0;
    }
    int error = map_aligned(size, out);
    if (error)
        return error;
    if (madvise(*out, size, backing == PV_BACKING_THP ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) && errno != EINVAL) {
        /* EINVAL: a kernel without THP, where all pages are small anyway */
        error = -errno;
        munmap(*out, size);
        return error;
    }
    (void)madvise(*out, size, MADV_DONTDUMP); /* advice: a core dump of ours is not to hold the guest */
    (void)madvise(*out, size, MADV_DONTFORK); /* a page that a child shares cannot be moved */
    return 0;
}

int pv_unmap(void *address, size_t size) { return munmap(address, size) ? -errno : 0; }

int pv_madvise(void *address, size_t size, int advice) { return madvise(address, size, advice) ? -errno : 0; }

uint8_t pv_peek(const volatile uint8_t *address) { return *address; }

void pv_poke(volatile uint8_t *address, uint8_t value) { *address = value; }

void pv_copy(void *to, const void *from, size_t size) { memcpy(to, from, size); }

void pv_zero(void *to, size_t size) { memset(to, 0, size); }
