# snapshot: a VM at rest: the file that holds its state and its RAM. Knows GuestMemory, State and Runs, never the VM.
"""`Snapshot` reads such a file, `pyvmm.snapshot.writer.Writer` makes one, which no restore has to import."""

from __future__ import annotations

from pyvmm.snapshot.reader import Snapshot

__all__ = ["Snapshot"]
