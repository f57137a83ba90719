/* irq.c: device and timer interrupts: the way from the IOAPIC's pins to CPU 0's LAPIC. */
#include "lib.h"

#define SVR_ENABLE 0x100
#define SPURIOUS_VECTOR 0xff

static void ioapic_write(uint32_t reg, uint32_t value)
{
    *(volatile uint32_t *)(IOAPIC_GPA + IOAPIC_SELECT) = reg;
    *(volatile uint32_t *)(IOAPIC_GPA + IOAPIC_WINDOW) = value;
}

void irq_init(void) { *lapic(LAPIC_SVR) = SVR_ENABLE | SPURIOUS_VECTOR; }

void irq_route(unsigned irq, unsigned vector)
{
    uint32_t reg = IOAPIC_REDIRECTION + 2 * irq;
    ioapic_write(reg + 1, *lapic(LAPIC_ID)); /* to this CPU */
    ioapic_write(reg, vector);               /* fixed, edge, active high, not masked */
}
