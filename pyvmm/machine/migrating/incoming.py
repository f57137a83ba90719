# incoming.py: the destination's side of a migration: a VM is built, filled, and runs when it is ours. Seconds.
"""`Incoming`: made by VM.receive()."""

from __future__ import annotations

import secrets
import threading
from contextlib import suppress

from pyvmm.errors import BadInput, MigrationError, PyvmmError, StateError
from pyvmm.machine.migrating.arriving import Arriving
from pyvmm.machine.migrating.filling import Filling
from pyvmm.machine.migrating.populating import ask_host, second_level
from pyvmm.machine.migrating.session import Session, as_ours
from pyvmm.machine.migrating.taking import Taking, places
from pyvmm.machine.shape import build
from pyvmm.memory.source import UNITS
from pyvmm.migration.accepting import Acceptor
from pyvmm.migration.address import parse_address
from pyvmm.migration.control import Abandoned, Cancelled, Control, line
from pyvmm.migration.decision import Decision
from pyvmm.migration.events import Connected, Report
from pyvmm.migration.frames import FEATURES, MODES, Refuse, Welcome
from pyvmm.migration.opening import Terms
from pyvmm.migration.order import DESTINATION, Order
from pyvmm.migration.shape import decode_shape
from pyvmm.migration.transport import listen as listen_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypedDict

    from pyvmm.machine.machine import VM
    from pyvmm.migration.connection import Connection
    from pyvmm.migration.frames import Hello
    from pyvmm.migration.tls import Tls

    class ReceiveOptions(TypedDict, total=False):
        """Of VM.receive(); what they mean is said at Incoming."""

        output: Callable[[bytes], None] | None
        built: Callable[[VM], None] | None
        prepare: Callable[[VM], None] | None
        unit: str
        tls: Tls | None
        capture: str | None
        devices: Sequence[str]


_WAIT = 0.5
"""Between two looks at whether it is to end, while nobody connects."""


