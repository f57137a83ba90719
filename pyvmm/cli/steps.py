# steps.py: what people ask to be done to 2 MiB blocks, as they type it (`--do split:3-5`), and doing it. Unit: blocks.
"""`parse_step()` and `Step`."""

from __future__ import annotations

import time

from pyvmm.errors import BadInput, PyvmmError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.machine import VM
    from pyvmm.memory.engine import Engine

BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE


def _install(engine: Engine, page: int, count: int) -> int:
    engine.install(page, count)
    return 0


def _whole(method: str) -> Callable[[Engine, int, int], int]:
    """An operation that takes a block: the engine refuses one that is not wholly RAM."""

    def operate(engine: Engine, page: int, count: int) -> int:
        getattr(engine, method)(page // BLOCK_PAGES)
        return 0

    return operate


def _share(engine: Engine, page: int, count: int) -> int:
    from pyvmm.memory.sharing.sharer import mark

    return mark(engine, page // BLOCK_PAGES)


# name -> what does it to a block, given as its first page and number of pages; returns how many pages went away
OPERATIONS: dict[str, Callable[[Engine, int, int], int]] = {
    "remove": lambda engine, page, count: engine.remove(page, count),
    "zero": lambda engine, page, count: engine.remove(page, count, "zero"),
    "install": _install,
    "split": _whole("split"),
    "merge": _whole("merge"),
    "break": _whole("break_"),
    "share": _share,
}
REMOVALS = ("remove", "zero", "share")


class Step:
    """One operation on some blocks, and what became of it.

    done, failed: blocks so far; pages: that went away; seconds: all blocks together; reason: why the first one failed.
    """

    def __init__(self, text: str, operation: str, blocks: list[int]) -> None:
        self.text = text
        self.operation = operation
        self.blocks = blocks
        self.done = self.failed = self.pages = 0
        self.seconds = 0.0
        self.reason = ""

    @property
    def finished(self) -> bool:
        """Has each block had its turn?"""
        return self.done + self.failed == len(self.blocks)

    def perform(self, vm: VM) -> None:
        """Does it, block by block, until the guest ends. A block that cannot be had does not keep the others."""
        engine, total = vm.memory.engine, vm.memory.size // PAGE_SIZE
        begin = time.perf_counter()
        for block in self.blocks:
            if vm.ended:
                break
            first = block * BLOCK_PAGES
            try:
                self.pages += OPERATIONS[self.operation](engine, first, min(BLOCK_PAGES, total - first))
                self.done += 1
            except PyvmmError as error:
                self.failed += 1
                self.reason = self.reason or str(error)
        self.seconds = time.perf_counter() - begin


def parse_step(text: str, size: int) -> Step:
    """`OP:BLOCKS` for a VM with `size` bytes of RAM. Raises BadInput."""
    operation, colon, blocks = text.partition(":")
    if not colon:
        raise BadInput(f"--do {text!r}: give an operation and blocks, such as split:3-5")
    if operation not in OPERATIONS:
        raise BadInput(f"--do {text!r}: no operation {operation!r}: choose one of {', '.join(OPERATIONS)}")
    return Step(text, operation, parse_blocks(blocks, -(-size // BLOCK_SIZE)))


def parse_blocks(text: str, limit: int) -> list[int]:
    """Blocks such as `3`, `3-9`, `3,5,8-10` or `all`, as typed, each once and below `limit`. Raises BadInput."""
    if text == "all":
        return list(range(limit))
    blocks: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = _number(first, text), _number(last if dash else first, text)
        if ends[1] < ends[0]:
            raise BadInput(f"blocks {part}: the first is behind the last; give {last}-{first}")
        if ends[1] >= limit:
            raise BadInput(f"block {ends[1]}: the VM has {limit} of 2 MiB, 0 to {limit - 1}; --mem gives it more")
        blocks.update(dict.fromkeys(range(ends[0], ends[1] + 1)))
    return list(blocks)


def _number(digits: str, text: str) -> int:
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 20:
        raise BadInput(f"blocks {text!r}: give numbers and ranges, such as 3,5,8-10, or all")
    return int(digits)
