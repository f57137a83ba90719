/* bits.c: page bitmaps: one bit a 4 KiB page of RAM, page p in word p / 64. Bits behind the last page may be anything. */
#include "native.h"

#include <errno.h>

void pv_bits_set(uint64_t *bits, uint64_t first, uint64_t count)
{
    while (count) {
        uint64_t shift = first % 64, span = count < 64 - shift ? count : 64 - shift;
        /* release: pairs with the acquire of pv_bits_take, so that who takes the bit sees what was written to the page */
        __atomic_fetch_or(&bits[first / 64], (~0ull >> (64 - span)) << shift, __ATOMIC_RELEASE);
        first += span;
        count -= span;
    }
}

uint64_t pv_bits_take(uint64_t *to, uint64_t *from, uint64_t words)
{
    uint64_t taken = 0;
    for (uint64_t i = 0; i < words; i++) {
        if (!__atomic_load_n(&from[i], __ATOMIC_RELAXED))
            continue;
        /* acquire: pairs with the release of pv_bits_set */
        uint64_t word = __atomic_exchange_n(&from[i], 0, __ATOMIC_ACQ_REL);
        taken += (uint64_t)__builtin_popcountll(word);
        to[i] |= word;
    }
    return taken;
}

void pv_bits_or(uint64_t *to, const uint64_t *from, uint64_t words)
{
    for (uint64_t i = 0; i < words; i++)
        to[i] |= from[i];
}

int pv_bits_mark(uint64_t *bits, const uint64_t *pages, uint64_t count, uint64_t limit)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t bit = 1ull << pages[i] % 64;
        if (pages[i] >= limit)
            return -EINVAL;
        if (bits[pages[i] / 64] & bit)
            return -EEXIST;
        bits[pages[i] / 64] |= bit;
    }
    return 0;
}

void pv_bits_clear(uint64_t *bits, uint64_t first, uint64_t count)
{
    while (count) {
        uint64_t shift = first % 64, span = count < 64 - shift ? count : 64 - shift;
        bits[first / 64] &= ~((~0ull >> (64 - span)) << shift);
        first += span;
        count -= span;
    }
}

void pv_bits_and_not(uint64_t *to, const uint64_t *from, uint64_t words)
{
    for (uint64_t i = 0; i < words; i++)
        to[i] &= ~from[i];
}

/* Word i without the bits that lie behind the last page. */
static uint64_t word_of(const uint64_t *bits, uint64_t i, uint64_t pages)
{
    return i == pages / 64 ? bits[i] & ((1ull << pages % 64) - 1) : bits[i];
}

static uint64_t words_of(uint64_t pages) { return (pages + 63) / 64; }

uint64_t pv_bits_count(const uint64_t *bits, uint64_t pages)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < words_of(pages); i++)
        count += (uint64_t)__builtin_popcountll(word_of(bits, i, pages));
    return count;
}

uint64_t pv_bits_count_runs(const uint64_t *bits, uint64_t pages)
{
    uint64_t count = 0, before = 0; /* before: the highest bit of the word in front */
    for (uint64_t i = 0; i < words_of(pages); i++) {
        uint64_t word = word_of(bits, i, pages);
        count += (uint64_t)__builtin_popcountll(word & ~(word << 1 | before));
        before = word >> 63;
    }
    return count;
}

/* The first page from `at` on whose bit is set, or with flip = ~0 clear; `pages` if there is none. */
static uint64_t find(const uint64_t *bits, uint64_t at, uint64_t pages, uint64_t flip)
{
    for (uint64_t keep = ~0ull << at % 64; at < pages; at = (at / 64 + 1) * 64, keep = ~0ull) {
        uint64_t word = (bits[at / 64] ^ flip) & keep;
        if (word) {
            uint64_t found = at / 64 * 64 + (uint64_t)__builtin_ctzll(word);
            return found < pages ? found : pages;
        }
    }
    return pages;
}

uint64_t pv_bits_runs(const uint64_t *bits, uint64_t pages, uint64_t *next, struct pv_run_pages *runs, uint64_t room)
{
    uint64_t found = 0, at = *next;
    while (found < room && (at = find(bits, at, pages, 0)) < pages) {
        uint64_t end = find(bits, at, pages, ~0ull);
        runs[found++] = (struct pv_run_pages){.first = at, .count = end - at};
        at = end;
    }
    *next = at;
    return found;
}

uint32_t pv_runs_cut(const struct pv_run_pages *runs, uint64_t count, uint64_t *run, uint64_t *done, uint64_t *limit,
                     struct pv_run_pages *out, uint32_t room)
{
    uint32_t used = 0;
    while (*run < count && *limit && used < room) {
        uint64_t left = runs[*run].count - *done, take = left < *limit ? left : *limit;
        out[used++] = (struct pv_run_pages){.first = runs[*run].first + *done, .count = take};
        *limit -= take;
        *done += take;
        if (take == left) {
            ++*run;
            *done = 0;
        }
    }
    return used;
}
