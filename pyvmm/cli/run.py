# run.py: `pyvmm run`: one guest in the foreground, its console on this terminal, its status ours.
"""Runs a guest. Signals stop it; the terminal is restored on every way out."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from contextlib import nullcontext

from pyvmm.console import Console
from pyvmm.errors import EXIT_BAD_INPUT, EXIT_SIGNAL, BadInput, GuestCrash
from pyvmm.machine import VM, RunResult

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import FrameType, TracebackType
    from typing import Any, Self

    from pyvmm.cli.parse import Arguments
    from pyvmm.control.control import Control
    from pyvmm.control.moving import Moving
    from pyvmm.devices.serial import Serial
    from pyvmm.devices.virtio.console import VirtioConsole

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BROKEN_PIPE = EXIT_SIGNAL + 13


class Signals:
    """Within its `with`, the first signal that asks us to end calls `stop(128+n)`, or watch() does; later ones nothing.

    A thread of its own makes the request. A handler of Python's runs on the main thread alone, in the middle of
    anything, and not at all while that waits, if the signal came just before or went to another thread; but at once the
    interpreter writes the number to the wakeup fd.
    """

    def __init__(self) -> None:
        self._number = 0
        self._stop: Callable[[int], None] | None = None
        self._lock = _thread.allocate_lock()

    def __enter__(self) -> Self:
        came, self._told = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(came, True)
        self._wakeup = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _pass) for number in _SIGNALS}
        _thread.start_new_thread(self._listen, (came,))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._told)  # which ends the thread

    def watch(self, stop: Callable[[int], None]) -> None:
        """From now on a signal calls `stop`; one that came before does so at once."""
        with self._lock:
            self._stop = stop
            number = self._number
        if number:
            stop(EXIT_SIGNAL + number)

    def _listen(self, came: int) -> None:
        with open(came, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in _SIGNALS and not self._number:
                    with self._lock:
                        self._number = number[0]
                        stop = self._stop
                    if stop is not None:
                        stop(EXIT_SIGNAL + number[0])


def _pass(number: int, frame: FrameType | None) -> None:
    """Who listens to the wakeup fd knows already."""


class Session:
    """One guest in the foreground, its console on this terminal: what all commands have in common that run one.

    What differs is overridden: prepare() before the first instruction, begin() that has it run, wait() while the guest
    runs, finish() after it; around() for what is there from prepare() on until the VM is closed; stop() for signals.
    """

    stdout = 1
    """The descriptor that the guest prints to."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        if args.timeout is not None:
            check_seconds("--timeout", args.timeout)

    def make(self) -> VM:
        """The VM, with its guest in it."""
        args = self.args
        devices = devices_of(args)
        vm = VM(memory=args.mem, cpus=args.cpus, pages=args.pages, hugetlb=args.hugetlb, devices=devices)
        try:
            vm.load(args.guest, _append(args, len(devices)), args.initrd, args.format, _address(args.at))
        except BaseException:
            vm.close()
            raise
        return vm

    def prepare(self, vm: VM) -> None:
        """The guest is loaded."""

    def around(self, vm: VM) -> AbstractContextManager[object]:
        """Entered when the guest is prepared, left when it has ended."""
        return nullcontext()

    def begin(self, vm: VM) -> None:
        """Has the guest run; its console is there."""
        vm.start()

    def stop(self, vm: VM, status: int) -> None:
        """A signal asks for the end, with this status. On a thread of its own, or before begin()."""
        vm.request_stop(status)

    def wait(self, vm: VM) -> RunResult | None:
        """The guest runs. Returns how it ended, a result with reason "timeout" after --timeout, or None: it has run
        for long enough, and is ended with status 0."""
        return vm.wait(self.args.timeout)

    def moved(self) -> None:
        """The guest runs elsewhere now; finish() comes after this."""

    def finish(self, vm: VM, seconds: float) -> None:
        """The guest has ended without a crash, after so many seconds, and the terminal is as it was."""

    def run(self) -> int:
        """Returns the guest's status, 124 after --timeout, 125 after a crash, 128+n after signal n."""
        with Signals() as self.signals, self.make() as vm:
            self.prepare(vm)
            with self.around(vm):
                return self._run(vm)

    def _run(self, vm: VM) -> int:
        args = self.args
        typed, *others = _consoles(vm)
        with Console(typed, _usable_stdin(), self.stdout) as console:
            for each in (typed, *others):
                each.output = console.output
            for device in vm.virtio:
                device.on_broken = _tell
            console.on_leave = lambda: self.stop(vm, 0)
            console.on_broken = lambda: self.stop(vm, _BROKEN_PIPE)

            def stop(status: int) -> None:
                self.stop(vm, status)
                console.abandon()  # its reader may never come

            self.signals.watch(stop)
            self.begin(vm)
            begin = time.monotonic()
            try:
                result = self.wait(vm)
            except GuestCrash as crash:
                console.close()  # the report belongs on a sane terminal
                print(f"\n{crash.report.rstrip()}\n\npyvmm: {crash}", file=sys.stderr)
                return crash.exit_code
            seconds = time.monotonic() - begin
        if result is None or result.reason == "timeout":
            if result is not None:
                print(f"pyvmm: the guest did not end within {args.timeout:g} s", file=sys.stderr)
            console.abandon()
            vm.stop()
        elif result.reason == "migrated":
            self.moved()
        self.finish(vm, seconds)
        return 0 if result is None else result.status


