/* zero.h: is a page all zeros? Read where it lies: whoever calls sees to it that nobody's write in between matters. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

static inline bool is_zero(const uint8_t *page)
{
    const uint64_t *words = (const uint64_t *)page;
    for (uint32_t i = 0; i < 4096 / 8; i += 8)
        if (words[i] | words[i + 1] | words[i + 2] | words[i + 3] | words[i + 4] | words[i + 5] | words[i + 6] |
            words[i + 7])
            return false;
    return true;
}
