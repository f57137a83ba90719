# opening.py: how a source gets its connections: HELLO, then JOIN for each of the others. Seconds.
"""`open_source()`, `join()`."""

from __future__ import annotations

import secrets
from contextlib import ExitStack

from pyvmm.errors import MigrationError
from pyvmm.migration.control import Control
from pyvmm.migration.frames import CHANNELS, FEATURES, MODES, Hello, Join, Joined, Refuse, Welcome
from pyvmm.migration.order import SOURCE, Order
from pyvmm.migration.proof import WITNESSES, join_key
from pyvmm.migration.transport import HANDSHAKE, connect
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.migration.address import Address
    from pyvmm.migration.capture import Recorder
    from pyvmm.migration.connection import Connection
    from pyvmm.migration.shape import Shape
    from pyvmm.migration.tls import Tls


class Terms(Record):
    """What both sides agreed on. id, token: of the migration; resume: the key of a new control connection; mode;
    channels: of pages; features: names of FEATURES."""

    __slots__ = ("channels", "features", "id", "mode", "resume", "token")

    def __init__(self, id: bytes, token: bytes, resume: bytes, mode: str, channels: int, features: int) -> None:
        self.id = id
        self.token = token
        self.resume = resume
        self.mode = mode
        self.channels = channels
        self.features = frozenset(name for name, bit in FEATURES.items() if features & bit)


class Ways:
    """A source's way to its destination: makes one connection after the other, all alike."""

    def __init__(self, address: Address, tls: Tls | None, recorder: Recorder | None = None) -> None:
        self.address = address
        self._tls = tls
        self._recorder = recorder
        self._numbers = 0

    def connect(self, timeout: float = HANDSHAKE, witness: bool = False) -> Connection:
        """One more. Raises MigrationError, PeerGone."""
        connection = connect(self.address, self._tls, timeout, witness)
        connection.recorder, connection.channel = self._recorder, self._numbers
        self._numbers += 1
        return connection

    def hello(self, shape: Shape, mode: str, channels: int, local: bool, stack: ExitStack) -> tuple[Control, Terms]:
        """The control connection, of which HELLO has been answered; `stack` closes it. Raises MigrationError where the
        destination refuses, with its reason."""
        features = FEATURES["postcopy"] | FEATURES["large"] | (FEATURES["local"] if local else 0)
        id, token = secrets.token_bytes(16), secrets.token_bytes(32)
        control = Control(self.connect(), Order(SOURCE))
        stack.callback(control.close)
        control.start()
        control.send(Hello(id, token, MODES[mode], channels, features, "", shape.encode()))
        answer = control.next(HANDSHAKE)
        if isinstance(answer, Refuse):
            raise MigrationError(f"{control.peer} refuses: {answer.reason}")
        if not isinstance(answer, Welcome) or answer.channels > channels or answer.features & ~features:
            raise MigrationError(f"{control.peer} answers HELLO by what was not offered: {answer.name()}")
        return control, Terms(id, token, answer.resume, mode, answer.channels, answer.features)

    def join(self, terms: Terms, kind: str, index: int, stack: ExitStack) -> Connection:
        """A connection more of that migration; kind: of CHANNELS. `stack` closes it. Raises MigrationError."""
        number = CHANNELS[kind]
        connection = stack.enter_context(self.connect(witness=number in WITNESSES))
        connection.send(Join(terms.id, join_key(terms.token, number), number, index), HANDSHAKE)
        answer = connection.recv(HANDSHAKE)
        if isinstance(answer, Refuse):
            raise MigrationError(f"{connection.peer} refuses a connection for {kind}: {answer.reason}")
        if not isinstance(answer, Joined) or (answer.kind, answer.index) != (number, index):
            raise MigrationError(f"{connection.peer} answers JOIN by {answer.name()}")
        return connection
