# uffd.py: a userfaultfd for the probes, one method an ioctl (Documentation/admin-guide/mm/userfaultfd.rst).
"""`Uffd`: opened in whatever way this host allows. Closing it lets every thread go on that waits in a fault."""

from __future__ import annotations

import os
import select
import threading
from contextlib import contextmanager

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, check
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory.uffd import open_uffd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

ANSWER_LIMIT = 0.5
"""Seconds within which a fault must be reported, and a thread go on after it was answered."""


class Uffd:
    """A userfaultfd with the `features` (UFFD_FEATURE_*). Raises KernelError: EINVAL where the kernel lacks one."""

    def __init__(self, *features: str) -> None:
        self.fd = open_uffd()
        wanted = 0
        for name in features:
            wanted |= getattr(lib, name)
        try:
            self._ioctl("UFFDIO_API", "struct uffdio_api", [lib.UFFD_API, wanted, 0], features="|".join(features))
        except BaseException:
            self.close()
            raise

    def _ioctl(self, name: str, struct: str, fields: object, **shown: object) -> None:
        check(lib.pv_ioctl(self.fd, getattr(lib, name), ffi.new(f"{struct} *", fields)), name, **shown)

    def register(self, address: int, mode: str, size: int = PAGE_SIZE) -> None:
        """`mode`: MISSING, WP or MINOR."""
        flag = getattr(lib, f"UFFDIO_REGISTER_MODE_{mode}")
        self._ioctl("UFFDIO_REGISTER", "struct uffdio_register", [[address, size], flag, 0], mode=mode, size=size)

    def copy(self, to: int, source: int, size: int = PAGE_SIZE) -> None:
        """Fills absent pages with a copy."""
        self._ioctl("UFFDIO_COPY", "struct uffdio_copy", [to, source, size, 0, 0], size=size)

    def move(self, to: int, source: int, size: int = PAGE_SIZE) -> None:
        """Fills absent pages with those at `source`, which lacks them then."""
        self._ioctl("UFFDIO_MOVE", "struct uffdio_move", [to, source, size, 0, 0], size=size)

    def carry_on(self, address: int, size: int = PAGE_SIZE) -> None:
        """UFFDIO_CONTINUE: maps what the file already has there."""
        self._ioctl("UFFDIO_CONTINUE", "struct uffdio_continue", [[address, size], 0, 0], size=size)

    def protect(self, address: int, size: int = PAGE_SIZE, on: bool = True) -> None:
        """Write-protects pages, or lets them be written again."""
        mode = lib.UFFDIO_WRITEPROTECT_MODE_WP if on else 0
        self._ioctl("UFFDIO_WRITEPROTECT", "struct uffdio_writeprotect", [[address, size], mode], size=size, on=on)

    def fault(self) -> tuple[int, int]:
        """The next fault: UFFD_PAGEFAULT_FLAG_* and address. Raises HostError where none comes in time."""
        ready = select.poll()
        ready.register(self.fd, select.POLLIN)
        if not ready.poll(ANSWER_LIMIT * 1000):
            raise HostError("the fault was not reported")
        flags, address = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        check(lib.pv_uffd_read(self.fd, flags, address), "read", file="userfaultfd")
        return int(flags[0]), int(address[0])

    def close(self) -> None:
        """Ends all registrations and wakes all who wait."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def touching(self, touch: Callable[[], object]) -> Iterator[None]:
        """Runs `touch`, which may wait in a fault, in another thread; the body answers the fault.

        Raises HostError where the thread does not go on after the answer; the userfaultfd is then closed.
        """
        thread = threading.Thread(target=touch, name="trial fault")
        thread.start()
        try:
            yield
            thread.join(ANSWER_LIMIT)
            if thread.is_alive():
                raise HostError("the thread that touched the page did not go on")
        except BaseException:
            self.close()  # lets it go on
            raise
        finally:
            thread.join()
