# activity.py: `pyvmm activity`: runs a guest while a few of its blocks at a time are watched, and shows what it uses.
"""The command. Its report goes to stdout, what the guest prints to stderr."""

from __future__ import annotations

import json
import os
import time

from rich.text import Text

from pyvmm.cli.heat import HeatPicture
from pyvmm.cli.output import Output
from pyvmm.cli.run import Session, check_seconds
from pyvmm.errors import BadInput, PyvmmError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.machine import VM, RunResult
from pyvmm.memory.activity import Estimate, HeatMap, Sampler, SamplerCounts, WorkingSet
from pyvmm.memory.reclaim.trace import MAX_RECORDS, Sample, Trace, save

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parse import Arguments

_SCHEMA = 1
_BEFORE = 0.25
"""Of --seconds: so long the guest runs unwatched before and after, to compare."""


def run(args: Arguments) -> int:
    """The command: the guest's status if it ended by itself, 0 after --seconds; else as for `pyvmm run`."""
    return _Activity(args).run()


class Seen:
    """What samples have told: a heat map, the working set, and an access trace where one is wanted."""

    def __init__(self, blocks: int, pages: int, source: str, period: float, traced: bool) -> None:
        self.heat = HeatMap(blocks)
        self.working_set = WorkingSet(period)
        self.trace = Trace(pages, source=source) if traced else None
        self.samples = 0
        self._begin = self._last = time.monotonic()
        self._records = 0

    def __call__(self, block: int, touched: int, active: bool) -> None:
        """A sample: see Sampler.on_sample."""
        now, count = time.monotonic(), touched.bit_count()
        self.samples += 1
        self.heat.add(block, count, now - self._begin)
        self.working_set.add(block, count, active, now)
        self._records += count + 1
        if self.trace is not None and self._records <= MAX_RECORDS:
            sample = Sample(block, touched)
            for page in sample.pages():
                self.trace.touch(page, False, int((now - self._last) * 1e6))
                self._last = now
            self.trace.add(sample)


class _Rates:
    """The guest's work a second, unwatched and watched; None where it keeps no progress page."""

    def __init__(self, vm: VM) -> None:
        self._vm = vm
        self._done = {False: 0, True: 0}
        self._seconds = {False: 0.0, True: 0.0}

    def measure(self, seconds: float, watched: bool) -> RunResult | None:
        """Lets the guest run on for so long; what it returns, if that was its end."""
        count, begin = self._vm.progress().count, time.monotonic()
        result = self._vm.wait(seconds)
        if result.reason != "timeout":
            return result
        self._done[watched] += self._vm.progress().count - count
        self._seconds[watched] += time.monotonic() - begin
        return None

    def rate(self, watched: bool) -> float | None:
        """Work a second."""
        return self._done[watched] / self._seconds[watched] if self._done[watched] else None

    @property
    def slower(self) -> float | None:
        """By which share the guest was slower while it was watched."""
        before, watched = self.rate(False), self.rate(True)
        return None if before is None or watched is None else 1 - watched / before


