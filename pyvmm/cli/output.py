# output.py: rich's console as our commands use it.
"""`Output`."""

from __future__ import annotations

from rich.console import Console


class Output(Console):
    """Highlights nothing by itself, and leaves it to `pyvmm.cli.main` what becomes of a pipe that nobody reads."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Called by rich where it has caught a BrokenPipeError: goes on with that."""
        raise  # noqa: PLE0704
