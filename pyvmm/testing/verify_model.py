# verify_model.py: what the guest `verify` (guest/verify.c) has in its memory, by its progress page; for tests.
"""`check_memory`: is every page of a stopped `verify` as it must be? `ram_hash`: one value for all RAM."""

from __future__ import annotations

import hashlib
from functools import partial

from pyvmm.errors import BadInput
from pyvmm.layout import BLOCK_SIZE
from pyvmm.testing.passes_model import Passes, versions
from pyvmm.testing.stamps import GOLDEN, WORDS, WrongPage, keys, mix, words_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pyvmm.machine import Progress
    from pyvmm.memory import GuestMemory
    from pyvmm.testing.passes_model import Order
    from pyvmm.testing.stamps import U64


def expected_page(seed: int, page: int, version: int, zeros: int = 0) -> bytes:
    """The 4096 bytes that `page` has in `version`. zeros: the guest's option, per mille."""
    import numpy as np

    numbers = np.full(1, page, np.uint64)
    return words_of(*_contents(zeros, numbers, keys(seed, numbers), np.full(1, version, np.int64))).tobytes()


def version(seed: int, page: int, pass_: int, write: int = 25) -> int:
    """The version of `page` after pass `pass_`: the last pass so far that wrote it. write: the option, per cent."""
    import numpy as np

    return int(versions(keys(seed, np.full(1, page, np.uint64)), np.full(1, pass_, np.int64), write)[0])


def check_memory(
    memory: GuestMemory, progress: Progress, *, write: int = 25, zeros: int = 0, order: Order = "seq"
) -> list[WrongPage]:
    """Compares every page of the guest `verify`, which must not be running, with what it must be; [] is good.

    write, zeros, order: the guest's options; the rest is in its progress. The one page that each vCPU may be about to
    write may have each 8-byte word of its old or its new version. Pages not written for the first time are not looked
    at. Raises StateError where the guest is another one or has not started, BadInput for an option that cannot be.
    """
    if not 0 <= zeros <= 1000:
        raise BadInput(f"zeros={zeros}: this is not an option of the guest verify")
    passes = Passes("verify", progress, write, order)
    newest = max((work.passes for work in progress.work), default=0)
    return passes.check(memory, partial(_contents, zeros), partial(_looks, passes.keys, newest))


def ram_hash(memory: GuestMemory) -> str:
    """BLAKE2b of all RAM and of where it lies, in hexadecimal. The guest must not be running."""
    digest = hashlib.blake2b(digest_size=32)
    for region in memory.regions:
        digest.update(f"{region.gpa.value:x}+{region.size:x};".encode())
        for offset in range(0, region.size, BLOCK_SIZE):
            digest.update(memory.read(region.gpa + offset, min(BLOCK_SIZE, region.size - offset)))
    return digest.hexdigest()


def _contents(zeros: int, numbers: U64, keys: U64, versions: NDArray[np.int64]) -> tuple[U64, U64]:
    """For each page (base, step), as guest/verify.c has them."""
    import numpy as np

    bases = mix(keys + versions.astype(np.uint64))
    steps = np.full(len(keys), GOLDEN, np.uint64)
    if zeros:
        blank = mix(bases) % 1000 < zeros
        bases[blank] = steps[blank] = 0
    return bases, steps


def _looks(keys: U64, newest: int, words: U64, right: U64) -> str:
    """What the first wrong word may come from: zeros, or one of the last 1000 versions of any page."""
    import numpy as np

    word = int(np.flatnonzero(words != right)[0])
    if words[word] == 0:
        return ", looks like zeros"
    base = (words - np.arange(WORDS, dtype=np.uint64) * GOLDEN)[word]
    for version in range(newest, max(newest - 1000, -1), -1):
        pages = np.flatnonzero(mix(keys + version) == base)
        if len(pages):
            return f", looks like version {version} of page {pages[0]}"
    return ""
