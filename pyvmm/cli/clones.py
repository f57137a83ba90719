# clones.py: `pyvmm restore FILE --count N`: N VMs go on from one snapshot at once, each by itself.
"""The command with N above 1. Clones are numbered from 1; no clone has the terminal's input."""

from __future__ import annotations

import errno
import resource
import sys
import threading
import time

from pyvmm.cli.run import Signals, check_seconds, devices_of
from pyvmm.console import Console
from pyvmm.errors import EXIT_SIGNAL, EXIT_TIMEOUT, BadInput, GuestCrash, HostError, KernelError, PyvmmError
from pyvmm.layout import MIB, PAGE_SIZE, parse_size
from pyvmm.machine import VM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.cli.parse import Arguments
    from pyvmm.snapshot.reader import Progress

MAX_CLONES = 256
_LONGEST_LINE = 4096
"""What is longer is broken: a guest need not print ends of lines."""
_BROKEN_PIPE = EXIT_SIGNAL + 13


def check_count(args: Arguments) -> None:
    """Raises BadInput for a --count that cannot be, and for what does not go with it."""
    if not 1 <= args.count <= MAX_CLONES:
        raise BadInput(f"--count {args.count}: give a number of clones from 1 to {MAX_CLONES}")
    if args.count > 1 and args.record:
        raise BadInput("--record watches one guest: with --count there are several")
    if args.count > 1 and args.snapshot is not None:
        raise BadInput("--snapshot saves one guest: with --count there are several")
    if args.count > 1 and args.control is not None:
        raise BadInput("--control is for one guest: with --count there are several")
    if args.count > 1 and args.live:
        raise BadInput("--live shows one guest: with --count, use --stats")


def restore(args: Arguments, progress: Progress | None = None) -> VM:
    """One VM, as the command's options say. Raises what VM.restore() raises."""
    track = "bitmap" if args.snapshot_incremental else None
    if args.eager and args.lazy:
        raise BadInput("--eager reads all RAM before the guest runs, --lazy does not: give one of them")
    return VM.restore(
        args.file,
        lazy=args.lazy,
        fill=args.fill == "all",
        fill_rate=None if args.fill_rate is None else parse_size(args.fill_rate),
        unit=args.unit,
        record=args.record,
        prefetch=args.prefetch,
        populate=args.populate,
        pages=args.pages,
        track=track,
        devices=devices_of(args),
        progress=progress,
    )


class Lines:
    """What one clone prints, as whole lines with its number in front. Any thread may call it."""

    def __init__(self, prefix: bytes, write: Callable[[bytes], None]) -> None:
        self._prefix = prefix
        self._write = write
        self._lock = threading.Lock()
        self._rest = b""

    def __call__(self, data: bytes) -> None:
        with self._lock:
            *lines, self._rest = (self._rest + data).split(b"\n")
            while len(self._rest) >= _LONGEST_LINE:
                lines.append(self._rest[:_LONGEST_LINE])
                self._rest = self._rest[_LONGEST_LINE:]
            self._print(lines)

    def end(self) -> None:
        """Nothing more comes: prints a line that has no end."""
        with self._lock:
            self._print([self._rest] if self._rest else [])
            self._rest = b""

    def _print(self, lines: list[bytes]) -> None:
        if lines:
            self._write(b"".join(self._prefix + line + b"\n" for line in lines))


class _Clone:
    """One VM and how it ended: status, how (for people), seconds, resident (bytes of RAM that it had in memory)."""

    def __init__(self, number: int, vm: VM, lines: Lines) -> None:
        self.number = number
        self.vm = vm
        self.status, self.how, self.seconds, self.resident = 0, "", 0.0, 0
        self.failure: BaseException | None = None
        """What is no error of ours, and to be raised when all have ended."""
        self._lines = lines

    def run(self, timeout: float | None) -> None:
        """Runs it to its end, and gives back what it has. Raises nothing."""
        begin = time.monotonic()
        try:
            try:
                self.vm.start()
                result = self.vm.wait(timeout)
                self.status, self.how = result.status, result.reason
            except PyvmmError as error:
                self.status, self.how = error.exit_code, "crash" if isinstance(error, GuestCrash) else "error"
                report = f"\n{error.report.rstrip()}\n\n" if isinstance(error, GuestCrash) else ""
                sys.stderr.write(f"{report}pyvmm: clone {self.number}: {error}\n")
            self.seconds = time.monotonic() - begin
            count = self.vm.memory.pages()
            self.resident = (count.large + count.small) * PAGE_SIZE
            self.vm.close()
            self._lines.end()
        except BaseException as error:
            self.failure = error


