# populating.py: mappings made before the guest runs here, hot pages first (technique T4, US11586371B2). Seconds.
"""`Ahead`: the host's page tables, before pages come; `second_level()`: KVM's own, before the guest runs."""

from __future__ import annotations

import threading
import time

from pyvmm import host
from pyvmm._native import lib
from pyvmm.errors import KernelError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.memory.pageset import PageSet
from pyvmm.memory.trace import Runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.layout import Gpa
    from pyvmm.machine.machine import VM
    from pyvmm.memory import GuestMemory
    from pyvmm.vcpu import Vcpu

BUDGET = 0.005
"""Of the downtime."""
_CHUNK = 16
"""Blocks that the host fills in with one call: some ms."""
_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE


class Ahead:
    """Populates blocks that are large at the source, in a thread, while pages come: to find, zero and map a large page
    takes as long as to receive what goes there. No page comes twice by that, and none is lost: what is there stays.
    seconds: that it has taken."""

    def __init__(self, memory: GuestMemory, large: bytes) -> None:
        self._memory = memory
        self._runs = Runs.from_bitmap(large)
        self._end = threading.Event()
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="migration populate", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Nothing more is populated; twice is once."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        begin, blocks, base = time.monotonic(), self._memory.size // BLOCK_SIZE, self._memory.base
        for first, count in self._runs:
            for block in range(first, min(first + count, blocks), _CHUNK):
                size = min(_CHUNK, first + count - block, blocks - block) * BLOCK_SIZE
                if self._end.is_set() or lib.pv_madvise(base + block * BLOCK_SIZE, size, lib.MADV_POPULATE_WRITE):
                    return  # a kernel before 5.14, or no memory: who receives will see
                self.seconds = time.monotonic() - begin


def ask_host() -> None:
    """Whether KVM can is found out by trying: not to be done while the guest stands."""
    host.has("pre_fault")


def second_level(vm: VM, hot: PageSet, rest: PageSet, budget: float = BUDGET) -> float:
    """Has KVM map RAM (KVM_PRE_FAULT_MEMORY, one call a vCPU at once): the blocks of the hot pages, which cover
    neighbours that are only read, then those of the rest, for as long as the budget lasts. What is left, and all where
    KVM cannot, is for the guest's first touches. Returns the seconds that it took."""
    if not host.has("pre_fault"):
        return 0.0
    begin = time.monotonic()
    blocks = list(dict.fromkeys([*_blocks(hot), *_blocks(rest)]))
    count = len(vm.vcpus)
    threads = [
        threading.Thread(target=_pre_fault, args=(vm, vcpu, blocks[index::count], begin + budget), name="pre-fault")
        for index, vcpu in enumerate(vm.vcpus)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - begin


def _blocks(pages: PageSet) -> Iterator[tuple[int, int]]:
    """The blocks of these pages, each once, as (first page, pages)."""
    before = -1
    for first, count in pages.runs():
        for block in range(first // _BLOCK_PAGES, (first + count - 1) // _BLOCK_PAGES + 1):
            if block != before:
                before = block
                yield block * _BLOCK_PAGES, min(_BLOCK_PAGES, pages.pages - block * _BLOCK_PAGES)


def _pre_fault(vm: VM, vcpu: Vcpu, blocks: list[tuple[int, int]], until: float) -> None:
    for first, count in blocks:
        if time.monotonic() > until:
            return
        gpa: Gpa = vm.memory.gpa_of(first)
        try:
            vcpu.fd.pre_fault_memory(gpa, count * PAGE_SIZE)
        except KernelError:  # then the guest's first touch does it
            return
