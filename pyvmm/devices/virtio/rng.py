# rng.py: virtio entropy device (virtio 1.2, section 5.4). Unit: bytes.
"""`Rng`: random bytes of the host's kernel; or, for tests that must come out alike, of a seed."""

from __future__ import annotations

import os

from pyvmm.devices.virtio.model import Model
from pyvmm.errors import StateError
from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.virtio.queue import Queue

PIECE = 64 << 10
"""At most so many bytes for one request: a device may give fewer than there is room for."""


class Rng(Model):
    """seed: None takes what the kernel has, which never comes twice. With a number, what comes is told by it alone, so
    that clones of a VM have the same."""

    name, id = "rng", 4

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self._seed = seed
        self._blocks = 0

    def serve(self, index: int, queue: Queue, features: int) -> bool | None:
        chain = queue.take()
        if chain is None:
            return None
        size = min(chain.writable.size, PIECE)
        chain.writable.write(os.getrandom(size) if self._seed is None else self._from_seed(size))
        wants = queue.give(chain.head, size)
        self._blocks += 1
        return wants

    def _from_seed(self, size: int) -> bytes:
        from hashlib import shake_128

        return shake_128(f"{self._seed} {self._blocks}".encode()).digest(size)

    def save(self) -> State:
        return State("virtio-rng", 1, {"seed": "" if self._seed is None else str(self._seed), "blocks": self._blocks})

    def restore(self, state: State) -> None:
        self.require(state)
        seed = "" if self._seed is None else str(self._seed)
        if state.fields.get("seed") != seed:
            raise StateError(f"virtio-rng: the state has another seed than {seed or 'none'}")
        self._blocks = state.integer("blocks")
