# capture.py: what goes over a migration's connections, kept in a file: frames, and of pages the frames without the
# bytes. It holds the secrets of that migration, which are of no use after it: its mode is 0600. Times in ns.
"""`Recorder` writes a capture, `entries()` reads one; `describe()` makes people's words of a frame."""

from __future__ import annotations

import os
import struct
import threading
import time

from pyvmm._native import ffi
from pyvmm.errors import BadInput, HostError, ProtocolError
from pyvmm.migration.fields import Fixed, Rest
from pyvmm.migration.frames import (
    BY_TYPE,
    CHANNELS,
    DECISIONS,
    FEATURES,
    HEAD_SIZE,
    MODES,
    Decoder,
    Hello,
    Join,
    Joined,
    _Bits,
)
from pyvmm.migration.shape import decode_shape
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from pyvmm._native import CData
    from pyvmm.migration.frames import Frame

MAGIC = b"\x93PVCAP\n\0"
VERSION = 1
MAX_FRAME = HEAD_SIZE + max(kind.most() for kind in BY_TYPE.values())
DEFAULT_LIMIT = 256 << 20
_FILE = struct.Struct("<8sII")
_ENTRY = struct.Struct("<QBBHI")


class Recorder:
    """Writes a capture into a file, which is made anew. Any thread may note. A migration never fails for its capture:
    what cannot be written, and what is beyond `limit` bytes, is left out and counted in `lost`; `error`: why. Raises
    HostError."""

    def __init__(self, path: str, limit: int = DEFAULT_LIMIT) -> None:
        self.lost = 0
        self.error = ""
        self._left = limit
        self._lock = threading.Lock()
        self._began = time.monotonic_ns()
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            os.fchmod(fd, 0o600)  # it may have been there
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}") from None
        self._file = os.fdopen(fd, "wb")
        self._write(_FILE.pack(MAGIC, VERSION, 0))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is left; twice is once."""
        with self._lock:
            try:
                self._file.close()
            except OSError as error:
                self.error = self.error or f"{error.strerror}"

    def note(self, out: bool, channel: int, raw: bytes, at: int | None = None) -> None:
        """A frame went out, or came in, on a channel. at: CLOCK_MONOTONIC; None: now."""
        since = max(0, (time.monotonic_ns() if at is None else at) - self._began)
        with self._lock:
            self._write(_ENTRY.pack(since, not out, channel, 0, len(raw)) + raw)

    def note_runs(self, out: bool, channel: int, stream: CData) -> None:
        """What C has noted of a `struct pv_stream`, which is empty then."""
        for number in range(stream.notes_used):
            noted = stream.notes[number]
            self.note(out, channel, bytes(ffi.buffer(ffi.addressof(noted, "frame"))), noted.at)
        self.lost += stream.notes_lost
        stream.notes_used = stream.notes_lost = 0

    def _write(self, data: bytes) -> None:
        if self.error or self._file.closed or len(data) > self._left:
            self.lost += 1
            self._left = 0  # so that nothing follows a gap
            return
        self._left -= len(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.error = f"{error.strerror}"
            self.lost += 1


class Entry(Record):
    """at: ns since the capture began; out: it went out from the side that recorded, else came in; channel: number;
    sequence: of the frame; frame: None where it is damaged, and `error` says how."""

    __slots__ = ("at", "channel", "error", "frame", "out", "sequence")

    def __init__(self, at: int, out: bool, channel: int, sequence: int, frame: Frame | None, error: str) -> None:
        self.at = at
        self.out = out
        self.channel = channel
        self.sequence = sequence
        self.frame = frame
        self.error = error


def entries(path: str) -> Iterator[Entry]:
    """Each frame of a capture, one at a time. Raises BadInput for a file that is none, or where it is damaged between
    frames; a damaged frame is an Entry with `error`."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    with file:
        try:
            head = file.read(_FILE.size)
            if len(head) < _FILE.size or head[:8] != MAGIC:
                raise BadInput(f"{path}: not a capture of a migration")
            if (version := _FILE.unpack(head)[1]) != VERSION:
                raise BadInput(f"{path}: a capture of version {version}, and this pyvmm reads version {VERSION} alone")
            at = _FILE.size
            while row := file.read(_ENTRY.size):
                if len(row) < _ENTRY.size:
                    raise BadInput(f"{path}: truncated at byte {at}")
                since, inward, channel, filler, size = _ENTRY.unpack(row)
                if inward > 1 or filler or not HEAD_SIZE <= size <= MAX_FRAME:
                    raise BadInput(f"{path}: damaged at byte {at}")
                raw = file.read(size)
                if len(raw) < size:
                    raise BadInput(f"{path}: truncated at byte {at}")
                yield _entry(since, not inward, channel, raw)
                at += _ENTRY.size + size
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}") from None


def _entry(at: int, out: bool, channel: int, raw: bytes) -> Entry:
    sequence = int.from_bytes(raw[12:16], "little")
    decoder = Decoder(sequence=sequence)
    try:
        found = list(decoder.feed(raw))
    except ProtocolError as error:
        return Entry(at, out, channel, sequence, None, str(error))
    if len(found) != 1 or not decoder.between:
        return Entry(at, out, channel, sequence, None, "not one whole frame")
    return Entry(at, out, channel, sequence, found[0], "")


def _name(table: dict[str, int], number: int) -> str:
    return next((name for name, value in table.items() if value == number), str(number))


def describe(frame: Frame) -> dict[str, object]:
    """Its fields for people and programs: names for numbers, how much for bytes; secrets are left out."""
    shown: dict[str, object] = {}
    for name, kind in frame.FIELDS.items():
        value = getattr(frame, name)
        label = name
        if isinstance(kind, Fixed) and kind.secret:
            continue
        if name == "mode":
            value = _name(MODES, value)
        elif name == "decision":
            value = _name(DECISIONS, value)
        elif name == "kind" and isinstance(frame, (Join, Joined)):
            value = _name(CHANNELS, value)
        elif name == "features":
            value = [feature for feature, bit in FEATURES.items() if value & bit]
        elif name == "shape" and isinstance(frame, Hello):
            value = _shape(value)
        elif name == "bits" and isinstance(frame, _Bits):
            label, value = "set", int.from_bytes(value, "little").bit_count()
        elif name == "checksum":
            value = f"{value:016x}"
        elif isinstance(kind, Rest):
            value = len(value)
        elif isinstance(kind, Fixed):
            value = value.hex()
        shown[label] = value
    return shown


def _shape(raw: bytes) -> object:
    try:
        shape = decode_shape(raw)
    except ProtocolError as error:
        return str(error)
    return {name: getattr(shape, name) for name in shape.__slots__}
