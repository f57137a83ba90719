# memory: the guest's RAM.
"""`GuestMemory`: RAM in our address space, read and written by guest-physical address."""

from pyvmm.memory.space import GuestMemory

__all__ = ["GuestMemory"]
