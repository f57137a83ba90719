# test_explain_cause.py: many ways to crash, and the sentence for each.
import pytest
from test_explain_builders import (
    ABSENT,
    CODE,
    CODE32,
    DATA,
    GDT,
    HANDLER,
    IDT,
    NX,
    RING0_STACK,
    RING3,
    STACK,
    TSS,
    P,
    U,
    W,
    World,
)

from pyvmm.explain.cause import notes, sentence
from pyvmm.explain.facts import ExitFacts
from pyvmm.explain.fault import find_fault

SHUTDOWN = ExitFacts("shutdown", 8)
AM = {"cr0": 0x8005_0011, "rflags": 1 << 18 | 2}


def code(hexadecimal):
    return bytes.fromhex(hexadecimal)


def said(world, facts=SHUTDOWN):
    text = sentence(facts, world.scene)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_the_whole_sentence():
    world = World(rip=CODE + 8, rax=0x7F00_0000_0000)
    world.write(CODE + 8, code("48c70001000000"))
    assert said(world) == (
        "Triple fault at main+0x8: `mov qword ptr [rax], 1` wrote to 0x7f0000000000, which the guest has not mapped "
        "(PML4 entry 254 is not present); the page fault (#PF) could not be delivered because the IDT is empty "
        "(limit 0)."
    )


