# sharing.py: what VMs in several processes could share: tables of hashes over control sockets. Units: pages of 4 KiB.
"""`hashes()`, `sharing()`: the answers. `fetch()`: another VM's table, by its socket."""

from __future__ import annotations

from pyvmm.control.client import Client
from pyvmm.errors import ControlError
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory.sharing.estimate import Estimate
from pyvmm.memory.sharing.table import PIECE, decode, encode, scan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine import VM
    from pyvmm.memory.sharing.table import Table

MAX_PAGES = 1 << 28
"""A VM with more is none of ours: 1 TiB."""


def hashes(vm: VM, first: int, count: int) -> dict[str, object]:
    """What at most `count` pages from `first` on hold, as they are now; none behind the last."""
    pages = vm.memory.size // PAGE_SIZE
    count = max(min(count, pages - first), 0)
    return {"pages": pages, "first": first, "count": count, "hashes": encode(scan(vm.memory, min(first, pages), count))}


def sharing(vm: VM, blocks: int) -> dict[str, object]:
    """What sharing within the VM would free, by a scan of all of it now."""
    return as_json(Estimate(scan(vm.memory)), blocks)


def as_json(found: Estimate, blocks: int) -> dict[str, object]:
    """As plain data, with so many of the blocks that have most."""
    return {
        "page_bytes": PAGE_SIZE,
        "pages": found.pages,
        "scanned": found.scanned,
        "zeros": found.zeros,
        "copies": found.copies,
        "across": found.across,
        "freed": found.freed,
        "blocks": [{"block": block, "pages": count} for block, count in best(found, blocks)],
    }


def best(found: Estimate, blocks: int) -> list[tuple[int, int]]:
    """(block, pages that could be given up) of those with most, and any."""
    counts = sorted(enumerate(found.counts()), key=lambda row: (-row[1], row[0]))[:blocks]
    return [(block, count) for block, count in counts if count]


def fetch(path: str) -> Table:
    """The table of the VM that listens at `path`, piece by piece: its pages as they were within that time. Raises
    BadInput where nobody listens, ControlError for an answer that cannot be."""
    import numpy as np

    pieces: list[Table] = []
    first, pages = 0, 1
    with Client(path) as client:
        while first < pages:
            answer = client.ask("hashes", first=first, count=PIECE)
            total = answer.get("pages")
            if type(total) is not int or not 0 < total <= MAX_PAGES or (first and total != pages):
                raise ControlError(f"{path} answers in a way that no VM of pyvmm does: pages {total!r}"[:200])
            pages = total
            pieces.append(decode(answer.get("hashes"), min(PIECE, pages - first)))
            first += PIECE
    return np.concatenate(pieces)
