# restore.py: `pyvmm restore FILE`: a guest goes on from a snapshot file, as `pyvmm run` would have it.
"""The command. All of the file is read before the guest runs, or with --lazy when it is touched."""

from __future__ import annotations

from pyvmm.cli import clones
from pyvmm.cli.run import Watched
from pyvmm.machine import VM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parse import Arguments


class _Restored(Watched):
    def make(self) -> VM:
        return clones.restore(self.args)


def run(args: Arguments) -> int:
    """The command: the guest's status, as for `run`; 2 for a file that cannot be restored."""
    clones.check_count(args)
    return _Restored(args).run() if args.count == 1 else clones.run(args)
