# results.py: what the C side's -errno means where a snapshot is read or written, in words.
"""`read_check()`, `write_check()`, `reason()`, `require_codec()`."""

from __future__ import annotations

import errno
import os

from pyvmm._native import lib
from pyvmm.errors import BadInput, HostError, SnapshotError
from pyvmm.snapshot.format import CODECS

_DAMAGED = {
    errno.EBADMSG: "damaged: the checksum of {what} is wrong",
    errno.EILSEQ: "damaged: {what} does not decompress",
    errno.EUCLEAN: "damaged: {what} contradicts its other maps",
    errno.ENODATA: "truncated: it ends before {what}",
    errno.EINVAL: "damaged: {what} cannot be where it is said to be",
}
_LIBRARIES = {"lz4": ("liblz4.so.1", "liblz4-1"), "zstd": ("libzstd.so.1", "libzstd1")}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_codec(codec: str) -> int:
    """The codec's number. Raises BadInput for another name than of CODECS, HostError where its library is not here."""
    if codec not in CODECS:
        raise BadInput(f"no codec {codec!r}: choose one of {', '.join(CODECS)}")
    number = CODECS.index(codec)
    if lib.pv_codec_available(number) < 0:
        library, package = _LIBRARIES[codec]
        raise HostError(f"codec {codec} needs {library}: run 'sudo apt-get install -y {package}', or use codec raw")
    return number


def read_check(result: int, name: str, what: str, codec: str) -> None:
    """Raises for a negative `result` of reading `what` of the snapshot `name`: SnapshotError for a file that is
    damaged, HostError where the host fails."""
    if result >= 0:
        return
    if -result == errno.ELIBACC:
        require_codec(codec)
    if (text := _DAMAGED.get(-result)) is not None:
        raise SnapshotError(f"{name}: {text.format(what=what)}")
    raise HostError(f"{name}: cannot read {what}: {os.strerror(-result)}")


def reason(number: int) -> str:
    """What a positive errno of reading a storage block says, in words."""
    text = _DAMAGED.get(number)
    return os.strerror(number) if text is None else text.format(what="a storage block")


def write_check(result: int, name: str) -> None:
    """Raises HostError for a negative `result` of writing the snapshot `name`."""
    if result >= 0:
        return
    help = "; free some space, or save elsewhere" if -result in _FULL else ""
    raise HostError(f"cannot write snapshot {name}: {os.strerror(-result)}{help}; what was there before is unchanged")
