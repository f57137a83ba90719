# bench.py: `pyvmm bench`: runs benchmarks one after the other, and tells what they found, as tables, data and plots.
"""`run()`: what was typed after `pyvmm bench`."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack

from pyvmm.bench import results
from pyvmm.bench.catalogue import BENCHMARKS
from pyvmm.bench.results import Entry, Log
from pyvmm.bench.runner import lacks
from pyvmm.bench.runner import run as measure
from pyvmm.cli.parse import Arguments
from pyvmm.errors import EXIT_FAILED, BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from rich.live import Live

ALL = "all"


def run(args: Arguments) -> int:
    """Lists benchmarks, runs some, or does one of the verbs. Returns 1 where one could not be measured."""
    verb, *files = args.words or [""]
    if verb in ("report", "compare"):
        return _verb(verb, files, args)
    if not verb:
        for row in BENCHMARKS.values():
            print(f"{row.name:12} {row.text}")
        return 0
    names = list(BENCHMARKS) if ALL in args.words else list(dict.fromkeys(args.words))
    for name in names:
        if name not in BENCHMARKS:
            raise BadInput(f"no benchmark {name!r}: choose from {', '.join(BENCHMARKS)}, or {ALL}")
    if args.report:
        from pyvmm.cli.bench_page import Report

        report = Report(args.report)  # what it lacks is told before anything is measured
    head = results.head(args.quick)
    entries, good = _run(names, head, args)
    if args.report:
        report.write([results.Run(head, entries)])
    return 0 if good else EXIT_FAILED


def _verb(verb: str, files: Sequence[str], args: Arguments) -> int:
    if verb == "compare":
        if len(files) != 2:
            raise BadInput("compare takes two files of results: pyvmm bench compare A.json B.json")
        from pyvmm.cli.bench_compare import show

        show(files[0], files[1], args.json)
        return 0
    if len(files) != 1 or not args.output:
        raise BadInput("report takes a file of results and a folder: pyvmm bench report FILE.json --output DIR")
    from pyvmm.cli.bench_page import Report

    Report(args.output).write(results.read(files[0]))
    return 0


def _run(names: Sequence[str], head: dict[str, object], args: Arguments) -> tuple[list[Entry], bool]:
    """All of them, whatever becomes of one; and whether all were measured, and are as they are to be."""
    quick: bool = args.quick
    entries: list[Entry] = []
    good = True
    with ExitStack() as stack:
        log = stack.enter_context(Log(args.output)) if args.output else None
        _tell(head, log, args.json)
        for name in names:
            with _Progress(names, entries, quick) as progress:
                entry = measure(name, quick, progress.told)
            entries.append(entry)
            _tell(entry.as_json(quick), log, args.json)
            if not args.json:
                _show(entry, quick)
            good = _is_good(entry, args) and good
    return entries, good


def _tell(line: dict[str, object], log: Log | None, to_stdout: bool) -> None:
    if log is not None:
        log.add(line)
    if to_stdout:
        print(json.dumps(line), flush=True)


def _show(entry: Entry, quick: bool) -> None:
    if not entry.reason:
        from pyvmm.cli.bench_tables import show

        show(entry.benchmark, entry.results, quick)


def _is_good(entry: Entry, args: Arguments) -> bool:
    wrong = lacks(entry.benchmark, entry.results, args.quick) if args.check and not entry.reason else []
    for text in [f"not measured: {entry.reason}"] if entry.reason else wrong:
        print(f"pyvmm: {entry.benchmark}: {text}", file=sys.stderr)
    return not entry.reason and not wrong


class _Progress:
    """While a benchmark runs, and only on a terminal: which one, for how long, and about how long all will take."""

    def __init__(self, names: Sequence[str], done: Sequence[Entry], quick: bool) -> None:
        self._expected = [BENCHMARKS[name].seconds[quick] for name in names]
        self._name, self._at, self._of = names[len(done)], len(done), len(names)
        self._spent = sum(entry.seconds for entry in done)
        self._live: Live | None = None

    def told(self, seconds: float) -> None:
        """So long by now."""
        if self._live is not None:
            from rich.text import Text

            left = f"some {_clock(self.left(seconds))} left" if self.left(seconds) >= 1 else "soon done"
            line = f"{self._at + 1} of {self._of}: {self._name}, {_clock(seconds)}; {left}"
            self._live.update(Text(line, "dim"), refresh=True)

    def left(self, seconds: float) -> float:
        """By what the others took of what was expected of them."""
        before = sum(self._expected[: self._at])
        pace = self._spent / before if before else 1.0
        own, *later = self._expected[self._at :]
        return max(own * pace - seconds, 0) + sum(later) * pace

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            # No thread of its own that draws: what is measured is to have the CPUs.
            self._live = Live(
                console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
            self.told(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(seconds))
