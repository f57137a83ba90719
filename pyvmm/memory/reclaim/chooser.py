# chooser.py: the policy of a VM that runs, and what stands between the two: it is told what changes, and what it gives
# is checked, since it may be a student's. Units: small pages, and blocks of 512 of them.
"""`Chooser`: asks a policy for victims; where it fails, `clock` takes its place."""

from __future__ import annotations

from pyvmm.errors import BadInput
from pyvmm.memory.reclaim.policies import Clock
from pyvmm.memory.reclaim.policy import BLOCK_PAGES, Block, Policy, Share, broken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.memory.reclaim.live import LiveView
    from pyvmm.memory.reclaim.policy import Victim
    from pyvmm.memory.reclaim.senses import Senses

_SUBSTITUTE = "clock"


class Chooser:
    """Of the policy `kind`, which people know as `name`, nothing is called that it does not have: there are many pages.

    on_failure: is told in a line, once, of a policy that raises or gives what cannot leave memory. Raises BadInput for
    one that cannot even be made.
    """

    def __init__(self, kind: type[Policy], name: str, view: LiveView, on_failure: Callable[[str], object]) -> None:
        self._view, self._on_failure = view, on_failure
        self._take(kind, name)

    def _take(self, kind: type[Policy], name: str) -> None:
        self.name = name
        self._path = code.co_filename if (code := getattr(kind.victims, "__code__", None)) else ""
        self._has = {method: getattr(kind, method) is not getattr(Policy, method) for method in _TOLD}
        try:
            self._policy = kind(self._view)
        except Exception as error:
            raise BadInput(f"policy {name}: {broken(error, self._path)}") from None

    def _replace(self, error: Exception) -> None:
        text = str(error) if isinstance(error, BadInput) else broken(error, self._path)
        name = self.name
        self._take(Clock, _SUBSTITUTE)
        self._on_failure(f"policy {name}: {text}: {_SUBSTITUTE} goes on in its place")

    def look(self, senses: Senses, touched: bool = True) -> None:
        """Tells it what has come and gone since the last time, and what was found out. touched: what came did so
        because the guest touched it."""
        came, left = self._view.look()
        try:
            if self._has["left"]:
                for page in left.tolist():
                    self._policy.left(page)
            for page in came.tolist() if self._has["came"] or (touched and self._has["touched"]) else ():
                self._policy.came(page)
                if touched:
                    self._policy.touched(page, False)
            senses.tell(self._policy)
        except Exception as error:
            self._replace(error)

    def choose(self, wanted: int, share: Callable[[int], int]) -> tuple[list[tuple[int, int]], int]:
        """Runs of pages (first, count) that are to go, `wanted` in all or as many as it gives; and how many it gave,
        with those of blocks that are to be shared: these go at once, by share(block), which returns how many went."""
        runs: list[tuple[int, int]] = []
        freed = given = 0
        victims = None
        while freed < wanted and given <= 2 * self._view.pages + wanted:  # a policy might share one block for ever
            try:
                victims = iter(self._policy.victims(wanted)) if victims is None else victims
                victim = next(victims, None)
                if victim is None:
                    break
                first, count = self._extent(victim)
                there = 0 if isinstance(victim, Share) else self._give_up(first, count)
            except Exception as error:
                self._replace(error)
                break
            if isinstance(victim, Share):  # what the kernel may have against that is no fault of the policy
                freed += share(victim.number)
                given += count
            else:
                runs.append((first, count))
                freed += there
                given += there
        return runs, given

    def _give_up(self, first: int, count: int) -> int:
        """Counts pages as gone, and tells the policy. How many were there."""
        there = [page for page in range(first, first + count) if self._view.resident[page]]
        self._view.gone(first, count)
        if self._has["left"]:
            for page in there:
                self._policy.left(page)
        return len(there)

    def _extent(self, victim: Victim) -> tuple[int, int]:
        """The pages (first, count) of what a victim is. Raises BadInput for what is none."""
        view = self._view
        if isinstance(victim, (Block, Share)):
            block = victim.number
            if not isinstance(block, int) or not 0 <= block < view.blocks:
                raise BadInput(f"block {block!r}: the VM has {view.blocks}")
            if not view.present[block]:
                raise BadInput(f"block {block} has no page in memory, and cannot leave it")
            first = block * BLOCK_PAGES
            return first, min(BLOCK_PAGES, view.pages - first)
        if not isinstance(victim, int) or not 0 <= victim < view.pages or not view.resident[victim]:
            raise BadInput(f"{victim!r} is no page in memory, and cannot leave it")
        return victim, 1


_TOLD = ("came", "left", "touched")
