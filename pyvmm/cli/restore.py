# restore.py: `pyvmm restore FILE`: a guest goes on from a snapshot file, as `pyvmm run` would have it.
"""The command. All of the file is read before the guest runs, or with --lazy when it is touched."""

from __future__ import annotations

from pyvmm.cli.run import Watched
from pyvmm.machine import VM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parse import Arguments


class _Restored(Watched):
    def make(self) -> VM:
        args = self.args
        return VM.restore(args.file, lazy=args.lazy, fill=args.fill == "all", pages=args.pages)


def run(args: Arguments) -> int:
    """The command: the guest's status, as for `run`; 2 for a file that cannot be restored."""
    return _Restored(args).run()
