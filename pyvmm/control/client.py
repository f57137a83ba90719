# client.py: asks a VM in another process, by its control socket. Seconds.
"""`Client`, and the `Stream` of what a long command tells."""

from __future__ import annotations

import json
import socket
from contextlib import suppress

from pyvmm.control import wire
from pyvmm.errors import EXIT_BAD_INPUT, BadInput, ControlError
from pyvmm.sockets import check_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

TIMEOUT = 30.0
"""For an answer that comes at once, or after a pause."""
_MAX_ANSWER = 64 << 20
"""Bytes: a report has a line for each round."""
_PIECE = 64 << 10
_LOOK = 0.25
"""Seconds after which a thread that waits for an answer looks up: a signal that came just before it began to wait did
not wake it, and its handler runs only then."""


class Client:
    """One connection to the VM that listens at `path`; a context manager. One thread at a time.

    Raises BadInput where nobody listens there, ControlError where somebody does who does not answer as a VM does.
    """

    def __init__(self, path: str, timeout: float = TIMEOUT) -> None:
        self._path = check_path(path, f"control socket {path!r}")
        self._timeout = timeout
        self._number = 0
        self._in = bytearray()
        self._patient = False
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            self._socket.close()
            raise BadInput(f"nobody listens at {path}: start the guest with --control {path}") from None
        except OSError as error:
            self._socket.close()
            raise BadInput(f"{path}: {error.strerror or error}: give the path of a guest's control socket") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; what was asked for goes on."""
        self._socket.close()

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Has something done, and returns what is said of it. Raises BadInput, ControlError with the VM's reason."""
        return self.result(self.send(do, **arguments))

    def result(self, number: int) -> dict[str, Any]:
        """What is said of something that was sent. Answers to what was sent before it are passed over. Raises BadInput,
        ControlError with the VM's reason."""
        stream = Stream(self, number)
        for _ in stream:
            pass
        return stream.result

    def stream(self, do: str, **arguments: object) -> Stream:
        """Has something done that tells more than once. Raises BadInput for what nobody can be asked."""
        number = self.send(do, **arguments)
        self._socket.settimeout(_LOOK)
        self._patient = True  # it takes as long as it does
        return Stream(self, number)

    def send(self, do: str, **arguments: object) -> int:
        """Asks, and reads no answer; one that comes is passed over. A signal handler may call it. Returns its id."""
        wire.check(do, arguments)
        self._number += 1
        with suppress(OSError):  # gone: perhaps it has said why, and receive() tells either way
            self._socket.sendall(wire.encode({"id": self._number, "do": do} | arguments))
        return self._number

    def receive(self) -> dict[str, Any]:
        """The next line. Raises ControlError."""
        searched = 0
        while (end := self._in.find(b"\n", searched)) < 0:
            searched = len(self._in)
            if searched > _MAX_ANSWER:
                raise ControlError(f"{self._path} answers in a way that no VM of pyvmm does")
            try:
                data = self._socket.recv(_PIECE)
            except TimeoutError:
                if self._patient:
                    continue
                raise ControlError(f"{self._path} does not answer within {self._timeout:g} s") from None
            except OSError:
                data = b""
            if not data:
                raise ControlError(f"{self._path}: whoever listened there has gone")
            self._in += data
        line = bytes(self._in[:end])
        del self._in[: end + 1]
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ControlError(f"{self._path} answers in a way that no VM of pyvmm does")
        return found


class Stream:
    """An iterator of the events of one request, as plain data. `result`: what it came to, when they have ended."""

    def __init__(self, client: Client, number: int) -> None:
        self.result: dict[str, Any] = {}
        self._client = client
        self._number = number

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        """Raises BadInput, ControlError with the VM's reason."""
        while True:
            found = self._client.receive()
            if found.get("id") not in (self._number, None):  # of another request
                continue
            if "error" in found:
                text = str(found["error"])
                raise BadInput(text) if found.get("code") == EXIT_BAD_INPUT else ControlError(text)
            if isinstance(found.get("event"), dict):
                return found["event"]  # type: ignore[no-any-return]
            if isinstance(found.get("result"), dict):
                self.result = found["result"]
                raise StopIteration
