# precopy.py: RAM in rounds while the guest runs (technique T7, US11995459B2: traces first, by a helper thread, coarse,
# refined where blocks are written again and again). Seconds, bytes, pages of 4 KiB.
"""`Precopy`: the rounds of one migration, and the last one."""

from __future__ import annotations

import time

from pyvmm import host
from pyvmm.errors import MigrationError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.machine.migrating.throttle import Throttle
from pyvmm.memory.pageset import PageSet
from pyvmm.migration.convergence import GIVE_UP, ROUND, Convergence
from pyvmm.migration.events import Helped, Moving, RoundEnded
from pyvmm.migration.frames import MAX_BITS, Large, Round, RoundDone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.machine.machine import VM
    from pyvmm.memory.trace import Runs, Trace
    from pyvmm.migration.control import Control
    from pyvmm.migration.convergence import Decision
    from pyvmm.migration.events import Event, Report
    from pyvmm.migration.sending import Pace, Sender

_TICK = 0.1
"""From one event Moving to the next."""
_BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE


class Precopy:
    """limits: seconds of downtime, may vCPUs be held, rounds at most; tell: takes events; now: seconds so far."""

    def __init__(
        self,
        vm: VM,
        sender: Sender,
        limits: tuple[float, bool, int],
        mode: str,
        tracker: str | None,
        tell: Callable[[Event], None],
        now: Callable[[], float],
    ) -> None:
        self._vm = vm
        self._sender = sender
        self._tell = tell
        self._now = now
        self._pages = vm.memory.size // PAGE_SIZE
        downtime, may_throttle, rounds = limits
        self._tracker = tracker or self._suiting()
        fine = tracker is None and self._tracker == "coarse" and not vm.has_rings
        self._policy = Convergence(downtime, may_throttle, mode == "hybrid", rounds, fine)
        self._throttle = Throttle(vm.life)
        self._trace: Trace | None = None
        self.round = 0
        """The last one that was begun."""
        self._left = PageSet(self._pages)
        """Pages that are still to be sent, or sent anew."""
        self._bandwidth = 0.0

    def close(self) -> None:
        """Nothing is traced or throttled any more; twice is once."""
        self._throttle.stop()
        if self._trace is not None:
            trace, self._trace = self._trace, None
            trace.stop()

    def tell_large(self, control: Control, report: Report) -> None:
        """The first thing of all: which blocks are large pages (technique T1)."""
        memory = self._vm.memory
        blocks = -(-self._pages // _BLOCK_PAGES)
        large = PageSet(blocks, [(0, blocks)]) if memory.hugetlb else PageSet(blocks)
        if not memory.hugetlb:
            for block, look in enumerate(memory.engine.looks()):
                if look == "large" or (look not in ("small", "untouched") and memory.engine.is_for_large(block)):
                    large.add(block, 1)
        report.large_before = large.runs().pages
        bits = large.bytes()
        for first in range(0, blocks, MAX_BITS * 8):
            count = min(MAX_BITS * 8, blocks - first)
            control.send(Large(first, count, bits[first // 8 : first // 8 + -(-count // 8)]))

    # ---- rounds ----

    def rounds(self, control: Control, report: Report) -> str:
        """All of them but the last, while the guest runs. Returns how it is to go on: SWITCH or POSTCOPY. Raises
        MigrationError where that is not to be expected any more, or the guest ends."""
        self._trace = self._vm.trace(self._tracker)
        self._trace.start()
        held = self._held()
        zeros: PageSet | None = held.complement()
        before: Runs | None = None
        while True:
            began, before_it = time.monotonic(), self._sender.page_bytes
            self._send(control, held, zeros)
            seconds = time.monotonic() - began
            self._note_speed(self._sender.page_bytes - before_it, seconds)
            dirty = self._trace.collect()
            self._left.remove(held)
            for first, count in dirty:
                self._left.add(first, count)
            left = self._left.count()
            decision = self._policy.after(self.round, left, self._bandwidth)
            self._tell_round(report, held.count() + (zeros.count() if zeros else 0), dirty.pages, seconds, decision)
            if decision.next != ROUND:
                break
            held, zeros, before = self._next(decision, before, dirty), None, dirty
        if decision.next == GIVE_UP:
            raise MigrationError(
                f"not done after {self.round} rounds: the guest writes {dirty.pages / seconds * PAGE_SIZE / 1e6:.0f} "
                f"MB/s, the connection takes {self._bandwidth / 1e6:.0f}: allow a longer downtime, or mode hybrid"
            )
        return decision.next

    def last(self, control: Control) -> bool:
        """The VM stands: what has changed since. Returns when it has begun; finish() waits. False: nothing has, and
        there is no such round."""
        left = self.stand()
        if not left.count():
            return False
        self._begin(control, left, None)
        return True

    def finish(self, control: Control) -> None:
        """Waits until all of the last round is there."""
        while not self._sender.done(_TICK):
            control.check()
        self._round_done(control)

    def bring_here(self) -> None:
        """Before a switch to post-copy: what is in homes that may fail comes back to the guest, which runs on, while
        that can still be said to anybody."""
        memory = self._vm.memory
        for home in () if memory.hugetlb else ("file", "swap", "peer", "shared"):
            for first, count in memory.engine.at_home(home).runs():
                memory.engine.install(first, count)

    def stand(self) -> PageSet:
        """The VM stands, and goes on in post-copy: all that is not there, or has changed since."""
        assert self._trace is not None
        for first, count in self._trace.collect():
            self._left.add(first, count)
        return self._left

    @property
    def pace(self) -> Pace:
        """What all pages keep to, also those that go after the switch."""
        return self._sender.pace

    @property
    def left(self) -> PageSet:
        """Pages that are still to be sent, or sent anew."""
        return self._left

    def fill_in(self, report: Report) -> None:
        """What the pages came to."""
        sender = self._sender
        report.wire_bytes, report.page_bytes, report.zero_pages = (
            sender.wire_bytes,
            sender.page_bytes,
            sender.zero_pages,
        )
        sent = report.zero_pages + report.page_bytes // PAGE_SIZE
        report.resent_pages = max(0, sent - self._pages)
        report.throttled = self._throttle.greatest

    # ---- inside ----

    def _suiting(self) -> str:
        """Coarse where it works: large pages stay large at the source, and vCPUs stall least."""
        vm = self._vm
        if not vm.memory.hugetlb and all(host.has(feature) for feature in ("uffd_wp", "uffd_guest")):
            return "coarse"
        if vm.has_rings:
            return "ring"
        return _fine_tracker()

    def _held(self) -> PageSet:
        memory = self._vm.memory
        return PageSet(self._pages, [(0, self._pages)]) if memory.hugetlb else memory.engine.held()

    def _next(self, decision: Decision, before: Runs | None, dirty: Runs) -> PageSet:
        """What the next round sends: of all that is left, not what was written in both rounds before, if that is to
        come last."""
        self._throttle.set(decision.throttle)
        if decision.fine and self._tracker == "coarse":
            self._trace_small_pages()
        wanted = PageSet(self._pages, self._left.runs())
        if decision.defer and before is not None:
            once = PageSet(self._pages, dirty).remove(PageSet(self._pages, before))
            hot = PageSet(self._pages, dirty).remove(once)
            cold = PageSet(self._pages, wanted.runs()).remove(hot)
            return cold if cold.count() else wanted
        return wanted

    def _trace_small_pages(self) -> None:
        """By KVM's log in place of the coarse trace, which reports 2 MiB for each page written."""
        before, self._tracker = self._trace, _fine_tracker()
        self._trace = self._vm.trace(self._tracker)
        try:
            self._trace.start(before)
        except BaseException:
            self._trace = before
            raise

    def _send(self, control: Control, pages: PageSet, zeros: PageSet | None) -> None:
        self._begin(control, pages, zeros)
        total, before, at = pages.count() + (zeros.count() if zeros else 0), self._sender.page_bytes, time.monotonic()
        while not self._sender.done(_TICK):
            control.check()
            if self._vm.ended:
                raise MigrationError("the guest has ended meanwhile")
            now, done = time.monotonic(), self._sender.page_bytes
            speed, before, at = (done - before) / (now - at), done, now
            self._tell(
                Moving(
                    self._now(),
                    round=self.round,
                    sent=self._sender.sent,
                    pages=total,
                    bytes=self._sender.wire_bytes,
                    bandwidth=speed,
                )
            )
        self._round_done(control)

    def _begin(self, control: Control, pages: PageSet, zeros: PageSet | None) -> None:
        self.round += 1
        memory = self._vm.memory
        if not memory.hugetlb and memory.engine.homes()["balloon"]:  # to send these would bring them
            pages = PageSet(self._pages, pages.runs())
            zeros = PageSet(self._pages) if zeros is None else PageSet(self._pages, zeros.runs())
            zeros.add_bits(pages.take_common(memory.engine.at_home("balloon")).bits)
        control.send(Round(self.round, pages.count() + (zeros.count() if zeros else 0)))
        self._sender.begin(self.round, pages, zeros)

    def _round_done(self, control: Control) -> None:
        done = control.expect(RoundDone)
        self._sender.round_done()
        if done.pages != self._sender.sent:
            raise MigrationError(f"{control.peer} got {done.pages} pages of a round of {self._sender.sent}")

    def _note_speed(self, size: int, seconds: float) -> None:
        """Of the last rounds; one that was short says little."""
        if size >= BLOCK_SIZE or not self._bandwidth:
            self._bandwidth = max(size / max(seconds, 1e-6), 1.0)

    def _tell_round(self, report: Report, pages: int, dirty: int, seconds: float, decision: Decision) -> None:
        ended = RoundEnded(
            self._now(), round=self.round, pages=pages, seconds=seconds, dirty=dirty, bandwidth=self._bandwidth,
            dirty_rate=dirty / max(seconds, 1e-6), expected=decision.expected,
        )  # fmt: skip
        report.rounds.append(ended)
        self._tell(ended)
        if decision.help:
            self._tell(Helped(self._now(), help=decision.help, share=decision.throttle))


def _fine_tracker() -> str:
    return "manual" if all(host.has(feature) for feature in ("manual_protect", "initially_set")) else "bitmap"
