# registers.py: a vCPU's registers as a table that people read, for crash reports and traces.
"""`table()`, and control registers and flags by their bits' names.

Intel SDM vol. 1, "EFLAGS Register"; vol. 3, "Control Registers", "IA32_EFER".
"""

from __future__ import annotations

from pyvmm.vcpu.registers import CONTROL, GENERAL, SEGMENTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.vcpu import Registers

RFLAGS = {0: "CF", 2: "PF", 4: "AF", 6: "ZF", 7: "SF", 8: "TF", 9: "IF", 10: "DF", 11: "OF", 14: "NT", 16: "RF",
          17: "VM", 18: "AC", 19: "VIF", 20: "VIP", 21: "ID"}  # fmt: skip
CR0 = {0: "PE", 1: "MP", 2: "EM", 3: "TS", 4: "ET", 5: "NE", 16: "WP", 18: "AM", 29: "NW", 30: "CD", 31: "PG"}
CR4 = {0: "VME", 1: "PVI", 2: "TSD", 3: "DE", 4: "PSE", 5: "PAE", 6: "MCE", 7: "PGE", 8: "PCE", 9: "OSFXSR",
       10: "OSXMMEXCPT", 11: "UMIP", 12: "LA57", 13: "VMXE", 14: "SMXE", 16: "FSGSBASE", 17: "PCIDE", 18: "OSXSAVE",
       20: "SMEP", 21: "SMAP", 22: "PKE", 23: "CET", 24: "PKS"}  # fmt: skip
EFER = {0: "SCE", 8: "LME", 10: "LMA", 11: "NXE", 12: "SVME", 13: "LMSLE", 14: "FFXSR", 15: "TCE"}

_TABLES = ("gdt_base", "gdt_limit", "idt_base", "idt_limit")
_ROWS = (("rax", "rbx", "rcx", "rdx"), ("rsi", "rdi", "rbp", "rsp"), ("r8", "r9", "r10", "r11"),
         ("r12", "r13", "r14", "r15"))  # fmt: skip


def bit_names(value: int, names: dict[int, str]) -> str:
    """The names of the bits set, lowest first; a bit without a name by its number."""
    return " ".join(names.get(bit, f"bit{bit}") for bit in range(value.bit_length()) if value >> bit & 1)


def flags(rflags: int) -> str:
    """RFLAGS as in "ZF IF IOPL=3"; bit 1, which is always set, is left out."""
    iopl = rflags >> 12 & 3
    return f"{bit_names(rflags & ~0x3002, RFLAGS)}{f' IOPL={iopl}' if iopl else ''}".strip()


def changes(before: Registers, after: Registers) -> dict[str, int]:
    """The registers that differ, but for rip: name -> new value. Segments by their selector."""
    names = (*GENERAL, *CONTROL, *_TABLES)
    found = {name: getattr(after, name) for name in names if getattr(before, name) != getattr(after, name)}
    found.pop("rip", None)
    for name in SEGMENTS:
        if getattr(before, name).selector != getattr(after, name).selector:
            found[name] = getattr(after, name).selector
    return found


def table(registers: Registers, place: str, paging: str, previous: Registers | None = None) -> list[str]:
    """The registers as lines. `place`: the symbol at rip, or ""; registers that differ from `previous` get a *."""
    changed = changes(previous, registers) if previous is not None else {}

    def cell(name: str) -> str:
        return f"{name:>3}{'*' if name in changed else ' '}{getattr(registers, name):016x}"

    def control(name: str, meaning: str) -> str:
        return f"{name + ('*' if name in changed else ''):<8}{getattr(registers, name):016x}  {meaning}".rstrip()

    lines = [f"{registers.mode}-bit code in ring {registers.ring}, {paging}", ""]
    lines += ["  ".join(cell(name) for name in row) for row in _ROWS]
    lines += [
        "",
        control("rip", place),
        control("rflags", flags(registers.rflags)),
        control("cr0", bit_names(registers.cr0, CR0)),
        control("cr2", "address of the last page fault" if registers.cr2 else ""),
        control("cr3", "page tables"),
        control("cr4", bit_names(registers.cr4, CR4)),
        control("efer", bit_names(registers.efer, EFER)),
        "",
        *_segments(registers, changed),
        f"{'gdt':<24}base {registers.gdt_base:#x}, limit {registers.gdt_limit:#x}",
        f"{'idt':<24}base {registers.idt_base:#x}, limit {registers.idt_limit:#x}",
    ]
    return lines


def _segments(registers: Registers, changed: dict[str, int]) -> list[str]:
    """One line a segment register; those that hold the same (often all data segments) share it."""
    same: dict[tuple[str, str], list[str]] = {}
    for name in SEGMENTS:
        segment = getattr(registers, name)
        kind = "not loaded"
        if segment.present and (segment.selector or name not in ("tr", "ldt")):
            width = 64 if segment.l else 32 if segment.db else 16
            code = name == "cs" or (name not in ("tr", "ldt") and segment.type & 8)
            kind = "system" if name in ("tr", "ldt") else f"{width}-bit code" if code else "data"
            kind += f", DPL {segment.dpl}" if kind != "system" else ""
        selector = f"{segment.selector:#06x}"
        meaning = f"base {segment.base:#x}, limit {segment.limit:#x}, {kind}"
        same.setdefault((selector, meaning), []).append(f"{name}{'*' if name in changed else ''}")
    return [f"{' '.join(names):<16}{selector}  {meaning}" for (selector, meaning), names in same.items()]
