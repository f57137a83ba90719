/* verify.c: stamps every page of its region, then checks them over and over while it rewrites some: what any mechanism
 * of the host does to memory must leave all of them as they are. lib/passes.h says when a page has which version, and
 * what the host may rely on; pyvmm/testing/verify_model.py computes the same.
 *
 *     base    = mix(key + version)
 *     word j  = base + j * GOLDEN, or all zeros where mix(base) % 1000 < zeros= */
#include "lib/passes.h"

GUEST("verify", "stamps all memory, then checks and rewrites it page by page",
      "seed=N what is written where (default 1)\n"
      "write=PERCENT of the pages rewritten in a pass (default 25)\n"
      "zeros=PERMILLE of contents that are all zeros (default 0)\n"
      "order=ORDER seq (default), or random: another order each pass\n"
      "passes=N checking passes (default 0 = for ever)\n"
      "size=SIZE bytes of memory from 2 MiB on (default all)\n");

/* progress->detail of a failure: what the wrong page looks like. */
enum { LOOKS_UNKNOWN, LOOKS_ZERO, LOOKS_STALE, LOOKS_OTHER_PAGE, LOOKS_BIT_FLIP, LOOKS_HEALED };

static uint64_t zeros;

static struct content verify_content(uint64_t page, uint64_t key, uint64_t version)
{
    (void)page;
    uint64_t base = mix(key + version);
    return zeros && mix(base) % 1000 < zeros ? ZEROS : content_from(base);
}

/* ---- a wrong page ---- */
struct diagnosis {
    uint64_t looks, page, version; /* the last two of LOOKS_STALE and LOOKS_OTHER_PAGE */
};

/* Whose content has this base? Of other pages, the versions about the pass that their CPU is in are looked at. */
static struct diagnosis find_base(uint64_t base, uint64_t page, uint64_t pass)
{
    for (uint64_t v = pass + 1; v-- > 0;)
        if (mix(key_of(page) + v) == base)
            return (struct diagnosis){LOOKS_STALE, page, v};
    for (uint64_t p = 0; p < passes.pages; p++) {
        uint64_t now = progress->work[p % passes.cpus].pass;
        for (uint64_t n = now < 4 ? 0 : now - 4; n <= now; n++) {
            uint64_t v = version_of(key_of(p), n);
            if (mix(key_of(p) + v) == base)
                return (struct diagnosis){LOOKS_OTHER_PAGE, p, v};
        }
    }
    return (struct diagnosis){LOOKS_UNKNOWN, 0, 0};
}

static void print_diagnosis(struct diagnosis diagnosis, uint64_t wrong_words)
{
    if (diagnosis.looks == LOOKS_HEALED) {
        print("; it was right when read again\n");
        return;
    }
    print("; ");
    print_number(wrong_words);
    print(" of 512 words are wrong");
    if (diagnosis.looks == LOOKS_ZERO)
        print(", looks like zeros");
    if (diagnosis.looks == LOOKS_BIT_FLIP)
        print(", by one bit");
    if (diagnosis.looks == LOOKS_STALE || diagnosis.looks == LOOKS_OTHER_PAGE) {
        print(", looks like version ");
        print_number(diagnosis.version);
        print(" of page ");
        print_number(diagnosis.page);
    }
    print("\n");
}

static __attribute__((noinline, cold)) void fail(uint64_t page, uint64_t pass)
{
    struct wrong wrong = tell_wrong(page, region_page(&passes.region, page), content_before(page, pass));
    print(", in pass ");
    print_number(pass);
    print(", version ");
    print_number(version_of(key_of(page), pass - 1));
    print(" expected");

    uint64_t bits = wrong.found ^ wrong.expected;
    struct diagnosis diagnosis = {LOOKS_HEALED, 0, 0};
    if (wrong.count && wrong.found == 0)
        diagnosis.looks = LOOKS_ZERO;
    else if (wrong.count == 1 && (bits & (bits - 1)) == 0)
        diagnosis.looks = LOOKS_BIT_FLIP;
    else if (wrong.count)
        diagnosis = find_base(wrong.found - wrong.word * GOLDEN, page, pass);
    progress->detail = (uint32_t)diagnosis.looks;
    print_diagnosis(diagnosis, wrong.count);
    leave(1);
}

int guest_main(void)
{
    passes_options(25);
    zeros = option_at_most("zeros", 0, 1000);
    content_of = verify_content;
    on_wrong = fail;
    return passes_run();
}
