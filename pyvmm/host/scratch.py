# scratch.py: a little memory to try things on, and what the kernel says of it. Addresses are ints, sizes bytes.
"""Scratch mappings, and how the kernel really maps them (Documentation/admin-guide/mm/pagemap.rst, proc(5) smaps)."""

from __future__ import annotations

import os
import struct
from contextlib import contextmanager

from pyvmm._native import ffi, lib
from pyvmm.errors import check
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm._native import CData

PAGEMAP_UFFD_WP = 1 << 57
PAGEMAP_SWAPPED = 1 << 62
PAGEMAP_PRESENT = 1 << 63


@contextmanager
def scratch(size: int = BLOCK_SIZE, backing: str = "PV_BACKING_SMALL") -> Iterator[int]:
    """Anonymous memory at a multiple of 2 MiB, untouched: its address."""
    out = ffi.new("void **")
    check(lib.pv_map(size, getattr(lib, backing), out), "mmap", size=size, backing=backing)
    address = int(ffi.cast("uintptr_t", out[0]))
    try:
        yield address
    finally:
        check(lib.pv_unmap(out[0], size), "munmap", size=size)


@contextmanager
def shared(size: int = BLOCK_SIZE, views: int = 1) -> Iterator[list[int]]:
    """One memfd, mapped `views` times at multiples of 2 MiB: the addresses."""
    fd = os.memfd_create("pyvmm trial", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        with scratch(size * views) as address:
            addresses = [address + i * size for i in range(views)]
            for view in addresses:
                check(lib.pv_map_file(pointer(view), size, fd), "mmap", size=size, file="memfd")
            yield addresses
    finally:
        os.close(fd)


def pointer(address: int) -> CData:
    """An address of ours as C takes it."""
    return ffi.cast("uint8_t *", address)


def advise(address: int, advice: str, size: int = BLOCK_SIZE) -> None:
    """madvise(2); raises KernelError where the kernel refuses the advice."""
    check(lib.pv_madvise(pointer(address), size, getattr(lib, advice)), "madvise", advice=advice, size=size)


def page_flags(address: int) -> int:
    """The page's word in /proc/self/pagemap."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(struct.unpack("<Q", os.pread(fd, 8, address // PAGE_SIZE * 8))[0])
    finally:
        os.close(fd)


def large_bytes(address: int) -> int:
    """Bytes in 2 MiB pages in the mapping that holds `address`, which the kernel may have joined with neighbours."""
    inside, total = False, 0
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            name, *rest = line.split()
            if not name.endswith(":"):  # "start-end perms ..."
                if inside:
                    break
                start, _, end = name.partition("-")
                inside = int(start, 16) <= address < int(end, 16)
            elif inside and name in ("AnonHugePages:", "ShmemPmdMapped:"):
                total += int(rest[0]) * 1024
    return total
