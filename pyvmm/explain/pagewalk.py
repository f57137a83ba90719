# pagewalk.py: the guest's page tables as the CPU walks them, for all of explain. Linear addresses are int, bytes.
"""`AddressSpace` translates linear addresses by reading the guest's own page tables; a `Walk` shows each step.

Intel SDM vol. 3, chapter "Paging": 32-bit, PAE, 4-level and 5-level. KVM_TRANSLATE would give the answer alone, neither
the way to it nor a reason why there is none.
"""

from __future__ import annotations

from pyvmm.errors import PyvmmError
from pyvmm.layout import PAGE_SIZE, Gpa, format_size
from pyvmm.record import Record
from pyvmm.vcpu.registers import CR0_PG, CR4_PAE, EFER_LMA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal, TypeAlias

    from pyvmm.vcpu import Registers

    Read: TypeAlias = Callable[[Gpa, int], bytes]
    """Guest-physical memory; raises a PyvmmError where there is no RAM."""
    Kind: TypeAlias = Literal["read", "write", "execute"]

CR0_WP = 1 << 16
CR4_PSE = 1 << 4
CR4_LA57 = 1 << 12
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21
EFER_NXE = 1 << 11
RFLAGS_AC = 1 << 18

P, W, U, A, D, PS, NX = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7, 1 << 63
FLAGS = {"P": P, "W": W, "U": U, "A": A, "D": D, "PS": PS, "NX": NX}
_PAT = 1 << 12  # of a large page
_ADDRESS = 0x000F_FFFF_FFFF_F000
_ADDRESS_32 = 0xFFFF_F000


class Level(Record):
    """One level of the tree: its table's name, which bits of the linear address are the index into it (`bits` of them,
    from `shift` on), and whether an entry may be a (large) page itself."""

    __slots__ = ("bits", "name", "pages", "shift")

    def __init__(self, name: str, shift: int, bits: int = 9, pages: bool = False) -> None:
        self.name = name
        self.shift = shift
        self.bits = bits
        self.pages = pages

    @property
    def span(self) -> int:
        """Bytes that one entry maps."""
        return 1 << self.shift


_PT, _PD, _PDPT = Level("PT", 12), Level("PD", 21, pages=True), Level("PDPT", 30, pages=True)
_PML4 = Level("PML4", 39)
_LEVELS = {
    "no paging": (),
    "32-bit paging": (Level("PD", 22, 10, pages=True), Level("PT", 12, 10)),
    "PAE paging": (Level("PDPT", 30, 2), _PD, _PT),
    "4-level paging": (_PML4, _PDPT, _PD, _PT),
    "5-level paging": (Level("PML5", 48), _PML4, _PDPT, _PD, _PT),
}


class Step(Record):
    """One entry that the walk read: `index` into the table called `level`, `at` its guest-physical address."""

    __slots__ = ("at", "index", "level", "value")

    def __init__(self, level: str, index: int, at: Gpa, value: int) -> None:
        self.level = level
        self.index = index
        self.at = at
        self.value = value

    @property
    def flags(self) -> tuple[str, ...]:
        """The names of the flags set: P(resent), W(ritable), U(ser), A(ccessed), D(irty), PS (large page), NX."""
        return tuple(name for name, bit in FLAGS.items() if self.value & bit)

    @property
    def name(self) -> str:
        """As in "PML4 entry 254"."""
        return f"{self.level} entry {self.index}"


class Walk(Record):
    """The way from a linear address to `gpa`; None where it ended early, and then `reason` says why.

    `page_size`: of the page it ended in (bytes), 0 where it ended early or paging is off.
    """

    __slots__ = ("gpa", "linear", "page_size", "reason", "steps")

    def __init__(self, linear: int, steps: tuple[Step, ...], gpa: Gpa | None, page_size: int, reason: str = "") -> None:
        self.linear = linear
        self.steps = steps
        self.gpa = gpa
        self.page_size = page_size
        self.reason = reason

    def without(self, flag: int) -> Step | None:
        """The first entry that lacks a flag which must be set on the whole way (P, W, U)."""
        return next((step for step in self.steps if not step.value & flag), None)


