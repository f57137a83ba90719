# worker.py: the thread that does a virtio device's work, and how others have it stand still. Times in seconds.
"""`Worker`. No vCPU's thread touches rings or buffers: their memory may be away, and files may be slow."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from pyvmm.errors import FetchError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 30.0
"""Until a device that is not through with one request is a fault of ours, or of the host."""


class Worker:
    """Calls `step()`, on a thread of its own, after each kick() again and again until it returns False. It runs between
    go() and hold() alone: at first it stands.

    on_trouble: told what step() raised. After a FetchError it stands, and the step is tried again after go(); after
    anything else it has ended.
    """

    def __init__(self, name: str, step: Callable[[], bool], on_trouble: Callable[[BaseException], None]) -> None:
        self._name = name
        self._step = step
        self._on_trouble = on_trouble
        self._changed = threading.Condition()
        self._kicked = self._allowed = self._busy = self._closed = False
        self._excluded = 0
        self._thread: threading.Thread | None = None

    def kick(self) -> None:
        """There may be something to do. Any thread, also within step()."""
        with self._changed:
            self._kicked = True
            self._changed.notify_all()

    def go(self) -> None:
        """It may run, and looks at once whether there is anything to do."""
        with self._changed:
            if self._closed:
                return
            self._allowed = self._kicked = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def ask(self) -> None:
        """It is to stand as soon as the request that it is at is done; returns at once."""
        with self._changed:
            self._allowed = False

    def hold(self) -> None:
        """ask(), and waits until it stands. Raises HostError where it does not within LIMIT."""
        with self._changed:
            self._allowed = False
            if not self._is_own() and not self._changed.wait_for(lambda: not self._busy, LIMIT):
                raise HostError(f"{self._name} was not through with a request within {LIMIT:g} s")

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Within its `with`, no step is under way."""
        with self._changed:
            self._excluded += 1
            self._changed.wait_for(lambda: not self._busy or self._is_own())
        try:
            yield
        finally:
            with self._changed:
                self._excluded -= 1
                self._changed.notify_all()

    def close(self, let_go: Callable[[], None], patience: float = 0.5) -> None:
        """Ends the thread. let_go: called if it does not within `patience`, since it waits for a page."""
        with self._changed:
            self._closed = True
            self._allowed = False
            self._changed.notify_all()
        if self._thread is None or self._is_own():
            return
        self._thread.join(patience)
        if self._thread.is_alive():
            let_go()
            self._thread.join(LIMIT)

    def _is_own(self) -> bool:
        return self._thread is threading.current_thread()

    def _may(self) -> bool:
        return self._kicked and self._allowed and not self._excluded

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may())
                if self._closed:
                    return
                self._kicked, self._busy = False, True
            trouble: BaseException | None = None
            more = False
            try:
                more = self._step()
            except BaseException as error:  # whatever it is, the machine must hear of it
                trouble = error
            with self._changed:
                self._busy = False
                if more or trouble is not None:
                    self._kicked = True
                if trouble is not None:
                    self._allowed = False
                closed = self._closed
                self._changed.notify_all()
            if trouble is None or closed:  # a closed VM has no memory any more
                continue
            self._on_trouble(trouble)
            if not isinstance(trouble, FetchError):
                return
            trouble = None
