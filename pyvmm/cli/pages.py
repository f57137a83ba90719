# pages.py: `pyvmm pages`: runs a guest, shows where its pages are, and changes that while it runs.
"""The command. Its report goes to stdout, what the guest prints to stderr."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext

from rich.text import Text

from pyvmm.cli import sharing
from pyvmm.cli.output import Output
from pyvmm.cli.picture import BlockMap, Histogram, PagesTable, Stage, nanoseconds, operations_table, stalls_table
from pyvmm.cli.run import Session, check_seconds
from pyvmm.cli.steps import REMOVALS, Step, parse_step
from pyvmm.control.sharing import as_json, fetch
from pyvmm.errors import BadInput, HostError
from pyvmm.layout import BLOCK_SIZE, MIB, format_size
from pyvmm.machine import VM, RunResult
from pyvmm.memory.sharing.estimate import Estimate
from pyvmm.memory.sharing.ksm import footprint, ksm_running, settled, why_not
from pyvmm.memory.sharing.table import scan
from pyvmm.memory.uffd import open_uffd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parse import Arguments
    from pyvmm.memory.counts import EngineStats, Operation, Stall

_SCHEMA = 1


def run(args: Arguments) -> int:
    """The command: the guest's status if it ended by itself, 0 after the last look; else as for `pyvmm run`."""
    if sharing.is_socket(args.guest):
        return sharing.run(args)
    return _Pages(args).run()


