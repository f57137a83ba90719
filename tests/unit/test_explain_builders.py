# test_explain_builders.py: a stopped vCPU without KVM: RAM, page tables, GDT, IDT, TSS, code. For test_explain_*.
import struct
from types import SimpleNamespace

from pyvmm.errors import MemoryAccessError
from pyvmm.explain.scene import Scene
from pyvmm.vcpu.registers import CONTROL, GENERAL, SEGMENTS, TABLES, Registers

RAM = 2 << 20
PML4, PDPT, PD, PT = 0x1000, 0x2000, 0x3000, 0x4000
IDT, GDT, TSS = 0x6000, 0x7000, 0x7800
CODE, STACK, RING0_STACK, HANDLER = 0x10000, 0x20000, 0x30000, 0x11000
P, W, U, PS, NX = 1, 2, 4, 0x80, 1 << 63
CODE0, CODE3, ABSENT, DATA, CODE32 = 0x08, 0x23, 0x28, 0x10, 0x18
SEGMENT = {"base": 0, "limit": 0xFFFFFFFF, "selector": DATA, "type": 3, "dpl": 0, "present": 1, "l": 0, "db": 1}


class FakeSymbols:
    """lookup() as pyvmm.image.symbols has it, over {name: start}; the last symbol ends at 0x13000."""

    def __init__(self, **starts):
        self._starts = sorted((start, name) for name, start in starts.items())

    def lookup(self, address):
        below = [(start, name) for start, name in self._starts if start <= address < 0x13000]
        if not below:
            return None
        start, name = below[-1]
        return name if start == address else f"{name}+{address - start:#x}"


def make_registers(**changes):
    """64-bit code in ring 0 with 4-level paging. A segment's changes are a dict, a table's a pair (base, limit)."""
    general = dict.fromkeys(GENERAL, 0) | {"rip": CODE, "rsp": STACK, "rflags": 2}
    control = dict.fromkeys(CONTROL, 0) | {"cr0": 0x8001_0011, "cr3": PML4, "cr4": 0x620, "efer": 0xD00}
    segments = {name: dict(SEGMENT) for name in SEGMENTS}
    segments["cs"] |= {"selector": CODE0, "type": 11, "l": 1, "db": 0}
    segments["tr"] |= {"selector": 0x40, "base": TSS, "limit": 0x67, "type": 11}
    tables = {"gdt": (GDT, 0x3F), "idt": (0, 0)}
    for name, value in changes.items():
        where = next(group for group in (general, control, tables, segments) if name in group)
        where[name] = segments[name] | value if name in segments else value
    assert set(tables) == set(TABLES)
    tables = {name: SimpleNamespace(base=base, limit=limit) for name, (base, limit) in tables.items()}
    segments = {name: SimpleNamespace(**values) for name, values in segments.items()}
    return Registers(SimpleNamespace(**general), SimpleNamespace(**control, **segments, **tables))


RING3 = {"cs": {"selector": CODE3, "dpl": 3}, "ss": {"selector": 0x33, "dpl": 3}}


class World:
    """Guest RAM, identity-mapped by small pages that are writable and the user's, and what is in it."""

    def __init__(self, code=b"\x90", **registers):
        self.ram = bytearray(RAM)
        self.registers = make_registers(**registers)
        self.symbols = FakeSymbols(main=CODE, handler=HANDLER)
        for table, entry in ((PML4, PDPT), (PDPT, PD), (PD, PT)):
            self.put(table, entry | P | W | U)
        for page in range(512):
            self.put(PT + 8 * page, page << 12 | P | W | U)
        self.put(GDT + CODE0, 0x00AF9B000000FFFF)
        self.put(GDT + DATA, 0x00CF93000000FFFF)
        self.put(GDT + CODE32, 0x00CF9B000000FFFF)
        self.put(GDT + (CODE3 & ~7), 0x00AFFB000000FFFF)
        self.put(GDT + ABSENT, 0x00CF73000000FFFF)
        self.put(GDT + 0x30, 0x00CFF3000000FFFF)
        self.put(TSS + 4, RING0_STACK)
        self.put(TSS + 102, 0x68)  # no I/O bitmap
        self.write(CODE, code)

    def read(self, gpa, size):
        if not 0 <= gpa.value <= RAM - size:
            raise MemoryAccessError("not RAM")
        return bytes(self.ram[gpa.value : gpa.value + size])

    def write(self, at, data):
        self.ram[at : at + len(data)] = data

    def put(self, at, value):
        self.write(at, value.to_bytes(8, "little"))

    def page(self, linear, flags):
        """Gives an identity-mapped page other flags."""
        self.put(PT + 8 * (linear >> 12), (linear & ~0xFFF) | flags)

    def gate(self, vector, selector=CODE0, type=0xE, dpl=0, present=1, ist=0, handler=HANDLER):
        """Makes an entry of a 64-bit IDT that is loaded whole."""
        self.registers.idt_base, self.registers.idt_limit = IDT, 0xFFF
        low = handler & 0xFFFF | selector << 16 | ist << 32 | type << 40 | dpl << 45 | present << 47
        self.write(IDT + 16 * vector, struct.pack("<QQ", low | (handler >> 16 & 0xFFFF) << 48, handler >> 32))

    @property
    def scene(self):
        return Scene(self.registers, self.read, self.symbols)
