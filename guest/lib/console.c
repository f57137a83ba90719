/* console.c: output on the serial port. A whole string is one `rep outsb`; KVM may still exit for each byte. */
#include "lib.h"

void print_bytes(const char *text, size_t size)
{
    __asm__ volatile("rep outsb" : "+S"(text), "+c"(size) : "d"(PV_PORT_SERIAL) : "memory");
}

void print(const char *text) { print_bytes(text, text_length(text)); }

static void print_base(uint64_t number, unsigned base)
{
    char digits[20];
    size_t at = sizeof(digits);
    do {
        digits[--at] = "0123456789abcdef"[number % base];
        number /= base;
    } while (number);
    print_bytes(digits + at, sizeof(digits) - at);
}

void print_number(uint64_t number) { print_base(number, 10); }

void print_hex(uint64_t number)
{
    print("0x");
    print_base(number, 16);
}
