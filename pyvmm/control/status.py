# status.py: what a VM's control socket says of the VM. Sizes in bytes, times in seconds, pages of 4 KiB.
"""`status()`: plain data."""

from __future__ import annotations

import os

from pyvmm import __version__
from pyvmm._native import lib
from pyvmm.control import ballooning
from pyvmm.errors import PyvmmError
from pyvmm.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.control.moving import Moving
    from pyvmm.machine import VM
    from pyvmm.memory.counts import PageCounts

SCHEMA = 1
_PROGRESS_PAGE = lib.PV_PROGRESS_GPA // PAGE_SIZE


def status(vm: VM, moving: Moving) -> dict[str, object]:
    """All of it. Waits for nothing: a page that is still at the source is not asked for."""
    counts = None if vm.memory.hugetlb else vm.memory.pages()
    return {
        "schema": SCHEMA,
        "version": __version__,
        "pid": os.getpid(),
        "state": state(vm, moving),
        "memory": vm.memory.size,
        "cpus": len(vm.vcpus),
        "progress": None if _is_far(vm, counts) else _progress(vm),
        "pages": None if counts is None else _pages(counts),
        "mappings": vm.mappings(),
        "balloon": None if vm.balloon is None else ballooning.short(vm.balloon),
        "migration": _migration(moving),
    }


def state(vm: VM, moving: Moving) -> str:
    """In a word."""
    if moving.going:
        return "migrating"
    if vm.ended:
        return "ended"
    if not vm.started:
        return "not started"
    return "paused" if vm.paused else "running"


def _is_far(vm: VM, counts: PageCounts | None) -> bool:
    """Would reading the progress page wait for another host?"""
    if counts is None or not counts.homes["peer"]:
        return False
    return bool(vm.memory.engine.at_home("peer").take(_PROGRESS_PAGE, 1))


def _progress(vm: VM) -> dict[str, object] | None:
    try:
        progress = vm.progress()
    except PyvmmError:  # its page cannot be brought back; wait() says why
        return None
    return {
        "guest": progress.guest,
        "status": progress.status,
        "detail": progress.detail,
        "count": progress.count,
        "writes": sum(work.writes for work in progress.work),
        "passes": progress.passes,
        "longest_gap": progress.longest_gap,
    }


def _pages(counts: PageCounts) -> dict[str, object]:
    return {
        "total": counts.total,
        "large": counts.large,
        "small": counts.small,
        "untouched": counts.untouched,
        "homes": dict(counts.homes),
        "armed": counts.armed,
    }


def _migration(moving: Moving) -> dict[str, object] | None:
    """The one that goes on, or went; null before any."""
    if not moving.going and moving.last is None:
        return None
    last = None if moving.last is None else moving.last.as_json()
    return {"side": moving.side, "to": moving.to, "going": moving.going, "last": last}
