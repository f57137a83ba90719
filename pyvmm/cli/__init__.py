# cli: the command line. One module a command; nothing is imported before its command is chosen.
"""`main()`: the `pyvmm` program. Exit codes are in pyvmm.errors."""

from __future__ import annotations

import os
import sys

from pyvmm.cli.parse import parse
from pyvmm.errors import EXIT_SIGNAL, PyvmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the process's exit status."""
    try:
        command, arguments = parse(sys.argv[1:] if argv is None else argv)
        return command(arguments)
    except PyvmmError as error:
        print(f"pyvmm: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_SIGNAL + 13
    except KeyboardInterrupt:
        return EXIT_SIGNAL + 2
