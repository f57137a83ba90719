# locality.py: which pages a guest has used, by its own page tables (technique T3.3, US9053065B2). Unit: RAM pages.
"""`accessed`: what is to lie together, at the front of a snapshot.

A CPU sets the accessed bit of each entry that it walks through (Intel SDM vol. 3, "Accessed and Dirty Flags"), so that
nothing below an entry without it was used, since the guest cleared it last. Tables are the guest's, and may be
anything: each is read once for each level that it is used at, and at most MAX_TABLES of them.
"""

from __future__ import annotations

import struct

from pyvmm.explain.pagewalk import CR4_PSE, PS, A, AddressSpace, P
from pyvmm.layout import PAGE_SIZE, Gpa
from pyvmm.memory.pageset import PageSet
from pyvmm.vcpu.registers import CR0_PG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.machine import VM
    from pyvmm.memory import GuestMemory
    from pyvmm.vcpu import Registers

MAX_TABLES = 1 << 14
"""They map 32 GiB by small pages. What others map is not looked at."""
_ADDRESS = 0x000F_FFFF_FFFF_F000


def accessed(vm: VM) -> list[tuple[int, int]]:
    """(first page, pages) of what any vCPU's page tables map and say was accessed, and of these tables, in the order of
    linear addresses, none twice; nothing of a vCPU whose paging is off. The VM must stand still."""
    walk = _Walk(vm.memory)
    for cpu in range(len(vm.vcpus)):
        walk.add(vm.regs(cpu))
    return walk.found


class _Walk:
    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._seen: set[tuple[str, int, int]] = set()
        pages = memory.size // PAGE_SIZE
        self._new = PageSet(pages, [(0, pages)])
        self.found: list[tuple[int, int]] = []

    def add(self, registers: Registers) -> None:
        """All that one vCPU's tables map."""
        if not registers.cr0 & CR0_PG:
            return
        space = AddressSpace(registers, self._memory.read)
        short = space.name == "32-bit paging"
        large = not short or bool(registers.cr4 & CR4_PSE)
        mask = {"32-bit paging": 0xFFFF_F000, "PAE paging": 0xFFFF_FFE0}.get(space.name, _ADDRESS)
        self._table(space, 0, registers.cr3 & mask, 4 if short else 8, large)

    def _table(self, space: AddressSpace, depth: int, address: int, size: int, large: bool) -> None:
        """One table, and what lies below it; as deep as there are levels, at most 5."""
        level = space.levels[depth]
        if (space.name, depth, address) in self._seen or len(self._seen) >= MAX_TABLES:
            return
        self._seen.add((space.name, depth, address))
        entries = 1 << level.bits
        raw = space.read_gpa(Gpa(address), entries * size)
        if raw is None:
            return
        self._note(address, PAGE_SIZE)
        wanted = P if level.name == "PDPT" and level.bits == 2 else P | A  # of PAE, whose PDPT has no accessed bits
        for value in struct.unpack(f"<{entries}{'I' if size == 4 else 'Q'}", raw):
            if value & wanted != wanted:
                continue
            if depth == len(space.levels) - 1 or (level.pages and large and value & PS):
                above = value >> 13 & 0xFF if size == 4 and level.span > PAGE_SIZE else 0  # bits 39:32 of a 4 MiB page
                self._note(value & _ADDRESS & -level.span | above << 32, level.span)
            else:
                self._table(space, depth + 1, value & (0xFFFF_F000 if size == 4 else _ADDRESS), size, large)

    def _note(self, address: int, size: int) -> None:
        """What of it is RAM and new."""
        for region in self._memory.regions:
            low, high = max(address, region.gpa.value), min(address + size, region.end.value)
            if low < high:
                first = (low - region.gpa.value + region.offset) // PAGE_SIZE
                self.found += self._new.take(first, (high - low) // PAGE_SIZE)
