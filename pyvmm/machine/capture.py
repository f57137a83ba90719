# capture.py: what a guest printed, for programs that wait for it. Bounded.
"""`Capture`: a console output that remembers."""

from __future__ import annotations

import threading
import time

LIMIT = 1 << 20
"""Bytes kept: of a guest that prints more, the last ones."""


class Capture:
    """Call it with output; any thread may read or wait for text meanwhile."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._changed = threading.Condition()

    def __call__(self, data: bytes) -> None:
        with self._changed:
            self._data += data
            del self._data[:-LIMIT]
            self._changed.notify_all()

    def text(self) -> bytes:
        """All that is kept."""
        with self._changed:
            return bytes(self._data)

    def wait_for(self, text: bytes, timeout: float) -> bool:
        """Waits until `text` has been printed; False where it was not within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while text not in self._data:
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    return text in self._data
            return True
