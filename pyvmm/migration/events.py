# events.py: what is told of a migration while it goes on, and the report at its end, for both sides. Seconds, bytes,
# pages of 4 KiB.
"""`Event` and its kinds, and `Report`: plain records that also go over a control socket as JSON."""

from __future__ import annotations

from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar


class Event(Record):
    """One thing that happened. at: seconds since the migration began. KIND: its name in JSON."""

    KIND: ClassVar[str] = "event"
    __slots__ = ("at",)

    def __init__(self, at: float, **fields: object) -> None:
        if fields.keys() != set(self.__slots__):
            raise TypeError(f"{type(self).__name__} takes at, {', '.join(self.__slots__)}")
        self.at = at
        for name, value in fields.items():
            setattr(self, name, value)

    __hash__ = None  # type: ignore[assignment]

    def as_json(self) -> dict[str, object]:
        """What json.dumps takes."""
        return {"event": self.KIND} | {name: _plain(getattr(self, name)) for name in ("at", *self.__slots__)}


class Connected(Event):
    """The other side agreed. peer: who; mode; channels: of pages; local: pages are read out of the source."""

    KIND = "connected"
    __slots__ = ("channels", "local", "mode", "peer")
    peer: str
    mode: str
    channels: int
    local: bool


class Moving(Event):
    """Pages go. round: 0 after the switch; sent, pages: of this round, so far and in all; bandwidth: bytes a second,
    of late; bytes: on the wire since the beginning."""

    KIND = "moving"
    __slots__ = ("bandwidth", "bytes", "pages", "round", "sent")
    round: int
    sent: int
    pages: int
    bytes: int
    bandwidth: float


class RoundEnded(Event):
    """All of a round is there. pages: of it, zeros and all; seconds; dirty: pages written meanwhile, which are the next
    round's; dirty_rate: pages a second; bandwidth: bytes a second; expected: the downtime, were the VM to be switched
    over now."""

    KIND = "round"
    __slots__ = ("bandwidth", "dirty", "dirty_rate", "expected", "pages", "round", "seconds")
    round: int
    pages: int
    seconds: float
    dirty: int
    dirty_rate: float
    bandwidth: float
    expected: float


class Helped(Event):
    """The source writes faster than the connection takes: help: what is done about it ("hot pages last", "small
    pages traced", "throttle", "postcopy"); share: of the time in which vCPUs are held, 0 to 1."""

    KIND = "helped"
    __slots__ = ("help", "share")
    help: str
    share: float


class Switched(Event):
    """The guest runs at the destination. downtime: seconds in which it ran nowhere, as this side knows it; away: pages
    that are still to come."""

    KIND = "switched"
    __slots__ = ("away", "downtime")
    downtime: float
    away: int


class Broken(Event):
    """The connection is gone after the switch: the guest stands until it is made anew."""

    KIND = "broken"
    __slots__ = ("reason",)
    reason: str


class Resumed(Event):
    """It is made anew. missing: pages that are still to come."""

    KIND = "resumed"
    __slots__ = ("epoch", "missing")
    epoch: int
    missing: int


class Failed(Event):
    """It came to nothing. reason: one line; runs: does the guest go on here?"""

    KIND = "failed"
    __slots__ = ("reason", "runs")
    reason: str
    runs: bool


class Finished(Event):
    """All is there. report: see Report."""

    KIND = "finished"
    __slots__ = ("report",)
    report: Report


class Report(Record):
    """A migration that came about, as one side saw it. Times in seconds.

    side: "source" or "destination"; mode; transport: "tcp", "tls", "unix" or "local"; channels; memory: bytes of RAM;
    seconds: from the first frame to the last; downtime: its parts by name, in the order in which they came; their sum
    is `total_downtime`; populate_seconds: of filling the destination's tables, populate_inside: of these, those that
    are part of the downtime; wire_bytes: all that went over pages channels; page_bytes: of pages, in full; zero_pages:
    that went as metadata; state_bytes; resent_pages: that went more than once; rounds: a RoundEnded each; faults: pages
    asked for by touches after the switch, fault_seconds: what these waited; large_before: blocks of 2 MiB that were
    large at the source, large_after: that are at the destination; throttled: the greatest share of time in which vCPUs
    were held; breaks: connections made anew.
    """

    __slots__ = (
        "breaks", "channels", "downtime", "fault_seconds", "faults", "large_after", "large_before", "memory", "mode",
        "page_bytes", "populate_inside", "populate_seconds", "resent_pages", "rounds", "seconds", "side", "state_bytes",
        "throttled", "transport", "wire_bytes", "zero_pages",
    )  # fmt: skip

    def __init__(self, side: str, mode: str, transport: str, channels: int, memory: int) -> None:
        self.side = side
        self.mode = mode
        self.transport = transport
        self.channels = channels
        self.memory = memory
        self.seconds = 0.0
        self.downtime: dict[str, float] = {}
        self.populate_seconds = 0.0
        self.populate_inside = 0.0
        self.wire_bytes = 0
        self.page_bytes = 0
        self.zero_pages = 0
        self.state_bytes = 0
        self.resent_pages = 0
        self.rounds: list[RoundEnded] = []
        self.faults = 0
        self.fault_seconds = 0.0
        self.large_before = 0
        self.large_after = 0
        self.throttled = 0.0
        self.breaks = 0

    __hash__ = None  # type: ignore[assignment]

    @property
    def total_downtime(self) -> float:
        """Seconds in which the guest ran nowhere."""
        return sum(self.downtime.values())

    def as_json(self) -> dict[str, object]:
        """What json.dumps takes."""
        return {name: _plain(getattr(self, name)) for name in self.__slots__} | {"total_downtime": self.total_downtime}


def _plain(value: object) -> object:
    if isinstance(value, (Event, Report)):
        return value.as_json()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
