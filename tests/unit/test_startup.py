# test_startup.py: what the quick ways into pyvmm must not import. Each row is a process of its own.
from __future__ import annotations

import subprocess
import sys

import pytest

SLOW = ("numpy", "rich", "capstone", "elftools", "typing", "dataclasses", "pathlib", "inspect", "asyncio")
LATE = (*SLOW, "pyvmm.explain", "pyvmm.host", "pyvmm.cli.report", "pyvmm.cli.picture")

# All that `pyvmm run hello` imports, KVM or not: the command itself is run as far as this host lets it.
RUN = "from pyvmm.cli import main; main(['run', 'hello', '--timeout', '10'])"

CASES = [
    ("import pyvmm", (*LATE, "pyvmm._native", "pyvmm.machine", "argparse", "re", "threading")),
    ("from pyvmm.cli.parse import parse; parse(['run', 'hello'])", (*LATE, "pyvmm._native", "argparse", "re")),
    ("from pyvmm import VM", LATE),
    ("import pyvmm.machine.loader, pyvmm.console, pyvmm.cli.run", LATE),
    (RUN, (*LATE, "argparse", "re", "json", "socket", "pyvmm.control", "pyvmm.migration")),
    ("import pytest, sys; known = set(sys.modules); import pyvmm.pytest_plugin", ("pyvmm.errors", "pyvmm.host")),
]


def modules(code):
    """What a fresh interpreter has imported after `code`; without `known`, less what it starts with."""
    program = (
        f"import sys; known = set(sys.modules)\n{code}\nprint('modules', *(set(sys.modules) - known), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("modules ")]
    return set(line.split()[1:])


@pytest.mark.parametrize(("code", "forbidden"), CASES)
def test_the_quick_ways_import_little(code, forbidden):
    found = modules(code)
    assert found  # the list of what was imported is not empty by a mistake of this test
    assert not found & set(forbidden)


def test_the_plugin_imports_nothing_else_of_ours():
    found = modules(CASES[-1][0])
    assert {name for name in found if name.split(".")[0] not in sys.stdlib_module_names} == {
        "pyvmm",
        "pyvmm.pytest_plugin",
    }


def test_what_is_imported_late_would_be_seen():
    assert {"numpy", "typing", "inspect"} <= modules("import numpy, typing, inspect")
