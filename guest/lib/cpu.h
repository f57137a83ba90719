/* cpu.h: the guests' own x86 constants and fixed addresses, for start.S and the C library. Bytes. */
#pragma once

#define CR0_PE 0x1
#define CR0_MP 0x2
#define CR0_TS 0x8
#define CR0_ET 0x10
#define CR0_NE 0x20
#define CR0_WP 0x10000
#define CR0_AM 0x40000
#define CR0_PG 0x80000000
#define CR4_PAE 0x20
#define CR4_OSFXSR 0x200
#define CR4_OSXMMEXCPT 0x400
#define MSR_EFER 0xc0000080
#define EFER_LME 0x100
#define MSR_TSC_DEADLINE 0x6e0

#define RFLAGS_ONE 0x2
#define RFLAGS_TF 0x100
#define RFLAGS_IF 0x200
#define RFLAGS_IOPL3 0x3000
#define RFLAGS_NT 0x4000
#define RFLAGS_AC 0x40000

#define PTE_TABLE 0x7 /* present, writable, user */
#define PTE_LARGE 0x87
#define PTE_UNCACHED 0x18

#define SELECTOR_CODE0 0x08
#define SELECTOR_DATA0 0x10
#define SELECTOR_CODE32 0x18
#define SELECTOR_DATA3 0x23
#define SELECTOR_CODE3 0x2b
#define SELECTOR_ABSENT 0x3b
#define SELECTOR_TSS 0x40
#define GDT_BYTES (0x40 + 16 * PV_MAX_CPUS)

/* Where guest.ld puts what descriptors must know as constants. */
#define VECTORS 0x100000
#define TSS 0x101000
#define TSS_STEP 256
#define TSS_BYTES (104 + 128 + 1) /* with an I/O bitmap for ports 0..0x3ff and its last byte */

#define RING0_STACK_BYTES 512
#define RING3_STACK_SHIFT 12

/* struct trap in lib.h */
#define TRAP_SHIFT 6
#define TRAP_VECTOR 0
#define TRAP_ERROR 8
#define TRAP_RIP 16
#define TRAP_RFLAGS 24
#define TRAP_RSP 32
#define TRAP_CR2 40
#define TRAP_STACK 48

/* What ring 3 may ask of ring 0 by int $GATE_VECTOR, in eax (start.S says what each does). */
#define GATE_VECTOR 4
#define GATE_WAIT 1
#define GATE_CPUID 2
#define GATE_SET_DEADLINE 3
#define GATE_DROP_IDT 4
#define GATE_SET_TS 5
#define GATE_HALT_OFF 6

#define LAPIC_GPA 0xfee00000
#define LAPIC_ID 0x20
#define LAPIC_EOI 0xb0
#define LAPIC_SVR 0xf0
#define LAPIC_ICR_LOW 0x300
#define LAPIC_ICR_HIGH 0x310
#define LAPIC_LVT_TIMER 0x320
#define LAPIC_TIMER_INITIAL 0x380
#define LAPIC_TIMER_CURRENT 0x390
#define LAPIC_TIMER_DIVIDE 0x3e0
#define IOAPIC_GPA 0xfec00000
#define IOAPIC_SELECT 0x00
#define IOAPIC_WINDOW 0x10
#define IOAPIC_REDIRECTION 0x10 /* register number of pin 0's entry, two a pin */
