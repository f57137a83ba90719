# senses.py: what a policy cannot see by itself, and a VM can be asked for: how active blocks are, and which pages have
# duplicates. Units: small pages; blocks of 512.
"""`Senses`: samples and scans while there is a limit, for those policies that want to know."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress

from pyvmm.errors import HostError
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory.activity import Sampler, WorkingSet
from pyvmm.memory.reclaim.policy import BLOCK_PAGES, Policy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.memory import GuestMemory
    from pyvmm.memory.sharing.scanner import Scanner

_ENOUGH = 4
"""Samples: of fewer, nothing is said of a working set."""
PRESSED_SECONDS = 2.0
"""For so long after something had to go, blocks of low activity are broken."""


class Senses:
    """For a policy of this class. free: the share of the limit that is not used. Their threads note what they find; who
    reclaims has it told to the policy on its own."""

    def __init__(self, memory: GuestMemory, kind: type[Policy], free: Callable[[], float]) -> None:
        self._memory, self._free = memory, free
        self.wants_samples = kind.sampled is not Policy.sampled
        self.wants_scans = kind.scanned is not Policy.scanned
        self._sampler: Sampler | None = None
        self._scanner: Scanner | None = None
        self._samples: deque[tuple[int, int]] = deque()
        self._scans: deque[tuple[int, int]] = deque()
        self._used = WorkingSet()
        self._using = threading.Lock()  # of that
        self._pressed = 0.0
        self.cold: deque[int] = deque()
        """Blocks that were found cold, and are broken: what was not touched of them is aside."""

    def start(self) -> None:
        """Begins, or goes on."""
        if self.wants_samples:
            if self._sampler is None:
                self._sampler = Sampler(self._memory, on_sample=self._sampled, decide=self._may_stay)
            self._sampler.start()
        if self.wants_scans:
            if self._scanner is None:
                from pyvmm.memory.sharing.scanner import Scanner

                self._scanner = Scanner(self._memory, free=self._free, on_block=self._scanned)
            self._scanner.start()

    def stop(self) -> None:
        """Until start()."""
        if self._sampler is not None:
            with suppress(HostError):  # see missing()
                self._sampler.stop()
        if self._scanner is not None:
            self._scanner.stop()

    def missing(self) -> str:
        """Why nobody samples, where the kernel does not allow it; or nothing."""
        return "" if self._sampler is None else self._sampler.missing

    def press(self) -> None:
        """Memory is short."""
        self._pressed = time.monotonic() + PRESSED_SECONDS

    def tell(self, policy: Policy) -> None:
        """What was found since the last time."""
        while self._samples:
            policy.sampled(*self._samples.popleft())
        while self._scans:
            policy.scanned(*self._scans.popleft())

    def working_set(self, resident: int) -> tuple[int, int, int] | None:
        """Of so many bytes, those that are in use: at least, by estimate, at most. None where nobody samples, or too
        little was. What is no whole large page cannot be sampled, and counts as used."""
        if self._sampler is None:
            return None
        blocks = self._sampler.population()
        with self._using:
            found = self._used.estimate(blocks, time.monotonic())
        if found.samples < _ENOUGH:
            return None
        rest = max(0, resident - blocks * BLOCK_PAGES * PAGE_SIZE)
        low, size, high = (rest + int(pages) * PAGE_SIZE for pages in (found.low, found.pages, found.high))
        return low, size, high

    def _sampled(self, block: int, touched: int, active: bool) -> None:
        self._samples.append((block, touched))
        with self._using:
            self._used.add(block, touched.bit_count(), active, time.monotonic())

    def _scanned(self, block: int, duplicates: int) -> None:
        self._scans.append((block, duplicates))

    def _may_stay(self, block: int, touched: int) -> bool:
        """Technique T8: of a block of low activity, what nobody touches goes, where memory is short."""
        if time.monotonic() > self._pressed:
            return True
        self.cold.append(block)
        return False
