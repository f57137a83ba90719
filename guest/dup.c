/* dup.c: plants duplicates of which the number is known, then checks all pages over and over: what a host that shares
 * equal pages may free, and must leave as they are. lib/passes.h says when a page has which version, and what the host
 * may rely on; pyvmm/testing/dup_model.py computes the same, and counts.
 *
 * A page is common, zero, a copy, or of its own; so it stays, whatever the version.
 *
 *     g       = shuffled(p) of all pages, by the key mix(~mix(seed)): each VM has its common pages elsewhere
 *     shared  = mix(mix(~shared=) + g * GOLDEN)
 *     common  = shared % 1000 < common=                       base = mix(shared): of no page twice, in each VM the same
 *     zero    else, where r = mix(key) % (1000 - common=) < zeros=
 *     copy    else, where r < zeros= + dups=                  base = mix(mix(seed) + mix(key + version) % groups)
 *     own     else                                            base = mix(key + version)
 *     groups  = groups=, or a quarter of the copies that are to be expected: pages * dups= / 4000, at least 1 */
#include "lib/passes.h"

GUEST("dup", "plants duplicate pages, as many as it is told, and checks all of them",
      "dups=PERMILLE of pages that are copies of others in this VM (default 200)\n"
      "groups=N different contents that copies have (default: a quarter of the copies)\n"
      "common=PERMILLE of pages that all VMs with the same shared= have (default 100)\n"
      "shared=N seed of what is common (default 1)\n"
      "zeros=PERMILLE of pages that are all zeros (default 100)\n"
      "seed=N what else is written where (default 1)\n"
      "write=PERCENT of the pages rewritten in a pass; copies become copies of others (default 0)\n"
      "order=ORDER seq (default), or random: another order each pass\n"
      "passes=N checking passes (default 0 = for ever)\n"
      "size=SIZE bytes of memory from 2 MiB on (default all)\n");

static uint64_t dups, groups, common, shared_seed, zeros;
static struct shuffle places;

static struct content dup_content(uint64_t page, uint64_t key, uint64_t version)
{
    uint64_t shared = mix(shared_seed + shuffled(&places, page) * GOLDEN);
    if (shared % 1000 < common)
        return content_from(mix(shared));
    uint64_t kind = mix(key) % (1000 - common); /* common=1000 has returned */
    if (kind < zeros)
        return ZEROS;
    uint64_t own = mix(key + version);
    return content_from(kind < zeros + dups ? mix(passes.mixed_seed + own % groups) : own);
}

static __attribute__((noinline, cold)) void fail(uint64_t page, uint64_t pass)
{
    tell_wrong(page, region_page(&passes.region, page), content_before(page, pass));
    print(", in pass ");
    print_number(pass);
    print("\n");
    leave(1);
}

int guest_main(void)
{
    passes_options(0);
    dups = option_at_most("dups", 200, 1000);
    common = option_at_most("common", 100, 1000);
    zeros = option_at_most("zeros", 100, 1000);
    if (dups + common + zeros > 1000)
        refuse("dups=, common= and zeros= are more than 1000 together", "");
    shared_seed = mix(~option_number("shared", 1));
    groups = option_number("groups", passes.pages * dups / 4000);
    groups = groups ? groups : 1;
    places = shuffle_of(passes.pages, mix(~passes.mixed_seed));
    content_of = dup_content;
    on_wrong = fail;
    return passes_run();
}
