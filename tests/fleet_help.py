# fleet_help.py: fleets of real guests, for tests: `pyvmm host up` of a file, and what the kernel says of its VMs.
from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from control_help import PATIENCE, until

import pyvmm
from pyvmm.control.client import Client
from pyvmm.errors import BadInput, ControlError


class Fleet:
    """`pyvmm host up` of a file, in a folder of its own. patience: seconds for VMs to begin, and the daemon to end."""

    patience = PATIENCE

    def __init__(self, folder):
        self.folder = folder
        self.file = folder / "x.toml"
        self.run = folder / "r"
        self.process = None
        self.pids = set()

    def write(self, budget, *vms, interval=0.1):
        lines = ["[host]", f'budget = "{budget}"', f"interval = {interval}"]
        for vm in vms:
            given = {"guest": "verify", "memory": "32M", "options": ["--pages", "4k"]} | vm
            lines += ["[[vm]]", *(f"{key} = {json.dumps(value)}" for key, value in given.items())]
        self.file.write_text("\n".join(lines))

    def up(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", "host", "up", str(self.file), "--folder", str(self.run)],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def command(self, action, *more):
        return subprocess.run(
            [sys.executable, "-m", "pyvmm", "host", action, "--folder", str(self.run), *more],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE * 3, check=False,
        )  # fmt: skip

    def status(self):
        """None as long as nobody answers."""
        try:
            with Client(str(self.run / "daemon.sock")) as client:
                found = client.ask("status")
        except (BadInput, ControlError):
            return None
        self.pids |= {vm["pid"] for vm in found["vms"]} - {None}
        return found

    def vms(self):
        found = self.status()
        return {vm["name"]: vm for vm in found["vms"]} if found else {}

    def states(self):
        return {name: vm["state"] for name, vm in self.vms().items()}

    def running(self, *names):
        until(lambda: self.states() and all(self.states().get(name) == "running" for name in names), self.patience)
        return self.vms()

    def ask(self, name, do, **arguments):
        with Client(str(self.run / f"{name}.vm.sock")) as client:
            return client.ask(do, **arguments)

    def count(self, name):
        return self.ask(name, "status")["progress"]["count"]

    def stop(self):
        with Client(str(self.run / "daemon.sock")) as client:
            client.ask("stop")
        return self.ended()

    def ended(self):
        self.process.communicate(timeout=self.patience)
        return self.process.returncode

    def close(self):
        """Nothing is left, however the test has ended: not by the daemon's word."""
        self.status()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.communicate()
        for pid in self.pids:
            with suppress(ProcessLookupError, FileNotFoundError):
                if str(self.run).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


def taken(pid):
    """Bytes in memory of what is registered with userfaultfd: the guest's RAM, and what is aside."""
    total = size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            size = int(line.split()[1]) << 10
        elif line.startswith("VmFlags:") and "um" in line.split():
            total += size
    return total


def gone(pid):
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        ready = select.select([pidfd], [], [], PATIENCE)[0]
        os.close(pidfd)
        return bool(ready)
    return True


@contextmanager
def fleet_in(folder, monkeypatch):
    """A Fleet of which nothing is left behind."""
    monkeypatch.setenv("PYTHONPATH", str(Path(pyvmm.__file__).parents[1]))
    made = Fleet(folder)
    try:
        yield made
    finally:
        made.close()
