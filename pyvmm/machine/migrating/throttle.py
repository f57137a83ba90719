# throttle.py: the guest gets less done, so that what it writes can be sent. Seconds.
"""`Throttle`."""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.lifecycle import Lifecycle

PERIOD = 0.01
"""vCPUs are held for a part of each."""


class Throttle:
    """Holds the vCPUs for `share` of the time, from the first set() above 0 on until stop()."""

    def __init__(self, life: Lifecycle) -> None:
        self._life = life
        self._share = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.greatest = 0.0
        """The greatest share that there was."""

    def set(self, share: float) -> None:
        """share: 0 to below 1."""
        self._share = share
        self.greatest = max(self.greatest, share)
        if share and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="migration throttle", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """The vCPUs run as they like; twice is once."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait((1 - self._share) * PERIOD):
            self._life.hold_back(self._share * PERIOD)
