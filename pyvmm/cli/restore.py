# restore.py: `pyvmm restore FILE`: a guest goes on from a snapshot file, as `pyvmm run` would have it.
"""The command. All of the file is read before the guest runs, or with --lazy when it is touched."""

from __future__ import annotations

import time

from pyvmm.cli import clones
from pyvmm.cli.progress import Bar
from pyvmm.cli.run import Watched
from pyvmm.errors import BadInput
from pyvmm.machine import VM, RunResult

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.filling import Filling
    from pyvmm.cli.parse import Arguments


class _Restored(Watched):
    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        if args.map and not args.lazy:
            raise BadInput("--map shows how RAM comes while the guest runs: give --lazy too")
        if args.snapshot_incremental and args.snapshot is None:
            raise BadInput("--snapshot-incremental says how, --snapshot FILE must say where to")
        self._filling: Filling | None = None

    def make(self) -> VM:
        if self.args.map:
            from pyvmm.cli import filling  # noqa: F401  (its imports are not part of what is timed)
        self._begin = time.perf_counter()
        with Bar("reading") as bar:
            return clones.restore(self.args, bar.told)

    def prepare(self, vm: VM) -> None:
        super().prepare(vm)
        if self.args.map:
            from pyvmm.cli.filling import Filling

            self._filling = Filling(vm, self._begin)

    def wait(self, vm: VM) -> RunResult | None:
        if self._filling is None:
            return super().wait(vm)
        timeout, begin = self.args.timeout, time.monotonic()
        result = self._filling.wait(timeout)
        if result is not None:
            return result
        return self.wait_on(vm, None if timeout is None else max(begin + timeout - time.monotonic(), 0))

    def finish(self, vm: VM, seconds: float) -> None:
        if self.args.record:
            from pyvmm.cli.recorded import record

            record(vm, self.args.file)
        super().finish(vm, seconds)

    def save_options(self) -> dict[str, object]:
        return super().save_options() | ({"parent": self.args.file} if self.args.snapshot_incremental else {})


def run(args: Arguments) -> int:
    """The command: the guest's status, as for `run`; 2 for a file that cannot be restored."""
    clones.check_count(args)
    return _Restored(args).run() if args.count == 1 else clones.run(args)
