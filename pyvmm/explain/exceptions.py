# exceptions.py: the CPU's exceptions by vector, and one that we expect. For the modules that look for causes.
"""Vectors, their names, and `Fault` (Intel SDM vol. 3, "Protected-Mode Exceptions and Interrupts")."""

from __future__ import annotations

from pyvmm.record import Record

DIVIDE, DEBUG, BREAKPOINT, INVALID_OPCODE, NO_DEVICE, DOUBLE_FAULT = 0, 1, 3, 6, 7, 8
NOT_PRESENT, STACK, PROTECTION, PAGE, FLOATING, ALIGNMENT, SIMD = 11, 12, 13, 14, 16, 17, 19
EXCEPTIONS = {
    0: "divide error (#DE)",
    1: "debug exception (#DB)",
    2: "NMI",
    3: "breakpoint (#BP)",
    4: "overflow (#OF)",
    5: "bound exception (#BR)",
    6: "invalid-opcode exception (#UD)",
    7: "device-not-available exception (#NM)",
    8: "double fault (#DF)",
    10: "invalid-TSS exception (#TS)",
    11: "segment-not-present exception (#NP)",
    12: "stack fault (#SS)",
    13: "general protection fault (#GP)",
    14: "page fault (#PF)",
    16: "floating-point error (#MF)",
    17: "alignment check (#AC)",
    18: "machine check (#MC)",
    19: "SIMD floating-point exception (#XM)",
    20: "virtualization exception (#VE)",
    21: "control protection exception (#CP)",
}


def exception_name(vector: int) -> str:
    """As in "page fault (#PF)"; "interrupt 0x20" for what is no exception."""
    return EXCEPTIONS.get(vector, f"interrupt {vector:#x}")


class Fault(Record):
    """An exception that we expect: `what` happened is a clause, which says so where it is a guess.

    `address`: of a page fault, what CR2 will hold; else None.
    """

    __slots__ = ("address", "vector", "what")

    def __init__(self, vector: int, what: str, address: int | None = None) -> None:
        self.vector = vector
        self.what = what
        self.address = address