class AddressSpace:
    """Linear memory as a vCPU sees it. Nothing that the guest has put into its tables makes it raise.

    The vCPU must be stopped; its TLB is not seen, so what is shown is what the tables say now.
    """

    def __init__(self, registers: Registers, read: Read) -> None:
        self._registers = registers
        self._read = read
        self.name = _paging(registers)
        self.levels: tuple[Level, ...] = _LEVELS[self.name]
        self._entry_size = 4 if self.name == "32-bit paging" else 8

    @property
    def width(self) -> int:
        """Bits of a linear address that are translated; the bits above must repeat the highest one."""
        top = self.levels[0] if self.levels else Level("", 32, 0)
        return min(top.shift + top.bits, 64)

    def read_gpa(self, gpa: Gpa, size: int) -> bytes | None:
        """Guest-physical bytes, or None where they are not (all) RAM."""
        try:
            return self._read(gpa, size)
        except PyvmmError:
            return None

    def is_canonical(self, linear: int) -> bool:
        """May a 64-bit CPU use the address at all? Always so where addresses have 32 bits."""
        return self.width <= 32 or linear >> (self.width - 1) in (0, (1 << (65 - self.width)) - 1)

    def walk(self, linear: int) -> Walk:
        """Every entry on the way to `linear`, a 64-bit number; it is cut to 32 bits where addresses have no more."""
        if not self.levels:
            return Walk(linear & 0xFFFF_FFFF, (), Gpa(linear & 0xFFFF_FFFF), 0)
        if not self.is_canonical(linear):
            return Walk(linear, (), None, 0, f"it is not canonical: bits 63 to {self.width - 1} differ")
        if self.width <= 32:
            linear &= 0xFFFF_FFFF
        table = self._registers.cr3 & {"32-bit paging": _ADDRESS_32, "PAE paging": 0xFFFF_FFE0}.get(self.name, _ADDRESS)
        steps: list[Step] = []
        for level in self.levels:
            index = linear >> level.shift & (1 << level.bits) - 1
            at = Gpa(table + index * self._entry_size)
            raw = self.read_gpa(at, self._entry_size)
            if raw is None:
                reason = f"the {level.name} itself lies outside RAM, at {table:#x}"
                return Walk(linear, tuple(steps), None, 0, reason)
            step = Step(level.name, index, at, int.from_bytes(raw, "little"))
            steps.append(step)
            problem = self._problem(step, level)
            if problem:
                return Walk(linear, tuple(steps), None, 0, f"{step.name} {problem}")
            if self._is_page(step, level):
                gpa = Gpa(self._frame(step, level.span) | linear & (level.span - 1))
                return Walk(linear, tuple(steps), gpa, level.span)
            table = step.value & (_ADDRESS_32 if self._entry_size == 4 else _ADDRESS)
        raise AssertionError("the last level is always a leaf")

    def translate(self, linear: int) -> Gpa | None:
        """Where a linear address lies in guest-physical space, or None where it is not mapped."""
        return self.walk(linear).gpa

    def read(self, linear: int, size: int) -> bytes:
        """The bytes from `linear` on, across pages; fewer than `size` where the rest is not mapped or not RAM."""
        data = b""
        while len(data) < size:
            at = linear + len(data) & 0xFFFF_FFFF_FFFF_FFFF
            part = min(size - len(data), PAGE_SIZE - at % PAGE_SIZE)
            gpa = self.translate(at)
            found = self.read_gpa(gpa, part) if gpa is not None else None
            if found is None:
                break
            data += found
        return data

    def number(self, linear: int, size: int) -> int | None:
        """A little-endian number of `size` bytes, or None where it cannot be read whole."""
        data = self.read(linear, size)
        return int.from_bytes(data, "little") if len(data) == size else None

    def refusal(self, linear: int, kind: Kind, ring: int) -> str | None:
        """Why the CPU would raise a page fault for this access, as a clause after "which", or None where it would not.

        SDM vol. 3, "Determination of access rights". Protection keys are not looked at.
        """
        walk = self.walk(linear)
        if walk.gpa is None:
            return f"the guest has not mapped ({walk.reason})"
        supervisor_page = walk.without(U)
        locked = walk.without(W)
        closed = next((step for step in walk.steps if step.value & NX and self._entry_size == 8), None)
        if not walk.steps:
            return None
        if ring == 3 and supervisor_page:
            return f"is for the supervisor only (U is 0 in {supervisor_page.name}) while the code runs in ring 3"
        if kind == "write" and locked and (ring == 3 or self._registers.cr0 & CR0_WP):
            return f"is read-only (W is 0 in {locked.name})"
        if kind == "execute" and closed:
            return f"is not executable (NX is set in {closed.name})"
        if ring < 3 and not supervisor_page:
            leaf = walk.steps[-1].name
            if kind == "execute" and self._registers.cr4 & CR4_SMEP:
                return f"is a user's page (U is set in {leaf}), where SMEP keeps ring {ring} from running code"
            if kind != "execute" and self._registers.cr4 & CR4_SMAP and not self._registers.rflags & RFLAGS_AC:
                return f"is a user's page (U is set in {leaf}), which SMAP keeps from ring {ring}"
        return None

    def _is_page(self, step: Step, level: Level) -> bool:
        """Does the entry map a page, rather than the next table?"""
        ignores_ps = self._entry_size == 4 and not self._registers.cr4 & CR4_PSE
        return level.shift == 12 or (level.pages and bool(step.value & PS) and not ignores_ps)

    def _problem(self, step: Step, level: Level) -> str:
        """What keeps the CPU from following an entry, or ""."""
        if not step.value & P:
            return "is not present"
        if self._entry_size == 4:
            return ""
        if step.value & NX and not self._registers.efer & EFER_NXE:
            return "has a reserved bit set (NX, while EFER.NXE is 0)"
        if not self._is_page(step, level):
            return "has a reserved bit set (PS)" if step.value & PS else ""
        if step.value & _ADDRESS & (level.span - 1) & ~_PAT:
            return f"has a reserved bit set (the address of its {format_size(level.span)} page is not aligned)"
        return ""

    def _frame(self, step: Step, size: int) -> int:
        """The first byte of the page of a leaf entry. Bits 20:13 of a 4 MiB page are bits 39:32 of the address."""
        if self._entry_size == 8:
            return step.value & _ADDRESS & -size
        return step.value & -size & 0xFFFF_FFFF | ((step.value >> 13 & 0xFF) << 32 if size > PAGE_SIZE else 0)


def _paging(registers: Registers) -> str:
    if not registers.cr0 & CR0_PG:
        return "no paging"
    if registers.efer & EFER_LMA:
        return "5-level paging" if registers.cr4 & CR4_LA57 else "4-level paging"
    return "PAE paging" if registers.cr4 & CR4_PAE else "32-bit paging"