class _Activity(Session):
    stdout = 2

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        check_seconds("--seconds", args.seconds)
        for option, path in (("--png", args.png), ("--record-trace", args.record_trace)):
            _check_file(option, path)
        if args.png is not None:
            from pyvmm.cli import plot  # noqa: F401  (says what to install, where there is no matplotlib)
        self._watched = 0.0
        self._estimate: Estimate | None = None
        self._counts: SamplerCounts | None = None

    def prepare(self, vm: VM) -> None:
        args = self.args
        blocks, pages = vm.memory.size // BLOCK_SIZE, vm.memory.size // PAGE_SIZE
        source = f"pyvmm activity {os.path.basename(args.guest)} {args.append}".strip()[:100]
        self._seen = Seen(blocks, pages, source, max(args.seconds, 1.0), args.record_trace is not None)
        self._sampler = Sampler(
            vm.memory,
            window=args.window,
            share=args.share,
            threshold=args.threshold,
            order=args.order,
            budget=args.budget,
            full=args.full,
            seed=args.seed,
            on_sample=self._seen,
        )
        self._rates = _Rates(vm)

    def wait(self, vm: VM) -> RunResult | None:
        deadline = time.monotonic() + (self.args.timeout or 1e9)
        apart = self.args.seconds * _BEFORE
        for watched, seconds in ((False, apart), (True, self.args.seconds), (False, apart)):
            left = deadline - time.monotonic()
            result = self._pass_time(min(seconds, max(left, 0)), watched)
            if result is None and left <= seconds:
                return vm.wait(0)
            if result is not None:
                return result
        return None

    def _pass_time(self, seconds: float, watched: bool) -> RunResult | None:
        if not watched:
            return self._rates.measure(seconds, False)
        begin = time.monotonic()
        with self._sampler:
            result = self._rates.measure(seconds, True)
            self._watched = time.monotonic() - begin
            self._estimate = self._seen.working_set.estimate(self._sampler.population(), time.monotonic())
        self._counts = self._sampler.counts()
        return result

    def finish(self, vm: VM, seconds: float) -> None:
        if self._seen.trace is not None:
            save(self._seen.trace, self.args.record_trace)
        if self.args.png is not None:
            from pyvmm.cli.plot import draw_heat

            title = f"Pages touched of {os.path.basename(self.args.guest)}"
            draw_heat(self.args.png, title, self._seen.heat, lambda block: _address(vm, block))
        if self._counts is None or self._estimate is None:
            raise PyvmmError("the guest ended before any block was watched: give one that runs on, such as hotcold")
        if self.args.json:
            print(json.dumps(self._as_json(vm, self._counts, self._estimate)))
        else:
            self._show(vm, self._counts, self._estimate)

    def _waited(self, counts: SamplerCounts) -> float:
        return float(counts.waited / (self._watched * self.args.cpus))

    def _show(self, vm: VM, counts: SamplerCounts, estimate: Estimate) -> None:
        output, args = Output(), self.args

        def line(name: str, text: str) -> None:
            output.print(Text.assemble((f"{name:>11} ", "bold"), text), soft_wrap=True)

        each = f"{args.window:g} s each, active from {args.threshold} pages on"
        line("watched", f"{self._seen.samples:,} samples in {self._watched:.1f} s, {each}: {counts.active:,} were")
        mib = [pages * PAGE_SIZE / (1 << 20) for pages in (estimate.pages, estimate.low, estimate.high)]
        whole = estimate.blocks * BLOCK_SIZE >> 20
        line("working set", f"{mib[0]:.1f} MiB ({mib[1]:.1f} to {mib[2]:.1f} with 95 %) of {whole} MiB in large pages")
        line("cost", f"{counts.touches:,} pages brought; vCPUs waited {self._waited(counts):.2%} of the time for them")
        slower = self._rates.slower
        if slower is not None:
            line(
                "guest",
                f"{slower:.1%} slower than unwatched, before and after" if slower > 0 else "no slower than unwatched",
            )
        output.print()
        if len(self._seen.heat):
            output.print(HeatPicture(self._seen.heat, lambda block: _address(vm, block)))

    def _as_json(self, vm: VM, counts: SamplerCounts, estimate: Estimate) -> dict[str, object]:
        """The report as plain data. Units are in the names of numbers, or pages."""
        first, last = self._seen.heat.span
        rows = min(self._seen.heat.blocks, 128)
        return {
            "schema": _SCHEMA,
            "guest": self.args.guest,
            "memory_bytes": vm.memory.size,
            "block_bytes": BLOCK_SIZE,
            "watched_seconds": round(self._watched, 6),
            "samples": self._seen.samples,
            "counts": {name: getattr(counts, name) for name in counts.__slots__},
            "working_set": {name: getattr(estimate, name) for name in estimate.__slots__},
            "vcpus_waited": self._waited(counts),
            "work_per_second": {"unwatched": self._rates.rate(False), "watched": self._rates.rate(True)},
            "slower": self._rates.slower,
            "heat": {"seconds": last - first, "first_blocks": self._seen.heat.first_blocks(rows),
                     "touched": self._seen.heat.cells(rows, 32)},
        }  # fmt: skip


def _address(vm: VM, block: int) -> int:
    return vm.memory.gpa_of(block * (BLOCK_SIZE // PAGE_SIZE)).value


def _check_file(option: str, path: str | None) -> None:
    """Raises BadInput now for what would be wrong when the guest has run."""
    if path is not None and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
        raise BadInput(f"{option} {path}: give a file in a directory that is there")
