/* start.S: from the boot loader's hand-over to ring 3, in as few ring-0 instructions as can be (some hosts interpret
 * ring 0). All tables are built by the assembler: nothing is computed at run time.
 *
 * Entered by PVH (Xen public/arch-x86/hvm/start_info.h): 32-bit protected mode, paging off, ebx = start_info; and, for
 * application processors, in real mode at PV_TRAMPOLINE_GPA. Both end in ring 3, 64-bit, ports open, interrupts on, at
 * lib_start(cpu index). */
#include "../abi.h"
#include "cpu.h"

/* ---- the PVH note ---- */
    .section .note.Xen, "a", @note
    .long 4, 4, 18 /* name and descriptor length; XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long pvh_start

/* ---- ring 0, 32 bits ---- */
    .section .text.start, "ax"
    .code32
    .globl pvh_start
pvh_start:
    movl %ebx, start_info_gpa
    movb $0xff, %al /* the 8259s' interrupts would come on exceptions' vectors: off, whatever a boot loader left */
    outb %al, $0x21
    outb %al, $0xa1
    xorl %ebp, %ebp /* CPU index */

protected_mode: /* ebp = CPU index; flat segments, paging off */
    lgdtl gdt_pointer
    movl $(CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT), %eax
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $MSR_EFER, %ecx
    rdmsr
    orl $EFER_LME, %eax
    wrmsr
    movl $(CR0_PG | CR0_AM | CR0_WP | CR0_NE | CR0_ET | CR0_MP | CR0_PE), %eax
    movl %eax, %cr0
    ljmpl $SELECTOR_CODE0, $long_mode

/* ---- ring 0, 64 bits ---- */
    .code64
long_mode:
    lidt idt_pointer
    xorl %eax, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %fs
    movl %eax, %gs
    movl %eax, %ss
    movl %ebp, %eax
    shll $4, %eax
    addl $SELECTOR_TSS, %eax
    ltr %ax
    movl %ebp, %eax
    incl %eax
    shll $RING3_STACK_SHIFT, %eax
    addl $ring3_stacks - 8, %eax /* as after a call: the ABI wants rsp + 8 aligned to 16 */
    movl $ring0_boot_stack_end, %esp
    pushq $SELECTOR_DATA3
    pushq %rax
    pushq $(RFLAGS_IOPL3 | RFLAGS_IF | RFLAGS_ONE)
    pushq $SELECTOR_CODE3
    pushq $lib_start
    movl %ebp, %edi
    iretq

/* ---- application processors: copied to PV_TRAMPOLINE_GPA ---- */
    .code16
    .globl trampoline, trampoline_end, trampoline_index
trampoline:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdt - trampoline
    movl $CR0_PE, %eax
    movl %eax, %cr0
    ljmpl $SELECTOR_CODE32, $(PV_TRAMPOLINE_GPA + trampoline_32 - trampoline)
    .code32
trampoline_32:
    movl $SELECTOR_DATA0, %eax
    movl %eax, %ds
    movl %eax, %ss
    movl PV_TRAMPOLINE_GPA + trampoline_index - trampoline, %ebp
    movl $protected_mode, %eax
    jmp *%eax
    .balign 4
trampoline_gdt:
    .word GDT_BYTES - 1
    .long gdt
    .balign 4
trampoline_index:
    .long 0 /* written by start_cpu() before each SIPI */
trampoline_end:

/* ---- traps ---- */
    .code64
/* An exception. Leaves what happened in this CPU's struct trap (lib.h) and goes on in ring 3 at lib_trap(), which has a
 * stack of its own there and does not return. */
    .section .text.trap, "ax"
