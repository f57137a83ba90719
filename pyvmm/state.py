# state.py: saved state as plain data, for snapshot and migration. Each stateful part saves one and restores from one.
"""`State`: what `save()` returns and `restore()` takes."""

from __future__ import annotations

from pyvmm.errors import StateError
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    Value: TypeAlias = "int | bytes | str | bool | list[Value] | dict[str, Value] | State"


class State(Record):
    """Plain data of one part of a VM.

    kind: what the part is ("vcpu", "serial", ...); version: of the fields' meaning, counted from 1;
    fields: integers, bytes, strings, and lists and dicts of these, and States of parts within.
    """

    __slots__ = ("fields", "kind", "version")

    def __init__(self, kind: str, version: int, fields: dict[str, Value]) -> None:
        self.kind = kind
        self.version = version
        self.fields = fields

    __hash__ = None  # type: ignore[assignment]

    def require(self, kind: str, version: int) -> dict[str, Value]:
        """The fields, if this is that kind and version; else raises StateError naming both."""
        if (self.kind, self.version) != (kind, version):
            raise StateError(
                f"cannot restore a {self.kind!r:.80} state of version {self.version} into {kind!r} of version {version}"
            )
        return self.fields

    def integer(self, name: str, low: int = 0, high: int = (1 << 64) - 1) -> int:
        """Field `name` as an integer in low..high; raises StateError otherwise."""
        value = self.fields.get(name)
        if not isinstance(value, int) or not low <= value <= high:
            raise StateError(f"{self.kind} state: field {name!r} is not an integer in {low:#x}..{high:#x}")
        return int(value)

    def blob(self, name: str, size: int | None = None, limit: int = 1 << 20) -> bytes:
        """Field `name` as bytes, exactly `size` long or at most `limit`; raises StateError otherwise."""
        value = self.fields.get(name)
        if not isinstance(value, bytes) or len(value) > limit or (size is not None and len(value) != size):
            raise StateError(f"{self.kind} state: field {name!r} is not {size if size is not None else 'a'} bytes")
        return value

    def part(self, name: str) -> State:
        """Field `name` as a State; raises StateError otherwise."""
        value = self.fields.get(name)
        if not isinstance(value, State):
            raise StateError(f"{self.kind} state: field {name!r} is missing or not a state")
        return value

    def parts(self, name: str) -> list[State]:
        """Field `name` as a list of States; raises StateError otherwise."""
        value = self.fields.get(name)
        if not isinstance(value, list) or not all(isinstance(part, State) for part in value):
            raise StateError(f"{self.kind} state: field {name!r} is missing or not a list of states")
        return [part for part in value if isinstance(part, State)]
