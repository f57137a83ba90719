# moving.py: the migration of a VM that goes on, or went: its last event, and what must not be done meanwhile. Seconds.
"""`Moving`."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from pyvmm.errors import LifecycleError
from pyvmm.migration.events import Finished, Switched

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    from pyvmm.machine import VM
    from pyvmm.migration.events import Event, Report

    class Migration(Protocol):
        """What is used here of Outgoing and Incoming."""

        @property
        def done(self) -> bool: ...
        def __iter__(self) -> Iterator[Event]: ...
        def result(self, timeout: float | None = None) -> Report: ...
        def cancel(self, reason: str = "") -> None: ...

    class Incoming(Migration, Protocol):
        """And of Incoming alone."""

        @property
        def address(self) -> str: ...
        def vm(self, timeout: float | None = None) -> VM: ...
        def close(self) -> None: ...


class Moving:
    """side: "source" or "destination", of the last one; `last`: its last event; `to`: where a source's guest goes.

    At the source nothing else may let vCPUs run or stand while a migration goes on: it decides which of the two sides
    has the guest.
    """

    def __init__(self) -> None:
        self.side = "source"
        self.to = ""
        self.last: Event | None = None
        self._lock = threading.Lock()
        self._migration: Migration | None = None
        self._switched = False

    @property
    def going(self) -> bool:
        """Does one go on?"""
        return self._migration is not None and not self._migration.done

    @property
    def switched(self) -> bool:
        """Has the last one's guest begun to run at the destination?"""
        return self._switched

    @property
    def moved(self) -> bool:
        """Has the guest left for good, with all that it needs?"""
        return self.side == "source" and isinstance(self.last, Finished)

    def begin(self, migration: Callable[[], Migration], to: str = "", side: str = "source") -> Migration:
        """Makes one. Raises LifecycleError while another one goes on, and what the making raises."""
        with self._lock:
            if self.going:
                raise LifecycleError("a migration goes on already: cancel it, or wait for its end")
            made = self._migration = migration()
            self.to, self.side = to, side
            self.last, self._switched = None, False
            return made

    def told(self, event: Event) -> None:
        """An event of it has come."""
        self._switched |= isinstance(event, (Switched, Finished))
        self.last = event

    def events(self) -> Iterator[Event]:
        """Those of the migration that began, each noted before it is given on."""
        migration = self._migration
        for event in migration or ():
            if migration is self._migration:  # else the guest has come, and goes on elsewhere already
                self.told(event)
            yield event

    def cancel(self, reason: str) -> None:
        """Ends it, if it may still be ended. Raises LifecycleError where none goes on, or the guest has moved."""
        migration = self._migration
        if migration is None or migration.done:
            raise LifecycleError("no migration goes on: there is nothing to cancel")
        if self._switched:
            raise LifecycleError("the guest runs at the destination already: it is too late to cancel")
        migration.cancel(reason)

    def result(self) -> Report:
        """Waits for its end. Raises MigrationError where it came to nothing."""
        assert self._migration is not None
        return self._migration.result()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within its `with` none begins. Raises LifecycleError where one has a say in whether the guest runs here."""
        with self._lock:
            if self.moved:
                raise LifecycleError(f"the guest has moved to {self.to}: it does not run here any more")
            if self.going and not (self.side == "destination" and self._switched):
                raise LifecycleError("a migration goes on: cancel it first")
            yield
