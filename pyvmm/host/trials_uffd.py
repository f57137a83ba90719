# trials_uffd.py: what userfaultfd does here, each part tried on a few pages. For the table in probe.py.
"""Trials of userfaultfd: a thread, or a guest, touches a page, the trial answers the fault and looks at the result."""

from __future__ import annotations

import os

from pyvmm._native import lib
from pyvmm.host.code import TOUCH
from pyvmm.host.feature import Outcome
from pyvmm.host.guest import DATA, TrialGuest
from pyvmm.host.scratch import (
    PAGEMAP_PRESENT,
    PAGEMAP_SWAPPED,
    PAGEMAP_UFFD_WP,
    large_bytes,
    page_flags,
    pointer,
    scratch,
    shared,
)
from pyvmm.host.uffd import Uffd
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.memory import uffd

_MARK = 0xA5  # in pages that a trial moves about
_THP = "PV_BACKING_THP"
_SYSCTL = "sudo sysctl vm.unprivileged_userfaultfd=1"


def opens() -> Outcome:
    """A userfaultfd that reports faults of the kernel too, as those of a guest are."""
    working = uffd.ways()
    if any(way in uffd.FULL_WAYS for way in working):
        return Outcome(True, "by " + ", ".join(working))
    remedy = f"sudo setfacl -m u:$USER:rw {uffd.DEVICE}; or {_SYSCTL}" if os.path.exists(uffd.DEVICE) else _SYSCTL
    if working:
        return Outcome(False, "in user mode only, which reports no fault of a guest", remedy)
    Uffd().close()  # raises, and says why
    return Outcome(False, "", remedy)


def _poke(address: int, value: int) -> None:
    lib.pv_poke(pointer(address), value)


def _peek(address: int) -> int:
    return lib.pv_peek(pointer(address))


def _served(seen: list[int], good: str) -> Outcome:
    return Outcome(seen == [_MARK], good if seen == [_MARK] else f"the thread read {seen}, not [{_MARK}]")


def missing() -> Outcome:
    """A touch of an absent page is reported, and reads what UFFDIO_COPY put there."""
    seen: list[int] = []
    with scratch() as source, scratch() as address, Uffd() as fd:
        _poke(source, _MARK)
        fd.register(address, "MISSING")
        with fd.touching(lambda: seen.append(_peek(address))):
            fd.fault()
            fd.copy(address, source)
    return _served(seen, "a touched page is reported and filled")


def guest() -> Outcome:
    """The same where a guest touches the page: KVM waits in the kernel until it is there."""
    with TrialGuest() as trial, scratch() as source, Uffd() as fd:
        address = trial.page_hva(7)
        fd.register(address, "MISSING")
        trial.start(TOUCH, ring=3, rax=_MARK, rcx=1, rdi=(DATA + 7 * PAGE_SIZE).value)
        _, where = fd.fault()
        _poke(source + 1, _MARK)
        fd.copy(where, source)
        trial.wait()
        seen = [_peek(address), _peek(address + 1)]
    return Outcome(seen == [_MARK, _MARK], "a guest's fault is reported and filled")


def write_protect() -> Outcome:
    """A write to a protected page waits, and happens after the protection is lifted."""
    with scratch() as address, Uffd("UFFD_FEATURE_PAGEFAULT_FLAG_WP") as fd:
        _poke(address, 1)
        fd.register(address, "WP")
        fd.protect(address)
        with fd.touching(lambda: _poke(address, 2)):
            flags, _ = fd.fault()
            before = _peek(address)
            fd.protect(address, on=False)
        ok = bool(flags & lib.UFFD_PAGEFAULT_FLAG_WP) and (before, _peek(address)) == (1, 2)
    return Outcome(ok, "a write waits until it is let" if ok else f"flags {flags:#x}, the page had {before}")


def write_protect_large() -> Outcome:
    """A 2 MiB page can be protected as a whole, and stays large."""
    with scratch(backing=_THP) as address, Uffd("UFFD_FEATURE_PAGEFAULT_FLAG_WP") as fd:
        _poke(address, 1)
        fd.register(address, "WP", BLOCK_SIZE)
        before = large_bytes(address)
        fd.protect(address, BLOCK_SIZE)
        protected = bool(page_flags(address + BLOCK_SIZE - PAGE_SIZE) & PAGEMAP_UFFD_WP)
        large = before >= BLOCK_SIZE and large_bytes(address) == before
    return Outcome(protected and large, "the 2 MiB page stays whole" if large else "the 2 MiB page is split")


def write_protect_async() -> Outcome:
    """The kernel lifts the protection by itself; the pagemap shows which pages were written."""
    with scratch() as address, Uffd("UFFD_FEATURE_WP_ASYNC", "UFFD_FEATURE_WP_UNPOPULATED") as fd:
        _poke(address, 1)
        fd.register(address, "WP", BLOCK_SIZE)
        fd.protect(address, BLOCK_SIZE)
        with fd.touching(lambda: _poke(address, 2)):
            pass  # nobody answers
        marks = [bool(page_flags(address + page * PAGE_SIZE) & PAGEMAP_UFFD_WP) for page in (0, 1)]
    ok = marks == [False, True]
    return Outcome(ok, "the pagemap shows the page written" if ok else f"the pagemap shows {marks}")


def minor() -> Outcome:
    """A touch of a memfd's page that is there but not mapped is reported, and goes on after UFFDIO_CONTINUE."""
    seen: list[int] = []
    with shared(views=2) as (ours, theirs), Uffd("UFFD_FEATURE_MINOR_SHMEM") as fd:
        _poke(ours, _MARK)
        fd.register(theirs, "MINOR")
        with fd.touching(lambda: seen.append(_peek(theirs))):
            flags, _ = fd.fault()
            fd.carry_on(theirs)
    if not flags & lib.UFFD_PAGEFAULT_FLAG_MINOR:
        return Outcome(False, f"reported as another fault, flags {flags:#x}")
    return _served(seen, "a page of a memfd is reported and mapped")


def move() -> Outcome:
    """A page goes from one address to another, and is gone at the first."""
    return _move(PAGE_SIZE, "PV_BACKING_SMALL")


def move_large() -> Outcome:
    """A 2 MiB page moves as a whole, and stays large."""
    return _move(BLOCK_SIZE, _THP)


def _move(size: int, backing: str) -> Outcome:
    seen: list[int] = []
    with scratch(backing=backing) as source, scratch(backing=backing) as address, Uffd("UFFD_FEATURE_MOVE") as fd:
        _poke(source + size - 1, _MARK)
        fd.register(address, "MISSING", size)
        with fd.touching(lambda: seen.append(_peek(address + size - 1))):
            fd.fault()
            fd.move(address, source, size)
            left = page_flags(source + size - PAGE_SIZE) & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED)
            large = large_bytes(address) >= BLOCK_SIZE
    if left:
        return Outcome(False, "the page is still where it was")
    if size == BLOCK_SIZE and not large:
        return Outcome(False, "the 2 MiB page is split")
    return _served(seen, "2 MiB move as one page" if large else "a page moves")
