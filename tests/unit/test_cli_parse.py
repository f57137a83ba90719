# test_cli_parse.py: the plain reader of command lines says what argparse says, wherever it says anything.

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyvmm.cli.commands import COMMANDS
from pyvmm.cli.parse import parse, parse_fully, parse_plain

WORDS = sorted(
    {option.name for command in COMMANDS for option in command.options if not option.positional}
    | {command.name for command in COMMANDS}
    | {
        "hello",
        "1",
        "2.5",
        "-1",
        "4k",
        "3m",
        "--",
        "",
        "a b",
        "--mem=64M",
        "info",
        "check",
        "--me",
        "-h",
        "--help",
        "1e3",
        "0x10",
    }
)


@given(st.lists(st.sampled_from(WORDS), max_size=7))
@example(["run", "hello"])
@example(["run", "--mem", "256M", "hello", "--stats"])
@example(["run", "hello", "--append", ""])
@example(["run", "hello", "--timeout", "2.5", "--cpus", "2"])
@example(["pages", "hello", "--do", "split:1", "--json", "--do", "merge:all"])
@example(["snapshot", "info", "hello", "--json"])
@example(["bench", "exits", "--json", "faults"])
@example(["bench", "exits", "faults", "--json"])
def test_plain_agrees_with_argparse(argv):
    plain = parse_plain(argv)
    if plain is None:
        return
    command, arguments = parse_fully(argv)
    assert plain[0] is command
    assert vars(plain[1]) == vars(arguments)


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "hello"],
        ["run", "hello", "--mem", "1G", "--cpus", "4", "--pages", "2m", "--append", "a=1 b=2", "--timeout", "3"],
        ["pages", "hello", "--do", "split:1", "--json", "--do", "merge:all"],
        ["guests"],
        ["doctor", "--json"],
        ["snapshot", "info", "a.snap", "--json"],
        ["snapshot", "--json", "check", "a.snap"],
    ],
)
def test_a_plain_line_needs_no_argparse(argv):
    assert parse_plain(argv) is not None


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (
            [],
            "give a command: run, restore, pages, activity, snapshot, status, swap, balloon, migrate, receive",
        ),
        (["fly"], "'fly'"),
        (["run"], "GUEST|FILE"),
        (["run", "hello", "--cpus", "two"], "'two'"),
        (["run", "hello", "--pages", "3m"], "'3m'"),
        (["run", "hello", "--speed", "9"], "--speed"),
        (["snapshot"], "FILE"),
        (["snapshot", "list", "a.snap"], "'list'"),
        (["snapshot", "check"], "FILE"),
        (["migration", "dissect"], "CAPTURE"),
        (["status"], "PATH"),
        (["migrate", "path", "--mode", "warp"], "'warp'"),
        (["run", "hello", "--mem"], "--mem"),
    ],
)
def test_bad_lines_end_with_one_line_that_names_it(argv, named, capsys):
    with pytest.raises(SystemExit) as end:
        parse(argv)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert named in message
