# runner.py: runs benchmarks, each in a process of its own, so that none finds what another one has left: memory,
# threads, modules. Units: seconds.
"""`run()`: one benchmark, to an `Entry`. As a program: what that process does."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from fnmatch import fnmatchcase
from importlib import import_module
from math import isfinite
from typing import TYPE_CHECKING

from pyvmm.bench import BETTER, Result
from pyvmm.bench.catalogue import BENCHMARKS
from pyvmm.bench.results import Entry, result_as_json, results_of
from pyvmm.bench.targets import TARGETS, verdicts
from pyvmm.errors import PyvmmError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PATIENCE = 3600
"""In which any benchmark has ended."""
_CLEANING = 20
"""In which one that is interrupted has put away what it made."""
_PR_SET_PDEATHSIG = 1


def run(name: str, quick: bool, told: Callable[[float], object], every: float = 1.0) -> Entry:
    """Measures; `told` is called now and then with the seconds so far. What goes wrong is in the entry's `reason`.

    The benchmark's process has a group of its own: Ctrl-C comes to it from here, once.
    """
    begin, load = time.monotonic(), round(os.getloadavg()[0], 2)
    command = [sys.executable, "-m", "pyvmm.bench.runner", name, "quick" if quick else "full", str(os.getpid())]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0) as process:
            try:
                _await(process, lambda: told(time.monotonic() - begin), every)
            except BaseException:
                _end(process)
                raise
        out.seek(0)
        err.seek(0)
        results, reason = _read(process.returncode, out.read(), err.read())
    return Entry(name, results, time.monotonic() - begin, load, reason)


def _await(process: subprocess.Popen[bytes], told: Callable[[], object], every: float) -> None:
    """Without polling: this process is to leave the CPUs alone."""
    end = time.monotonic() + PATIENCE
    fd = os.pidfd_open(process.pid)
    try:
        while not select.select([fd], [], [], every)[0]:
            told()
            if time.monotonic() > end:
                raise TimeoutError
    except TimeoutError:
        _end(process)
    finally:
        os.close(fd)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_CLEANING)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _read(status: int, out: bytes, err: bytes) -> tuple[tuple[Result, ...], str]:
    """Results, or why there are none: what the process says itself, or what became of it."""
    try:
        told = json.loads(out)
        if "error" in told:
            return (), _line(told["error"])
        return results_of(told["results"]), ""
    except ValueError:
        last = err.decode(errors="replace").strip().split("\n")[-1]
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        return (), _line(f"its process ended by {ended}{': ' if last else ''}{last}")


def _line(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:1000]


def lacks(name: str, results: Sequence[Result], quick: bool) -> list[str]:
    """What is wrong with the shape of a benchmark's results, on a host that has everything: results or sides of targets
    that are not there, units that nobody knows, values that are no figures."""
    wrong = [f"unknown unit {each.unit!r} of {each.name!r}" for each in results if each.unit not in BETTER]
    wrong += [f"a value of {each.name!r} is no figure" for each in results if not all(map(isfinite, each.values))]
    wrong += [
        f"no {side!r} in {group!r}"
        for group, side in BENCHMARKS[name].has
        if not any(each.values and fnmatchcase(each.group, group) and fnmatchcase(each.name, side) for each in results)
    ]
    judged = {id(verdict.target) for verdict in verdicts(name, results, quick)}
    wanted = [target for target in TARGETS if target.benchmark == name and not (quick and target.full)]
    wrong += [
        f"nothing to judge {target.measure} by: {target.side!r} in {target.group!r}"
        for target in wanted
        if id(target) not in judged
    ]
    return wrong


def main() -> None:
    """Prints results or an error as one line of JSON. Ends as by Ctrl-C when who started it does."""
    name, size, parent = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
    try:
        if os.getppid() != int(parent):
            raise KeyboardInterrupt
        results: list[Result] = import_module(f"pyvmm.bench.{name}").measure(quick=size == "quick")
        print(json.dumps({"results": [result_as_json(result) for result in results]}))
    except PyvmmError as error:
        print(json.dumps({"error": str(error)}))
    except Exception as error:  # whatever it was: the other benchmarks go on
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
