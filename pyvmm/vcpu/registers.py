# registers.py: a vCPU's registers by name, and what they are when a guest starts.
"""`Registers`, read from a parked vCPU; and the start states of the boot modes (Intel SDM vol. 3, 9.1 and 3.4)."""

from __future__ import annotations

from pyvmm._native import ffi
from pyvmm.errors import BadInput
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import CData
    from pyvmm.image.model import Entry
    from pyvmm.kvm import VcpuFd
    from pyvmm.state import State

GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
TABLES = ("gdt", "idt")

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10


class Segment(Record):
    """One segment register with its hidden part. `limit` in bytes; `dpl` of SS is the CPU's privilege level."""

    __slots__ = ("base", "db", "dpl", "l", "limit", "present", "selector", "type")

    def __init__(self, raw: CData) -> None:
        self.selector: int = raw.selector
        self.base: int = raw.base
        self.limit: int = raw.limit
        self.type: int = raw.type
        self.dpl: int = raw.dpl
        self.present: int = raw.present
        self.l: int = raw.l
        self.db: int = raw.db


class Registers(Record):
    """A copy of a vCPU's general, control and segment registers. Setting a field does not change the vCPU."""

    __slots__ = (*GENERAL, *CONTROL, *SEGMENTS, "gdt_base", "gdt_limit", "idt_base", "idt_limit")

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rbp: int
    rsp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt_base: int
    gdt_limit: int
    idt_base: int
    idt_limit: int

    def __init__(self, regs: CData, sregs: CData) -> None:
        for name in GENERAL:
            setattr(self, name, getattr(regs, name))
        for name in CONTROL:
            setattr(self, name, getattr(sregs, name))
        for name in SEGMENTS:
            setattr(self, name, Segment(getattr(sregs, name)))
        for name in TABLES:
            table = getattr(sregs, name)
            setattr(self, f"{name}_base", table.base)
            setattr(self, f"{name}_limit", table.limit)

    @property
    def ring(self) -> int:
        """The current privilege level, 0..3."""
        return self.ss.dpl if self.cr0 & CR0_PE else 0

    @property
    def mode(self) -> int:
        """Width of the code running: 16, 32 or 64 bits."""
        if self.cs.l and self.efer & EFER_LMA:
            return 64
        return 32 if self.cs.db else 16

    @property
    def pc(self) -> int:
        """The linear address of the next instruction."""
        return self.rip if self.mode == 64 else (self.cs.base + self.rip) & 0xFFFF_FFFF


def saved_registers(state: State) -> Registers:
    """The registers in a vCPU's saved state (pyvmm.vcpu.state). Raises StateError where they are not there."""
    parts = []
    for name in ("regs", "sregs"):
        struct = ffi.new(f"struct kvm_{name} *")
        ffi.memmove(struct, state.blob(name, ffi.sizeof(f"struct kvm_{name}")), ffi.sizeof(f"struct kvm_{name}"))
        parts.append(struct)
    return Registers(*parts)


def read_registers(fd: VcpuFd) -> Registers:
    """The registers of a vCPU that is not running."""
    return Registers(fd.get_regs(), fd.get_sregs())


def write_registers(fd: VcpuFd, values: dict[str, int]) -> None:
    """Changes general and control registers by name. Raises BadInput for another name, with nothing changed."""
    for name in values:
        if name not in GENERAL and name not in CONTROL:
            raise BadInput(f"no register {name!r} that can be set: choose one of {', '.join(GENERAL + CONTROL)}")
    regs, sregs = fd.get_regs(), fd.get_sregs()
    for name, value in values.items():
        setattr(regs if name in GENERAL else sregs, name, value)
    if any(name in CONTROL for name in values):
        fd.set_sregs(sregs)
    fd.set_regs(regs)


def _flat(segment: CData, code: bool, bits: int) -> None:
    segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 0x08 if code else 0x10
    segment.type = 0xB if code else 0x3  # accessed
    segment.present, segment.s, segment.g, segment.dpl = 1, 1, 1, 0
    segment.l, segment.db = int(bits == 64 and code), int(not (bits == 64 and code))


def set_entry(fd: VcpuFd, entry: Entry, page_table: int) -> None:
    """Puts the first vCPU where a guest's image says it starts. `page_table`: CR3, used in mode long64 alone."""
    sregs = fd.get_sregs()
    if entry.mode == "real16":
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            segment.base, segment.selector, segment.limit = 0, 0, 0xFFFF
    else:
        bits = 64 if entry.mode == "long64" else 32
        _flat(sregs.cs, True, bits)
        for name in ("ds", "es", "fs", "gs", "ss"):
            _flat(getattr(sregs, name), False, bits)
        sregs.cr0 = CR0_PE | CR0_ET
        if bits == 64:
            sregs.cr0 |= CR0_PG
            sregs.cr3 = page_table
            sregs.cr4 = CR4_PAE
            sregs.efer = EFER_LME | EFER_LMA
    fd.set_sregs(sregs)
    regs = fd.get_regs()
    for name in GENERAL:
        setattr(regs, name, entry.registers.get(name, 0))
    regs.rip, regs.rflags = entry.rip.value, 0x2
    fd.set_regs(regs)
