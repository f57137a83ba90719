# warm.py: the host's memory, warmed before each side of a benchmark. Unit: bytes.
"""`warm_host()`."""

from __future__ import annotations

from pyvmm.memory import GuestMemory


def warm_host(size: int) -> None:
    """Has the host give out so much memory, and takes it back: the first touch ever is 5 to 50 times slower."""
    memory = GuestMemory(size)
    try:
        for region in memory.regions:
            memory.zero(region.gpa, region.size)
    finally:
        memory.close()
