# progress.py: a bar for what takes long: saving, reading and checking snapshots. On stderr; bytes.
"""`Bar`."""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from rich.progress import Progress, TaskID

_AFTER = 0.3
"""Seconds: what is done sooner shows nothing, and imports nothing."""
_INTERVAL = 0.1


class Bar:
    """Share, rate and time left, of a thing that takes longer than a moment; nothing where stderr is no terminal.

    Within its `with`, `bar.told` is the `progress` of what works: told(bytes done, of how many).
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._begin = time.monotonic()
        self._next = self._begin + _AFTER if sys.stderr.isatty() else float("inf")
        self._shown: tuple[Progress, TaskID] | None = None

    def told(self, done: int, total: int) -> None:
        """So far."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _INTERVAL
        self._shown = self._shown or self._show(total)
        shown, task = self._shown
        shown.update(task, completed=done, total=total, refresh=True)

    def _show(self, total: int) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )  # fmt: skip

        columns = BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()
        # No thread of its own that draws, and the guest's output is left alone.
        shown = Progress(
            TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True,
            auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        shown.start()
        return shown, shown.add_task(self._what, total=total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown is not None:
            self._shown[0].stop()
