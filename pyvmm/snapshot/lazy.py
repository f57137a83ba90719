# lazy.py: RAM that is read from a snapshot file when it is touched (technique T3, US9053065B2). The work is in
# cffi_build/filehome.c; the engine's thread does it, without the GIL.
"""`FileHome`: the home FILE of one VM. `fill`: brings the rest, block by block."""

from __future__ import annotations

import errno
import threading

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, FetchError, MemoryAccessError, SnapshotError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE, format_size
from pyvmm.snapshot.results import reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.memory import GuestMemory
    from pyvmm.snapshot.reader import Snapshot


class FileHome:
    """The pages of `snapshot`, and of what it builds on, that `memory` has not touched yet. Owns the snapshot.

    memory: of the same size, and never touched. Raises BadInput otherwise, SnapshotError for a damaged file.
    """

    def __init__(self, snapshot: Snapshot, memory: GuestMemory) -> None:
        if memory.size != snapshot.memory_size:
            raise BadInput(f"{snapshot.name} is of a VM with {format_size(snapshot.memory_size)} of memory")
        self._snapshot = snapshot
        self._memory = memory
        self._filler: threading.Thread | None = None
        self.struct = ffi.new("struct pv_home *")
        self._native = ffi.new("struct pv_file_home *")
        self.struct.fetch, self.struct.self = lib.pv_file_fetch, self._native
        each: Snapshot | None = snapshot
        while each is not None:
            self._native.file[self._native.files] = each.native
            self._native.files += 1
            each = each.parent
        memory.engine.set_native_home("file", self)
        result = memory.engine.call(lib.pv_file_assign, self._native)
        if result == -errno.EEXIST:
            raise BadInput(f"{snapshot.name} is restored into fresh memory: this has been written to")
        if result:
            raise SnapshotError(f"{snapshot.name}: {self.explain(-result)}")

    @property
    def reads(self) -> int:
        """Storage blocks read so far."""
        return int(self._native.reads)

    @property
    def bytes_read(self) -> int:
        """Their bytes, as they are stored."""
        return int(self._native.bytes_read)

    def explain(self, number: int) -> str:
        """What an errno of a failed fetch means."""
        return f"{self._snapshot.name}: {reason(number)}"

    def fill(self, on_failure: Callable[[FetchError], None]) -> None:
        """Brings all that is still in the file, in a thread of its own; a touch of the guest's goes between blocks."""
        self._filler = threading.Thread(target=self._fill, args=(on_failure,), name="snapshot filler", daemon=True)
        self._filler.start()

    def _fill(self, on_failure: Callable[[FetchError], None]) -> None:
        engine, pages, step = self._memory.engine, self._memory.size // PAGE_SIZE, BLOCK_SIZE // PAGE_SIZE
        try:
            for page in range(0, pages, step):
                engine.install(page, min(step, pages - page))
        except FetchError as error:
            on_failure(error)
        except MemoryAccessError:
            pass  # the VM is closed

    def wait(self) -> None:
        """Waits until the filler has ended, where there is one."""
        if self._filler is not None:
            self._filler.join()

    def close(self) -> None:
        """After the engine's end: closes the file."""
        self.wait()
        self._snapshot.close()
