# snapshot: a VM at rest: the file that holds its state and its RAM. Knows GuestMemory, State and Runs, never the VM.
"""`Writer` makes a snapshot file, `Snapshot` reads one; pyvmm.snapshot.inspect counts and checks what is in it."""

from __future__ import annotations

from pyvmm.snapshot.reader import Home, Snapshot
from pyvmm.snapshot.writer import Writer

__all__ = ["Home", "Snapshot", "Writer"]
