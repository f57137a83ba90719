# rawfile.py: a block device's sectors in a file, or on a block device, byte for byte. Units: bytes; sectors of 512.
"""`RawFile`: a `Backend` (pyvmm.devices.virtio.block)."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from pyvmm._native import lib
from pyvmm.errors import BadInput, HostError, check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.virtio.queue import Buffers

SECTOR = 512
PIECE = 256 << 10
"""Bytes that are copied at once."""
_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL)
"""Of a file system that has no holes."""


class RawFile:
    """The file, opened once; it is locked from activate() to release(), so that no two VMs write to it.

    Raises BadInput, in one line, for what cannot be a disk.
    """

    def __init__(self, path: str, read_only: bool = False) -> None:
        self.read_only = read_only
        self.id = os.path.basename(path)[:20]
        self._path = path
        self._locked = self._unsure = False
        try:
            self._fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "no file has such a name"
            raise BadInput(f"disk {path}: {why}") from None
        try:
            self.sectors = self._size() // SECTOR
        except BaseException:
            os.close(self._fd)
            raise

    def _size(self) -> int:
        mode = os.fstat(self._fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise BadInput(f"disk {self._path}: neither a file nor a block device")
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if not size or size % SECTOR:
            raise BadInput(f"disk {self._path}: {size} bytes are not whole sectors: make it a multiple of {SECTOR}")
        return size

    def activate(self) -> None:
        if self._locked:
            return
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if self.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            use = "writes to it" if self.read_only else "uses it"
            raise BadInput(f"disk {self._path} is in use: another VM {use}, end that first") from None
        except OSError as error:
            raise BadInput(f"disk {self._path} cannot be locked: {error.strerror}") from None
        self._locked = True

    def release(self) -> None:
        if self._locked:
            if not self.read_only:  # who goes on may be another host, which sees what is on the disk
                try:
                    self.flush()
                except OSError as error:
                    raise HostError(f"disk {self._path} cannot be written out: {error.strerror}") from None
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self._locked = False

    def read(self, sector: int, into: Buffers) -> None:
        offset = sector * SECTOR
        for at in range(0, into.size, PIECE):
            part = into.part(at, PIECE)
            part.write(self.get(offset + at, part.size))

    def write(self, sector: int, source: Buffers) -> None:
        offset = sector * SECTOR
        for at in range(0, source.size, PIECE):
            self.put(source.part(at, PIECE).read(), offset + at)

    def get(self, offset: int, size: int) -> bytes:
        """`size` bytes of the file, by one read. Raises OSError."""
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise OSError(errno.EIO, "the file has become shorter")
        return data

    def put(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """The other way round."""
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self._fd, rest, offset)
            rest, offset = rest[done:], offset + done

    def flush(self) -> None:
        # The kernel tells an error once, and what it stood for is lost: to say later that all is well would be a lie.
        if self._unsure:
            raise OSError(errno.EIO, "an earlier flush has failed")
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._unsure = True
            raise

    def figures(self) -> dict[str, int]:
        return {}

    def require_lasting(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def discard(self, sector: int, count: int) -> None:
        self._clear(lib.PV_FILE_HOLE, sector, count)  # where that cannot be, they stay as they are

    def write_zeroes(self, sector: int, count: int, unmap: bool) -> None:
        if not self._clear(lib.PV_FILE_HOLE if unmap else lib.PV_FILE_ZEROS, sector, count):
            zeros = bytes(min(PIECE, count * SECTOR))
            for at in range(0, count * SECTOR, PIECE):
                self.put(zeros[: count * SECTOR - at], sector * SECTOR + at)

    def _clear(self, how: int, sector: int, count: int) -> bool:
        result = lib.pv_clear_file(self._fd, how, sector * SECTOR, count * SECTOR)
        if -result in _CANNOT:
            return False
        check(result, "fallocate", disk=self._path)
        return True

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
