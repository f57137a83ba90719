# checkpoint.py: `pyvmm run|restore --snapshot FILE [--snapshot-at CONDITION]`. Units: the guest's own of work, seconds.
"""`Condition`: when to save. `save_when`: waits for it, and saves."""

from __future__ import annotations

import sys
import time

from pyvmm.cli.progress import Bar
from pyvmm.errors import BadInput
from pyvmm.layout import format_size
from pyvmm.machine import VM

TYPE_CHECKING = False
if TYPE_CHECKING:
    pass

_LOOK_SECONDS = 0.005
"""From one look at the guest's progress to the next."""


class Condition:
    """`progress>=N` of the guest's work, `seconds>=S` since its start, or None: when it has ended. Raises BadInput."""

    def __init__(self, text: str | None) -> None:
        name, found, number = (text or "").partition(">=")
        try:
            self.limit = float(number) if found else 0.0
        except ValueError:
            self.limit = -1.0
        self.what = name.strip()
        if text is not None and (self.what not in ("progress", "seconds") or not 0 <= self.limit < 1e18):
            raise BadInput(f"--snapshot-at {text!r}: give progress>=N or seconds>=S, such as 'progress>=10000'")

    def holds(self, vm: VM, seconds: float) -> bool:
        """Is it so?"""
        if self.what == "progress":
            return vm.progress().count >= self.limit
        return self.what == "seconds" and seconds >= self.limit


def save_when(vm: VM, condition: Condition, path: str, timeout: float | None, options: dict[str, object]) -> None:
    """Saves once the condition holds, or the guest has ended or run for `timeout` seconds without that; not a guest
    that has moved elsewhere. options: of VM.snapshot()."""
    begin = time.monotonic()
    while not condition.holds(vm, seconds := time.monotonic() - begin):
        reason = vm.wait(_LOOK_SECONDS).reason
        if reason == "migrated":
            print(f"pyvmm: {path}: not written: the guest has moved before it was to be saved", file=sys.stderr)
            return
        if reason != "timeout" or (timeout is not None and seconds >= timeout):
            break
    count = vm.progress().count
    with Bar("saving") as bar:
        saved = vm.snapshot(path, progress=bar.told, **options)  # type: ignore[arg-type]
    took = f"in {saved.seconds * 1e3:.0f} ms, the guest paused for {saved.pause_seconds * 1e3:.1f}"
    print(f"pyvmm: {path}: progress {count:,} when asked, {format_size(vm.memory.size)}, {took}", file=sys.stderr)
