# torture.py: `pyvmm torture`: proves the memory engine on this host, for as long as one likes.
"""A guest that checks all of its memory, under random operations on that memory. Status 1 where anything is wrong."""

from __future__ import annotations

import json
import random
import sys
import time
from contextlib import nullcontext

from rich.console import Console
from rich.table import Table

from pyvmm import host
from pyvmm.errors import BadInput
from pyvmm.layout import parse_size
from pyvmm.testing.torture import Torture, TortureFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.cli.parse import Arguments
    from pyvmm.memory.counts import EngineStats

_TERMINAL_INTERVAL, _LOG_INTERVAL = 0.25, 10.0
"""Seconds between two states of the progress line: on a terminal, where it stays one line, and elsewhere."""


def run(args: Arguments) -> int:
    """The command: 0 if all was well, 1 and a report if not."""
    if not 0 < args.seconds < 1e9:
        raise BadInput(f"--seconds {args.seconds:g}: give seconds above 0")
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    memory = parse_size(args.mem)
    print(f"seed {seed}", file=sys.stderr)
    begin = time.monotonic()
    with (
        host.without("uffd_move") if args.without_move else nullcontext(),
        Torture(seed, memory, args.cpus, args.pages) as torture,
    ):
        failure = None
        try:
            torture.run(args.seconds, _line(begin))
        except TortureFailure as error:
            failure = error
        result = _summary(torture, time.monotonic() - begin, failure)
        if args.json:
            print(json.dumps(result))
        else:
            _show(torture, result)
        if failure is not None:
            print(f"\npyvmm: {failure.report}", file=sys.stderr)
            return failure.exit_code
    return 0


def _line(begin: float) -> Callable[[Torture], None]:
    """Shows how far it is, now and then."""
    terminal = sys.stderr.isatty()
    interval = _TERMINAL_INTERVAL if terminal else _LOG_INTERVAL
    shown = begin

    def show(torture: Torture) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < interval:
            return
        shown = now
        progress, stats = torture.vm.progress(), torture.subject.stats()
        text = (
            f"{now - begin:6.1f} s  {torture.operations:,} operations ({torture.operations / (now - begin):,.0f}/s), "
            f"{stats.faults:,} faults, {progress.count:,} pages checked"
        )
        print(f"\r{text}\x1b[K" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return show


def _summary(torture: Torture, seconds: float, failure: TortureFailure | None) -> dict[str, object]:
    """The outcome as plain data; times in ns where the name does not say otherwise."""
    stats = torture.subject.stats()
    return {
        "seed": torture.seed,
        "ok": failure is None,
        "wrong": None if failure is None else str(failure),
        "seconds": round(seconds, 3),
        "operations": torture.operations,
        "checks": torture.checks,
        "done": dict(torture.done),
        "refused": dict(torture.subject.refused),
        "migrations": dict(torture.subject.moves),
        "pages_checked_by_guest": torture.vm.progress().count,
        "faults": stats.faults,
        "answers": stats.answers,
        "latency": {str(share): stats.percentile(share) for share in (0.5, 0.9, 0.99, 1.0)},
        "engine": {
            name: {"done": each.done, "failed": each.failed, "mean": _mean(each.nanoseconds, each.done + each.failed),
                   "longest": each.longest}
            for name, each in stats.operations.items()
        },
        "retries": stats.retries,
    }  # fmt: skip


def _mean(total: int, count: int) -> int:
    return total // count if count else 0


def _show(torture: Torture, result: dict[str, object]) -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)
    stats = torture.subject.stats()
    console = Console(highlight=False)
    title = (
        f"{torture.vm!r}, seed {torture.seed}: {torture.operations:,} operations, {torture.checks} full checks, "
        f"{result['pages_checked_by_guest']:,} pages checked by the guest in {result['seconds']} s"
    )
    asked = Table("asked for", "times", "refused", title=title, title_justify="left")
    for kind, count in torture.done.most_common():
        asked.add_row(kind, f"{count:,}", f"{torture.subject.refused[kind]:,}")
    console.print(asked)
    console.print(_work(stats))
    faults = Table("faults answered by", "times", title=f"{stats.faults:,} faults", title_justify="left")
    for answer, count in stats.answers.items():
        faults.add_row(answer, f"{count:,}")
    console.print(faults)
    shares = ", ".join(f"{share:.0%} below {stats.percentile(share) / 1000:,.0f} us" for share in (0.5, 0.99, 1.0))
    console.print(f"latency: {shares}")


def _work(stats: EngineStats) -> Table:
    table = Table("engine", "done", "failed", "mean us", "longest us")
    for name, each in stats.operations.items():
        mean = _mean(each.nanoseconds, each.done + each.failed)
        table.add_row(name, f"{each.done:,}", f"{each.failed:,}", f"{mean / 1000:,.1f}", f"{each.longest / 1000:,.0f}")
    return table
