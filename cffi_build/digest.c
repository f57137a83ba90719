/* digest.c: a digest of 122 bits of a page, under a secret key. XXH64 would not do here, however secret its seed: two
 * words that differ by 2^63 / P2 and by +-2^30 * P1 / P2 leave its state as it was in one of two cases. Here, whoever does
 * not know the key has two pages with one digest in 2^-120 of all cases: a sum of products of pairs of words, to each of
 * which a word of the key was added, twice, the key shifted by a pair of words (Toeplitz), each sum of 128 bits brought to
 * 61 by a linear hash modulo 2^61 - 1. It is faster, too: a multiplication for 8 bytes, none of which waits for another.
 *
 * "Sum" and "product" are those of numbers (NH: UMAC, RFC 4418, here of 64-bit words), or, where the CPU multiplies four
 * such pairs at once, of polynomials over GF(2): there, too, of two different pairs and a key at random, each difference of
 * the products comes in at most one of 2^64 cases, and that is all that the proof needs. No digest leaves the process, so
 * that hosts need not agree. */
#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <immintrin.h>
#include <string.h>
#include <sys/random.h>

#define WORDS 512
#define PRIME ((1ull << 61) - 1)

typedef unsigned __int128 wide;

int pv_digest_key_make(struct pv_digest_key *key, int plain)
{
    uint8_t *to = (uint8_t *)key;
    for (size_t done = 0; done < sizeof(*key);) {
        ssize_t got = getrandom(to + done, sizeof(*key) - done, 0);
        if (got < 0 && errno != EINTR)
            return -errno;
        done += got > 0 ? (size_t)got : 0;
    }
    for (int i = 0; i < 6; i++)
        key->last[i] = (key->last[i] & PRIME) % PRIME;
    key->polynomials = !plain && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
    return 0;
}

static uint64_t reduce(wide sum, const uint64_t last[3])
{
    wide product = (wide)((uint64_t)sum & PRIME) * last[0] + (wide)((uint64_t)(sum >> 61) & PRIME) * last[1] +
                   (wide)(uint64_t)(sum >> 122) * last[2];
    uint64_t folded = (uint64_t)(product & PRIME) + (uint64_t)(product >> 61); /* below 2^61 + 2^63 */
    return folded % PRIME;
}

static void sums_of_numbers(const uint64_t *key, const uint8_t *page, wide sums[2])
{
    uint64_t low = key[0], high = key[1];
    wide one = 0, two = 0;
    for (int i = 0; i < WORDS; i += 2) {
        uint64_t pair[2], next_low = key[i + 2], next_high = key[i + 3];
        memcpy(pair, page + i * 8, sizeof(pair));
        one += (wide)(pair[0] + low) * (pair[1] + high);
        two += (wide)(pair[0] + next_low) * (pair[1] + next_high);
        low = next_low;
        high = next_high;
    }
    sums[0] = one;
    sums[1] = two;
}

__attribute__((target("avx512f,vpclmulqdq"))) static void sums_of_polynomials(const uint64_t *key, const uint8_t *page,
                                                                              wide sums[2])
{
    __m512i one = _mm512_setzero_si512(), two = one;
    for (int i = 0; i < WORDS; i += 8) {
        __m512i words = _mm512_loadu_si512(page + i * 8);
        __m512i here = _mm512_xor_si512(words, _mm512_loadu_si512(key + i));
        __m512i next = _mm512_xor_si512(words, _mm512_loadu_si512(key + i + 2));
        one = _mm512_xor_si512(one, _mm512_clmulepi64_epi128(here, here, 1)); /* of each pair, one word by the other */
        two = _mm512_xor_si512(two, _mm512_clmulepi64_epi128(next, next, 1));
    }
    wide parts[2][4];
    _mm512_storeu_si512(parts[0], one);
    _mm512_storeu_si512(parts[1], two);
    for (int i = 0; i < 2; i++)
        sums[i] = parts[i][0] ^ parts[i][1] ^ parts[i][2] ^ parts[i][3];
}

void pv_digest(const struct pv_digest_key *key, const uint8_t *page, uint64_t digest[2])
{
    wide sums[2];
    if (key->polynomials)
        sums_of_polynomials(key->words, page, sums);
    else
        sums_of_numbers(key->words, page, sums);
    digest[0] = reduce(sums[0], key->last);
    digest[1] = reduce(sums[1], key->last + 3);
}
