# generation.py: what a VM is told of its own identity: a seed at boot; after a restore, that it is one of many that may
# go on from the same snapshot. In the guest's progress page (guest/abi.h, struct pv_progress).
"""`seed` at load, `renew` at restore: 32 bytes in a row of the progress page, written while no vCPU runs.

It does what VMGenID does (Virtual Machine Generation ID, Microsoft 2012; UAPI.14; QEMU docs/specs/vmgenid.rst): 128
random bits in an 8-byte aligned place of guest memory, other ones whenever the VM goes on from an earlier state, the
same ones through a pause. It differs in this:

- It lies in a fixed page, where VMGenID has an ACPI device that says where, outside the memory that the guest may use.
- The guest is not notified (there: by an ACPI event); it looks, which costs a read of memory.
- Before the first restore it is zeros, there it is random from the first boot on.
- A seed comes with it, and a count of restores. VMGenID is public and no entropy: it only says that some is needed.
- The memory of foreign guests is left alone: only a page that has our magic is written to.
"""

from __future__ import annotations

import os

from pyvmm._native import ffi, lib
from pyvmm.layout import Gpa
from pyvmm.machine.outcome import PROGRESS_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory import GuestMemory

_PAGE = Gpa(lib.PV_PROGRESS_GPA)
_HEAD: int = ffi.offsetof("struct pv_progress", "work")
"""The rest is not needed here, and in another page."""
_GENERATION: int = ffi.offsetof("struct pv_progress", "generation")
_SEED_SIZE = 8
_WORD = (1 << 64) - 1


def seed(memory: GuestMemory) -> None:
    """Gives a guest that is to boot its seed, in a page that is zeros else, and has our magic from now on: a VM that is
    saved before it starts must not have clones with one seed."""
    page = ffi.new("struct pv_progress *")
    page.magic, page.version = lib.PV_PROGRESS_MAGIC, lib.PV_PROGRESS_VERSION
    page.random_seed = int.from_bytes(os.urandom(_SEED_SIZE), "little")
    memory.write(_PAGE, ffi.buffer(page, _HEAD)[:])


def renew(memory: GuestMemory) -> bool:
    """Makes a restored VM another one than that which was saved: a new generation, one restore more, a new seed.

    Returns whether it has a progress page; other guests are left as they are. Where its memory is read lazily, this
    brings the page. Raises FetchError if that cannot be.
    """
    head = memory.read(_PAGE, _HEAD).ljust(PROGRESS_SIZE, b"\0")
    found = ffi.from_buffer("struct pv_progress *", head)
    if found.magic != lib.PV_PROGRESS_MAGIC or found.version != lib.PV_PROGRESS_VERSION:
        return False
    restores = (found.restores + 1) & _WORD
    memory.write(_PAGE + _GENERATION, os.urandom(16) + restores.to_bytes(8, "little") + os.urandom(_SEED_SIZE))
    return True
