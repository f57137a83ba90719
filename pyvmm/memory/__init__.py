# memory: the guest's RAM. What is written there is told by pyvmm.memory.trace, imported by who wants to know.
"""`GuestMemory`: RAM in our address space, read and written by guest-physical address."""

from pyvmm.memory.space import GuestMemory

__all__ = ["GuestMemory"]
