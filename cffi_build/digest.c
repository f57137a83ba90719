/* digest.c: a digest of 122 bits of a page, under a secret key. XXH64 would not do here, however secret its seed: two
 * words that differ by 2^63 / P2 and by +-2^30 * P1 / P2 leave its state as it was in one of two cases. Here, whoever does
 * not know the key has two pages with one digest in 2^-120 of all cases: NH (UMAC, RFC 4418, here of 64-bit words) twice,
 * its key shifted by a pair of words (Toeplitz), each sum of 128 bits brought to 61 by a linear hash modulo 2^61 - 1. It
 * is faster, too: a multiplication for 8 bytes, none of which waits for another. */
#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>

#define WORDS 512
#define PRIME ((1ull << 61) - 1)

typedef unsigned __int128 wide;

int pv_digest_key_make(struct pv_digest_key *key)
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
    return 0;
}

static uint64_t reduce(wide sum, const uint64_t last[3])
{
    wide product = (wide)((uint64_t)sum & PRIME) * last[0] + (wide)((uint64_t)(sum >> 61) & PRIME) * last[1] +
                   (wide)(uint64_t)(sum >> 122) * last[2];
    uint64_t folded = (uint64_t)(product & PRIME) + (uint64_t)(product >> 61); /* below 2^61 + 2^63 */
    return folded % PRIME;
}

void pv_digest(const struct pv_digest_key *key, const uint8_t *page, uint64_t digest[2])
{
    const uint64_t *k = key->words;
    wide one = 0, two = 0;
    for (int i = 0; i < WORDS; i += 2) {
        uint64_t pair[2];
        memcpy(pair, page + i * 8, sizeof(pair));
        one += (wide)(pair[0] + k[i]) * (pair[1] + k[i + 1]);
        two += (wide)(pair[0] + k[i + 2]) * (pair[1] + k[i + 3]);
    }
    digest[0] = reduce(one, key->last);
    digest[1] = reduce(two, key->last + 3);
}
