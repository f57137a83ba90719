# frames.py: the typed messages of a migration, in bytes and back. docs/migration-protocol.md has the rules, which hold
# when a frame is made and when one is read: what cannot be sent cannot be received either.
"""`Frame` and its kinds; `encode()`, and a `Decoder` that is fed with bytes as they come."""

from __future__ import annotations

import struct

from pyvmm._native import lib
from pyvmm.errors import ProtocolError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.migration.fields import Fixed, Number, Rest, Text
from pyvmm.record import Record
from pyvmm.snapshot.format import MAX_STATES, checksum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, ClassVar, TypeAlias

    from pyvmm.migration.fields import Kind

    Buffer: TypeAlias = bytes | bytearray | memoryview

MAGIC = b"\x93PVM"
VERSION: int = lib.PV_STREAM_VERSION
HEAD_SIZE = 24
RUN_SIZE: int = lib.PV_RUN_FRAME
"""Bytes of a frame of pages: all that is on a pages channel but pages."""
MAX_RUN: int = lib.PV_RUN_MAX
"""Pages in a run of bytes: a block of 2 MiB."""
MAX_PAGES = 1 << 28
"""1 TiB of RAM."""
MAX_BLOCKS = MAX_PAGES * PAGE_SIZE // BLOCK_SIZE
MAX_BITS = 64 << 10
"""Bytes of a bitmap in one frame."""
MAX_SHAPE = 64 << 10
MAX_PIECE = 1 << 20
"""Bytes of States in one frame."""
MAX_ROUNDS = 1 << 20
MAX_CHANNELS = 8
_MAX_64 = (1 << 64) - 1
_MAX_32 = (1 << 32) - 1

_HEAD = struct.Struct("<4sBBHIIQ")

MODES = {"precopy": 1, "postcopy": 2, "hybrid": 3}
FEATURES = {"postcopy": 1, "large": 2, "local": 4}
"""By their bits."""
CHANNELS = {"pages": 1, "urgent": 2, "source-witness": 3, "destination-witness": 4}
DECISIONS = {"held": 1, "offered": 2, "given": 3, "none": 4, "ready": 5, "taken": 6}
"""The source's first three, then the destination's."""


U8 = Number(1, 0xFF)
U64 = Number(8, _MAX_64)
PAGES = Number(8, MAX_PAGES)
ROUND = Number(4, MAX_ROUNDS, 1)
ID, KEY = Fixed(16), Fixed(32, secret=True)
CHANNEL = Number(1, MAX_CHANNELS, 1)
DECISION = Number(1, len(DECISIONS), 1)
BITS = Rest(MAX_BITS, 1)


# ---- frames ----


def _fields(**kinds: Kind) -> dict[str, Kind]:
    return kinds


class Frame(Record):
    """One message. FIELDS: name and kind of each, in the order of the body; they are the arguments, in order or by
    name. Raises ProtocolError where one cannot be what it is given."""

    TYPE: ClassVar[int]
    FIELDS: ClassVar[dict[str, Kind]] = _fields()
    __slots__ = ()

    def __init__(self, *values: object, **named: object) -> None:
        named.update(zip(self.FIELDS, values, strict=False))
        if named.keys() != self.FIELDS.keys() or len(values) > len(self.FIELDS):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.FIELDS) or 'nothing'}")
        for name, value in named.items():
            setattr(self, name, value)
        self.body()  # so that nothing is made that cannot be sent

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # noqa: ANN401 (fields, as FIELDS says)

    @classmethod
    def name(cls) -> str:
        """As the protocol has it: ROUND_DONE."""
        return "".join("_" + c if c.isupper() and n else c for n, c in enumerate(cls.__name__)).upper()

    @classmethod
    def most(cls) -> int:
        """Bytes of the longest body."""
        return sum(kind.most for kind in cls.FIELDS.values())

    def check(self) -> None:
        """Raises ValueError where fields contradict each other."""

    def body(self) -> bytearray:
        """The bytes behind the header."""
        out = bytearray()
        for name, kind in self.FIELDS.items():
            try:
                kind.put(getattr(self, name), out)
            except ValueError as error:
                raise ProtocolError(f"{self.name()}: {name}: {error}") from None
        try:
            self.check()
        except ValueError as error:
            raise ProtocolError(f"{self.name()}: {error}") from None
        return out

    @classmethod
    def decode(cls, body: Buffer) -> Frame:
        """The frame with that body. Raises ProtocolError."""
        at = 0
        values: dict[str, object] = {}
        view = memoryview(body)
        for name, kind in cls.FIELDS.items():
            try:
                values[name], at = kind.take(view, at)
            except ValueError as error:
                raise ProtocolError(f"{cls.name()}: {name}: {error}") from None
        if at != len(view):
            raise ProtocolError(f"{cls.name()}: {len(view) - at} bytes too many in its body")
        return cls(**values)


