/* checksum.c: XXH64 (xxHash's specification, doc/xxhash_spec.md of github.com/Cyan4973/xxHash): 64 bits wide, more than
 * 10 GB/s in plain C, and zstd has it too. CRC32C would need an instruction set and is half as wide. */
#include "native.h"

#include <string.h>

#define P1 0x9E3779B185EBCA87ull
#define P2 0xC2B2AE3D27D4EB4Full
#define P3 0x165667B19E3779F9ull
#define P4 0x85EBCA77C2B2AE63ull
#define P5 0x27D4EB2F165667C5ull

static uint64_t rotate(uint64_t value, int by) { return value << by | value >> (64 - by); }

static uint64_t word(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, 8);
    return value;
}

static uint64_t half(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, 4);
    return value;
}

static uint64_t round_of(uint64_t lane, uint64_t input) { return rotate(lane + input * P2, 31) * P1; }

static uint64_t merge(uint64_t hash, uint64_t lane) { return (hash ^ round_of(0, lane)) * P1 + P4; }

uint64_t pv_hash(const uint8_t *data, uint64_t size, uint64_t seed)
{
    const uint8_t *end = data + size;
    uint64_t hash = seed + P5;
    if (size >= 32) {
        uint64_t a = seed + P1 + P2, b = seed + P2, c = seed, d = seed - P1;
        for (; end - data >= 32; data += 32) {
            a = round_of(a, word(data));
            b = round_of(b, word(data + 8));
            c = round_of(c, word(data + 16));
            d = round_of(d, word(data + 24));
        }
        hash = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18);
        hash = merge(merge(merge(merge(hash, a), b), c), d);
    }
    hash += size;
    for (; end - data >= 8; data += 8)
        hash = rotate(hash ^ round_of(0, word(data)), 27) * P1 + P4;
    if (end - data >= 4) {
        hash = rotate(hash ^ half(data) * P1, 23) * P2 + P3;
        data += 4;
    }
    for (; data < end; data++)
        hash = rotate(hash ^ *data * P5, 11) * P1;
    hash = (hash ^ hash >> 33) * P2;
    hash = (hash ^ hash >> 29) * P3;
    return hash ^ hash >> 32;
}
