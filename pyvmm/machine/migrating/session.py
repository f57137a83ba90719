# session.py: what both sides of a migration have in common: a thread of its own, events, an end. Times in seconds.
"""`Session`."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

from pyvmm.errors import MigrationError, PyvmmError
from pyvmm.migration.events import Failed, Finished

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.migration.events import Event, Report


class Session:
    """A migration as one side has it, in a thread. Iterating gives its events from the first on, as they come, and ends
    with Finished or Failed. Any thread may call."""

    def __init__(self, name: str) -> None:
        self._began = time.monotonic()
        self._events: list[Event] = []
        self._news = threading.Condition()
        self._error: PyvmmError | None = None
        self._report: Report | None = None
        self._ended = False
        self._stack = ExitStack()
        """What is closed at the end, the last one first."""
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def __iter__(self) -> Iterator[Event]:
        told = 0
        while True:
            with self._news:
                while len(self._events) == told and not self._ended:
                    self._news.wait()
                new = self._events[told:]
            if not new:
                return
            told += len(new)
            yield from new

    @property
    def done(self) -> bool:
        """Has it come to its end?"""
        return self._ended

    @property
    def last(self) -> Event | None:
        """The newest event."""
        return self._events[-1] if self._events else None

    def result(self, timeout: float | None = None) -> Report:
        """Waits for the end. Raises MigrationError, or another error of pyvmm, where it came to nothing, and
        TimeoutError."""
        with self._news:
            if not self._news.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"the migration goes on after {timeout:g} s")
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report

    def cancel(self, reason: str = "it was cancelled") -> None:
        """Calls it off, if that can still be; result() tells how it ended."""
        raise NotImplementedError

    # ---- for the two sides ----

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _tell(self, event: Event) -> None:
        with self._news:
            self._events.append(event)
            self._news.notify_all()

    def _run(self) -> Report:
        """All of it, in the session's thread."""
        raise NotImplementedError

    def _runs_here(self) -> bool:
        """After a failure: does the guest go on here?"""
        raise NotImplementedError

    def _failed(self, error: PyvmmError) -> None:
        """It came to nothing: whoever waits hears of it, though the thread may still have something to do."""
        self._end(Failed(self._now(), reason=str(error), runs=self._runs_here()), error, None)

    def _finished(self, report: Report) -> None:
        """It came about, likewise."""
        report.seconds = self._now()
        self._end(Finished(self._now(), report=report), None, report)

    def _end(self, event: Event, error: PyvmmError | None, report: Report | None) -> None:
        with self._news:
            if self._ended:
                return
            self._error, self._report = error, report
            self._events.append(event)
            self._ended = True
            self._news.notify_all()

    def _main(self) -> None:
        try:
            with self._stack:
                report = self._run()
        except PyvmmError as error:
            self._failed(error)
        except BaseException as error:
            self._failed(as_ours(error))
        else:
            self._finished(report)


def as_ours(error: BaseException) -> PyvmmError:
    """It as an error to be told in one line, also where it is a fault of ours or of the host's."""
    if isinstance(error, PyvmmError):
        return error
    failure = MigrationError(f"the migration failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
