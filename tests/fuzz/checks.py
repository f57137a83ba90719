# checks.py: what must hold of every error that hostile input brings about, for all Python targets.
"""`one_line()`."""

from __future__ import annotations


def one_line(error: object, most: int = 1000) -> None:
    """One line without control characters, of at most so many characters, whatever the input had in it."""
    text = str(error)
    assert text.isprintable(), ascii(text)
    assert len(text) <= most, f"{len(text)} characters: {text[:200]}"
