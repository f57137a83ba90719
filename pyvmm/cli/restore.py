# restore.py: `pyvmm restore FILE`: a guest goes on from a snapshot file, as `pyvmm run` would have it.
"""The command. All of the file is read before the guest runs, or with --lazy when it is touched."""

from __future__ import annotations

from pyvmm.cli.progress import Bar
from pyvmm.cli.run import Watched
from pyvmm.errors import BadInput
from pyvmm.machine import VM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parse import Arguments


class _Restored(Watched):
    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        if args.snapshot_incremental and args.snapshot is None:
            raise BadInput("--snapshot-incremental says how, --snapshot FILE must say where to")

    def make(self) -> VM:
        args = self.args
        track = "bitmap" if args.snapshot_incremental else None
        with Bar("reading") as bar:
            return VM.restore(
                args.file, lazy=args.lazy, fill=args.fill == "all", pages=args.pages, track=track, progress=bar.told
            )

    def save_options(self) -> dict[str, object]:
        return super().save_options() | ({"parent": self.args.file} if self.args.snapshot_incremental else {})


def run(args: Arguments) -> int:
    """The command: the guest's status, as for `run`; 2 for a file that cannot be restored."""
    return _Restored(args).run()
