# ksm.py: the kernel's own merging of equal pages (Documentation/admin-guide/mm/ksm.rst): a setting of the whole host.
"""`ksm_running()`: within its `with` the kernel merges. `settled()`: it has. `Figures`, `footprint()`, `freed_here()`:
what it says."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager, suppress

from pyvmm._native import ffi
from pyvmm.errors import HostError
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pyvmm.memory import GuestMemory

FOLDER = "/sys/kernel/mm/ksm"
QUICK = {"pages_to_scan": 20_000, "sleep_millisecs": 10}
"""How the kernel scans where we start it: what was chosen is merged within seconds."""
ROUNDS, QUIET = 6, 4
"""Of the kernel's scans until a page that does not change is merged: for its checksum, a place in a tree, a match, each
of which may have to wait for one scan more, where somebody works with the page."""
_PATIENCE = 30.0
_TICK = 0.02


def read(name: str) -> int:
    """A setting or figure. Raises HostError where the kernel has none."""
    try:
        with open(f"{FOLDER}/{name}") as file:
            return int(file.read())
    except (OSError, ValueError):
        raise HostError(f"this kernel does not merge pages: there is no {FOLDER}/{name}") from None


class Figures(Record):
    """Of the whole host, in pages. shared: that several use; sharing: that were freed for them; scans: through all that
    may be merged. merging: of this process, that are merged or stand for others. What has gone is in them until the
    kernel comes by the next time: see footprint() for what memory really takes."""

    __slots__ = ("merging", "scans", "shared", "sharing")

    def __init__(self) -> None:
        self.shared, self.sharing, self.scans = read("pages_shared"), read("pages_sharing"), read("full_scans")
        self.merging = 0
        with suppress(OSError), open("/proc/self/ksm_merging_pages") as file:  # since 6.0
            self.merging = int(file.read())


def freed_here() -> int:
    """Pages that merging has freed of this process, as far as can be told: of all that is merged, each process has its
    share in what that has freed."""
    found = Figures()
    return found.merging * found.sharing // max(found.shared + found.sharing, 1)


def footprint(memory: GuestMemory) -> int:
    """Bytes of the host's that the RAM in the guest's mapping takes: a page that several use counts with its share, in
    each process that has it (Pss). What is aside or in the swap file is not in it."""
    start = int(ffi.cast("uintptr_t", memory.base))
    end, total, inside = start + memory.size, 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            name, _, rest = line.partition(" ")
            if name == "Pss:" and inside:
                total += int(rest.split()[0]) * 1024
            elif not name.endswith(":"):
                first, _, last = name.partition("-")
                inside = start <= int(first, 16) and int(last, 16) <= end
    return total


def why_not() -> str:
    """Nothing where the kernel merges now; else what is missing, in a line."""
    try:
        run = read("run")
    except HostError as error:
        return str(error)
    if run == 1:
        return ""
    return f"the kernel's merging of pages is off: run 'echo 1 | sudo tee {FOLDER}/run', or have it started (--ksm)"


@contextmanager
def ksm_running(start: bool = False, how: Mapping[str, int] = QUICK, patience: float = _PATIENCE) -> Iterator[None]:
    """Within its `with` the kernel merges. start: if it does not, it is told to, and how; all its settings are put back
    at the end, and what was merged stays so. Only one process does that at a time, others wait, `patience` seconds.

    Raises HostError where it does not and is not to be started, or we may not.
    """
    if not start:
        if missing := why_not():
            raise HostError(missing)
        yield
        return
    with _alone(patience):
        before = {name: read(name) for name in (*how, "run")}
        try:
            if before["run"] != 1:
                for name, value in (dict(how) | {"run": 1}).items():
                    _write(name, value)
            yield
        finally:
            for name, value in before.items():
                if read(name) != value:
                    _write(name, value)


def _write(name: str, value: int) -> None:
    try:
        with open(f"{FOLDER}/{name}", "w") as file:
            file.write(str(value))
    except OSError as error:
        raise HostError(
            f"{FOLDER}/{name} cannot be set ({os.strerror(error.errno or 0)}): be root, or set it"
        ) from None


@contextmanager
def _alone(patience: float) -> Iterator[None]:
    """Two that put back what they found would leave what the other had set."""
    end = time.monotonic() + patience
    try:
        file = open(f"{FOLDER}/run")  # noqa: SIM115 (closed below)
    except OSError:
        raise HostError(f"this kernel does not merge pages: there is no {FOLDER}") from None
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise HostError("another process has had the kernel merge pages for long: try later") from None
                time.sleep(_TICK)
        yield


def settled(seconds: float = _PATIENCE) -> bool:
    """Waits until the kernel has been through ROUNDS times and found no more in QUIET. False if it takes longer."""
    end, before = time.monotonic() + seconds, Figures()
    goal = before.scans + ROUNDS
    while time.monotonic() < end:
        now = Figures()
        if (now.sharing, now.merging) != (before.sharing, before.merging):
            before, goal = now, max(goal, now.scans + QUIET)
        elif now.scans >= goal:
            return True
        time.sleep(_TICK)
    return False