class _Bits(Frame):
    """`count` bits from number `first` on, the lowest bit of a byte first."""

    __slots__ = ("bits", "count", "first")
    LIMIT: ClassVar[int]

    def check(self) -> None:
        if self.first + self.count > self.LIMIT:
            raise ValueError(f"{self.count} from {self.first} on go beyond {self.LIMIT}")
        if len(self.bits) != -(-self.count // 8):
            raise ValueError(f"{len(self.bits)} bytes for {self.count} bits")
        if self.count % 8 and self.bits[-1] >> self.count % 8:
            raise ValueError("bits are set behind the last one")


class _Run(Frame):
    """Pages; all such frames have RUN_SIZE bytes."""

    __slots__ = ("count", "first", "round")
    FIELDS = _fields(first=PAGES, count=Number(4, MAX_PAGES), round=Number(4, MAX_ROUNDS))
    MOST = MAX_PAGES

    def check(self) -> None:
        if not 1 <= self.count <= self.MOST or self.first + self.count > MAX_PAGES:
            raise ValueError(f"{self.count} pages from {self.first} on cannot be")
        if self.MOST == MAX_RUN and self.first // MAX_RUN != (self.first + self.count - 1) // MAX_RUN:
            raise ValueError("its pages are not in one block of 2 MiB")


class Hello(Frame):
    TYPE = 1
    __slots__ = ("channels", "features", "id", "mode", "resume_at", "shape", "token")
    FIELDS = _fields(
        id=ID, token=KEY, mode=Number(1, 3, 1), channels=CHANNEL, features=U64, resume_at=Text(),
        shape=Rest(MAX_SHAPE, 1),
    )  # fmt: skip


class Welcome(Frame):
    TYPE = 2
    __slots__ = ("channels", "features", "resume")
    FIELDS = _fields(features=U64, channels=CHANNEL, resume=KEY)


class Refuse(Frame):
    TYPE = 3
    __slots__ = ("reason",)
    FIELDS = _fields(reason=Text())


class Join(Frame):
    TYPE = 4
    __slots__ = ("id", "index", "kind", "token")
    FIELDS = _fields(id=ID, token=KEY, kind=Number(1, 4, 1), index=Number(1, MAX_CHANNELS - 1))


class Joined(Frame):
    TYPE = 5
    __slots__ = ("index", "kind")
    FIELDS = _fields(kind=Number(1, 4, 1), index=Number(1, MAX_CHANNELS - 1))


class Source(Frame):
    TYPE = 6
    __slots__ = ("pid", "ram", "started")
    FIELDS = _fields(pid=Number(4, (1 << 31) - 1, 1), started=U64, ram=U64)


class Large(_Bits):
    TYPE = 7
    __slots__ = ()
    LIMIT = MAX_BLOCKS
    FIELDS = _fields(first=Number(8, MAX_BLOCKS), count=Number(4, MAX_BITS * 8, 1), bits=BITS)


class Round(Frame):
    TYPE = 8
    __slots__ = ("pages", "round")
    FIELDS = _fields(round=ROUND, pages=PAGES)


class RoundDone(Round):
    TYPE = 9
    __slots__ = ()


class States(Frame):
    TYPE = 10
    __slots__ = ("data", "offset", "total")
    FIELDS = _fields(total=Number(4, MAX_STATES, 1), offset=Number(4, MAX_STATES), data=Rest(MAX_PIECE, 1))

    def check(self) -> None:
        if self.offset + len(self.data) > self.total:
            raise ValueError(f"{len(self.data)} bytes from {self.offset} on go beyond {self.total}")


class Prepare(Frame):
    TYPE = 11
    __slots__ = ("away", "checksum", "round", "states")
    FIELDS = _fields(
        round=Number(4, MAX_ROUNDS), away=PAGES, states=Number(4, MAX_STATES, 1), checksum=U64,
    )  # fmt: skip


class Ready(Frame):
    TYPE = 12
    __slots__ = ("away",)
    FIELDS = _fields(away=PAGES)


class Commit(Frame):
    TYPE = 13
    __slots__ = ()


class Taken(Frame):
    TYPE = 14
    __slots__ = ()


class Complete(Frame):
    TYPE = 15
    __slots__ = ("large",)
    FIELDS = _fields(large=Number(8, MAX_BLOCKS))


class Done(Frame):
    TYPE = 16
    __slots__ = ()


class Cancel(Refuse):
    TYPE = 17
    __slots__ = ()


class Ping(Frame):
    TYPE = 18
    __slots__ = ("number",)
    FIELDS = _fields(number=U64)


class Pong(Ping):
    TYPE = 19
    __slots__ = ()


class Resume(Frame):
    TYPE = 20
    __slots__ = ("decision", "epoch", "id", "resume")
    FIELDS = _fields(id=ID, resume=KEY, epoch=Number(4, _MAX_32, 1), decision=DECISION)


class Resumed(Frame):
    TYPE = 21
    __slots__ = ("decision", "epoch")
    FIELDS = _fields(epoch=Number(4, _MAX_32, 1), decision=DECISION)


class Have(_Bits):
    TYPE = 22
    __slots__ = ()
    LIMIT = MAX_PAGES
    FIELDS = _fields(first=PAGES, count=Number(4, MAX_BITS * 8, 1), bits=BITS)


class Died(Frame):
    TYPE = 23
    __slots__ = ("decision", "proof")
    FIELDS = _fields(decision=DECISION, proof=KEY)


class Away(Have):
    TYPE = 24
    __slots__ = ()


class Bytes(_Run):
    TYPE = lib.PV_FRAME_BYTES
    __slots__ = ()
    MOST = MAX_RUN


class Zeros(_Run):
    TYPE = lib.PV_FRAME_ZEROS
    __slots__ = ()


class Pull(Bytes):
    TYPE = lib.PV_FRAME_PULL
    __slots__ = ()


class End(_Run):
    TYPE = lib.PV_FRAME_END
    __slots__ = ()

    def check(self) -> None:
        if self.count:
            raise ValueError(f"{self.count} pages at the end of a round")


class Request(Bytes):
    TYPE = lib.PV_FRAME_REQUEST
    __slots__ = ()


CONTROL: tuple[type[Frame], ...] = (
    Hello, Welcome, Refuse, Join, Joined, Source, Large, Round, RoundDone, States, Prepare, Ready, Commit, Taken,
    Complete, Done, Cancel, Ping, Pong, Resume, Resumed, Have, Died, Away,
)  # fmt: skip
RUNS: tuple[type[Frame], ...] = (Bytes, Zeros, Pull, End, Request)
BY_TYPE = {kind.TYPE: kind for kind in (*CONTROL, *RUNS)}


def encode(frame: Frame, sequence: int) -> bytes:
    """All bytes of a frame, which is the `sequence`th of its connection, from 0 on. Raises ProtocolError."""
    body = frame.body()
    sequence &= _MAX_32
    raw = _HEAD.pack(MAGIC, VERSION, frame.TYPE, 0, len(body), sequence, 0) + body
    return raw[:16] + checksum(raw).to_bytes(8, "little") + raw[HEAD_SIZE:]


class Decoder:
    """Bytes of one connection in, frames out. Holds no more than one frame at a time; after a ProtocolError it is of no
    use any more. sequence: of the next frame, modulo 2^32."""

    def __init__(self, allowed: tuple[type[Frame], ...] = (*CONTROL, *RUNS), sequence: int = 0) -> None:
        self._allowed = {kind.TYPE for kind in allowed}
        self._held = bytearray()
        self._kind: type[Frame] | None = None
        self._size = HEAD_SIZE
        self.sequence = sequence

    @property
    def wants(self) -> int:
        """Bytes up to the end of the header, or of the frame: who feeds no more never has some of what follows."""
        return self._size - len(self._held)

    @property
    def between(self) -> bool:
        """No frame has been begun."""
        return not self._held

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """Takes all of data; each frame that ends in it. Raises ProtocolError for the first thing that is wrong, as
        early as it can be seen."""
        view = memoryview(data).cast("B")
        while view:
            part = view[: self.wants]
            self._held += part
            view = view[len(part) :]
            if self._kind is None:
                self._look_at_head()
            if self._kind is not None and not self.wants:
                yield self._whole(self._kind)

    def _look_at_head(self) -> None:
        held = self._held
        if held[:4] != MAGIC[: len(held)]:
            raise ProtocolError("what came is not a frame of pyvmm's migration")
        if len(held) > 4 and held[4] != VERSION:
            raise ProtocolError(f"the other side speaks protocol version {held[4]}, and this pyvmm version {VERSION}")
        if len(held) > 5 and held[5] not in self._allowed:
            known = BY_TYPE.get(held[5])
            raise ProtocolError(f"{known.name() if known else f'a frame of type {held[5]}'} cannot come here")
        if len(held) < HEAD_SIZE:
            return
        _, _, number, flags, length, sequence, _ = _HEAD.unpack_from(held)
        kind = BY_TYPE[number]
        if flags:
            raise ProtocolError(f"{kind.name()}: flags {flags:#x} are not known")
        if length > kind.most():
            raise ProtocolError(f"{kind.name()}: a body of {length} bytes, {kind.most()} at most")
        if sequence != self.sequence:
            raise ProtocolError(f"{kind.name()}: frame {sequence} comes where {self.sequence} should")
        self._kind, self._size = kind, HEAD_SIZE + length

    def _whole(self, kind: type[Frame]) -> Frame:
        held = self._held
        found = int.from_bytes(held[16:24], "little")
        held[16:24] = bytes(8)
        if checksum(held) != found:
            raise ProtocolError(f"{kind.name()}: damaged on its way: its checksum is wrong")
        frame = kind.decode(bytes(held[HEAD_SIZE:]))
        self._held, self._kind, self._size = bytearray(), None, HEAD_SIZE
        self.sequence = (self.sequence + 1) & _MAX_32
        return frame
