# filling.py: `pyvmm restore --lazy --map`: where a guest's RAM is while it comes. On stderr: stdout is the guest's.
"""A map that is redrawn on a terminal; elsewhere the map at the beginning, in the middle and at the end."""

from __future__ import annotations

import os
import threading
import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pyvmm.cli.picture import ROWS, BlockMap, nanoseconds
from pyvmm.layout import PAGE_SIZE, format_size
from pyvmm.machine import VM, RunResult

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from rich.console import RenderableType

    from pyvmm.devices.serial import Serial
    from pyvmm.memory.counts import PageCounts

INTERVAL = 0.1
"""Seconds between two maps on a terminal."""
_LOOK = 0.0005
"""Seconds between two looks for the first work, and for the middle where no map is redrawn."""
_ROWS = 8
"""Of a map that goes elsewhere."""
_OTHER_LINES = 6
"""Of a terminal, which are not the map's rows: a map that is redrawn must fit."""
_LINE = 4096
"""Characters of the guest's that are held back as an unfinished line."""


class Filling:
    """One VM that is restored lazily. begin: when its restoring was asked for, by time.perf_counter().

    To be made when the VM has not started: what work it had done by then is read.
    """

    def __init__(self, vm: VM, begin: float) -> None:
        self._vm = vm
        self._begin = begin
        self._count = vm.progress().count
        self._first_work: float | None = None
        self._console = Console(stderr=True, highlight=False)
        self._rows = max(min(ROWS, self._console.height - _OTHER_LINES), 1) if self._console.is_terminal else _ROWS

    def wait(self, timeout: float | None) -> RunResult | None:
        """Draws until all has come: None. Or until the guest has ended, or `timeout` seconds have passed, as
        vm.wait() does."""
        end = time.monotonic() + (1e9 if timeout is None else timeout)
        result = self._see_first_work(end)
        if self._console.is_terminal:
            with Printed(self._console, self._vm.serial if os.isatty(1) else None) as printed:
                result = self._live(end, printed) if result is None else result
                self._say_sum()
        else:
            result = self._plain(end) if result is None else result
            self._say_sum()
        return result

    def _see_first_work(self, end: float) -> RunResult | None:
        """Draws nothing meanwhile, and not for long: the guest may sleep."""
        result, due = None, time.monotonic() + INTERVAL
        while self._first_work is None and result is None and time.monotonic() < due:
            result = self._step(_LOOK, end)
        return result

    def _step(self, seconds: float, end: float) -> RunResult | None:
        """Lets the guest run. What wait() is to return if that is the end of it."""
        result = self._vm.wait(max(min(seconds, end - time.monotonic()), 0))
        if self._first_work is None and self._vm.progress().count != self._count:
            self._first_work = time.perf_counter() - self._begin
        return result if result.reason != "timeout" or time.monotonic() >= end else None

    # ---- on a terminal ----

    def _live(self, end: float, printed: Printed) -> RunResult | None:
        result = None
        with Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
            while result is None:
                counts = self._vm.memory.pages()
                live.update(Group(*printed.line(), *self._picture(counts)), refresh=True)
                if not counts.homes["file"]:
                    return None
                result = self._step(INTERVAL, end)
            live.update(Group(*self._picture(self._vm.memory.pages())), refresh=True)
        return result

    # ---- elsewhere ----

    def _plain(self, end: float) -> RunResult | None:
        for share in (1.0, 0.5, 0.0):
            result, counts = None, self._vm.memory.pages()
            while counts.homes["file"] > share * counts.total and result is None:
                result = self._step(_LOOK, end)
                counts = self._vm.memory.pages()
            for each in self._picture(counts):
                self._console.print(each)
            if result is not None:
                return result
        return None

    # ---- both ----

    def _picture(self, counts: PageCounts) -> tuple[RenderableType, ...]:
        seconds = time.perf_counter() - self._begin
        left = counts.homes["file"]
        text = f"{nanoseconds(seconds * 1e9)}: {left:,} of {counts.total:,} pages are in the file"
        return Text(text, "bold"), BlockMap(self._vm.memory.engine.looks(), self._vm.memory.regions, self._rows)

    def _say_sum(self) -> None:
        seconds = time.perf_counter() - self._begin
        home, stats = self._vm.restored, self._vm.memory.engine.stats()
        assert home is not None
        counts = self._vm.memory.pages()
        came = format_size((counts.total - counts.homes["file"]) * PAGE_SIZE)
        first = "no work yet" if self._first_work is None else f"first work after {nanoseconds(self._first_work * 1e9)}"
        text = f"{first}; {came} came within {nanoseconds(seconds * 1e9)}"
        reads = f"{home.reads:,} reads of storage blocks, {stats.faults:,} faults"
        self._console.print(Text(f"pyvmm: {text}: {reads}"), soft_wrap=True)


class Printed:
    """A context manager: what the guest prints within it, while a map is drawn on the same terminal. Whole lines go
    above the map; what is no line yet is printed as it is at the end. serial: None where the guest prints elsewhere.
    """

    def __init__(self, console: Console, serial: Serial | None) -> None:
        self._console = console
        self._serial = serial
        self._lock = threading.Lock()
        self._line = ""
        self._ended = False

    def __enter__(self) -> Self:
        if self._serial is not None:
            self._output = self._serial.output
            self._serial.output = self._add
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._serial is not None:
            with self._lock:  # a vCPU's thread may be about to call _add()
                self._output(self._line.encode())
                self._ended = True
            self._serial.output = self._output

    def line(self) -> list[Text]:
        """The line that has no end yet, if there is one."""
        return [Text.from_ansi(self._line)] if self._line else []

    def _add(self, data: bytes) -> None:
        """The serial port's output, on a vCPU's thread."""
        with self._lock:
            if self._ended:
                self._output(data)
                return
            *lines, self._line = (self._line + data.decode("utf-8", "replace")).split("\n")
            if len(self._line) > _LINE:
                lines, self._line = [*lines, self._line], ""
            for line in lines:
                self._console.print(Text.from_ansi(line), soft_wrap=True)
