# cli: the command line. One module a command; nothing is imported before its command is chosen.
"""`main()`: the `pyvmm` program. Exit codes are in pyvmm.errors."""

from __future__ import annotations

import argparse
import os
import sys

from pyvmm.errors import EXIT_BAD_INPUT, EXIT_SIGNAL, PyvmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        # The width is given, since argparse would import shutil to ask for it: 3 ms of every start.
        super().__init__(prog, max_help_position=30, width=100)


class _Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the whole usage too."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message} (see '{self.prog} --help')\n")


def _run_command(args: argparse.Namespace) -> int:
    from pyvmm.cli.run import run

    return run(args)


def _guests_command(args: argparse.Namespace) -> int:
    from pyvmm.cli.guests import run

    return run(args.name)


def _doctor_command(args: argparse.Namespace) -> int:
    from pyvmm.cli.doctor import run

    return run(args.json, args.summary)


def _bench_command(args: argparse.Namespace) -> int:
    from pyvmm.cli.bench import run

    return run(args.name, args.json)


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("guest", metavar="GUEST|FILE", help="one of `pyvmm guests`, or an image file")
    add("--mem", default="64M", metavar="SIZE", help="RAM, such as 256M or 4G (default 64M)")
    add("--cpus", type=int, default=1, metavar="N", help="vCPUs, 1 to 64 (default 1)")
    add("--pages", choices=("auto", "2m", "4k"), default="auto", help="large or small pages behind the RAM")
    add("--hugetlb", action="store_true", help="take reserved 2 MiB pages (vm.nr_hugepages)")
    add("--append", default="", metavar='"K=V ..."', help="the guest's command line")
    add("--initrd", metavar="FILE", help="a file handed to the guest beside its image")
    add("--format", metavar="NAME", help="pvh, multiboot, flat16 or flat64, where the file does not say")
    add("--at", metavar="ADDRESS", help="load address of a flat image, such as 0x7c00")
    add("--timeout", type=float, metavar="SECONDS", help="end the guest then, with status 124")
    add("--stats", action="store_true", help="print exits, mappings and rates at the end")
    add("--live", action="store_true", help="show the guest's progress while it runs")
    add("--trace", type=int, metavar="N", help="single-step the first N instructions, and show them")


def _add_guests(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="GUEST", help="show this guest's options")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--summary", action="store_true", help="the few lines that matter most")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one; without it they are listed")
    parser.add_argument("--json", action="store_true", help="data instead of a table")


# name, help, its arguments, what it does
COMMANDS: tuple[
    tuple[str, str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]], ...
] = (
    ("run", "run a guest", _add_run, _run_command),
    ("guests", "list the guests that pyvmm brings", _add_guests, _guests_command),
    ("bench", "measure what pyvmm costs", _add_bench, _bench_command),
    ("doctor", "say what this host can do, by trying", _add_doctor, _doctor_command),
)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("pyvmm", "A userspace mini-hypervisor on /dev/kvm.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, text, add_arguments, command in COMMANDS:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_arguments(sub)
        sub.set_defaults(function=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the process's exit status."""
    try:
        parser = _parser()
        args = parser.parse_args(argv)
        if args.version:
            from pyvmm import __version__

            print(f"pyvmm {__version__}")
            return 0
        if args.command is None:
            parser.error("give a command: " + ", ".join(row[0] for row in COMMANDS))
        return int(args.function(args))
    except PyvmmError as error:
        print(f"pyvmm: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_SIGNAL + 13
    except KeyboardInterrupt:
        return EXIT_SIGNAL + 2
