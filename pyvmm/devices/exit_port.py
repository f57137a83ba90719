# exit_port.py: QEMU's isa-debug-exit, the port by which a guest ends its VM with a status. Unit: one byte.
"""`ExitPort`: the guest writes a byte and is done. (QEMU, hw/misc/debugexit.c, makes status 2b+1 of byte b.)"""

from __future__ import annotations

from pyvmm.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH = 4
"""Ports that the device takes; a write to any of them ends the guest."""


class ExitPort:
    """Calls `on_exit(byte)` with the low byte of what the guest writes; reads as 0."""

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, value: int, size: int) -> None:
        self._on_exit(value & 0xFF)

    def save(self) -> State:
        """An empty state: the device remembers nothing."""
        return State("exit-port", 1, {})

    def restore(self, state: State) -> None:
        """Raises StateError if `state` is another part's."""
        state.require("exit-port", 1)
