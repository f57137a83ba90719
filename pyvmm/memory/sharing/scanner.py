# scanner.py: goes round over a VM's blocks and keeps a table of what they hold. Units: pages of 4 KiB, pages a second.
"""`Scanner`, and the rule for how fast it goes."""

from __future__ import annotations

import threading

from pyvmm.errors import BadInput, MemoryAccessError
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory.sharing.estimate import BLOCK_PAGES, Estimate
from pyvmm.memory.sharing.table import scan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from pyvmm.memory import GuestMemory
    from pyvmm.memory.sharing.table import Table

RATE, TIGHT = 1000.0, 100_000.0
"""Pages a second: 4 MB/s while memory is plenty, and at most 400 MB/s (some 2.5 % of a CPU) while it is not."""
PLENTY = 0.25
"""Of all memory: with more than that free, nobody needs what sharing frees."""


def free_share() -> float:
    """Of the host's memory, what programs could still have: 0 to 1."""
    found = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                found[name] = int(rest.split()[0])
    return found["MemAvailable"] / found["MemTotal"]


def pace(free: float, rate: float, tight: float, plenty: float, sharable: float | None) -> float:
    """Pages a second to scan. While the free share is above `plenty`: rate. Below it, a second rate follows from the
    estimate: the share of what was scanned that sharing would free, times `tight`, and never below `rate`; `tight` as
    long as there is no estimate (US9977747B2)."""
    if free > plenty:
        return rate
    return max(rate, tight if sharable is None else tight * sharable)


class Scanner:
    """Hashes one block after the other, round after round; a context manager that ends its thread.

    rate, tight, plenty: see pace(); free: the free share of memory now; on_block: is told of each block after a round,
    with a bit for each page whose content is elsewhere too, on the scanner's thread (Policy.scanned takes the same).
    others: gives tables of other VMs. table: the hashes so far; rounds: through all blocks.
    """

    def __init__(
        self,
        memory: GuestMemory,
        rate: float = RATE,
        tight: float = TIGHT,
        plenty: float = PLENTY,
        *,
        free: Callable[[], float] = free_share,
        on_block: Callable[[int, int], object] | None = None,
        others: Callable[[], Sequence[Table]] = lambda: (),
    ) -> None:
        import numpy as np

        if not (0 < rate < float("inf") and 0 < tight < float("inf")):
            raise BadInput(f"rates of {rate:g} and {tight:g} pages a second: give positive numbers")
        self._memory = memory
        self._rate, self._tight, self._plenty, self._free = rate, tight, plenty, free
        self._on_block, self._others = on_block, others
        self.table: Table = np.zeros(memory.size // PAGE_SIZE, np.uint64)
        self.rounds = 0
        self._next = 0
        self._sharable: float | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        memory.before_end(self.stop)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def step(self) -> int:
        """Scans the next block, or the rest of RAM that is smaller. Returns how many pages."""
        first = self._next
        count = min(BLOCK_PAGES, len(self.table) - first)
        self.table[first : first + count] = scan(self._memory, first, count)
        self._next = first + count
        if self._next == len(self.table):
            self._next = 0
            self.rounds += 1
            self._tell()
        return count

    def round(self) -> Estimate:
        """Scans all of RAM as fast as it goes. What that says."""
        self._next = 0
        rounds = self.rounds
        while self.rounds == rounds:
            self.step()
        return self.estimate()

    def estimate(self) -> Estimate:
        """By what was scanned so far."""
        return Estimate(self.table, self._others())

    def pace(self) -> float:
        """Pages a second, as memory is now."""
        return pace(self._free(), self._rate, self._tight, self._plenty, self._sharable)

    def _tell(self) -> None:
        found = self.estimate()
        self._sharable = found.freed / max(found.scanned, 1)
        if self._on_block is not None:
            for block in range(-(-found.pages // BLOCK_PAGES)):
                self._on_block(block, found.bits(block))

    def start(self) -> None:
        """Has a thread go round, at pace(), until stop() or the memory's end. Nothing if one does already."""
        if self._thread is not None:
            return
        self._end.clear()
        self._thread = threading.Thread(target=self._run, name="sharing scanner", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, if there is one."""
        thread, self._thread = self._thread, None
        self._end.set()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        try:
            while not self._end.wait(BLOCK_PAGES / self.pace()):
                self.step()
        except MemoryAccessError:
            pass  # the VM is closed