class Incoming(Session):
    """A guest that moves here, and the VM that it gets.

    output, devices: as of VM(), and devices as the guest has that comes;
    built: called with the VM as soon as there is one, before anything comes; prepare: called when
    all is there that is to be there before its first instruction, while the guest runs nowhere; both on the session's
    thread, and an exception ends the migration; unit: how much a touch brings after the switch
    (pyvmm.memory.source.UNITS); tls; capture: a file in which what comes is recorded. Raises BadInput, HostError.

    It listens until a migration has begun; who is refused before that is in nobody's way (`troubles`). The VM is the
    caller's from vm() on; else close() ends it.
    """

    def __init__(
        self,
        kind: type[VM],
        listen: str,
        *,
        output: Callable[[bytes], None] | None = None,
        built: Callable[[VM], None] | None = None,
        prepare: Callable[[VM], None] | None = None,
        unit: str = "adaptive",
        tls: Tls | None = None,
        capture: str | None = None,
        devices: Sequence[str] = (),
    ) -> None:
        super().__init__("migration in")
        if unit not in UNITS:
            raise BadInput(f"unit={unit!r}: choose one of {', '.join(UNITS)}")
        self._kind = kind
        self._output = output
        self._built = built
        self._prepare = prepare
        self._unit = unit
        self._devices = tuple(devices)
        self._tls = tls
        self._vm: VM | None = None
        self._running = threading.Event()
        self._closing = threading.Event()
        self._handed = False
        self._reason = "closed before a guest moved here"
        self._taking: Taking | None = None
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
        if self._vm is None or not self._runs_here():
            self.result()
            raise MigrationError("no guest has moved here")
        self._handed = True
        return self._vm

    @property
    def troubles(self) -> list[str]:
        """Who came to nothing lately, in one line each."""
        return self._acceptor.troubles

    def cancel(self, reason: str = "it was cancelled") -> None:
        """No guest is wanted here any more, unless it runs here by now."""
        if self._runs_here():
            return
        self._reason = reason
        self._closing.set()
        if self._taking is not None and not self._runs_here():
            self._taking.control.fail(Cancelled(reason))

    def close(self) -> None:
        """Ends it, and the VM too, unless that was given out by vm(). A guest whose pages are not all here is lost."""
        self._closing.set()
        if self._taking is not None:
            self._taking.control.fail(Abandoned("the destination is closed"))
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._vm is not None and not self._handed:
            self._vm.close()

    def release(self) -> None:
        """close(), and its witness goes without a word: the other side is known to have ended."""
        self.close()
        if self._decision is not None:
            self._decision.close()

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _runs_here(self) -> bool:
        lost = self._taking is not None and self._taking.lost
        return self._decision is not None and self._decision.value == "taken" and not lost

    # ---- its course ----

    def _run(self) -> Report:
        try:
            while True:
                found = self._acceptor.hello(_WAIT)
                if self._closing.is_set():
                    if found is not None:
                        self._turn_away(found[0])
                    raise Cancelled(self._reason)
                if found is not None and (begun := self._begin(*found)) is not None:
                    return self._one(*begun)
        finally:
            self._running.set()

    def _turn_away(self, connection: Connection) -> None:
        """Who came when no guest was wanted any more."""
        with connection, suppress(MigrationError):
            connection.send(Refuse(line(self._reason)), 1.0)

    def _begin(self, connection: Connection, hello: Hello) -> tuple[VM, Control, Hello] | None:
        """A VM of the shape that HELLO tells; None where this host has none such, and the source has been told so."""
        order = Order(DESTINATION)
        order.came(hello)
        control = Control(connection, order)
        control.start()
        try:
            vm = self._vm = build(self._kind, decode_shape(hello.shape), self._output, self._devices)
        except Exception as met:
            error = as_ours(met)
            control.refuse(str(error))
            control.close()
            self._acceptor.refused(str(error))
            return None
        ask_host()
        self._stack.callback(control.close)
        return vm, control, hello

    def _one(self, vm: VM, control: Control, hello: Hello) -> Report:
        """One migration, from WELCOME on."""
        mode = next(name for name, number in MODES.items() if number == hello.mode)
        transport = "tls" if self._tls else self.address.partition(":")[0]
        report = Report("destination", mode, transport, hello.channels, vm.memory.size)
        offered = FEATURES["large"] | FEATURES["postcopy"] | (FEATURES["local"] if self._local else 0)
        features = hello.features & offered
        terms = Terms(hello.id, hello.token, secrets.token_bytes(32), mode, hello.channels, features)
        decision = self._decision = Decision(DESTINATION)
        taking = self._taking = Taking(
            vm, self._acceptor, control, decision, terms, report, self._closing, self._running, self._tell, self._now
        )
        self._stack.callback(taking.close)
        try:
            if mode != "precopy":
                vm.memory.engine.equip()  # what takes time before it is part of the downtime
            if self._built is not None:
                self._built(vm)
            self._acceptor.expect(terms, places(terms, pages=True))
            control.send(Welcome(features, terms.channels, terms.resume))
            self._fill(vm, taking, terms, report)
        except Exception as met:  # whatever it is, the source must hear that the guest is its own
            why = taking.control.why(as_ours(met))
            if decision.value == "taken":  # it could not be started; nobody else may: our witness will say so
                taking.lost = True
                raise why from met
            self._not_ours(vm, taking, decision, why)
            raise why from met
        taking.finish()
        if taking.arriving is not None:
            taking.arriving.fill_in(report)
        self._finished(report)
        taking.farewell()
        decision.close()
        return report

    def _fill(self, vm: VM, taking: Taking, terms: Terms, report: Report) -> None:
        """All up to the moment in which the guest runs here."""
        filling = Filling(vm, taking.control, terms)
        filling.join(self._acceptor, self._stack)
        taking.witness()
        self._tell(
            Connected(
                self._now(), peer=taking.control.peer, mode=terms.mode, channels=terms.channels, local=self._local
            )
        )
        away = filling.receive(report)
        if away is not None:
            taking.arriving = Arriving(vm.memory, filling.large, self._unit, filling.away)
            assert filling.urgent is not None
            taking.arriving.join(filling.pages, filling.urgent, filling.source)
        try:
            vm.restore_state(filling.state)
        except StateError as error:
            raise MigrationError(f"the states do not go in here: {error}") from None
        report.populate_inside = second_level(vm, filling.hot, filling.seen)
        report.populate_seconds += report.populate_inside
        if self._prepare is not None:
            self._prepare(vm)
        taking.take(away or 0)

    def _not_ours(self, vm: VM, taking: Taking, decision: Decision, error: PyvmmError) -> None:
        """The guest does not come here: the other side is told, if it is there."""
        open_ended = decision.value == "ready"
        decision.set("none")
        taking.control.cancel(str(error))
        heard = taking.control.linger()
        vm.close()
        if heard or not open_ended:
            decision.close()  # else the witness has it to say, when this process ends
