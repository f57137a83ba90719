# host_simulate.py: `pyvmm host simulate`: policies for a fleet side by side, on paper. Bytes, pages of 4 KiB, ticks.
"""The command."""

from __future__ import annotations

import json

from rich.table import Table
from rich.text import Text

from pyvmm.cli.output import Output
from pyvmm.errors import BadInput
from pyvmm.fleet.policy import POLICIES, find
from pyvmm.fleet.simulator import Outcome, simulate
from pyvmm.fleet.synthetic import Series, load, make, three
from pyvmm.layout import parse_size, rough_size
from pyvmm.memory.reclaim.policy import broken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parse import Arguments

_SHARE = 0.7
"""Of what VMs are promised, where nobody says how much there is."""
_OURS = "class-based"


def run(args: Arguments) -> int:
    """The command: 0. Raises BadInput."""
    if args.fleet is not None or args.folder is not None or args.detach:
        raise BadInput("simulate needs no fleet: give --vms N or --trace FILE, or neither for three unlike guests")
    if args.vms is not None and args.trace is not None:
        raise BadInput("give one of --vms and --trace")
    if not 1 <= args.ticks <= 1_000_000:
        raise BadInput(f"--ticks {args.ticks}: give 1 to 1000000")
    names = list(POLICIES) if args.policy is None else args.policy.split(",")
    kinds = {name: find(name) for name in names}
    fleet = _fleet(args)
    promised = sum(series.memory for series in fleet)
    budget = int(promised * _SHARE) if args.budget is None else parse_size(args.budget)
    if budget < 1:
        raise BadInput(f"--budget {args.budget}: that is no memory at all")
    outcomes = []
    for name, kind in kinds.items():
        try:
            outcomes.append(simulate(fleet, budget, kind(), name, args.ticks))
        except BadInput:
            raise
        except Exception as error:  # somebody's own policy
            raise BadInput(f"policy {name}: {broken(error, name.rpartition(':')[0])}") from None
    if args.json:
        found = {"vms": len(fleet), "promised": promised, "budget": budget, "ticks": args.ticks, "seed": args.seed}
        print(json.dumps({**found, "policies": [outcome.as_dict() for outcome in outcomes]}))
    else:
        _show(fleet, promised, budget, args.ticks, outcomes)
    return 0


def _fleet(args: Arguments) -> list[Series]:
    if args.trace is not None:
        return load(args.trace)
    return three(ticks=args.ticks) if args.vms is None else make(args.vms, args.ticks, args.seed)


def _show(fleet: list[Series], promised: int, budget: int, ticks: int, outcomes: list[Outcome]) -> None:
    output = Output()
    what = f"{len(fleet)} VMs, promised {rough_size(promised)}, in {rough_size(budget)}, {ticks} ticks"
    output.print(Text(what, "bold"), soft_wrap=True)
    columns = ("policy", "refaults", "stale", "ballooned", "swapped", "slowdown", "worst", "over", f"/ {_OURS}")
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    least = next((outcome.refaults for outcome in outcomes if outcome.name == _OURS), 0)
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            *(f"{getattr(outcome, field):,}" for field in ("refaults", "stale", "ballooned", "swapped")),
            f"{outcome.slowdown:.2f}",
            f"{outcome.worst:.2f}",
            f"{outcome.over:.1%}",
            f"{outcome.refaults / least:.1f}" if least else "-",
        )
    output.print(table)
    output.print(
        "Pages of 4 KiB. stale: free pages that were read back for nothing. slowdown, worst: times as long, of all VMs"
        " and of one. over: above the budget; who is, has not given up as much as the others.",
        soft_wrap=True,
    )
