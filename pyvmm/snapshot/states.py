# states.py: a tree of State in bytes, and back. What is read may be hostile: every count is held against what is left.
"""`encode()`, `decode()`: the STATES section (docs/snapshot-format.md)."""

from __future__ import annotations

from pyvmm.errors import StateError
from pyvmm.snapshot.format import MAX_STATES
from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.state import Value

MAX_VALUES = 1 << 20
MAX_NESTED = 32
"""Values within values."""
MAX_INT_BYTES = 32


def encode(state: State) -> bytes:
    """The tree as bytes. Raises StateError for what a State cannot hold, naming where it is."""
    out = bytearray()
    _Encoder(out).put(state, state.kind, 0)
    if len(out) > MAX_STATES:
        raise StateError(f"the states take {len(out)} bytes: a snapshot holds {MAX_STATES} at most")
    return bytes(out)


def decode(raw: bytes) -> State:
    """The tree that encode() had. Raises StateError for bytes that are no such tree; takes memory in proportion to
    them, and no more than MAX_VALUES values."""
    if len(raw) > MAX_STATES:
        raise StateError(f"states of {len(raw)} bytes: a snapshot holds {MAX_STATES} at most")
    decoder = _Decoder(raw)
    state = decoder.value(0)
    if not isinstance(state, State):
        raise decoder.damaged("it does not begin with a state")
    if decoder.at != len(raw):
        raise decoder.damaged("something follows the last value")
    return state


class _Encoder:
    def __init__(self, out: bytearray) -> None:
        self._out = out
        self._values = 0

    def put(self, value: Value, where: str, nested: int) -> None:
        self._values += 1
        if nested > MAX_NESTED or self._values > MAX_VALUES:
            raise StateError(f"{where}: more than {MAX_NESTED} levels or {MAX_VALUES} values in a state")
        out = self._out
        if isinstance(value, bool):
            out += b"T" if value else b"F"
        elif isinstance(value, int):
            size = (value if value >= 0 else ~value).bit_length() // 8 + 1
            if size > MAX_INT_BYTES:
                raise StateError(f"{where}: an integer of more than {MAX_INT_BYTES} bytes")
            out += b"i" + bytes((size,)) + value.to_bytes(size, "little", signed=True)
        elif isinstance(value, (bytes, bytearray)):
            out += b"b"
            self._blob(value)
        elif isinstance(value, str):
            out += b"s"
            self._text(value, where)
        elif isinstance(value, list):
            out += b"l" + len(value).to_bytes(4, "little")
            for number, item in enumerate(value):
                self.put(item, f"{where}[{number}]", nested + 1)
        elif isinstance(value, dict):
            out += b"d"
            self._table(value, where, nested)
        elif isinstance(value, State):
            if not isinstance(value.version, int) or not 0 <= value.version < 1 << 32:
                raise StateError(f"{where}: a state of version {value.version!r}")
            out += b"S"
            self._text(value.kind, where)
            out += value.version.to_bytes(4, "little")
            self._table(value.fields, where, nested)
        else:
            raise StateError(f"{where}: a state cannot hold a {type(value).__name__}")

    def _blob(self, data: bytes | bytearray) -> None:
        if len(data) > MAX_STATES:
            raise StateError(f"a value of {len(data)} bytes: a snapshot holds {MAX_STATES} at most")
        self._out += len(data).to_bytes(4, "little")
        self._out += data

    def _text(self, text: str, where: str) -> None:
        if not isinstance(text, str):
            raise StateError(f"{where}: a name that is a {type(text).__name__}")
        try:
            self._blob(text.encode())
        except UnicodeEncodeError:
            raise StateError(f"{where}: {text!r} is not Unicode") from None

    def _table(self, table: dict[str, Value], where: str, nested: int) -> None:
        self._out += len(table).to_bytes(4, "little")
        for name, value in table.items():
            self._text(name, where)
            self.put(value, f"{where}.{name}", nested + 1)


class _Decoder:
    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.at = 0
        self._values = 0

    def damaged(self, why: str) -> StateError:
        return StateError(f"saved states are damaged at byte {self.at}: {why}")

    def _take(self, size: int) -> bytes:
        if size > len(self._raw) - self.at:
            raise self.damaged(f"{size} bytes are said to follow, {len(self._raw) - self.at} do")
        self.at += size
        return self._raw[self.at - size : self.at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _count(self, least: int) -> int:
        """How many items follow, each of `least` bytes or more."""
        count = self._number(4)
        if count > (len(self._raw) - self.at) // least:
            raise self.damaged(f"{count} items are said to follow")
        return count

    def _text(self) -> str:
        raw = self._take(self._number(4))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.damaged("a text is not UTF-8") from None

    def value(self, nested: int) -> Value:
        self._values += 1
        if nested > MAX_NESTED or self._values > MAX_VALUES:
            raise self.damaged(f"more than {MAX_NESTED} levels or {MAX_VALUES} values")
        tag = self._take(1)
        if tag == b"T":
            return True
        if tag == b"F":
            return False
        if tag == b"i":
            size = self._number(1)
            if not 0 < size <= MAX_INT_BYTES:
                raise self.damaged(f"an integer of {size} bytes")
            return int.from_bytes(self._take(size), "little", signed=True)
        if tag == b"b":
            return self._take(self._number(4))
        if tag == b"s":
            return self._text()
        if tag == b"l":
            return [self.value(nested + 1) for _ in range(self._count(1))]
        if tag == b"d":
            return self._table(nested)
        if tag == b"S":
            kind = self._text()
            version = self._number(4)
            return State(kind, version, self._table(nested))
        raise self.damaged(f"no value begins with {tag!r}")

    def _table(self, nested: int) -> dict[str, Value]:
        table: dict[str, Value] = {}
        for _ in range(self._count(5)):
            name = self._text()
            if name in table:
                raise self.damaged(f"{name!r:.80} comes twice")
            table[name] = self.value(nested + 1)
        return table
