# wire.py: what goes over a control socket: one JSON object a line. The table of commands, and the check of a request.
"""`Request`, `COMMANDS`, and lines made of answers. Sizes in bytes, times in seconds."""

from __future__ import annotations

import json

from pyvmm.errors import EXIT_BAD_INPUT, EXIT_FAILED, BadInput, PyvmmError
from pyvmm.memory.sharing.table import PIECE
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

MAX_LINE = 64 << 10
"""Of a request, with its end."""
_MAX_ID = 1 << 53
_MAX_ID_TEXT = 64
_MAX_TEXT = 4096
"""Characters of an argument."""
_SHOWN = 60

MODES = ("precopy", "postcopy", "hybrid")
MAX_CHANNELS = 8
DOWNTIME = 0.020

_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class Argument(Record):
    """One argument of a command. kind: str, int, float (whole ones too) or bool; default: where it is not given;
    least, most: of a number; choices: of a text."""

    __slots__ = ("choices", "default", "kind", "least", "most", "name", "required")

    def __init__(
        self,
        name: str,
        kind: type,
        default: object = None,
        required: bool = False,
        least: float = 0,
        most: float = _MAX_ID,
        choices: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.kind = kind
        self.default = default
        self.required = required
        self.least = least
        self.most = most
        self.choices = choices

    def check(self, value: object) -> object:
        """The value, if it can be. Raises BadInput."""
        kinds = (int, float) if self.kind is float else (self.kind,)
        if type(value) not in kinds:  # True is an int to isinstance
            raise BadInput(f"{self.name}: {_shown(value)} is not {_KINDS[self.kind]}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not self.least <= value <= self.most:
                raise BadInput(f"{self.name} {_shown(value)}: give {self.least:g} to {self.most:g}")
            return self.kind(value)
        if isinstance(value, str):
            if self.choices and value not in self.choices:
                raise BadInput(f"{self.name} {_shown(value)}: choose one of {', '.join(self.choices)}")
            if len(value) > _MAX_TEXT:
                raise BadInput(f"{self.name}: {len(value)} characters; {_MAX_TEXT} are the most")
        return value


COMMANDS: dict[str, tuple[Argument, ...]] = {
    "status": (),
    "swap": (
        Argument("target", int, None, least=1),
        Argument("policy", str),
        Argument("off", bool, False),
        Argument("wait", bool, True),
    ),
    "balloon": (Argument("target", int),),
    "migrate": (
        Argument("to", str, required=True),
        Argument("mode", str, "precopy", choices=MODES),
        Argument("downtime", float, DOWNTIME, least=0.0001, most=3600),
        Argument("channels", int, 1, least=1, most=MAX_CHANNELS),
        Argument("bandwidth", int, None, least=1),
        Argument("throttle", bool, True),
        Argument("tls_cert", str),
        Argument("tls_key", str),
        Argument("tls_ca", str),
        Argument("capture", str),
    ),
    "cancel": (Argument("reason", str, ""),),
    "abandon": (),
    "pause": (),
    "resume": (),
    "stop": (Argument("status", int, 0, most=255),),
    "sharing": (Argument("blocks", int, 10, most=1000),),
    "hashes": (Argument("first", int, 0), Argument("count", int, PIECE, least=1, most=PIECE)),
}
"""What can be asked for. `pyvmm.control.control` does it."""


def check(do: str, given: dict[str, object]) -> dict[str, object]:
    """All arguments of a command: those that were given, checked, and the others' defaults. null is not given. Raises
    BadInput, naming what is wrong."""
    if do not in COMMANDS:
        raise BadInput(f"there is no command {_shown(do)}: choose one of {', '.join(COMMANDS)}")
    table = {argument.name: argument for argument in COMMANDS[do]}
    unknown = [name for name in given if name not in table]
    if unknown:
        takes = f"it takes {', '.join(table)}" if table else "it takes none"
        raise BadInput(f"{do} has no argument {_shown(unknown[0])}: {takes}")
    values: dict[str, object] = {}
    for name, argument in table.items():
        value = given.get(name)
        if value is None and argument.required:
            raise BadInput(f"{do} needs {name}")
        values[name] = argument.default if value is None else argument.check(value)
    return values


def decode(line: bytes) -> dict[str, object]:
    """The object of a line. Raises BadInput."""
    try:
        found = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadInput("that is no JSON: send one object a line") from None
    if not isinstance(found, dict):
        raise BadInput("that is no JSON object: send one object a line")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and the infinities are not JSON


class Request(Record):
    """What was asked for: `id` comes back in each answer; `arguments` are complete and checked."""

    __slots__ = ("arguments", "do", "id")

    def __init__(self, found: dict[str, object]) -> None:
        self.id = id_of(found)
        do = found.get("do")
        if not isinstance(do, str):
            raise BadInput('a request says what to do: {"id": 1, "do": "status"}')
        self.do = do
        self.arguments = check(do, {name: value for name, value in found.items() if name not in ("id", "do")})


def id_of(found: dict[str, object]) -> int | str:
    """Raises BadInput for one that is missing, or none."""
    number = found.get("id")
    if type(number) is int and 0 <= number < _MAX_ID:
        return number
    if isinstance(number, str) and len(number) <= _MAX_ID_TEXT:
        return number
    raise BadInput(f"a request has an id: a whole number from 0 on, or a text of at most {_MAX_ID_TEXT} characters")


def encode(fields: dict[str, object]) -> bytes:
    """A line. ASCII, so that a text that is no Unicode goes as it came."""
    return json.dumps(fields).encode() + b"\n"


def answer_error(number: int | str | None, error: BaseException) -> bytes:
    """The line that ends a request that came to nothing. code: the status of a process that ends with it."""
    code = EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_FAILED
    text = str(error) if isinstance(error, PyvmmError) else f"{type(error).__name__}: {error}"
    return encode({"id": number, "error": " ".join(text.split()), "code": code})


def _shown(value: object) -> str:
    """As JSON, and not all of it."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
