# __main__.py: `python -m pyvmm`.
"""The command line, where the `pyvmm` script is not on the path."""

import sys

from pyvmm.cli import main

sys.exit(main())
