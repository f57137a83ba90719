# reclaim.py: --limit, --swap and --policy: a guest of which a part is in a swap file, from its first instruction on.
"""`check()` before there is a VM, `ready()` when there is one, `limit()` when its memory may go."""

from __future__ import annotations

import os
import sys

from pyvmm.errors import BadInput
from pyvmm.layout import parse_size
from pyvmm.memory.reclaim.reclaimer import check_limit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parse import Arguments
    from pyvmm.machine import VM


def check(args: Arguments) -> None:
    """Raises BadInput for what cannot be meant."""
    if args.limit is not None:
        check_limit(parse_size(args.limit), "--limit ")
    elif args.policy is not None and args.swap is None:
        raise BadInput("--policy says who chooses what goes, --limit SIZE must say how much may stay")
    if args.policy is not None:
        from pyvmm.memory.reclaim.policy import find

        find(args.policy)


def ready(vm: VM, args: Arguments) -> None:
    """A swap as the options say. What goes wrong later is told on stderr, in a line. Raises BadInput, HostError."""
    path, size = place(args.swap)
    compress = None if args.swap_compress == "none" else args.swap_compress
    reclaimer = vm.memory.reclaim(path, size, compress, args.policy)
    reclaimer.on_trouble = lambda text: print(f"pyvmm: {text}", file=sys.stderr, flush=True)


def limit(vm: VM, args: Arguments) -> None:
    """The limit that the options say, once it is ready()."""
    if args.limit is not None:
        vm.memory.limit = parse_size(args.limit)


def place(swap: str | None) -> tuple[str | None, int | None]:
    """FILE, SIZE or FILE,SIZE as (path, bytes). A name that looks like a size is one: ./1G is a file."""
    if swap is None:
        return None, None
    path, comma, size = swap.rpartition(",")
    if comma and path:
        return os.path.abspath(path), parse_size(size)
    try:
        return None, parse_size(swap)
    except BadInput:
        return os.path.abspath(swap), None
