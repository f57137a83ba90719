# migration.py: `pyvmm migration dissect CAPTURE`: what was said between two VMMs while a VM moved.
"""The command."""

from __future__ import annotations

import json

from pyvmm.errors import EXIT_BAD_INPUT, BadInput
from pyvmm.migration.capture import describe, entries

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parse import Arguments
    from pyvmm.migration.capture import Entry

_SCHEMA = 1
_SHOWN = 200
"""Characters of a field's value."""


def run(args: Arguments) -> int:
    """The command: 0; 2 for a file that is no capture, or holds a damaged frame."""
    return _as_json(args.file) if args.json else _for_people(args.file)


def _for_people(path: str) -> int:
    damaged = 0
    for entry in entries(path):
        damaged += entry.frame is None
        print(
            f"{entry.at / 1e9:12.6f} {'->' if entry.out else '<-'} {entry.channel} #{entry.sequence:<6} {_words(entry)}"
        )
    return EXIT_BAD_INPUT if damaged else 0


def _words(entry: Entry) -> str:
    if entry.frame is None:
        return f"damaged: {entry.error}"
    fields = (f"{name}={_short(value)}" for name, value in describe(entry.frame).items())
    return " ".join((f"{entry.frame.name():<10}", *fields)).rstrip()


def _short(value: object) -> str:
    if isinstance(value, dict):
        text = "{" + " ".join(f"{name}={_short(inner)}" for name, inner in value.items()) + "}"
    elif isinstance(value, (list, tuple)):
        text = ",".join(map(_short, value)) or "-"
    else:
        text = repr(value) if isinstance(value, str) and (" " in value or not value) else str(value)
    return text if len(text) <= _SHOWN or isinstance(value, dict) else text[:_SHOWN] + "..."


def _as_json(path: str) -> int:
    """One object, written as the file is read: captures may be long."""
    damaged = 0
    found = entries(path)
    first = next(found, None)  # a file that is no capture leaves nothing behind on the output
    print(f'{{"schema": {_SCHEMA}, "file": {json.dumps(path)}, "frames": [', end="")
    entry, comma, error = first, "", None
    while entry is not None:
        damaged += entry.frame is None
        row: dict[str, object] = {
            "at_ns": entry.at,
            "direction": "out" if entry.out else "in",
            "channel": entry.channel,
            "sequence": entry.sequence,
        }
        if entry.frame is None:
            row["error"] = entry.error
        else:
            row.update(type=entry.frame.name(), fields=describe(entry.frame))
        print(comma + "\n" + json.dumps(row), end="")
        comma = ","
        try:
            entry = next(found, None)
        except BadInput as damage:  # what was read so far is whole JSON
            entry, error = None, damage
    print(f'\n], "damaged": {damaged}, "error": {json.dumps(error and str(error))}}}')
    if error is not None:
        raise error
    return EXIT_BAD_INPUT if damaged else 0
