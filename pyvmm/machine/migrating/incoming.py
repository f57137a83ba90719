# incoming.py: the destination's side of a migration: a VM is built, filled, and runs when it is ours. Seconds.
"""`Incoming`: made by VM.receive()."""

from __future__ import annotations

import secrets
import threading

from pyvmm.errors import BadInput, MigrationError, ProtocolError, PyvmmError, StateError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.machine.migrating.session import Session
from pyvmm.machine.shape import build
from pyvmm.memory.source import UNITS
from pyvmm.migration.accepting import Acceptor
from pyvmm.migration.address import parse_address
from pyvmm.migration.control import Cancelled, Control
from pyvmm.migration.decision import Decision
from pyvmm.migration.events import Connected, Report, Switched
from pyvmm.migration.frames import (
    FEATURES,
    MODES,
    Commit,
    Complete,
    Done,
    Large,
    Prepare,
    Ready,
    Round,
    RoundDone,
    Source,
    States,
    Taken,
    Welcome,
)
from pyvmm.migration.local import accept
from pyvmm.migration.opening import Terms
from pyvmm.migration.order import DESTINATION, Order
from pyvmm.migration.pages import Arrivals, PageChannel
from pyvmm.migration.receiving import Receiver
from pyvmm.migration.shape import decode_shape
from pyvmm.migration.transport import listen as listen_at
from pyvmm.snapshot.format import checksum
from pyvmm.snapshot.states import decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypedDict

    from pyvmm.machine.machine import VM
    from pyvmm.migration.connection import Connection
    from pyvmm.migration.frames import Hello
    from pyvmm.migration.tls import Tls

    class ReceiveOptions(TypedDict, total=False):
        """Of VM.receive(); what they mean is said at Incoming."""

        output: Callable[[bytes], None] | None
        prepare: Callable[[VM], None] | None
        unit: str
        tls: Tls | None
        capture: str | None


_WAIT = 0.5
"""Between two looks at whether it is to end, while nobody connects."""


