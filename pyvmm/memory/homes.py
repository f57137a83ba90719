# homes.py: where a page can be while it is not in the guest, and homes written in Python. Units: pages of 4 KiB.
"""`HOMES`: their names. `Home`: subclass it to say where pages come from; a dozen lines make a swap of your own."""

from __future__ import annotations

import errno

from pyvmm._native import ffi, lib
from pyvmm.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm._native import CData

HOMES = ("present", "zero", "aside", "file", "swap", "peer", "balloon", "shared")
"""Names by number (PV_HOME_*). "present" is no home: the page is in the guest, or was never touched and reads as zeros.
"zero" and "aside" (a staging area of our own RAM) are the engine's; the others are whoever's is put there."""

LOCATOR_LIMIT = 1 << (64 - lib.PV_PAGE_LOCATOR_SHIFT)
"""A locator is smaller than this: 52 bits."""


class Home:
    """What serves one of HOMES, in Python: for tests, fault injection and first drafts. C is for what is to be fast.

    The methods are called on the engine's thread or on the caller's of `Engine.install` and `store`, with the block
    locked: they must not touch guest memory. Whatever one raises is a failure: an OSError keeps its errno, all else is
    EIO. A vCPU waits meanwhile, for the GIL too. So what holds the GIL must not wait for the engine: while such a home
    has pages, use GuestMemory.read() for memory that was never touched, not a view of it.
    """

    error: BaseException | None = None
    """What the last failure was."""

    def fetch(self, page: int, locators: Sequence[int]) -> bytes:
        """The bytes of len(locators) pages from `page` on, each found by its locator."""
        raise NotImplementedError

    def store(self, page: int, data: bytes) -> Sequence[int]:
        """Keeps the pages from `page` on; says by which locators they are found again. For homes that take some."""
        raise OSError(errno.EROFS, "this home takes no pages")

    def forget(self, page: int, locators: Sequence[int]) -> None:
        """The pages are back in the guest: their places can be used again."""


class Native:
    """A Home as C sees it. `struct`: a struct pv_home; keep this for as long as the engine may call it."""

    def __init__(self, home: Home) -> None:
        self._handle = ffi.new_handle(home)
        self.struct = ffi.new("struct pv_home *")
        self.struct.fetch = lib.python_fetch
        self.struct.store = lib.python_store
        self.struct.forget = lib.python_forget
        self.struct.self = self._handle


def _locators(words: CData, count: int) -> list[int]:
    return [word >> lib.PV_PAGE_LOCATOR_SHIFT for word in ffi.unpack(words, count)]


def _failed(home: Home, error: BaseException) -> int:
    home.error = error
    number = error.errno if isinstance(error, OSError) else None
    return -number if isinstance(number, int) and number in errno.errorcode else -errno.EIO


# BaseException below: nothing may travel into C, and KeyboardInterrupt comes to the main thread only.


@ffi.def_extern(name="python_fetch", error=-errno.EIO)
def _fetch(handle: CData, page: int, count: int, words: CData, to: CData) -> int:
    home: Home = ffi.from_handle(handle)
    try:
        data = home.fetch(page, _locators(words, count))
        if len(data) != count * PAGE_SIZE:
            raise ValueError(f"fetch({page}) gave {len(data)} bytes for {count} pages")
    except BaseException as error:
        return _failed(home, error)
    ffi.memmove(to, data, len(data))
    return 0


@ffi.def_extern(name="python_store", error=-errno.EIO)
def _store(handle: CData, page: int, count: int, source: CData, locators: CData) -> int:
    home: Home = ffi.from_handle(handle)
    try:
        found = home.store(page, bytes(ffi.buffer(source, count * PAGE_SIZE)))
        if len(found) != count or not all(0 <= locator < LOCATOR_LIMIT for locator in found):
            raise ValueError(f"store({page}) gave {len(found)} locators for {count} pages, or one beyond 52 bits")
    except BaseException as error:
        return _failed(home, error)
    locators[0:count] = list(found)
    return 0


@ffi.def_extern(name="python_forget")
def _forget(handle: CData, page: int, count: int, words: CData) -> None:
    home: Home = ffi.from_handle(handle)
    try:
        home.forget(page, _locators(words, count))
    except BaseException as error:
        _failed(home, error)
