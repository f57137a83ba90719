# views.py: bytes of guest memory that somebody looks at or writes: while they do, the pages stay where they are.
# Units: pages of the mapping.
"""`View`, which lasts as long as its buffer; `Pinned` and `NOTHING`, for the length of a `with`; `page_range()`."""

from __future__ import annotations

from contextlib import suppress

from pyvmm.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import weakref

    from pyvmm.memory.engine import Engine


class View:
    """A view that is held. `reference` keeps the weak reference alive that tells of its end."""

    __slots__ = ("_pins", "first", "pages", "reference")

    def __init__(self, reference: weakref.ref[memoryview], first: int, pages: int) -> None:
        self.reference = reference
        self.first = first
        self.pages = pages
        self._pins: list[Engine] = []  # at most one; append and pop are atomic

    def pin(self, engine: Engine) -> None:
        """Has the engine leave its pages where they are. Raises FetchError."""
        engine.pin(self.first, self.pages)
        self._pins.append(engine)
        if self.reference() is None:  # it ended meanwhile: whoever comes second to unpin() finds nothing
            self.unpin()

    def unpin(self) -> None:
        """Not any more."""
        with suppress(IndexError):
            self._pins.pop().unpin(self.first, self.pages)


class Pinned:
    """Within its `with`, pages are in the guest's mapping, and stay. Raises FetchError."""

    def __init__(self, engine: Engine, first: int, count: int) -> None:
        self._engine = engine
        self._range = first, count

    def __enter__(self) -> None:
        self._engine.pin(*self._range)

    def __exit__(self, *_: object) -> None:
        self._engine.unpin(*self._range)


class Nothing:
    """Where nothing can be away."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


NOTHING = Nothing()


def page_range(offset: int, size: int) -> tuple[int, int]:
    """(first page, pages) that `size` bytes at `offset` lie in."""
    first = offset // PAGE_SIZE
    return first, (offset + size - 1) // PAGE_SIZE - first + 1 if size else 0
