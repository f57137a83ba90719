/* memory.c: the guest's RAM as one run of pages, its mapping above 4 GiB, and the C library's memory functions. */
#include "lib.h"

uint64_t ram_from(uint64_t gpa);
extern uint64_t pdpt[512];

/* Maps 4 GiB..`end` with large pages. The page directories come off the end of low RAM, of which the size is returned.
 * Each is filled before it is linked in: the CPU has cached nothing of it, so nothing is to be flushed. */
static uint64_t map_high(uint64_t low_end, uint64_t end)
{
    uint64_t tables = (end - HIGH_RAM + (1ul << 30) - 1) >> 30;
    uint64_t bytes = (tables * PAGE_SIZE + BLOCK_SIZE - 1) & ~(BLOCK_SIZE - 1);
    uint64_t *pd = (uint64_t *)(low_end - bytes);
    for (uint64_t i = 0; i < tables; i++, pd += 512) {
        for (uint64_t j = 0; j < 512; j++)
            pd[j] = (HIGH_RAM + ((i * 512 + j) << 21)) | PTE_LARGE;
        __atomic_store_n(&pdpt[4 + i], (uint64_t)pd | PTE_TABLE, __ATOMIC_RELEASE);
    }
    return bytes;
}

struct region memory_region(uint64_t first_gpa)
{
    static uint64_t low_end, high_bytes;
    if (!low_end) {
        low_end = 0x100000 + ram_from(0x100000);
        high_bytes = ram_from(HIGH_RAM);
        if (high_bytes > 508ul << 30)
            high_bytes = 508ul << 30; /* one page of the top level is all that start.S has */
        if (high_bytes)
            low_end -= map_high(low_end, HIGH_RAM + high_bytes);
    }
    struct region region = {.first_gpa = first_gpa};
    if (first_gpa < low_end)
        region.low_pages = (low_end - first_gpa) / PAGE_SIZE;
    region.pages = region.low_pages + high_bytes / PAGE_SIZE;
    return region;
}

void *memcpy(void *to, const void *from, size_t size)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size)::"memory");
    return start;
}

void *memset(void *to, int byte, size_t size)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(byte) : "memory");
    return start;
}

int memcmp(const void *a, const void *b, size_t size)
{
    const uint8_t *x = a, *y = b;
    for (size_t i = 0; i < size; i++)
        if (x[i] != y[i])
            return x[i] - y[i];
    return 0;
}

bool same_text(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

size_t text_length(const char *text)
{
    size_t length = 0;
    while (text[length])
        length++;
    return length;
}
