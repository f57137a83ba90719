# order.py: which frame may come next on a migration's control connection: the table of docs/migration-protocol.md, for
# both ends. It knows neither sockets nor pages.
"""`Order`: told of each frame that goes or comes; refuses what is out of turn."""

from __future__ import annotations

from pyvmm.errors import ProtocolError
from pyvmm.migration.frames import (
    MODES,
    Away,
    Cancel,
    Commit,
    Complete,
    Done,
    Have,
    Hello,
    Large,
    Ping,
    Pong,
    Prepare,
    Ready,
    Refuse,
    Round,
    RoundDone,
    Source,
    States,
    Taken,
    Welcome,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.migration.frames import Frame

SOURCE, DESTINATION = "source", "destination"

# phase -> who sends what -> next phase
PHASES: dict[str, dict[tuple[str, type[Frame]], str]] = {
    "new": {(SOURCE, Hello): "asked"},
    "asked": {(DESTINATION, Welcome): "open", (DESTINATION, Refuse): "ended"},
    "open": {
        (SOURCE, Source): "open",
        (SOURCE, Large): "open",
        (SOURCE, Round): "sending",
        (SOURCE, States): "states",
    },
    "sending": {(DESTINATION, RoundDone): "open"},
    "states": {(SOURCE, States): "states", (SOURCE, Away): "states", (SOURCE, Prepare): "prepared"},
    "prepared": {(DESTINATION, Ready): "ready"},
    "ready": {(SOURCE, Commit): "committed"},
    "committed": {(DESTINATION, Taken): "running"},
    "running": {(DESTINATION, Have): "running", (DESTINATION, Complete): "full"},
    "full": {(SOURCE, Done): "ended"},
    "ended": {},
}
_CANCEL = {
    SOURCE: ("open", "sending", "states", "prepared", "ready"),
    DESTINATION: ("open", "sending", "states", "prepared", "ready", "committed"),
}
_KEEP_ALIVE = ("open", "sending", "states", "prepared", "ready", "committed", "running", "full")
RESUMABLE = ("ready", "running")


class Order:
    """Of one end. side: "source" or "destination"; mode: of MODES, known from HELLO on. `phase` as in the document;
    `cancelled`: this end has sent CANCEL, and takes whatever still comes."""

    def __init__(self, side: str) -> None:
        self.side = side
        self.other = DESTINATION if side == SOURCE else SOURCE
        self.phase = "new"
        self.mode = ""
        self.cancelled = False
        self._round = 0
        self._have: int | None = None
        """The next page that HAVE is to begin with; None: none is expected."""
        self._away = 0
        self._offset = self._total = 0

    def sent(self, frame: Frame) -> None:
        """A frame is about to be sent. Raises ProtocolError where that is a mistake of ours."""
        self._step(self.side, frame, "we may not send")
        if isinstance(frame, Cancel):
            self.cancelled = True

    def came(self, frame: Frame) -> bool:
        """A frame has come: is it to be heeded? Raises ProtocolError where it may not come now."""
        if self.cancelled:
            return False
        self._step(self.other, frame, "it may not come")
        return True

    def resumed(self, phase: str) -> None:
        """A new control connection stands in for a broken one. phase: "ready" (COMMIT comes anew), or "running"."""
        if phase not in RESUMABLE or self.phase not in ("prepared", "ready", "committed", "running", "full"):
            raise ProtocolError(f"a migration in phase {self.phase} cannot go on in phase {phase}")
        if self.phase in ("running", "full") and phase == "ready" and self.side == DESTINATION:
            raise ProtocolError("the guest runs here already: it cannot be handed over once more")
        self.phase = phase
        self._have = 0 if phase == "running" else None

    def _step(self, sender: str, frame: Frame, may_not: str) -> None:
        kind, phase = type(frame), self.phase
        if kind in (Ping, Pong) and phase in _KEEP_ALIVE:
            return
        following = "ended" if kind is Cancel and phase in _CANCEL[sender] else PHASES[phase].get((sender, kind))
        if following is None:
            raise ProtocolError(f"{frame.name()} from the {sender} in phase {phase}: {may_not} then")
        why = self._wrong(frame)
        if why:
            raise ProtocolError(f"{frame.name()}: {why}")
        self._note(frame)
        self.phase = following

    def _wrong(self, frame: Frame) -> str:
        """Why a frame cannot be what it is after those before it; or nothing."""
        if isinstance(frame, Round):  # and RoundDone
            wanted = self._round if isinstance(frame, RoundDone) else self._round + 1
            if self.mode == "postcopy":
                return "there are no rounds in post-copy"
            return "" if frame.round == wanted else f"round {frame.round} where {wanted} should come"
        if isinstance(frame, States):
            if frame.offset != self._offset or (self._offset and frame.total != self._total):
                return f"a piece from byte {frame.offset} on of {frame.total}, after {self._offset} of {self._total}"
        elif isinstance(frame, Away):
            return self._gap(frame, self._away) if self.mode == "hybrid" else f"nothing is away in {self.mode}"
        elif isinstance(frame, Have):
            return "nothing was broken" if self._have is None else self._gap(frame, self._have)
        elif isinstance(frame, Prepare):
            if frame.round != self._round:
                return f"the last round is {self._round}, not {frame.round}"
            if self._offset != self._total or frame.states != self._total:
                return f"{self._offset} bytes of States have come, of {frame.states}"
            if (self.mode == "precopy" and frame.away) or (self.mode == "postcopy" and not frame.away):
                return f"{frame.away} pages away in {self.mode}"
            if self.mode != "postcopy" and not self._round:
                return "not one round was sent"
        return ""

    @staticmethod
    def _gap(frame: Have, wanted: int) -> str:
        return "" if frame.first == wanted else f"pages from {frame.first} on, where {wanted} should come"

    def _note(self, frame: Frame) -> None:
        if isinstance(frame, Hello):
            self.mode = next(name for name, number in MODES.items() if number == frame.mode)
        elif type(frame) is Round:
            self._round = frame.round
        elif isinstance(frame, States):
            self._offset, self._total = frame.offset + len(frame.data), frame.total
        elif isinstance(frame, Away):
            self._away = frame.first + frame.count
        elif isinstance(frame, Have):
            self._have = frame.first + frame.count
