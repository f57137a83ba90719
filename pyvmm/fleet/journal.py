# journal.py: what a fleet's daemon has seen and decided: a JSON object a line. Bytes; seconds since 1970.
"""`Journal`."""

from __future__ import annotations

import json
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.fleet.demand import Demand
    from pyvmm.fleet.plan import Target

MOST = 32 << 20
"""Then it goes on in a new file, and the one before is kept as NAME.1."""


class Journal:
    """At `path`, which is appended to. A full disk ends no fleet: what cannot be written is not."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close())

    def close(self) -> None:
        """Twice is once."""
        self._file.close()

    def write(self, event: str, **fields: object) -> None:
        """One line."""
        try:
            if self._file.tell() > MOST:
                self._file.close()
                os.replace(self._path, f"{self._path}.1")
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
            self._file.write(json.dumps({"at": round(time.time(), 3), "event": event} | fields).encode() + b"\n")
        except (OSError, ValueError):
            pass

    def decision(self, state: str, vms: list[Demand], targets: list[Target]) -> None:
        """A line for each VM's demand, which `pyvmm host simulate --trace` reads, and one for all targets."""
        for vm in vms:
            self.write(
                "demand",
                vm=vm.name,
                **vm.settings,
                resident=vm.resident,
                swapped=vm.swapped,
                ballooned=vm.ballooned,
                refaults=round(vm.refaults, 1),
                classes=None if vm.classes is None else vm.classes.as_dict(),
            )
        told = {target.name: [target.entitlement, target.ceiling, target.balloon] for target in targets}
        self.write("targets", state=state, targets=told)
