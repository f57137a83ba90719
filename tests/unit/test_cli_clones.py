# test_cli_clones.py: what several clones print, line by line; and what --count takes.
from __future__ import annotations

import pytest

from pyvmm.cli.clones import MAX_CLONES, Lines, check_count
from pyvmm.cli.parse import parse
from pyvmm.errors import BadInput


@pytest.mark.parametrize(
    ("pieces", "written"),
    [
        ([b"one\n"], [b"7: one\n"]),
        ([b"o", b"n", b"e", b"\n", b"two\n"], [b"7: one\n", b"7: two\n"]),
        ([b"a\nb\nc"], [b"7: a\n7: b\n", b"7: c\n"]),
        ([b"\n\n"], [b"7: \n7: \n"]),
        ([b"no end"], [b"7: no end\n"]),
        ([], []),
        ([b"x" * 9000], [b"7: " + b"x" * 4096 + b"\n7: " + b"x" * 4096 + b"\n", b"7: " + b"x" * 808 + b"\n"]),
        ([b"x" * 4095, b"x", b"\n"], [b"7: " + b"x" * 4096 + b"\n", b"7: \n"]),
    ],
)
def test_lines(pieces, written):
    found = []
    lines = Lines(b"7: ", found.append)
    for piece in pieces:
        lines(piece)
    lines.end()
    lines.end()
    assert found == written


@pytest.mark.parametrize("options", [["--count", "1"], ["--count", str(MAX_CLONES)], ["--live"], []])
def test_counts_that_can_be(options):
    check_count(parse(["restore", "file", *options])[1])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--count", "0"], "--count 0: give a number of clones from 1 to"),
        (["--count=-3"], "--count -3: give"),
        (["--count", "1000"], "--count 1000: give"),
        (["--count", "2", "--live"], "--live shows one guest"),
    ],
)
def test_counts_that_cannot_be(options, line):
    with pytest.raises(BadInput, match=line):
        check_count(parse(["restore", "file", *options])[1])
