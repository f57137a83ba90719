# fields.py: what the body of a frame is made of, in bytes and back: one encoding alone for each value.
"""`Number`, `Fixed`, `Text`, `Rest`. put() and take() raise ValueError for what cannot be."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Kind: TypeAlias = "Number | Fixed | Text | Rest"

MAX_TEXT = 1024


class Number:
    """An unsigned integer from `low` to `high`, `size` bytes."""

    def __init__(self, size: int, high: int, low: int = 0) -> None:
        self.size, self.high, self.low = size, high, low
        self.most = size

    def put(self, value: Any, out: bytearray) -> None:  # noqa: ANN401 (whatever a frame was made with)
        if type(value) is not int or not self.low <= value <= self.high:
            raise ValueError(f"{value!r} is not a number from {self.low} to {self.high}")
        out += value.to_bytes(self.size, "little")

    def take(self, body: memoryview, at: int) -> tuple[int, int]:
        if len(body) - at < self.size:
            raise ValueError("the body is too short")
        value = int.from_bytes(body[at : at + self.size], "little")
        if not self.low <= value <= self.high:
            raise ValueError(f"{value} is not from {self.low} to {self.high}")
        return value, at + self.size


class Fixed:
    """So many bytes; secret: not shown to people."""

    def __init__(self, size: int, secret: bool = False) -> None:
        self.size = self.most = size
        self.secret = secret

    def put(self, value: Any, out: bytearray) -> None:  # noqa: ANN401
        if not isinstance(value, bytes) or len(value) != self.size:
            raise ValueError(f"not {self.size} bytes")
        out += value

    def take(self, body: memoryview, at: int) -> tuple[bytes, int]:
        if len(body) - at < self.size:
            raise ValueError("the body is too short")
        return bytes(body[at : at + self.size]), at + self.size


class Text:
    """One line for people, or an address."""

    most = 2 + MAX_TEXT

    def put(self, value: Any, out: bytearray) -> None:  # noqa: ANN401
        if not isinstance(value, str) or not value.isprintable():
            raise ValueError("not a printable text")
        raw = value.encode()  # no surrogate is printable
        if len(raw) > MAX_TEXT:
            raise ValueError(f"a text of {len(raw)} bytes: {MAX_TEXT} at most")
        out += len(raw).to_bytes(2, "little") + raw

    def take(self, body: memoryview, at: int) -> tuple[str, int]:
        if len(body) - at < 2:
            raise ValueError("the body is too short")
        end = at + 2 + int.from_bytes(body[at : at + 2], "little")
        if end - at > self.most or end > len(body):
            raise ValueError("a text is longer than it can be")
        text = str(body[at + 2 : end], "utf-8")  # a UnicodeDecodeError is a ValueError
        if not text.isprintable():
            raise ValueError("a text is not printable")
        return text, end


class Rest:
    """All bytes up to the end: `low` to `high` of them."""

    def __init__(self, high: int, low: int = 0) -> None:
        self.most, self.low = high, low

    def put(self, value: Any, out: bytearray) -> None:  # noqa: ANN401
        if not isinstance(value, bytes) or not self.low <= len(value) <= self.most:
            raise ValueError(f"not {self.low} to {self.most} bytes")
        out += value

    def take(self, body: memoryview, at: int) -> tuple[bytes, int]:
        if not self.low <= len(body) - at <= self.most:
            raise ValueError(f"not {self.low} to {self.most} bytes")
        return bytes(body[at:]), len(body)
