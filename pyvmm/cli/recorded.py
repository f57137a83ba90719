# recorded.py: `pyvmm restore FILE --lazy --record`: what the guest touched goes into FILE, as its working set.
"""`record`. Units: pages of 4 KiB."""

from __future__ import annotations

import sys

from pyvmm.layout import MIB, PAGE_SIZE, format_size
from pyvmm.machine import VM
from pyvmm.snapshot.rewrite import set_wset


def record(vm: VM, path: str) -> None:
    """Writes the working set of a VM that has been restored with record, and says how much it is. Raises HostError,
    SnapshotError: the file is as it was then."""
    if not vm.ended:
        vm.pause()
    assert vm.restored is not None
    pages = vm.restored.working_set()
    set_wset(path, pages)
    share = f"{len(pages):,} pages, {len(pages) * PAGE_SIZE / MIB:.1f} MiB of {format_size(vm.memory.size)}"
    hint = "restore it with --prefetch; 'pyvmm snapshot pack --order touch' puts it together in the file"
    print(f"pyvmm: {path}: working set recorded: {share}; {hint}", file=sys.stderr)