class _Pages(Session):
    stdout = 2

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        check_seconds("--seconds", args.seconds)
        if args.png is not None:
            _check_png(args.png)
        self._deadline = 0.0
        self._steps: list[Step] = []
        self._stages: list[Stage] = []
        if args.with_ and not args.sharing:
            raise BadInput("--with PATH goes with --sharing")
        self._estimate: Estimate | None = None
        self._takes: list[int] = []  # bytes of the host's, before and after blocks were shared

    def prepare(self, vm: VM) -> None:
        self._steps = [parse_step(text, vm.memory.size) for text in self.args.do]
        if any(step.operation != "split" for step in self._steps):
            os.close(open_uffd(for_guests=True))  # a host that has none says so now, and not for each block
        if self._shares and not self.args.ksm and (missing := why_not()):
            raise HostError(missing)
        _ = vm.memory.engine  # hugetlb memory has none, and says so

    def wait(self, vm: VM) -> RunResult | None:
        self._deadline = time.monotonic() + (self.args.timeout or 1e9)
        result = self._pass_time(vm)
        self._look(vm, "at the end" if result is not None else "before" if self._steps else "at first")
        if result is not None:
            return result
        if self.args.sharing:
            self._estimate = Estimate(scan(vm.memory), [fetch(path) for path in self.args.with_])
        self._perform(vm)
        if self._steps:
            self._look(vm, "after --do")
        result = self._pass_time(vm)
        self._look(vm, "at the end" if result is not None else f"{self.args.seconds:g} s later")
        return result

    @property
    def _shares(self) -> bool:
        return any(step.operation == "share" for step in self._steps)

    def _perform(self, vm: VM) -> None:
        """What is to be shared is, when this returns."""
        with ksm_running(self.args.ksm) if self._shares else nullcontext():
            self._takes = [footprint(vm.memory)] if self._shares else []
            for step in self._steps:
                step.perform(vm)
            if self._shares:
                settled()
                self._takes.append(footprint(vm.memory))

    def _pass_time(self, vm: VM) -> RunResult | None:
        """Lets the guest run on for --seconds; what wait() is to return if that is the end of it."""
        left = self._deadline - time.monotonic()
        result = vm.wait(max(min(self.args.seconds, left), 0))
        return None if result.reason == "timeout" and left > self.args.seconds else result

    def _look(self, vm: VM, title: str) -> None:
        """Paused, so that our count, KVM's and the map are of one moment, but for a fault whose answer is under way."""
        vm.pause()
        try:
            self._stages.append(Stage(title, vm.memory.pages(), vm.mappings(), vm.memory.engine.looks()))
        finally:
            if vm.paused:
                vm.resume()

    def finish(self, vm: VM, seconds: float) -> None:
        stats = vm.memory.engine.stats()
        if self.args.json:
            print(json.dumps(self._as_json(vm, seconds, stats)))
        else:
            self._show(vm, stats)
        if self.args.png is not None:
            from pyvmm.cli.plot import draw

            title = f"Where the pages of {os.path.basename(self.args.guest)} are ({format_size(vm.memory.size)})"
            draw(self.args.png, title, self._stages, vm.memory.regions)

    # ---- for people ----

    def _show(self, vm: VM, stats: EngineStats) -> None:
        console = Output()
        if self._estimate is not None:
            sharing.show(console, self._estimate, len(self.args.with_))
            console.print()

        def line(text: str = "", style: str = "") -> None:
            console.print(Text(text, style))

        for step in self._steps:
            line(_outcome(step), "" if step.finished and not step.failed else "yellow")
            if step.reason:
                line(f"  {step.reason}", "yellow")
        if self._takes:
            before, after = (f"{size / MIB:,.1f} MiB" for size in self._takes)
            line(f"the guest's RAM takes {after} of the host's, {before} before it was shared")
        if self._steps:
            line()
        line("pages of 4 KiB", "bold")
        console.print(PagesTable(self._stages))
        if any(op.done + op.failed for op in stats.operations.values()):
            line()
            line("operations on blocks", "bold")
            console.print(operations_table(console, stats.operations))
        line()
        answers = ", ".join(f"{name} {count:,}" for name, count in stats.answers.items() if count)
        line(f"faults answered: {stats.faults:,}" + (f" ({answers})" if answers else ""), "bold")
        if stats.faults:
            console.print(Histogram(stats.latency))
            line()
            console.print(stalls_table(console, stats))
        self._show_maps(console, vm)

    def _show_maps(self, console: Output, vm: VM) -> None:
        before = None
        for stage in self._stages:
            console.print()
            same = before is not None and before.looks == stage.looks
            console.print(Text(f"map {stage.title}{': the same' if same else ''}", "bold"))
            if not same:
                console.print(BlockMap(stage.looks, vm.memory.regions))
            before = stage

    # ---- for programs ----

    def _as_json(self, vm: VM, seconds: float, stats: EngineStats) -> dict[str, object]:
        """The report as plain data. Units are in the names of numbers, or pages; looks: a word a block."""
        return {
            "schema": _SCHEMA,
            "guest": self.args.guest,
            "seconds": round(seconds, 6),
            "memory_bytes": vm.memory.size,
            "block_bytes": BLOCK_SIZE,
            "regions": [{"gpa": region.gpa.value, "bytes": region.size} for region in vm.memory.regions],
            "stages": [
                {
                    "title": stage.title,
                    "pages": dict(stage.counts.rows()),
                    "kvm": dict(stage.mappings),
                    "looks": list(stage.looks),
                }
                for stage in self._stages
            ],
            "steps": [
                {
                    "do": step.text,
                    "blocks": len(step.blocks),
                    "done": step.done,
                    "failed": step.failed,
                    "pages": step.pages,
                    "seconds": round(step.seconds, 9),
                    "reason": step.reason or None,
                }
                for step in self._steps
            ],
            "sharing": None if self._estimate is None else as_json(self._estimate, len(self._stages[0].looks)),
            "shared_bytes": self._takes or None,
            "operations": {name: _fields(operation) for name, operation in stats.operations.items()},
            "faults": {
                "count": stats.faults,
                "by_home": stats.by_home,
                "answers": stats.answers,
                "latency_log2_ns": stats.latency,
                "nanoseconds": stats.nanoseconds,
                "vcpus": [_fields(stall) for stall in stats.vcpus],
                "workers": _fields(stats.workers),
                "others": _fields(stats.others),
            },
        }


def _fields(record: Operation | Stall) -> dict[str, int]:
    return {name: getattr(record, name) for name in record.__slots__}


def _outcome(step: Step) -> str:
    """What became of a step, in a line."""
    blocks = f"{len(step.blocks):,} {'block' if len(step.blocks) == 1 else 'blocks'}"
    if not step.finished:
        return f"{step.text}: the guest ended after {step.done + step.failed:,} of {blocks}"
    went = f", {step.pages:,} pages went away" if step.operation in REMOVALS else ""
    failed = f", {step.failed:,} failed" if step.failed else ""
    return f"{step.text}: {blocks} in {nanoseconds(step.seconds * 1e9)}{went}{failed}"


def _check_png(path: str) -> None:
    """Raises BadInput now for what would be wrong when the guest has run."""
    from pyvmm.cli import plot  # noqa: F401  (says what to install, where there is no matplotlib)

    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise BadInput(f"--png {path}: give a file in a directory that is there")