trap_common: /* stack: vector, error, rip, cs, rflags, rsp, ss */
    pushq %rax
    pushq %rcx
    str %ax
    movzwl %ax, %eax
    subl $SELECTOR_TSS, %eax
    shll $(TRAP_SHIFT - 4), %eax
    addl $traps, %eax
    movq 16(%rsp), %rcx
    movq %rcx, TRAP_VECTOR(%rax)
    movq 24(%rsp), %rcx
    movq %rcx, TRAP_ERROR(%rax)
    movq 32(%rsp), %rcx
    movq %rcx, TRAP_RIP(%rax)
    movq 48(%rsp), %rcx
    movq %rcx, TRAP_RFLAGS(%rax)
    movq 56(%rsp), %rcx
    movq %rcx, TRAP_RSP(%rax)
    movq %cr2, %rcx
    movq %rcx, TRAP_CR2(%rax)
    movq TRAP_STACK(%rax), %rcx
    movq %rcx, 56(%rsp)
    movq $lib_trap_entry, 32(%rsp)
    movq $SELECTOR_CODE3, 40(%rsp)
    movq $SELECTOR_DATA3, 64(%rsp)
    andq $~(RFLAGS_TF | RFLAGS_NT | RFLAGS_AC), 48(%rsp)
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq

    .section .text
lib_trap_entry: /* ring 3 */
    call lib_trap
    ud2

/* An interrupt: counted by vector, acknowledged, nothing else. */
    .section .text.trap, "ax"
interrupt_common: /* stack: vector, error (0), rip, ... */
    pushq %rax
    movl 8(%rsp), %eax
    lock incq interrupts(, %rax, 8)
    movl $(LAPIC_GPA + LAPIC_EOI), %eax
    movl $0, (%rax)
    popq %rax
    addq $16, %rsp
    iretq

/* ---- what ring 3 may ask of ring 0: int $GATE_VECTOR, function in eax (cpu.h), arguments in rdi and rsi ---- */
gate: /* no other vector is as good: some hosts let ring 3 raise 3 and 4 and no others */
    cmpl $GATE_WAIT, %eax
    je gate_wait
    cmpl $GATE_CPUID, %eax
    je gate_cpuid
    cmpl $GATE_SET_DEADLINE, %eax
    je gate_set_deadline
    cmpl $GATE_DROP_IDT, %eax
    je gate_drop_idt
    cmpl $GATE_SET_TS, %eax
    je gate_set_ts
    cmpl $GATE_HALT_OFF, %eax
    je gate_halt_off
    pushq $0
    pushq $GATE_VECTOR /* an exception like others */
    jmp trap_common

/* rdi = vector, rsi = count: halts until interrupts[rdi] differs from rsi. */
gate_wait:
    cmpq %rsi, interrupts(, %rdi, 8)
    jne 1f
    sti
    hlt /* the interrupt shadow of sti covers it: no interrupt is lost between the two */
    cli
    jmp gate_wait
1:  jmp gate_done

/* edi = leaf, esi = subleaf; answers in eax, ebx, ecx, edx. In ring 3 some hosts let the processor answer itself. */
gate_cpuid:
    movl %edi, %eax
    movl %esi, %ecx
    cpuid
    jmp gate_done

/* rdi = TSC ticks: the LAPIC timer, in its TSC-deadline mode, is to fire that much later. The TSC is read here since it
 * is ring 0's that counts: ring 3's may differ from it where the host does not offset it. Changes rax, rcx, rdx. */
gate_set_deadline:
    rdtsc
    shlq $32, %rdx
    addq %rdx, %rax
    addq %rdi, %rax
    movq %rax, %rdx
    shrq $32, %rdx
    movl $MSR_TSC_DEADLINE, %ecx
    wrmsr
    jmp gate_done

/* No exception can be delivered from here on, the next one is a triple fault. */
gate_drop_idt:
    lidt null_pointer
    jmp gate_done

/* The next floating-point instruction raises #NM. Changes rax. */
gate_set_ts:
    movq %cr0, %rax
    orq $CR0_TS, %rax
    movq %rax, %cr0
    jmp gate_done

/* Clears the caller's CF: it was set by gate(), to know that it was heard. */
gate_done:
    andb $0xfe, 16(%rsp)
    iretq

/* Halts with interrupts off, for ever. */
gate_halt_off:
    hlt
    jmp gate_halt_off

/* Entries of the IDT: 16 bytes each, from VECTORS on, so that the gates are constants. */
    .section .vectors, "ax"
    .set vector, 0
    .rept 256
    .balign 16
    .if vector == GATE_VECTOR
    jmp gate
    .elseif vector < 32
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
    testb $8, %spl /* frames start aligned to 16: `int N` pushes no error code where the exception does */
    jz 1f
    pushq $0
