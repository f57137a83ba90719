# uffd.py: the ways to a userfaultfd that hosts allow (Documentation/admin-guide/mm/userfaultfd.rst).
"""`open_uffd`: a userfaultfd, by system call where the host lets us, else by /dev/userfaultfd."""

from __future__ import annotations

import errno
import os

from pyvmm._native import lib
from pyvmm.errors import HostError, KernelError, check

DEVICE = "/dev/userfaultfd"


def _by_call(flags: int) -> int:
    return check(lib.pv_userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | flags), "userfaultfd", flags=flags)


def _by_system_call() -> int:
    return _by_call(0)


def _by_device() -> int:
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return check(lib.pv_userfaultfd_device(device, os.O_CLOEXEC | os.O_NONBLOCK), "USERFAULTFD_IOC_NEW")
    finally:
        os.close(device)


def _user_mode_only() -> int:
    return _by_call(lib.UFFD_USER_MODE_ONLY)


FULL_WAYS = {"system call": _by_system_call, DEVICE: _by_device}
"""Ways to a userfaultfd that serves faults of the kernel too; a guest's faults are such."""
WAYS = FULL_WAYS | {"user mode only": _user_mode_only}


def ways() -> list[str]:
    """The WAYS that work here."""
    return [way for way in WAYS if _opens(way)]


def _opens(way: str) -> bool:
    try:
        os.close(WAYS[way]())
    except OSError:
        return False
    return True


def open_uffd(for_guests: bool = False) -> int:
    """A new userfaultfd, not yet initialised by UFFDIO_API: a descriptor. Raises HostError where there is no way.

    for_guests: one that reports faults of the kernel too, as KVM's are.
    """
    refusal: OSError | None = None
    for way in (FULL_WAYS if for_guests else WAYS).values():
        try:
            return way()
        except OSError as error:
            refusal = refusal or error
    if isinstance(refusal, KernelError) and refusal.errno == errno.ENOSYS:
        raise HostError("this kernel is built without userfaultfd")
    raise HostError(f"no way to open a userfaultfd: {refusal}; 'pyvmm doctor' says what would help")
