/* stamp.c: tells of a page that is not as it must be. */
#include "stamp.h"

struct wrong tell_wrong(uint64_t page, const uint64_t *bytes, struct content right)
{
    static bool told;
    while (__atomic_exchange_n(&told, true, __ATOMIC_ACQ_REL)) /* another CPU is about to end the guest */
        __builtin_ia32_pause();
    struct wrong wrong = {0};
    for (uint64_t i = WORDS; i-- > 0;) { /* backwards: the first wrong word is met last */
        uint64_t found = ((const volatile uint64_t *)bytes)[i], expected = right.base + i * right.step;
        if (found != expected)
            wrong = (struct wrong){wrong.count + 1, i, found, expected};
    }
    unsigned byte = wrong.count ? (unsigned)__builtin_ctzl(wrong.found ^ wrong.expected) / 8 : 0;
    uint64_t at = wrong.word * 8 + byte;
    progress->wrong_gpa = (uint64_t)bytes + at;
    progress->wrong_expected = wrong.expected >> 8 * byte & 0xff;
    progress->wrong_found = wrong.found >> 8 * byte & 0xff;
    progress->status = PV_STATUS_FAILED;

    print("FAIL: page ");
    print_number(page);
    print(" (gpa ");
    print_hex((uint64_t)bytes);
    print(") byte ");
    print_hex(at);
    print(": expected ");
    print_hex(progress->wrong_expected);
    print(", found ");
    print_hex(progress->wrong_found);
    return wrong;
}
