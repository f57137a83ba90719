# parse.py: from argv to a command and its arguments.
"""`parse()`. argparse does it, but for a plain command line, which is read without: importing argparse and building its
parsers would be a third of the time from `pyvmm run hello` to the guest's first byte."""

from __future__ import annotations

from pyvmm.cli.commands import COMMANDS
from pyvmm.errors import EXIT_BAD_INPUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.cli.commands import Command, Option


class Arguments:
    """One attribute for each option of the command, by its name without dashes."""

    def __init__(self, values: dict[str, object]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (as argparse's Namespace)
        raise AttributeError(name)


def parse(argv: Sequence[str]) -> tuple[Command, Arguments]:
    """The command and its arguments. Ends the process, as argparse does, after --help and for what it cannot read."""
    return parse_plain(argv) or parse_fully(argv)


def parse_plain(argv: Sequence[str]) -> tuple[Command, Arguments] | None:
    """Reads `COMMAND [--option value | --flag | positional]...` with options written in full; None for all else,
    also for what is wrong: argparse finds the words for it."""
    command = next((command for command in COMMANDS if argv and command.name == argv[0]), None)
    if command is None:
        return None
    values: dict[str, Any] = {option.field: option.default for option in command.options}
    named = {option.name: option for option in command.options}
    positional = [option for option in command.options if option.positional]
    words = iter(argv[1:])
    several = False
    for word in words:
        if word.startswith("-"):
            if several:
                positional = []  # argparse takes what is repeated on end alone
            option = named.get(word)
            if option is None:
                return None
        elif positional:
            option = positional[0] if positional[0].repeated else positional.pop(0)
            several = several or option.repeated
        else:
            return None
        if option.kind is bool:
            values[option.field] = True
            continue
        text = word if option.positional else next(words, "-")
        if text.startswith("-") or (option.choices and text not in option.choices):
            return None
        try:
            value = option.kind(text)
        except ValueError:
            return None
        values[option.field] = [*values[option.field], value] if option.repeated else value
    if any(not option.optional for option in positional):
        return None
    return command, Arguments(values)


def parse_fully(argv: Sequence[str]) -> tuple[Command, Arguments]:
    """The same by argparse: with help, abbreviations, `--option=value`, and errors in one line."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:  # noqa: ANN401 (it never returns)
            """One line, where argparse would print the whole usage too."""
            self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message} (see '{self.prog} --help')\n")

    parser = Parser("pyvmm", description="A userspace mini-hypervisor on /dev/kvm.")
    parser.add_argument("--version", action="version", version=f"pyvmm {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        text = command.help
        sub = commands.add_parser(command.name, help=text, description=text[0].upper() + text[1:] + ".")
        for option in command.options:
            _add(sub, option)
        sub.set_defaults(command=command)
    values = vars(parser.parse_args(argv))
    chosen = values.pop("command")
    if chosen is None:
        parser.error("give a command: " + ", ".join(command.name for command in COMMANDS))
    return chosen, Arguments(values)


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    if option.kind is bool:
        parser.add_argument(option.name, action="store_true", help=option.help)
        return
    named = {} if option.positional else {"dest": option.field}
    several = option.repeated and not option.positional
    parser.add_argument(
        option.name,
        type=option.kind,
        default=option.default,
        metavar=option.metavar,
        choices=option.choices,
        help=option.help,
        action="append" if several else "store",
        **named,  # type: ignore[arg-type]
        **({"nargs": "*" if option.repeated else "?"} if option.optional else {}),  # type: ignore[arg-type]
    )


def _version() -> str:
    from pyvmm import __version__

    return __version__