class Shown(Session):
    """With --live and --stats, --control, and --limit."""

    moving: Moving | None = None
    """What the control socket says of a migration; None: none has begun."""
    _control: Control | None = None

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        if args.limit is not None or args.policy is not None:
            from pyvmm.cli import reclaim

            reclaim.check(args)

    def prepare(self, vm: VM) -> None:
        if self.args.limit is not None or self.args.swap is not None:
            from pyvmm.cli import reclaim

            reclaim.ready(vm, self.args)

    def begin(self, vm: VM) -> None:
        self.limit(vm)
        super().begin(vm)

    def limit(self, vm: VM) -> None:
        """From now on --limit counts."""
        if self.args.limit is not None:
            from pyvmm.cli import reclaim

            reclaim.limit(vm, self.args)

    def around(self, vm: VM) -> AbstractContextManager[object]:
        if self.args.control is None:
            return nullcontext()
        from pyvmm.control.control import Control

        self._control = Control(vm, self.args.control, self.moving)
        return self._control

    def wait(self, vm: VM) -> RunResult | None:
        return self.wait_on(vm, self.args.timeout)

    def wait_on(self, vm: VM, timeout: float | None) -> RunResult:
        """Waits, so many seconds at most."""
        if self.args.live:
            from pyvmm.cli.report import wait_live

            return wait_live(vm, timeout)
        return vm.wait(timeout)

    def moved(self) -> None:
        where = f" to {self._control.moved_to()}" if self._control is not None else ""
        print(f"pyvmm: the guest has moved{where}", file=sys.stderr)

    def finish(self, vm: VM, seconds: float) -> None:
        if self.args.stats:
            from pyvmm.cli.report import print_stats

            print_stats(vm, seconds)


class Watched(Shown):
    """And with --snapshot and all that belongs to it."""

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        if args.snapshot_at is not None and args.snapshot is None:
            raise BadInput("--snapshot-at says when, --snapshot FILE must say where to")
        if args.snapshot_mode != "stop" and args.snapshot is None:
            raise BadInput("--snapshot-mode says how, --snapshot FILE must say where to")
        if args.snapshot is not None:
            from pyvmm.cli.checkpoint import Condition

            self._condition = Condition(args.snapshot_at)

    def save_options(self) -> dict[str, object]:
        """Of VM.snapshot()."""
        args = self.args
        return {
            "mode": args.snapshot_mode,
            "block_size": args.snapshot_block,
            "codec": args.snapshot_codec,
            "order": args.snapshot_order,
        }

    def wait_on(self, vm: VM, timeout: float | None) -> RunResult:
        """Saves where that is asked for; waits."""
        if self.args.snapshot is not None:
            from pyvmm.cli.checkpoint import save_when

            save_when(vm, self._condition, self.args.snapshot, timeout, self.save_options())
        return super().wait_on(vm, timeout)


class _Run(Watched):
    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        if args.trace is not None and args.trace < 1:
            raise BadInput(f"--trace {args.trace}: give a number of instructions, 1 or more")

    def prepare(self, vm: VM) -> None:
        super().prepare(vm)
        if self.args.trace is not None:
            vm.single_step(self.args.trace, lambda line: print(line, file=sys.stderr, flush=True))


def run(args: Arguments) -> int:
    """The command: returns the process's status."""
    return _Run(args).run()


def check_seconds(option: str, seconds: float) -> None:
    """Raises BadInput for what is no time to wait."""
    if not 0 < seconds < 1e9:
        raise BadInput(f"{option} {seconds:g}: give seconds above 0")


def devices_of(args: Arguments) -> list[str]:
    """What --rng, --virtio-console, --balloon, --disk and --swap-disk ask for, as VM() takes it."""
    disks = [f"block:{disk}" for disk in args.disk]
    disks += [f"swapdisk:{disk}" for disk in args.swap_disk]
    return ["rng"] * args.rng + ["console"] * args.virtio_console + ["balloon"] * args.balloon + disks


def _append(args: Arguments, devices: int) -> str:
    if not args.virtio_append:
        return str(args.append)
    from pyvmm.devices.virtio.specs import linux_options

    return " ".join(filter(None, (args.append, *linux_options(devices))))


def _consoles(vm: VM) -> list[Serial | VirtioConsole]:
    """Those that a guest may print to; the first one gets what is typed."""
    found: list[Any] = [device.model for device in vm.virtio if device.model.name == "console"]
    return [*found, vm.serial]


def _tell(line: str) -> None:
    print(f"pyvmm: {line}", file=sys.stderr, flush=True)


def _address(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(text, 0)
    except ValueError:
        raise BadInput(f"--at {text!r} is not an address: give a number such as 0x7c00") from None


def _usable_stdin() -> int:
    """Descriptor 0, or /dev/null in its place where we were started without one."""
    try:
        os.fstat(0)
    except OSError:
        if os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) != 0:
            raise SystemExit(EXIT_BAD_INPUT) from None
    return 0