# (machine code, registers, vector, words of the clause)
FAULTS = {
    "read": (
        "488b4308",
        {"rbx": 0x4000_0000},
        14,
        "read from 0x40000008, which the guest has not mapped (PDPT entry 1",
    ),
    "index": ("488b04cb", {"rbx": 0x4000_0000, "rcx": 2}, 14, "read from 0x40000010"),
    "rip": ("488b05f9ffff3f", {}, 14, "read from 0x40010000"),
    "absolute": ("488b042500000040", {}, 14, "read from 0x40000000"),
    "short": ("678b00", {"rax": 0xFFFF_FFFF_4000_0000}, 14, "read from 0x40000000"),
    "gs": ("65488b042510000000", {"gs": {"base": 0x4000_0000}}, 14, "read from 0x40000010"),
    "across": ("488b00", {"rax": 0x1F_FFFC}, 14, "read from 0x1ffffc and on to 0x200003"),
    "push": ("50", {"rsp": 0x4000_0000}, 14, "wrote to 0x3ffffff8"),
    "call": ("e800000000", {"rsp": 0x4000_0000}, 14, "wrote to 0x3ffffff8"),
    "pop": ("58", {"rsp": 0x4000_0000}, 14, "read from 0x40000000"),
    "ret": ("c3", {"rsp": 0x4000_0000}, 14, "read from 0x40000000"),
    "leave": ("c9", {"rbp": 0x4000_0000}, 14, "read from 0x40000000"),
    "string": (
        "f348a5",
        {"rdi": 0x4000_0000, "rsi": CODE, "rcx": 1},
        14,
        "`rep movsq qword ptr [rdi], qword ptr [rsi]` wr",
    ),
    "cmpxchg": ("f0480fb108", {"rax": 0x4000_0000}, 14, "wrote to 0x40000000"),
    "rcx is 0": ("f348a5", {"rdi": 0x4000_0000}, None, ""),
    "lea": ("488d00", {"rax": 0x4000_0000}, None, ""),
    "nop": ("0f1f00", {"rax": 0x4000_0000}, None, ""),
    "harmless": ("4889d8", {}, None, ""),
    "non-canonical": (
        "488b00",
        {"rax": 1 << 47},
        13,
        "read from 0x800000000000, which is not canonical (bits 63 to 47",
    ),
    "non-canonical stack": ("50", {"rsp": 1 << 63}, 12, "which is not canonical"),
    "rbp": ("488b4500", {"rbp": 1 << 63}, 12, "not canonical"),
    "ud2": ("0f0b", {}, 6, "`ud2` is an invalid opcode on purpose"),
    "bytes": ("06" + "ff" * 15, {}, 6, "the bytes 06 ff ff ff ff ff ff ff are not an instruction"),
    "div": ("f7f1", {"rax": 5}, 0, "`div ecx` divided by zero"),
    "div of memory": ("48f736", {"rsi": 0x9000}, 0, "divided by zero"),
    "div by r8b": ("41f6f0", {"rax": 5, "r8": 0x100}, 0, "divided by zero"),
    "quotient": ("f7f1", {"rdx": 5, "rcx": 5}, 0, "the quotient of `div ecx` does not fit into 32 bits"),
    "quotient fits": ("f7f1", {"rdx": 4, "rcx": 5}, None, ""),
    "smallest / -1": ("48f7f9", {"rax": 1 << 63, "rdx": 2**64 - 1, "rcx": 2**64 - 1}, 0, "does not fit into 64 bits"),
    "smallest / 1": ("48f7f9", {"rax": 1 << 63, "rdx": 2**64 - 1, "rcx": 1}, None, ""),
    "int3": ("cc", {}, 3, "`int3` is a breakpoint"),
    "int": ("cd80", {}, 0x80, "`int 0x80` asked for interrupt 0x80"),
    "hlt": ("f4", RING3, 13, "`hlt` is for ring 0 only, and the code runs in ring 3"),
    "mov cr3": ("0f22d8", RING3, 13, "is for ring 0 only"),
    "wrmsr in ring 3": ("0f30", RING3, 13, "is for ring 0 only"),
    "cli": ("fa", RING3, 13, "`cli` in ring 3 is not allowed: RFLAGS.IOPL is 0, and needs to be 3"),
    "cli with IOPL": ("fa", {**RING3, "rflags": 0x3002}, None, ""),
    "out": (
        "e6f4",
        RING3,
        13,
        "`out 0xf4, al` in ring 3 is not allowed: IOPL is 0, and the TSS's I/O bitmap does not op",
    ),
    "in dx": ("ed", {**RING3, "rdx": 0x3F8}, 13, "does not open port 0x3f8"),
    "outsb": ("6e", {**RING3, "rdx": 0x3F8, "rsi": 0x9000}, 13, "does not open port 0x3f8"),
    "out with IOPL": ("e6f4", {**RING3, "rflags": 0x3002}, None, ""),
    "sse": ("0f28c1", {"cr4": 0x20}, 6, "uses SSE, which the guest has not enabled (CR4.OSFXSR is 0)"),
    "sse, TS": ("0f28c1", {"cr0": 0x8000_0019}, 7, "while CR0.TS is 1"),
    "x87, EM": ("d9c0", {"cr0": 0x8000_0015}, 7, "while CR0.EM is 1"),
    "sse, EM": ("0f28c1", {"cr0": 0x8000_0015}, 6, "CR0.EM"),
    "avx": ("c5f877", {}, None, ""),
    "avx registers": ("c5f828c1", {}, 6, "uses AVX, which the guest has not enabled (CR4.OSXSAVE is 0)"),
    "movaps": ("0f2800", {"rax": 0x9001}, 13, "read from 0x9001, which is not aligned to 16 bytes"),
    "movups": ("0f1000", {"rax": 0x9001}, None, ""),
    "vmovaps": ("c5fc2800", {"rax": 0x9010, "cr4": 0x40620}, 13, "not aligned to 32 bytes"),
    "alignment check": ("8b00", {**RING3, **AM, "rax": 0x9002}, 17, "read from 0x9002, not a multiple of 4"),
    "no alignment check in ring 0": ("8b00", {**AM, "rax": 0x9002}, None, ""),
    "absent segment": (
        "8ed8",
        {"rax": ABSENT},
        11,
        "loads DS with 0x28, which names an entry of the GDT that is not pres",
    ),
    "absent stack": ("8ed0", {"rax": ABSENT}, 12, "loads SS with 0x28"),
    "outside the GDT": ("8ed8", {"rax": 0x48}, 13, "loads DS with 0x48, which lies outside the GDT (limit 0x3f)"),
    "outside the LDT": ("8ed8", {"rax": 0xFC, "ldt": {"limit": 7}}, 13, "lies outside the LDT (limit 0x7)"),
    "null segment": ("8ed8", {}, None, ""),
    "good segment": ("8ed8", {"rax": DATA}, None, ""),
    "ltr": ("0f00d8", {"rax": 0x80}, 13, "`ltr ax` loads TR with 0x80, which lies outside"),
    "iretq": ("48cf", {}, 13, "`iretq` loads CS with 0x0, which is null"),
    "wrmsr": (
        "0f30",
        {"rcx": 0x1234},
        13,
        "most likely because the CPU does not have MSR 0x1234 or does not take the value",
    ),
    "mov cr4": ("0f22e0", {"rax": 1 << 40}, 13, "does not take 0x10000000000 there"),
    "single step": ("90", {"rflags": 0x102}, 1, "RFLAGS.TF is set"),
    "fwait": ("9b", {}, 16, "most likely reported the error of an x87 instruction"),
    "divss": ("f30f5ec1", {}, 19, "most likely met numbers"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    machine_code, registers, vector, words = FAULTS[name]
    fault = find_fault(World(code(machine_code) + b"\x90" * 16, **registers).scene)
    if vector is None:
        assert fault is None
    else:
        assert fault is not None
        assert fault.vector == vector
        assert words in fault.what
        assert (fault.address is not None) == (vector == 14)


@pytest.mark.parametrize(
    ("machine_code", "flags", "registers", "words"),
    [
        ("488903", P | U, {}, "read-only (W is 0 in PT entry 9)"),
        ("488903", P | W, RING3, "for the supervisor only (U is 0 in PT entry 9) while the code runs in ring 3"),
        ("488b03", P | W, {}, None),
    ],
)
def test_page_rights(machine_code, flags, registers, words):
    world = World(code(machine_code), rbx=0x9000, **registers)
    world.page(0x9000, flags)
    fault = find_fault(world.scene)
    assert (
        (fault is None) if words is None else (fault.vector == 14 and words in fault.what and fault.address == 0x9000)
    )


def test_ports_that_the_bitmap_opens():
    world = World(code("e6f4"), **RING3)
    world.registers.tr.limit = 0x67 + 0x81
    world.write(TSS + 102, (0x68).to_bytes(2, "little"))
    assert find_fault(world.scene) is None
    world.write(TSS + 0x68 + 0xF4 // 8, bytes([1 << 0xF4 % 8]))
    assert "does not open port 0xf4" in find_fault(world.scene).what


def test_a_jump_into_nothing_names_the_caller():
    world = World(code("ffd090"), rip=0x4000_0000, rsp=STACK)
    world.put(STACK, CODE + 2)
    assert "Triple fault at 0x40000000: the CPU went to 0x40000000 (called from main), which" in said(world)
    world.put(STACK, CODE + 3)  # not behind a call
    assert "went to 0x40000000, which the guest has not mapped (PDPT entry 1 is not present)" in said(world)


def test_a_handler_that_is_not_there():
    world = World(rip=0x4000_0000)
    world.gate(13, handler=0x4000_0000)
    assert "the CPU went to 0x40000000 to handle a general protection fault (#GP), which" in said(world)


def test_rip_that_cannot_run():
    assert find_fault(World(rip=1 << 60).scene).vector == 13
    world = World()
    world.page(CODE, P | NX)
    assert "is not executable" in find_fault(world.scene).what


def test_an_instruction_that_goes_on_in_an_unmapped_page():
    world = World(rip=CODE + 0xFFE)
    world.write(CODE + 0xFFE, code("48c70001000000"))
    world.page(CODE + 0x1000, 0)
    fault = find_fault(world.scene)
    assert (fault.vector, fault.address) == (14, CODE + 0x1000)
    assert "the instruction at 0x10ffe goes on at 0x11000" in fault.what


def test_int_in_ring_3_needs_its_gate():
    world = World(code("cd80"), **RING3)
    world.gate(0x80)
    fault = find_fault(world.scene)
    assert (fault.vector, "entry 128 of the IDT is for ring 0 (DPL)" in fault.what) == (13, True)
    world.gate(0x80, dpl=3)
    assert find_fault(world.scene).vector == 0x80


def test_a_trap_that_lies_behind_rip():
    world = World(code("cc90"), rip=CODE + 1)
    assert "Triple fault at main+0x1: just before, `int3` is a breakpoint" in said(world)


def test_32_bit_code_is_held_to_its_segments():
    world = World(code("8b03"), cr0=0x11, cr4=0, efer=0, cs={"l": 0, "db": 1}, ds={"base": 0x100, "limit": 0xFFF})
    world.registers.rbx = 0xFFC
    assert find_fault(world.scene) is None
    world.registers.rbx = 0xFFD
    fault = find_fault(world.scene)
    assert (fault.vector, "read from 0x10fd, which is beyond its segment's limit" in fault.what) == (13, True)
    world.registers.ds.type = 7  # expand-down: what lies above the limit is allowed
    assert find_fault(world.scene) is not None
    world.registers.rbx = 0x1000
    assert find_fault(world.scene) is None


def test_real_mode_addresses():
    world = World(code("8b07"), rip=0, cr0=0x10, cr4=0, efer=0, rbx=0x5555_0010, idt=(0, 0x3FF))
    world.registers.cs.l, world.registers.cs.db, world.registers.cs.base = 0, 0, CODE
    world.registers.ds.base, world.registers.ds.limit = 0x9000, 0xF
    assert "read from 0x9010, which is beyond its segment's limit" in find_fault(world.scene).what


# ---- why it could not be delivered: (a change to a world whose IDT is good, the reason) ----


def unmap(at):
    return lambda world: world.page(at, 0)


DELIVERY = {
    "short IDT": (lambda w: setattr(w.registers, "idt_limit", 0x7F), "the IDT ends before its entry 14 (limit 0x7f)"),
    "IDT away": (unmap(IDT), "the IDT, at 0x60e0, is not mapped (PT entry 6 is not present)"),
    "IDT not RAM": (lambda w: w.put(0x4000 + 8 * 6, 0x40000007), "the IDT, at physical 0x400000e0, lies outside RAM"),
    "gate absent": (lambda w: w.gate(14, present=0), "entry 14 of the IDT is not present"),
    "gate type": (lambda w: w.gate(14, type=5), "entry 14 of the IDT is no 64-bit interrupt or trap gate (type 0x5)"),
    "null selector": (lambda w: w.gate(14, selector=0), "has the code selector 0x0, which is null"),
    "selector outside": (lambda w: w.gate(14, selector=0x80), "which lies outside the GDT (limit 0x3f)"),
    "absent code": (lambda w: w.gate(14, selector=ABSENT), "names an entry of the GDT that is not present"),
    "data": (lambda w: w.gate(14, selector=DATA), "has the code selector 0x10, which is not 64-bit code"),
    "32-bit code": (lambda w: w.gate(14, selector=CODE32), "has the code selector 0x18, which is not 64-bit code"),
    "outwards": (lambda w: w.gate(14, selector=0x23), "leads to ring 3, and nothing may lead outwards"),
    "GDT away": (unmap(GDT), "cannot be looked up, since the GDT, at 0x7008, is not mapped"),
    "stack away": (unmap(STACK - 0x1000), "the stack pointer is 0x20000, and the page below it the guest has not map"),
    "stack read-only": (lambda w: w.page(STACK - 0x1000, P | U), "and the page below it is read-only"),
    "stack non-canonical": (
        lambda w: setattr(w.registers, "rsp", 1 << 62),
        "is 0x4000000000000000, which is not canon",
    ),
    "IST away": (lambda w: (w.gate(14, ist=1), w.put(TSS + 36, 0x4000_0000)), "IST1 is 0x40000000, and the page below"),
}


@pytest.mark.parametrize("name", DELIVERY)
def test_delivery(name):
    change, reason = DELIVERY[name]
    world = World(code("488b00"), rax=0x4000_0000)
    world.gate(8)
    world.gate(14)
    assert "why the page fault (#PF) could not be delivered is not to be seen" in said(world)
    change(world)
    text = said(world)
    assert "could not be delivered because" in text
    assert reason in text


def test_both_deliveries_must_have_failed():
    world = World(code("488b00"), rax=0x4000_0000)
    world.gate(8)
    world.gate(14, present=0)
    assert said(world).endswith("is not present (why the double fault could not be is not to be seen).")
    world.gate(8, present=0)
    assert said(world).endswith("because entry 14 of the IDT is not present.")


def test_delivery_from_ring_3_needs_the_stack_of_the_tss():
    world = World(code("0f0b"), **RING3)
    world.gate(6)
    world.gate(8)
    world.page(RING0_STACK - 0x1000, 0)
    assert "because RSP0 is 0x30000, and the page below it the guest has not mapped (PT entry 47" in said(world)
    world.page(RING0_STACK - 0x1000, P | W)
    assert "not to be seen in the guest's tables" in said(world)
    world.registers.tr.selector = 0
    world.put(TSS + 4, 0)
    assert "RSP0 is 0x0" in said(world)
    assert said(world).endswith("since the guest has not loaded a TSS.")
    world.page(TSS, 0)
    world.registers.gdt_base = 0x9000
    world.put(0x9000 + 8, 0x00AF9B000000FFFF)
    assert "the TSS, at 0x7800, which names the ring-0 stack, cannot be read" in said(world)


def test_an_idt_that_was_never_loaded():
    world = World(code("0f0b"), idt=(0, 0xFFFF))
    assert "because the guest has not loaded an IDT (base 0, limit 0xffff, as after a reset)" in said(world)


def test_32_bit_gates_and_stack():
    world = World(code("0f0b"), cr0=0x11, cr4=0, efer=0, cs={"l": 0, "db": 1, "selector": CODE32}, idt=(IDT, 0x7FF))
    low = HANDLER & 0xFFFF | CODE32 << 16 | 0x8E << 40 | (HANDLER >> 16) << 48
    world.put(IDT + 8 * 6, low)
    assert "not to be seen in the guest's tables" in said(world)
    world.put(IDT + 8 * 6, low & ~(0xF << 40) | 3 << 40)
    assert "entry 6 of the IDT is no interrupt, trap or task gate (type 0x3)" in said(world)


def test_real_mode_interrupt_table():
    world = World(code("0f0b"), rip=0, cr0=0x10, cr4=0, efer=0, idt=(0, 0), cs={"l": 0, "db": 0, "base": CODE})
    assert "the interrupt table ends before its entry 6 (limit 0x0)" in said(world)
    world.registers.idt_limit = 0x3FF
    assert "not to be seen" in said(world)


# ---- without a fault to be seen ----


def test_interrupts():
    world = World(code("f490"), rip=CODE + 1, rflags=0x202)
    assert "an interrupt came while the CPU was halted, and could not be delivered because the IDT is empty" in said(
        world
    )
    world.write(CODE, b"\x90")
    assert "most likely an interrupt came" in said(world)
    world.registers.rflags = 2
    assert "`nop` gives no reason for an exception that can be seen from outside" in said(world)


def test_cr2_as_evidence():
    world = World(cr2=0x4000_0000)
    assert "most likely a page fault, since CR2 holds 0x40000000, which the guest has not mapped" in said(world)
    world = World(code("488b00"), rax=0x4000_0000, cr2=0x4000_0000)
    assert any("agrees: 0x40000000" in note for note in notes(SHUTDOWN, world.scene))
    world.registers.cr2 = 0x60E0
    assert any("CR2 holds 0x60e0: the address of an earlier" in note for note in notes(SHUTDOWN, world.scene))


def test_registers_after_a_reset_are_not_explained():
    world = World(
        rip=0xFFF0, cr0=0x6000_0010, cr4=0, efer=0, cs={"base": 0xFFFF_0000, "selector": 0xF000, "l": 0, "db": 0}
    )
    assert said(world).startswith(
        "Triple fault, place unknown: this host's KVM has already put the vCPU into its reset"
    )
    assert len(notes(SHUTDOWN, world.scene)) == 1


def test_code_where_there_is_no_ram():
    world = World(rip=0x40_0000)
    world.put(0x3000 + 16, 0x4000_0000 | 0x87)
    text = "the guest runs on at physical 0x40000000, where there is no RAM to hold code."
    assert said(world).endswith(text)
    assert said(world, ExitFacts("internal_error", 17, 1)).endswith(text)


# ---- the ends that KVM declares ----


def test_emulation_failure():
    facts = ExitFacts("internal_error", 17, 1, (1, 0xCC0F, 0))
    text = said(World(code("cc")), facts)
    assert text.startswith(
        "KVM gave up at main: it cannot emulate `int3` (cc); on a host whose CPU does not run ring 0"
    )
    assert "move this one to ring 3" in text
    assert "ring 0" not in said(World(code("cc"), **RING3), facts)


def test_emulation_failure_of_code_that_only_kvm_could_read():
    world = World(rip=0x4000_0000)
    facts = ExitFacts("internal_error", 17, 1, (1, 0xFFFF_FFFF_FF_CC_01, 0))
    assert "it cannot emulate `int3` (cc)" in said(world, facts)
    assert "could not read or decode." in said(world, ExitFacts("internal_error", 17, 1, (0,)))
    assert "could not read or decode (06)." in said(world, ExitFacts("internal_error", 17, 1, (1, 0x0601, 0)))


def test_emulation_failure_on_a_device():
    world = World(code("0f2900"), rax=0x40_0000)
    world.put(0x3000 + 16, 0x4000_0000 | 0x87)
    text = said(world, ExitFacts("internal_error", 17, 1))
    assert "`movaps xmmword ptr [rax], xmm0` (0f 29 00) accesses physical 0x40000000, which is not RAM" in text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (ExitFacts("internal_error", 17, 2), "two exceptions came at once"),
        (
            ExitFacts("internal_error", 17, 3, (0x8000_0B0E, 48, 0, 0)),
            "while page fault (#PF) was being delivered, the CPU",
        ),
        (ExitFacts("internal_error", 17, 3, (0x8000_0B0E, 48, 0, 0)), "EPT violation"),
        (ExitFacts("internal_error", 17, 3), "an event was being delivered"),
        (ExitFacts("internal_error", 17, 4, (0x4D, 0)), "a reason that this kernel does not know (0x4d)"),
        (ExitFacts("internal_error", 17, 99), "suberror 99"),
        (
            ExitFacts("fail_entry", 9, hardware_reason=0x8000_0021),
            "(hardware reason 0x80000021): the CPU calls the guest",
        ),
        (
            ExitFacts("fail_entry", 9, hardware_reason=2**64 - 1),
            "the CPU calls the guest's state or KVM's control fields",
        ),
        (ExitFacts("fail_entry", 9, hardware_reason=0x55), "a reason that pyvmm does not know"),
        (ExitFacts("unhandled", 5), "halted at main, and nothing can wake it"),
        (ExitFacts("unhandled", 37), "stopped at main with KVM_EXIT_NOTIFY"),
        (ExitFacts("unhandled", 999), "with exit 999"),
    ],
)
def test_numbers_of_kvm(facts, words):
    assert words in said(World(), facts)


def test_a_state_that_no_cpu_enters():
    world = World(cr0=0x8000_0010, rflags=0)
    text = said(world, ExitFacts("fail_entry", 9, hardware_reason=0x8000_0021))
    assert "CR0.PG is set without CR0.PE and bit 1 of RFLAGS is 0." in text
    assert "invalid." in said(World(), ExitFacts("fail_entry", 9, hardware_reason=0x8000_0021))
