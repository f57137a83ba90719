# model.py: what a kind of virtio device is to the transport.
"""`Model`: the base of rng, console, block, balloon and what follows."""

from __future__ import annotations

from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.devices.virtio.queue import Queue
    from pyvmm.memory import GuestMemory


class Model:
    """A kind of device. serve() is called on the worker's thread, which may wait for memory and for files; no other
    method is called meanwhile, but for config() and those that a model says any thread may call.

    name, id: by which people and drivers know it (virtio 1.2, section 5); features: that it offers, but for those of
    transport and queues; queues: how many.
    """

    name = ""
    id = 0
    features = 0
    queues = 1

    def __init__(self) -> None:
        self.kick: Callable[[], None] = lambda: None
        """Call it when something came that serve() has waited for."""
        self.config_changed: Callable[[], None] = lambda: None
        """Call it when config() says something else: the driver is told."""

    def attach(self, memory: GuestMemory) -> None:
        """Before anything else: the memory of the VM. Raises BadInput where the device cannot be in such a VM."""

    def config(self) -> bytes:
        """The configuration space that drivers read."""
        return b""

    def write_config(self, offset: int, value: int, size: int) -> None:
        """The driver writes to it, on a vCPU's thread; what no driver may write is not looked at."""

    def fixed(self) -> bytes:
        """What of the configuration must be the same where the guest goes on."""
        return self.config()

    def serve(self, index: int, queue: Queue, features: int) -> bool | None:
        """Does one request of a queue, with these features negotiated. Does the driver want an interrupt? None: nothing
        was to be done. Raises RingError; FetchError, after which the same request is served once more, from the start.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """The driver has reset the device."""

    def activate(self) -> None:
        """The guest is about to run here, maybe again. Raises BadInput, HostError where it must not.

        Not before: in a migration the source may still take it back, and needs then what it has let go."""

    def release(self) -> None:
        """Another process may run the guest, until activate()."""

    def figures(self) -> dict[str, int]:
        """What it has done, by name: for people."""
        return {}

    def require_lasting(self) -> None:
        """Raises BadInput where a part of it is gone with this process: such a VM can be neither saved nor moved."""

    def save(self) -> State:
        """What is not in the guest's memory."""
        return State(f"virtio-{self.name}", 1, {})

    def restore(self, state: State) -> None:
        """Becomes what save() saw. Raises StateError, and stays as it is, if `state` does not fit."""
        self.require(state)

    def require(self, state: State) -> None:
        """Raises StateError for the state of another kind."""
        state.require(f"virtio-{self.name}", 1)

    def close(self) -> None:
        """Gives back what it holds."""
