# record.py: the base of our plain data records. dataclasses would cost every start of pyvmm 7 ms of imports.
"""`Record`: a slotted class that compares and prints by its fields."""

from __future__ import annotations


class Record:
    """Subclasses list their fields in `__slots__` and set them in `__init__`."""

    __slots__: tuple[str, ...] = ()

    def _fields(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Record) and self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash(self._fields())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in zip(self.__slots__, self._fields(), strict=True))
        return f"{type(self).__name__}({shown})"
