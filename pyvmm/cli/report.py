# report.py: what `pyvmm run` shows of a running or ended guest: --live and --stats. On stderr: stdout is the guest's.
"""A live line, and the statistics at the end."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pyvmm.machine import VM, Progress, RunResult

INTERVAL = 0.25
"""Seconds between two states of the live line."""


def _rate(count: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f}{unit}"
    return f"{count:.0f}"


class _Line:
    """Rates between two looks at a VM."""

    def __init__(self, vm: VM) -> None:
        self._vm = vm
        self._begin = self._at = time.monotonic()
        self._count = self._exits = 0

    def next(self) -> Text:
        now, progress = time.monotonic(), self._vm.progress()
        exits = sum(sum(vcpu.exits().values()) for vcpu in self._vm.vcpus)
        seconds = max(now - self._at, 1e-9)
        text = self._show(progress, (progress.count - self._count) / seconds, (exits - self._exits) / seconds, now)
        self._at, self._count, self._exits = now, progress.count, exits
        return text

    def _show(self, progress: Progress, work: float, exits: float, now: float) -> Text:
        mappings = self._vm.mappings()
        return Text.assemble(  # 80 columns
            (f"{progress.guest or 'guest':8}", "bold"),
            f"{now - self._begin:6.1f} s {progress.status:8}",
            (f"{_rate(max(work, 0)):>6}/s ", "green"),
            f"{_rate(progress.count):>6} {progress.passes:>5} passes ",
            f"{mappings['pages_2m']:>5}x2M {mappings['pages_4k']:>4}x4K {_rate(max(exits, 0)):>6} exits/s",
        )


def wait_live(vm: VM, timeout: float | None) -> RunResult:
    """Like vm.wait(timeout), showing a line that moves; on a terminal it stays one line."""
    deadline = None if timeout is None else time.monotonic() + timeout
    line = _Line(vm)
    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False, transient=False, redirect_stdout=False) as live:
        while True:
            left = INTERVAL if deadline is None else min(INTERVAL, deadline - time.monotonic())
            result = vm.wait(max(left, 0))
            live.update(line.next(), refresh=True)
            if result.reason != "timeout" or (deadline is not None and time.monotonic() >= deadline):
                return result


def print_stats(vm: VM, seconds: float) -> None:
    """The counts of a guest that has ended, as a table."""
    stats = vm.stats()
    table = Table(title=f"{vm!r} ran {seconds:.3f} s", show_header=False, title_justify="left")
    progress = vm.progress()
    if progress.guest:
        table.add_row(f"{progress.guest}: work", f"{progress.count:,} ({_rate(progress.count / seconds)}/s)")
    for reason, count in sorted(stats["exits"].items(), key=lambda row: -row[1]):
        table.add_row(f"exits: {reason}", f"{count:,} ({_rate(count / seconds)}/s)")
    if not vm.memory.hugetlb:  # whose pages are neither of these
        pages = dict(vm.memory.pages().rows())
        shown = ", ".join(f"{pages[kind]:,} {kind}" for kind in ("large", "small", "untouched"))
        table.add_row("memory: pages of 4 KiB", shown)
    for name, count in vm.mappings().items():
        table.add_row(f"mapped at the end: {name}", f"{count:,}")
    for device in vm.virtio:
        counts = {name: count for name, count in device.model.figures().items() if count}
        if counts:
            table.add_row(
                device.kind, ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
            )
    for kind in ("kvm", "vcpus"):
        for name, count in stats[kind].items():
            if count and not name.startswith("pages_"):
                table.add_row(f"KVM {'VM' if kind == 'kvm' else 'vCPUs'}: {name}", f"{count:,}")
    for port, (reads, writes) in vm.unknown_ports().items():
        table.add_row(f"unknown port {port:#x}", f"{reads:,} reads, {writes:,} writes")
    Console(stderr=True).print(table)
