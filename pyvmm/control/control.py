# control.py: one VM's control socket: what can be asked for is done to that VM. Times in seconds.
"""`Control`."""

from __future__ import annotations

import threading
from contextlib import suppress

from pyvmm.control.moving import Moving
from pyvmm.control.server import Server
from pyvmm.control.status import status
from pyvmm.errors import BadInput, LifecycleError, PyvmmError
from pyvmm.migration.events import Finished

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self

    from pyvmm.control.server import Reply
    from pyvmm.control.wire import Request
    from pyvmm.machine import VM
    from pyvmm.migration.tls import Tls

_CANCELLING = 10.0


class Control:
    """Listens at `path` for as long as it is not closed; a context manager. To be closed before the VM is.

    moving: of a VM that comes from elsewhere, where whoever receives it notes the events. Raises BadInput, HostError
    where it cannot listen there.
    """

    def __init__(self, vm: VM, path: str, moving: Moving | None = None) -> None:
        self._vm = vm
        self.moving = Moving() if moving is None else moving
        self._stream: threading.Thread | None = None
        self._beginning = threading.Lock()  # until the thread that follows a migration runs
        self._closed = False  # no migration begins any more
        self._handlers: dict[str, Callable[[dict[str, Any], Reply], None]] = {
            "status": self._status,
            "swap": self._swap,
            "balloon": self._balloon,
            "migrate": self._migrate,
            "cancel": self._cancel,
            "abandon": self._abandon,
            "pause": self._pause,
            "resume": self._resume,
            "stop": self._stop,
            "sharing": self._sharing,
            "hashes": self._hashes,
        }
        self._server = Server(path, self._serve)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends it. A migration that goes on is cancelled, or where the guest runs elsewhere already and may need pages
        of ours, waited for."""
        with self._beginning:
            self._closed = True
        if not self.moving.switched:
            with suppress(PyvmmError):  # there is none, or it is too late
                self.moving.cancel("the source ends")
        stream = self._stream
        while stream is not None and stream.is_alive():
            stream.join(_CANCELLING)
            if not self.moving.switched:
                break
        self._server.close()

    def moved_to(self) -> str:
        """Where the guest has gone, when wait() has told that it has: waits until the other side has all of it. Raises
        MigrationError where it was killed there before."""
        with self._beginning:
            stream = self._stream
        if stream is not None:
            stream.join()
            self.moving.result()
        return self.moving.to

    def _serve(self, request: Request, reply: Reply) -> None:
        self._handlers[request.do](request.arguments, reply)

    # ---- the commands ----

    def _status(self, arguments: dict[str, Any], reply: Reply) -> None:
        reply.result(status(self._vm, self.moving))

    def _swap(self, arguments: dict[str, Any], reply: Reply) -> None:
        from pyvmm.control.swapping import change, figures

        change(self._vm.memory, arguments["target"], arguments["policy"], arguments["off"], arguments["wait"])
        reply.result(figures(self._vm.memory))

    def _balloon(self, arguments: dict[str, Any], reply: Reply) -> None:
        from pyvmm.control.ballooning import change, figures

        if arguments["target"] is None:
            change(self._vm, None)
        else:
            with self.moving.apart():  # else it might be set here when the guest is there
                change(self._vm, arguments["target"])
        reply.result(figures(self._vm))

    def _pause(self, arguments: dict[str, Any], reply: Reply) -> None:
        with self.moving.apart():
            seconds = self._vm.pause()
        reply.result({"seconds": seconds})

    def _resume(self, arguments: dict[str, Any], reply: Reply) -> None:
        with self.moving.apart():
            self._vm.resume()
        reply.result({})

    def _stop(self, arguments: dict[str, Any], reply: Reply) -> None:
        with self.moving.apart():
            self._vm.request_stop(arguments["status"])
        reply.result({})

    def _sharing(self, arguments: dict[str, Any], reply: Reply) -> None:
        from pyvmm.control.sharing import sharing

        reply.result(sharing(self._vm, arguments["blocks"]))

    def _hashes(self, arguments: dict[str, Any], reply: Reply) -> None:
        from pyvmm.control.sharing import hashes

        reply.result(hashes(self._vm, arguments["first"], arguments["count"]))

    def _cancel(self, arguments: dict[str, Any], reply: Reply) -> None:
        self.moving.cancel(arguments["reason"])
        reply.result({})

    def _abandon(self, arguments: dict[str, Any], reply: Reply) -> None:
        if self._vm.leaving is None:
            raise LifecycleError("nothing to abandon: no guest was given away")
        self._vm.leaving.abandon()
        reply.result({})

    def _migrate(self, arguments: dict[str, Any], reply: Reply) -> None:
        given = dict(arguments)
        to = given.pop("to")
        given["tls"] = tls_of(given.pop("tls_cert"), given.pop("tls_key"), given.pop("tls_ca"))
        with self._beginning:
            if self._closed:
                raise LifecycleError("the VM is about to be closed")
            self.moving.begin(lambda: self._vm.migrate(to, **given), to)
            self._stream = threading.Thread(target=self._tell, args=(reply,), name="control migration", daemon=True)
            self._stream.start()

    def _tell(self, reply: Reply) -> None:
        """Gives on what happens; nobody waits for whoever reads that."""
        try:
            for event in self.moving.events():
                if not isinstance(event, Finished):  # what it has is the result
                    reply.event(event.as_json())
            reply.result(self.moving.result().as_json())
        except Exception as error:  # a fault of ours too: whoever asked waits for the end
            reply.error(error)


def tls_of(certificate: str | None, key: str | None, authority: str | None) -> Tls | None:
    """TLS with these files, or none of them. Raises BadInput."""
    if certificate is None and key is None and authority is None:
        return None
    if certificate is None or key is None or authority is None:
        raise BadInput("TLS needs all three: a certificate, its key, and the authority that signed the other side's")
    from pyvmm.migration.tls import Tls

    return Tls(certificate, key, authority)