class Incoming(Session):
    """A guest that moves here, and the VM that it gets.

    output: as of VM(); prepare: called with the VM before its first instruction, on the session's thread; unit: how
    much a touch brings after the switch (pyvmm.memory.source.UNITS); tls; capture: a file in which what comes is
    recorded. Raises BadInput, HostError.

    It listens until a guest has moved here, or close(): who is refused, or fails, may come again. The VM is the
    caller's from vm() on; else close() ends it.
    """

    def __init__(
        self,
        kind: type[VM],
        listen: str,
        *,
        output: Callable[[bytes], None] | None = None,
        prepare: Callable[[VM], None] | None = None,
        unit: str = "adaptive",
        tls: Tls | None = None,
        capture: str | None = None,
    ) -> None:
        super().__init__("migration in")
        if unit not in UNITS:
            raise BadInput(f"unit={unit!r}: choose one of {', '.join(UNITS)}")
        self._kind = kind
        self._output = output
        self._prepare = prepare
        self._unit = unit
        self._tls = tls
        self._vm: VM | None = None
        self._running = threading.Event()
        self._closing = False
        self._control: Control | None = None
        self._decision: Decision | None = None
        recorder = None
        if capture is not None:
            from pyvmm.migration.capture import Recorder

            recorder = self._stack.enter_context(Recorder(capture))
        listener = listen_at(parse_address(listen, listening=True), tls)
        self.address = str(listener.address)
        self._local = listener.address.kind == "local"
        self._acceptor = Acceptor(listener, recorder)
        self._stack.callback(self._acceptor.close)
        self._thread.start()

    def vm(self, timeout: float | None = None) -> VM:
        """Waits until the guest runs here; the VM is the caller's to close then. Raises MigrationError where it never
        will, TimeoutError."""
        if not self._running.wait(timeout):
            raise TimeoutError(f"no guest has moved here in {timeout:g} s")
        if self._vm is None or self._decision is None or self._decision.value != "taken":
            self.result()
            raise MigrationError("no guest has moved here")
        self._handed = True
        return self._vm

    def cancel(self, reason: str = "it was cancelled") -> None:
        """No guest is wanted here any more, unless it runs here by now."""
        self._closing = True
        control = self._control
        if control is not None:
            control.fail(Cancelled(reason))

    def close(self) -> None:
        """Ends it, and the VM too, unless that was given out by vm()."""
        self.cancel("the destination is closed")
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._vm is not None and not self._handed:
            self._vm.close()

    _handed = False

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _runs_here(self) -> bool:
        return self._decision is not None and self._decision.value == "taken"

    # ---- its course ----

    def _run(self) -> Report:
        try:
            while True:
                if self._closing:
                    raise Cancelled("closed before a guest moved here")
                found = self._acceptor.hello(_WAIT)
                if found is None:
                    continue
                report = self._one(*found)
                if report is not None:
                    return report
        finally:
            self._running.set()

    def _one(self, connection: Connection, hello: Hello) -> Report:
        """One migration."""
        order = Order(DESTINATION)
        order.came(hello)
        control = self._control = Control(connection, order)
        self._stack.callback(control.close)
        mode = next(name for name, number in MODES.items() if number == hello.mode)
        try:
            shape = decode_shape(hello.shape)
            vm = self._vm = build(self._kind, shape, self._output)
        except PyvmmError as error:
            control.refuse(str(error))
            raise
        decision = self._decision = self._stack.enter_context(Decision(DESTINATION))
        try:
            known = FEATURES["large"] | FEATURES["postcopy"] | (FEATURES["local"] if self._local else 0)
            features = hello.features & known
            terms = Terms(hello.id, hello.token, secrets.token_bytes(32), mode, hello.channels, features)
            self._acceptor.expect(terms, [("pages", index) for index in range(terms.channels)])
            control.send(Welcome(features, terms.channels, terms.resume))
            return self._receive(vm, control, decision, terms)
        except PyvmmError as error:
            if decision.value != "taken":
                if decision.value == "ready":
                    decision.set("none")
                control.cancel(str(error))
                control.linger()
                vm.close()
            raise

    def _receive(self, vm: VM, control: Control, decision: Decision, terms: Terms) -> Report:
        transport = self.address.partition(":")[0]
        report = Report("destination", terms.mode, "tls" if self._tls else transport, terms.channels, vm.memory.size)
        pages = vm.memory.size // PAGE_SIZE
        channels = []
        for index in range(terms.channels):
            connection = self._acceptor.joined("pages", index)
            self._stack.callback(connection.close)
            channels.append(PageChannel(connection, vm.memory.base, pages))
        receiver = Receiver(channels)
        control.on_end = receiver.end
        self._tell(
            Connected(self._now(), peer=control.peer, mode=terms.mode, channels=len(channels), local=self._local)
        )
        large = bytearray()
        frame = control.next()
        if isinstance(frame, Source):
            if "local" not in terms.features:
                raise ProtocolError(f"{control.peer} sent SOURCE, and that was not agreed on")
            accept(control.connection, frame, channels)
            frame = control.next()
        while isinstance(frame, Large):
            large += frame.bits
            frame = control.next()
        blocks = -(-pages * PAGE_SIZE // BLOCK_SIZE)
        arrivals = Arrivals(pages, bytes(large) if len(large) * 8 >= blocks else None)
        seen = 0
        while type(frame) is Round:
            came = receiver.round(arrivals, frame.round, frame.pages)
            seen += came
            control.send(RoundDone(frame.round, came))
            frame = control.next()
        states = bytearray()
        while isinstance(frame, States):
            states += frame.data
            frame = control.next()
        if not isinstance(frame, Prepare):
            raise ProtocolError(f"{control.peer} sent {frame.name()}, and PREPARE was to come")
        if checksum(states) != frame.checksum:
            raise ProtocolError("the states came damaged")
        try:
            vm.restore_state(decode(bytes(states)))
        except StateError as error:
            raise MigrationError(f"the states do not go in here: {error}") from None
        if self._prepare is not None:
            self._prepare(vm)
        decision.set("ready")
        control.send(Ready(0))
        control.expect(Commit)
        decision.set("taken")
        vm.start()
        self._running.set()
        control.send(Taken())
        self._tell(Switched(self._now(), downtime=0.0, away=0))
        control.send(Complete())
        control.expect(Done)
        decision.release()
        report.wire_bytes, report.page_bytes = receiver.wire_bytes, receiver.page_bytes
        report.zero_pages, report.state_bytes = receiver.zero_pages, len(states)
        return report
