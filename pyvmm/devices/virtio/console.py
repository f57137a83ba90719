# console.py: virtio console device with one port (virtio 1.2, section 5.3). Unit: bytes.
"""`VirtioConsole`: what the driver sends goes to `output`; what is fed waits until the driver has room for it."""

from __future__ import annotations

from threading import Lock

from pyvmm.devices.virtio.model import Model
from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.devices.virtio.queue import Queue

RECEIVE, TRANSMIT = 0, 1
QUEUE_SIZE = 64 << 10
"""Bytes of host input that may wait for the guest."""
PIECE = 64 << 10
"""At most so many bytes go to `output` at once."""


class VirtioConsole(Model):
    """`output(data)`, an attribute that may be replaced, gets what the guest sends, on the worker's thread.

    on_listen: called once, when the driver first gives room for input; feed(), room() and `waiting` are as Serial's, by
    which a host's console can be attached to either.
    """

    name, id, queues = "console", 3, 2

    def __init__(self, output: Callable[[bytes], None]) -> None:
        super().__init__()
        self.output = output
        self.on_listen: Callable[[], None] = lambda: None
        self.listening = False
        self._lock = Lock()
        self._input = bytearray()
        self._sent = 0
        """Bytes of the request at hand that are out: they must not go twice."""

    def config(self) -> bytes:
        return bytes(12)  # size and ports mean nothing without their features, and emerg_wr is to be written

    def feed(self, data: bytes) -> int:
        """Host input, on any thread. Returns how many bytes of `data` were taken, from its start."""
        with self._lock:
            taken = data[: QUEUE_SIZE - len(self._input)]
            self._input += taken
        self.kick()
        return len(taken)

    def room(self) -> int:
        """How many bytes feed() would take now."""
        return QUEUE_SIZE - len(self._input)

    @property
    def waiting(self) -> int:
        """Bytes fed that the guest has not got."""
        return len(self._input)

    def serve(self, index: int, queue: Queue, features: int) -> bool | None:
        return self._receive(queue) if index == RECEIVE else self._transmit(queue)

    def _receive(self, queue: Queue) -> bool | None:
        if self.listening and not self._input:
            return None
        chain = queue.take()
        if chain is None:
            return None
        if not self.listening:
            self.listening = True
            self.on_listen()
        with self._lock:
            data = bytes(self._input[: chain.writable.size])
        if not self._input:
            return None
        chain.writable.write(data)
        wants = queue.give(chain.head, len(data))
        with self._lock:
            del self._input[: len(data)]
        return wants

    def _transmit(self, queue: Queue) -> bool | None:
        chain = queue.take()
        if chain is None:
            return None
        if self._sent < chain.readable.size:
            data = chain.readable.part(self._sent, PIECE).read()
            self.output(data)
            self._sent += len(data)
        if self._sent < chain.readable.size:
            return False  # the rest with the next call: in between the device may be held
        wants = queue.give(chain.head, 0)
        self._sent = 0
        return wants

    def reset(self) -> None:
        self._sent = 0

    def save(self) -> State:
        with self._lock:
            data = bytes(self._input)
        return State("virtio-console", 1, {"input": data, "listening": int(self.listening), "sent": self._sent})

    def restore(self, state: State) -> None:
        self.require(state)
        data, sent = state.blob("input", limit=QUEUE_SIZE), state.integer("sent", high=1 << 32)
        listening = state.integer("listening", high=1)
        with self._lock:
            self._input, self._sent = bytearray(data), sent
        if listening and not self.listening:
            self.listening = True
            self.on_listen()
