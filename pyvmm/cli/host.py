# host.py: `pyvmm host`: a fleet of guests on one host: up, status, top, stop, and policies on paper (host_simulate.py).
"""The command. Times in seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from pyvmm.control.client import Client
from pyvmm.errors import EXIT_SIGNAL, BadInput, ControlError
from pyvmm.fleet.folder import Folder, default, only

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

    from pyvmm.cli.parse import Arguments

_DETACHING = 20.0
_ENDING = 60.0
"""For all VMs of a fleet to end."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIMULATE = ("vms", "trace", "policy", "budget")


def run(args: Arguments) -> int:
    """The command: 0; 1 where a VM died or did not fit; 2 for bad input, and where no daemon is; 128+n after signal n,
    which ends the daemon alone."""
    if args.action == "simulate":
        from pyvmm.cli.host_simulate import run as simulate

        return simulate(args)
    for name in _SIMULATE:
        if getattr(args, name) is not None:
            raise BadInput(f"--{name} is for `pyvmm host simulate`")
    if args.detach and args.action != "up":
        raise BadInput("--detach is for `pyvmm host up`")
    return {"up": _up, "status": _status, "top": _top, "stop": _stop}[args.action](args)


# ---- up ----


def _up(args: Arguments) -> int:
    if args.fleet is None:
        raise BadInput("say which fleet: pyvmm host up fleet.toml")
    from pyvmm.fleet.config import load

    fleet = load(args.fleet)
    folder = Folder(_path(args))
    if args.detach:
        return _detach(args, folder)
    from pyvmm.fleet.daemon import Daemon

    daemon = Daemon(fleet, folder, lambda line: print(f"pyvmm: {line}", file=sys.stderr, flush=True))
    caught: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        daemon.leave()

    before = {number: signal.signal(number, leave) for number in _SIGNALS}
    try:
        status = daemon.run()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if caught:
        print("pyvmm: the VMs run on: `pyvmm host stop` ends them, `pyvmm host up` finds them", file=sys.stderr)
        return EXIT_SIGNAL + caught[0]
    return status


def _detach(args: Arguments, folder: Folder) -> int:
    """A process of its own does it; returns when that answers."""
    log = os.path.join(folder.path, "daemon.log")
    command = [sys.executable, "-m", "pyvmm", "host", "up", os.path.abspath(args.fleet), "--folder", folder.path]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    end = time.monotonic() + _DETACHING
    while time.monotonic() < end:
        if (status := process.poll()) is not None:
            with open(log, encoding="utf-8", errors="replace") as said:
                sys.stderr.write(said.read())
            return status
        try:
            with Client(folder.socket) as client:
                if client.ask("status")["pid"] == process.pid:
                    print(f"pyvmm: process {process.pid}, in {folder.path}", file=sys.stderr)
                    process.returncode = 0  # it is left to run
                    return 0
        except BadInput:
            time.sleep(0.02)
    process.kill()
    process.wait()
    raise ControlError(f"the daemon did not answer within {_DETACHING:g} s: {log}")


# ---- what others ask ----


def _path(args: Arguments) -> str:
    """The run folder."""
    if args.folder is not None:
        return str(args.folder)
    if args.fleet is None:
        return only()
    return default(os.path.basename(args.fleet).removesuffix(".toml"))


def _client(folder: Folder) -> Client:
    try:
        return Client(folder.socket, _ENDING)
    except BadInput:
        raise BadInput(f"no daemon in {folder.path}: `pyvmm host up FILE` starts one, and finds VMs that run") from None


def _status(args: Arguments) -> int:
    with _client(Folder(_path(args), make=False)) as client:
        found = client.ask("status")
    if args.json:
        print(json.dumps(found))
        return 0
    from pyvmm.cli.host_table import show

    show(found)
    return 0


def _top(args: Arguments) -> int:
    from pyvmm.cli.host_table import live

    with _client(Folder(_path(args), make=False)) as client:

        def look() -> dict[str, Any]:
            return client.ask("status")

        live(look)
    return 0


def _stop(args: Arguments) -> int:
    folder = Folder(_path(args), make=False)
    try:
        client = Client(folder.socket, _ENDING)
    except BadInput:
        return _stop_alone(folder)
    with client:
        client.ask("stop")
    return 0


def _stop_alone(folder: Folder) -> int:
    """Of a fleet whose daemon has gone."""
    from pyvmm.fleet.config import Guest
    from pyvmm.fleet.daemon import end
    from pyvmm.fleet.member import Member

    members = [Member(Guest(name, "", 1), folder) for name in folder.names()]
    running = [member for member in members if member.vmm.running()]
    if not running:
        raise BadInput(f"nothing runs in {folder.path}")
    try:
        end(running)
    finally:
        for member in running:
            member.disconnect()
            member.vmm.close()
    return 0