1:
    .else
    pushq $0 /* the CPU pushes no error code for this one */
    .endif
    pushq $vector
    jmp trap_common
    .else
    pushq $0
    pushq $vector
    jmp interrupt_common
    .endif
    .set vector, vector + 1
    .endr

/* ---- tables at fixed addresses (cpu.h, guest.ld) ---- */
    .section .tables, "aw"
    .globl pml4, pdpt
pml4: /* 0..512 GiB, identity, user, writable */
    .quad pdpt + PTE_TABLE
    .fill 511, 8, 0
pdpt: /* the first 4 GiB; map_high() adds what RAM lies above */
    .quad pd + PTE_TABLE, pd + 0x1000 + PTE_TABLE, pd + 0x2000 + PTE_TABLE, pd + 0x3000 + PTE_TABLE
    .fill 508, 8, 0
pd:
    .set at, 0
    .rept 1536
    .quad at + PTE_LARGE
    .set at, at + 0x200000
    .endr
    .rept 512 /* 3..4 GiB: devices, uncached */
    .quad at + PTE_LARGE + PTE_UNCACHED
    .set at, at + 0x200000
    .endr

    .globl idt
idt:
    .set vector, 0
    .rept 256
    .word (VECTORS + 16 * vector) & 0xffff
    .word SELECTOR_CODE0
    .byte 0
    .byte 0xee /* interrupt gate, present, DPL 3: ring 3 may raise any vector itself */
    .word (VECTORS + 16 * vector) >> 16
    .long 0, 0
    .set vector, vector + 1
    .endr

    .globl gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff /* 0x08 ring 0 code, 64 bits; accessed bits are set: the CPU has nothing to write */
    .quad 0x00cf93000000ffff /* 0x10 ring 0 data */
    .quad 0x00cf9b000000ffff /* 0x18 ring 0 code, 32 bits */
    .quad 0x00cff3000000ffff /* 0x20 ring 3 data */
    .quad 0x00affb000000ffff /* 0x28 ring 3 code, 64 bits */
    .quad 0
    .quad 0x00cf73000000ffff /* 0x38 ring 3 data, not present: for guests that want #NP */
    .set cpu, 0
    .rept PV_MAX_CPUS
    .word TSS_BYTES - 1
    .word (TSS + TSS_STEP * cpu) & 0xffff
    .byte (TSS + TSS_STEP * cpu) >> 16
    .byte 0x89 /* available 64-bit TSS */
    .byte 0, 0
    .long 0, 0
    .set cpu, cpu + 1
    .endr
gdt_end:
    .if gdt_end - gdt != GDT_BYTES
    .error "GDT_BYTES in cpu.h is not the size of the GDT"
    .endif

    .section .tss, "aw"
    .set cpu, 0
    .rept PV_MAX_CPUS
    .balign TSS_STEP
    .long 0
    .quad ring0_stacks + RING0_STACK_BYTES * (cpu + 1)
    .fill 102 - 12, 1, 0
    .word 104 /* the I/O bitmap follows: ports 0..0x3ff are ring 3's, since not every host keeps IOPL over an iretq */
    .fill 128, 1, 0
    .byte 0xff
    .set cpu, cpu + 1
    .endr

    .section .data
    .balign 8
gdt_pointer:
    .word GDT_BYTES - 1
    .quad gdt
    .balign 8
idt_pointer:
    .word 4095
    .quad idt
    .balign 8
null_pointer:
    .word 0
    .quad 0
    .globl start_info_gpa
start_info_gpa:
    .long 0, 0

    .section .bss
    .balign 16
ring0_boot_stack:
    .skip 256
ring0_boot_stack_end:
ring0_stacks:
    .skip RING0_STACK_BYTES * PV_MAX_CPUS
ring3_stacks:
    .skip PV_MAX_CPUS << RING3_STACK_SHIFT
    .globl traps, interrupts
traps:
    .skip PV_MAX_CPUS << TRAP_SHIFT
interrupts:
    .skip 256 * 8

    .section .note.GNU-stack, "", @progbits
