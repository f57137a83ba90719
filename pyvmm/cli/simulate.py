# simulate.py: `pyvmm simulate`: victim policies side by side on an access trace, with the least that any could cost.
"""The command. Units: small pages."""

from __future__ import annotations

import json

from rich.table import Table
from rich.text import Text

from pyvmm.cli.output import Output
from pyvmm.errors import BadInput
from pyvmm.layout import PAGE_SIZE, parse_size, rough_size
from pyvmm.memory.reclaim.opt import NAME, optimum
from pyvmm.memory.reclaim.policy import Policy, find
from pyvmm.memory.reclaim.simulator import Outcome, check_limit, simulate
from pyvmm.memory.reclaim.synthetic import make
from pyvmm.memory.reclaim.trace import Trace, load, save

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parse import Arguments

COLUMNS = ("faults", "refaults", "read", "written", "saved", "shared")
"""Figures of an Outcome."""


def run(args: Arguments) -> int:
    """The command: 0. Raises BadInput."""
    policies = {name: find(name) for name in args.policy.split(",")}
    limit = None if args.memory is None else _pages(args.memory, "--memory")
    if limit is None and args.out is None:
        raise BadInput("give --memory SIZE: so much the VM may have in memory")
    trace = _trace(args)
    if args.out is not None:
        save(trace, args.out)
    if limit is None:
        return 0
    check_limit(trace, limit, not args.small)
    outcomes = [_simulated(trace, name, policy, limit, args) for name, policy in policies.items()]
    outcomes.append(optimum(trace, limit))
    if args.json:
        print(json.dumps(_as_dict(trace, limit, args, outcomes)))
    else:
        _show(trace, limit, outcomes)
    return 0


def _simulated(trace: Trace, name: str, policy: type[Policy], limit: int, args: Arguments) -> Outcome:
    return simulate(
        trace, policy, limit, name=name, seed=args.seed, large=not args.small, blind=args.blind, window=args.window
    )


def _pages(text: str, option: str) -> int:
    pages = parse_size(text) // PAGE_SIZE
    if pages == 0:
        raise BadInput(f"{option} {text}: less than a page of 4 KiB")
    return pages


def _trace(args: Arguments) -> Trace:
    if (args.trace is None) == (args.make is None):
        raise BadInput("give one of a TRACE and --make KIND")
    if args.make is None:
        return load(args.trace)
    return make(args.make, _pages(args.ram, "--ram"), args.touches, args.seed)


def _as_dict(trace: Trace, limit: int, args: Arguments, outcomes: list[Outcome]) -> dict[str, object]:
    return {
        "pages": trace.pages,
        "limit": limit,
        "touches": len(trace),
        "source": trace.source,
        "seed": args.seed,
        "large": not args.small,
        "policies": [outcome.as_dict() for outcome in outcomes],
    }


def _show(trace: Trace, limit: int, outcomes: list[Outcome]) -> None:
    output = Output()
    what = f"{rough_size(trace.pages * PAGE_SIZE)} in {rough_size(limit * PAGE_SIZE)}, {len(trace):,} touches"
    output.print(Text.assemble((what, "bold"), f": {trace.source}" if trace.source else ""), soft_wrap=True)
    table = Table("policy", *COLUMNS, "large", f"/ {NAME}", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    least = outcomes[-1].read
    for outcome in outcomes:
        figures = [_figure(getattr(outcome, field)) for field in COLUMNS]
        kept = f"{outcome.large}/{outcome.blocks}" if outcome.blocks else "-"
        table.add_row(outcome.name, *figures, kept, f"{outcome.read / least:.2f}" if least else "-")
    output.print(table)
    output.print(
        f"Pages of 4 KiB. large: blocks left whole. / {NAME}: pages read, over the least that any policy could read.",
        soft_wrap=True,
    )


def _figure(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
