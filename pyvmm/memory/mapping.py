# mapping.py: asks the kernel for a guest's RAM. Sizes in bytes.
"""`check_size()` before, and `allocate()`."""

from __future__ import annotations

import errno

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, HostError, check
from pyvmm.layout import BLOCK_SIZE, MIN_MEMORY, PAGE_SIZE, format_size, ram_regions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, TypeAlias

    from pyvmm._native import CData

    Pages: TypeAlias = Literal["auto", "2m", "4k"]

PAGES = ("auto", "2m", "4k")
_THP = "/sys/kernel/mm/transparent_hugepage/enabled"


def check_size(size: int, pages: str, hugetlb: bool, address_bits: int) -> None:
    """Raises BadInput for what cannot be a guest's RAM, HostError for what this host does not have."""
    if size < MIN_MEMORY:
        raise BadInput(f"memory {format_size(size)} is too small: a VM needs at least {format_size(MIN_MEMORY)}")
    unit = BLOCK_SIZE if hugetlb else PAGE_SIZE
    if size % unit:
        raise BadInput(f"memory {format_size(size)} is not a multiple of {format_size(unit)}")
    if ram_regions(size)[-1].end.value > 1 << address_bits:
        raise BadInput(f"memory {format_size(size)} is beyond this CPU's {address_bits}-bit physical addresses")
    if ram_regions(size)[-1].end.value > 1 << 46:
        raise BadInput(f"memory {format_size(size)} does not fit into a process: give at most 32T")
    if pages not in PAGES:
        raise BadInput(f"pages={pages!r}: choose one of {', '.join(PAGES)}")
    if hugetlb and pages == "4k":
        raise BadInput("hugetlb memory is in 2 MiB pages: it cannot go with pages=4k")
    if pages == "2m" and not hugetlb:
        _require_thp()


def _require_thp() -> None:
    try:
        with open(_THP) as file:
            setting = file.read()
    except OSError:
        raise HostError("this kernel has no transparent huge pages: use --pages 4k or --hugetlb") from None
    if "[never]" in setting:
        raise HostError(f"transparent huge pages are off: run 'echo madvise | sudo tee {_THP}', or use --pages auto")


def allocate(size: int, pages: Pages, hugetlb: bool) -> CData:
    """Memory that nothing has been written to, 2 MiB aligned, and is given back when the cdata object goes. Raises
    HostError."""
    backing = lib.PV_BACKING_SMALL if pages == "4k" else lib.PV_BACKING_THP
    out = ffi.new("void **")
    error = lib.pv_map(size, lib.PV_BACKING_HUGETLB if hugetlb else backing, out)
    if error == -errno.ENOMEM and hugetlb:
        blocks = size // BLOCK_SIZE
        raise HostError(
            f"{blocks} huge pages of 2 MiB are not reserved: run 'sudo sysctl vm.nr_hugepages={blocks}', or more"
        )
    if error == -errno.ENOMEM:
        raise HostError(f"the host cannot map {format_size(size)} of memory: give less, or raise 'ulimit -v'")
    check(error, "mmap", size=size, pages=pages, hugetlb=hugetlb)
    return ffi.gc(ffi.cast("uint8_t *", out[0]), lambda base: lib.pv_unmap(base, size), size)
