# moves.py: the torture of migrations: the guest moves to another VM of this process while operations go on, first at
# its source, then at its destination, where pages are away that are still with the source. Pages of 4 KiB, seconds.
"""`migrate`: the operation. `Move`: a migration that is under way."""

from __future__ import annotations

import os
import random
from tempfile import TemporaryDirectory

from pyvmm.errors import MigrationError
from pyvmm.host import has
from pyvmm.memory.source import UNITS
from pyvmm.testing.operations import PATIENCE, Wrong, check_books
from pyvmm.testing.verify_model import ram_hash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from pyvmm.machine import VM
    from pyvmm.testing.operations import Operation, Subject
    from pyvmm.testing.shelves import Shelf

_MODES: tuple[Literal["precopy", "postcopy", "hybrid"], ...] = ("precopy", "postcopy", "hybrid")
MOVED = "moved"
CAME_TO_NOTHING = "stayed"
CANCELLED = "enough of it"
OPERATIONS = 60
"""Until it is waited for, at most."""
CANCELS = 0.25
"""Of all that are begun."""
_GIVES_UP = "not done after"
"""What a migration may come to by itself."""


def migrate(subject: Subject, operation: Operation) -> None:
    """Begins to move the guest; cancels that, or has it come to its end, where it is under way."""
    move = subject.move
    if move is not None and move.leaving:
        move.cancel(at_source=bool(operation.value % 2))
        return
    subject.end_move()
    subject.stop_trace()
    subject.resume()
    subject.move = Move(subject, operation)


class Move:
    """Of the guest of `subject`. How it moves follows from the operation; how far it gets until the next one does not.
    `leaving`: it runs at its source, or nowhere for the moment."""

    def __init__(self, subject: Subject, operation: Operation) -> None:
        rng = random.Random(operation.value)
        self._subject = subject
        self._before: tuple[VM, Shelf] | None = None
        self._until = operation.number + rng.randrange(OPERATIONS)
        self._cancel_at = operation.number + rng.randrange(20) if rng.random() < CANCELS else None
        self._at_source = rng.random() < 0.5
        self._cancelled = False
        self._source = subject.vm
        mode = rng.choice(_MODES)
        transport = rng.choice(("unix", "local"))
        tracker = rng.choice((None, "ring" if self._source.has_rings else rng.choice(("bitmap", "manual"))))
        compares = mode == "precopy" and rng.random() < 0.5
        self._folder = TemporaryDirectory(prefix="pyvmm-torture-")
        self._into = type(self._source).receive(
            f"{transport}:{os.path.join(self._folder.name, 'socket')}",
            unit=rng.choice(UNITS),
            prepare=self._compare if compares else None,
        )
        try:
            self._out = self._source.migrate(
                self._into.address,
                mode=mode,
                downtime=rng.choice((0.001, 0.2)) if mode == "hybrid" else 0.2,
                channels=rng.choice((1, 2, 5)),
                bandwidth=rng.choice((None, "128M", "512M")),
                rounds=rng.choice((2, 6)),
                tracker=tracker if has("uffd_wp") or tracker else None,
            )
        except BaseException:
            self._into.close()
            self._folder.cleanup()
            raise

    @property
    def leaving(self) -> bool:
        """Has torture not gone on with the destination yet?"""
        return self._before is None

    def follow(self, number: int) -> bool:
        """Before operation `number`: cancels, or goes on with the destination, if it is time. Is the guest leaving?"""
        if self.leaving:
            if self._cancel_at is not None and number >= self._cancel_at:
                self.cancel(self._at_source)
            self._look(0)
        if number >= self._until and self._subject.move is self:
            self.finish()
        return self._subject.move is self and self.leaving

    def cancel(self, at_source: bool) -> None:
        """Calls it off; it may be too late for that."""
        self._cancelled = True
        (self._out if at_source else self._into).cancel(CANCELLED)

    def finish(self) -> None:
        """Waits for the end. Then the source is closed, or the guest goes on there."""
        self._look(PATIENCE)
        if self._before is None:
            return
        self._out.result(PATIENCE)
        self._into.result(PATIENCE)
        former, store = self._before
        if former.wait(PATIENCE).reason != "migrated":
            raise Wrong(f"the guest has moved, and its source says {former.wait(0)!r}")
        check_books(former.memory, store)
        self._end(MOVED)
        self._subject.retire(former, store)
        if left := self._subject.engine.at_home("peer").count():
            raise Wrong(f"the guest has moved, and {left} pages are still with the source that has gone")

    def close(self) -> None:
        """Ends it as it is."""
        self._into.release()
        self._out.release()
        self._source.close()
        self._folder.cleanup()

    def _look(self, seconds: float) -> None:
        """Waits so long at most until the guest runs at the destination, or never will."""
        if self._before is not None:
            return
        try:
            vm = self._into.vm(seconds)
        except TimeoutError:
            if seconds:
                raise
        except MigrationError as error:
            self._stayed(error)
        else:
            self._before = self._subject.turn_to(vm)

    def _stayed(self, why: MigrationError) -> None:
        """It came to nothing: the guest runs on at its source, which says so."""
        gave_up = _GIVES_UP in str(why)
        if not self._cancelled and not gave_up:
            raise Wrong(f"the guest has not moved: {why}")
        try:
            self._out.result(PATIENCE)
        except MigrationError as error:
            if not gave_up and not _tells_of(error, why):
                raise Wrong(f"cancelled, and it ended because: {error}") from None
        else:
            raise Wrong(f"the guest has moved, says its source, and the destination: {why}")
        if self._source.paused or self._source.ended:
            raise Wrong(f"the guest has not moved, and does not run on: {why}")
        self._end(CAME_TO_NOTHING)

    def _end(self, how: str) -> None:
        self._out.release()
        self._into.release()
        self._folder.cleanup()
        self._subject.moves[how] += 1
        self._subject.move = None

    def _compare(self, target: VM) -> None:
        """Both stand: all that the source has is there."""
        if ram_hash(self._source.memory) != ram_hash(target.memory):
            raise Wrong("RAM is not the same at source and destination")


def _tells_of(*errors: MigrationError) -> bool:
    """Do they say that it was cancelled? A destination that goes before it has looked at HELLO says nothing."""
    return any(said in str(error) for error in errors for said in (CANCELLED, "closed the connection"))
