/* stamp.h: contents of pages that a guest can compute again, so that it can check what it wrote: each 8-byte word of a
 * page differs from the same word of any other content, so that a page that is stale, misplaced, zeroed or torn is seen
 * at its first wrong word. Compressors make nothing of it (zlib and zstd find no repetition). */
#pragma once

#include "lib.h"

#define WORDS (PAGE_SIZE / sizeof(uint64_t))
typedef uint64_t pair __attribute__((vector_size(16), may_alias));

struct content {
    uint64_t base, step; /* word j = base + j * step; step is GOLDEN, or 0 with a base of 0: all zeros */
};
#define ZEROS ((struct content){0, 0})
static inline struct content content_from(uint64_t base) { return (struct content){base, GOLDEN}; }

/* ---- whole pages, a cache line at a time ---- */
static inline void first_line(pair line[4], struct content content)
{
#pragma GCC unroll 4
    for (unsigned i = 0; i < 4; i++) {
        uint64_t first = content.base + 2 * i * content.step;
        line[i] = (pair){first, first + content.step};
    }
}

static inline void fill(uint64_t *page, struct content content)
{
    pair line[4], step = {8 * content.step, 8 * content.step};
    first_line(line, content);
    for (pair *at = (pair *)page, *end = at + WORDS / 2; at < end; at += 4)
#pragma GCC unroll 4
        for (unsigned i = 0; i < 4; i++) {
            at[i] = line[i];
            line[i] += step;
        }
}

static inline bool same(const uint64_t *page, struct content content)
{
    pair line[4], step = {8 * content.step, 8 * content.step}, wrong[4] = {{0}};
    first_line(line, content);
    for (const pair *at = (const pair *)page, *end = at + WORDS / 2; at < end; at += 4)
#pragma GCC unroll 4
        for (unsigned i = 0; i < 4; i++) {
            wrong[i] |= at[i] ^ line[i];
            line[i] += step;
        }
    pair all = (wrong[0] | wrong[1]) | (wrong[2] | wrong[3]);
    return (all[0] | all[1]) == 0;
}

/* ---- stamp.c: a page that is not as it must be ---- */
struct wrong {
    uint64_t count, word, found, expected; /* wrong words, and the first of them; a count of 0: right when read again */
};
/* Looks at the page, tells the progress page, and prints "FAIL: page N (gpa ...) byte ...: expected ..., found ...",
 * without an end of the line. The first CPU that calls it goes on; others wait there until it has ended the guest. */
struct wrong tell_wrong(uint64_t page, const uint64_t *bytes, struct content right);