class _Clones:
    """All of them. stop(): ends them, also those that have not begun; what came first is the status."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        self.clones: list[_Clone] = []
        self.stopped = 0
        self._lock = threading.Lock()
        self._console: Console | None = None

    def restore(self) -> None:
        """Makes them. Raises what VM.restore() raises."""
        width = len(str(self.args.count))
        for number in range(1, self.args.count + 1):
            if self._status():
                return
            vm = self._restore_one()
            if self._console is None:
                self._console = Console(vm.serial)  # for its output alone
                self._console.on_broken = lambda: self.stop(_BROKEN_PIPE)
            lines = Lines(f"{number:{width}}: ".encode(), self._console.output)
            vm.serial.output = lines
            with self._lock:
                self.clones.append(_Clone(number, vm, lines))
                if status := self._status():
                    vm.request_stop(status)

    def _restore_one(self) -> VM:
        try:
            return restore(self.args)
        except KernelError as error:
            if error.errno != errno.EMFILE:
                raise
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise HostError(f"{self.args.count} clones need more than {most} open files: raise 'ulimit -Hn'") from None

    def _status(self) -> int:
        return self.stopped

    def stop(self, status: int) -> None:
        """Ends all soon. Any thread."""
        with self._lock:
            self.stopped = self.stopped or status
            clones = list(self.clones)
        for clone in clones:
            clone.vm.request_stop(status)
        if self._console is not None:
            self._console.abandon()

    def run(self) -> None:
        """Runs all at once, until the last has ended."""
        threads = [
            threading.Thread(target=clone.run, args=(self.args.timeout,), name=f"clone {clone.number}")
            for clone in self.clones
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        """Gives back what is left of them."""
        for clone in self.clones:
            clone.vm.close()

    def status(self) -> int:
        """The signal's, or the first one of a clone's, by number, that is not 0. Raises what was no error of ours."""
        for clone in self.clones:
            if clone.failure is not None:
                raise clone.failure
        return self.stopped or next((clone.status for clone in self.clones if clone.status), 0)


def run(args: Arguments) -> int:
    """Runs the clones: the first status of theirs that is not 0, or 128+n after signal n, which ends all."""
    if args.timeout is not None:
        check_seconds("--timeout", args.timeout)
    _allow_descriptors()
    clones = _Clones(args)
    with Signals() as signals:
        signals.watch(clones.stop)
        try:
            clones.restore()
            clones.run()
        finally:
            clones.close()
    late = [clone.number for clone in clones.clones if clone.status == EXIT_TIMEOUT and clone.how == "timeout"]
    if late:
        print(f"pyvmm: {len(late)} of {args.count} clones did not end within {args.timeout:g} s", file=sys.stderr)
    if args.stats:
        _show(clones.clones)
    return clones.status()


def _allow_descriptors() -> None:
    """As many descriptors as we may have: each VM takes some."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _show(clones: list[_Clone]) -> None:
    from rich.console import Console as Screen
    from rich.table import Table

    table = Table("clone", "ended by", title=f"{len(clones)} clones", title_justify="left")
    for name in ("status", "seconds", "resident"):
        table.add_column(name, justify="right")
    for clone in clones:
        table.add_row(str(clone.number), clone.how, str(clone.status), *_figures(clone.seconds, clone.resident))
    longest = max((clone.seconds for clone in clones), default=0.0)
    table.add_row("all", "", "", *_figures(longest, sum(clone.resident for clone in clones)))
    Screen(stderr=True).print(table)


def _figures(seconds: float, resident: int) -> tuple[str, str]:
    return f"{seconds:.3f}", f"{resident / MIB:.1f} MiB"
