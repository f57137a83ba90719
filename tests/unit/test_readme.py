# test_readme.py: the README's reading order names files that exist, and leaves no part of the source out.
from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ORDER = README[README.index("## Reading the source") :]
# For people who look at what the rest does, not a step in understanding it.
LEFT_OUT = {"cli", "bench", "testing", "guests"}


def test_each_file_in_the_reading_order_exists():
    named = re.findall(r"`((?:pyvmm|guest|cffi_build)/[\w./]+)`", ORDER)
    assert len(named) > 15
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_each_package_is_in_the_reading_order():
    packages = {path.parent.name for path in (ROOT / "pyvmm").glob("*/*.py")}
    assert {name for name in packages - LEFT_OUT if f"`pyvmm/{name}/" not in ORDER} == set()


def test_each_guest_is_in_the_table():
    guests = {path.stem for path in (ROOT / "guest").glob("*.c")}
    assert {name for name in guests if f"| `{name}` |" not in README} == set()
