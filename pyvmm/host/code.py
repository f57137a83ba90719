# code.py: the machine code of the trial guests. It runs in any ring, at any address.
"""Trial guests; each ends by port 0xf4 (`guest.END`); port 0xf0 (`guest.MARK`) marks begin and end of the work."""

from __future__ import annotations

SPIN = bytes.fromhex(
    "e6 f0"  #         out 0xf0, al
    "ff c9"  #      1: dec ecx
    "75 fc"  #         jnz 1b
    "e6 f0"  #         out 0xf0, al
    "e6 f4"  #         out 0xf4, al
)
"""2 * ecx instructions between its marks."""

PORTS = bytes.fromhex(
    "e6 f0"  #         out 0xf0, al
    "e6 80"  #      1: out 0x80, al
    "ff c9"  #         dec ecx
    "75 fa"  #         jnz 1b
    "e6 f0"  #         out 0xf0, al
    "e6 f4"  #         out 0xf4, al
)
"""ecx writes to a port where nothing is, between its marks."""

TOUCH = bytes.fromhex(
    "88 07"  #      1: mov [rdi], al
    "48 01 f7"  #      add rdi, rsi
    "ff c9"  #         dec ecx
    "75 f7"  #         jnz 1b
    "e6 f4"  #         out 0xf4, al
)
"""Writes al to ecx places, the first at rdi, rsi bytes apart."""

STEPS = bytes.fromhex(
    "90 90 90"  #      nop; nop; nop
    "e6 f4"  #         out 0xf4, al
)

CLOCK = bytes.fromhex(
    "e6 f0"  #         out 0xf0, al
    "0f 31"  #         rdtsc
    "48 c1 e2 20"  #   shl rdx, 32
    "48 09 d0"  #      or rax, rdx
    "48 89 c6"  #      mov rsi, rax
    "ff c9"  #      1: dec ecx
    "75 fc"  #         jnz 1b
    "0f 31"  #         rdtsc
    "48 c1 e2 20"  #   shl rdx, 32
    "48 09 d0"  #      or rax, rdx
    "e6 f0"  #         out 0xf0, al
    "e6 f4"  #         out 0xf4, al
)
"""Leaves the TSC in rsi before, and in rax after ecx turns of a loop."""
