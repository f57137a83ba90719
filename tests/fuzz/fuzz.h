/* fuzz.h: what both C targets share: a check that ends the run, and memory of which one can tell which pages were
 * written. For libFuzzer, which takes a crash for a finding. */
#pragma once

#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define GUARD (64u * PAGE) /* before and behind each area: no access */

#define CHECK(holds)                                                                                                   \
    do {                                                                                                               \
        if (!(holds)) {                                                                                                \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #holds);                                        \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);

/* Pages of a private mapping of a file in memory: what was written is no page of the file any more. */
struct area {
    uint8_t *at;
    uint64_t pages;
    uint64_t *seen; /* of /proc/self/pagemap, from area_look() on */
    int pagemap;
};

#define SEEN_FILE (1ull << 61)
#define SEEN_THERE (3ull << 62) /* present, or swapped out */

static inline uint64_t pristine(uint64_t page) { return 0x5a5a5a5a00000000ull | page; }

static inline void area_look(struct area *area)
{
    size_t size = area->pages * sizeof(*area->seen);
    CHECK(pread(area->pagemap, area->seen, size, (off_t)((uintptr_t)area->at / PAGE * 8)) == (ssize_t)size);
}

static inline bool area_written(const struct area *area, uint64_t page)
{
    return (area->seen[page] & SEEN_THERE) && !(area->seen[page] & SEEN_FILE);
}

static inline void area_clear(struct area *area) { CHECK(!madvise(area->at, area->pages * PAGE, MADV_DONTNEED)); }

static inline bool is_pristine(const uint8_t *at, uint64_t page)
{
    for (uint32_t i = 0; i < PAGE / 8; i++)
        if (((const uint64_t *)at)[i] != pristine(page))
            return false;
    return true;
}

static inline void area_make(struct area *area, uint64_t pages)
{
    size_t size = pages * PAGE;
    int fd = memfd_create("pristine", MFD_CLOEXEC);
    CHECK(fd >= 0 && !ftruncate(fd, (off_t)size));
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t words[PAGE / 8];
        for (uint32_t i = 0; i < PAGE / 8; i++)
            words[i] = pristine(page);
        CHECK(pwrite(fd, words, PAGE, (off_t)(page * PAGE)) == PAGE);
    }
    uint8_t *whole = mmap(NULL, size + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(whole != MAP_FAILED);
    area->at = mmap(whole + GUARD, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0);
    CHECK(area->at == whole + GUARD);
    close(fd);
    area->pages = pages;
    area->seen = calloc(pages, sizeof(*area->seen));
    area->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    CHECK(area->seen && area->pagemap >= 0);
    area->at[0] = 1; /* or this kernel does not tell which pages were written */
    CHECK(is_pristine(area->at + PAGE, 1));
    area_look(area);
    CHECK(area_written(area, 0) && !area_written(area, 1));
    area_clear(area);
    CHECK(is_pristine(area->at, 0));
}
