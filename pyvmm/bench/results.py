# results.py: a file of results: a head, then a line of JSON for each benchmark; several runs one after the other.
# Whoever reads one may have got it from anywhere.
"""`head()`, `as_json()` and `Log` write; `read()` gives what a file has, checked. Units: bytes, seconds."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvmm import __version__, host
from pyvmm.bench import Result
from pyvmm.bench.catalogue import BENCHMARKS
from pyvmm.bench.targets import verdicts
from pyvmm.errors import BadInput
from pyvmm.layout import MIB
from pyvmm.record import Record

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Self

FORMAT = 1
_MAX_FILE = 64 * MIB
_MAX_TEXT = 1000
_MAX_VALUES = 100_000
_SCALARS = (str, int, float, bool, type(None))
_GIT_SECONDS = 5


class Entry(Record):
    """What a run has of one benchmark: results, or why there are none (`reason`)."""

    __slots__ = ("benchmark", "load", "reason", "results", "seconds")

    def __init__(
        self, benchmark: str, results: tuple[Result, ...], seconds: float, load: float, reason: str = ""
    ) -> None:
        self.benchmark = benchmark
        self.results = results
        self.seconds = seconds
        self.load = load
        self.reason = reason

    def as_json(self, quick: bool) -> dict[str, Any]:
        """A line of the file; with what follows from the values and from our tables, for whoever has only the file."""
        row = BENCHMARKS[self.benchmark]
        told: dict[str, Any] = {"benchmark": self.benchmark, "seconds": round(self.seconds, 3), "load": self.load}
        if self.reason:
            return told | {"error": self.reason}
        return told | {
            "measures": row.measures,
            "techniques": row.techniques,
            "results": [result_as_json(result) for result in self.results],
            "targets": [verdict.as_json() for verdict in verdicts(self.benchmark, self.results, quick)],
        }


class Run(Record):
    """A head, plain data, and what came after it."""

    __slots__ = ("entries", "head")

    def __init__(self, head: dict[str, Any], entries: list[Entry]) -> None:
        self.head = head
        self.entries = entries

    @property
    def quick(self) -> bool:
        """Small and short: not to be compared with a whole one."""
        return bool(self.head["quick"])


# ---- writing ----


def head(quick: bool) -> dict[str, Any]:
    """Where, when and of what: this host as `pyvmm doctor` sees it, this version, this command line."""
    return {
        "pyvmm_bench": FORMAT,
        "version": __version__,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["pyvmm", *sys.argv[1:]]),
        "quick": quick,
        "load": round(os.getloadavg()[0], 2),
        "host": host.facts(),
        "features": {str(finding.feature): finding.ok for finding in host.findings()},
    }


def _commit() -> str | None:
    """Of the checkout that this package lies in, if it lies in one."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "--short=12", "HEAD") + (", changed" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def result_as_json(result: Result) -> dict[str, Any]:
    """Plain data."""
    named = {"group": result.group} if result.group else {}
    return named | {
        "name": result.name,
        "unit": result.unit,
        "median": result.median if result.values else None,
        "values": list(result.values),
    }


class Log:
    """A file that lines are appended to, one at a time: an interrupted run keeps what it had. A context manager.

    Raises BadInput where the file holds something else, cannot be written, or another run writes to it.
    """

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._fd).st_size:
                read(path)
                self._cut()
        except BlockingIOError:
            os.close(self._fd)
            raise BadInput(f"{path}: another run writes to it") from None
        except BaseException:
            os.close(self._fd)
            raise

    def _cut(self) -> None:
        """Takes away a last line of which a run that was killed wrote only a part."""
        with open(self._fd, "rb", closefd=False) as file:
            data = file.read()
        if not data.endswith(b"\n"):
            os.ftruncate(self._fd, data.rfind(b"\n") + 1)

    def add(self, line: dict[str, Any]) -> None:
        """Appends a line, which is on the disk then."""
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._fd)


# ---- reading ----


def read(path: str) -> list[Run]:
    """What a file holds. Raises BadInput for what is none, in one line. A last line without an end is passed over."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    if len(data) > _MAX_FILE:
        raise BadInput(f"{path}: larger than {_MAX_FILE // MIB} MiB: no results of pyvmm bench")
    *lines, _ = data.split(b"\n")
    runs: list[Run] = []
    for number, line in enumerate(lines, 1):
        try:
            _add(runs, _decoded(line))
        except _Wrong as error:
            raise BadInput(f"{path}: line {number}: {error}: no results of pyvmm bench") from None
    if not runs:
        raise BadInput(f"{path}: nothing in it: no results of pyvmm bench")
    return runs


class _Wrong(Exception):
    """What is wrong with a line."""


def _decoded(line: bytes) -> dict[str, Any]:
    def constant(name: str) -> float:
        raise _Wrong(f"{name} is no number")

    try:
        told = json.loads(line, parse_constant=constant)
    except (ValueError, RecursionError):
        raise _Wrong("not JSON") from None
    if not isinstance(told, dict):
        raise _Wrong("not an object")
    return told


def _add(runs: list[Run], told: dict[str, Any]) -> None:
    if "pyvmm_bench" in told:
        runs.append(Run(_head(told), []))
    elif not runs:
        raise _Wrong("no head")
    else:
        runs[-1].entries.append(entry(told))


def _head(told: dict[str, Any]) -> dict[str, Any]:
    if told["pyvmm_bench"] != FORMAT:
        raise _Wrong(f"of format {str(told['pyvmm_bench'])[:20]!r}, and this pyvmm reads {FORMAT}")
    for name in ("version", "date", "command"):
        _text(told, name)
    if told.get("commit") is not None:
        _text(told, "commit")
    if not isinstance(told.get("quick"), bool):
        raise _Wrong("quick is neither true nor false")
    _number(told, "load")
    for name, kinds in (("host", _SCALARS), ("features", (bool,))):
        table = told.get(name)
        if not isinstance(table, dict) or not all(isinstance(each, kinds) for each in table.values()):
            raise _Wrong(f"{name} is no table")
        for key, each in table.items():
            _printable(key, name)
            if isinstance(each, str):
                _printable(each, name)
            elif not isinstance(each, (bool, type(None))):
                _finite(each, name)
    return told


def entry(told: dict[str, Any]) -> Entry:
    """One benchmark's line. Raises an exception with what is wrong in it."""
    name = _text(told, "benchmark")
    seconds, load = _number(told, "seconds"), _number(told, "load")
    if "error" in told:
        return Entry(name, (), seconds, load, _text(told, "error"))
    return Entry(name, results_of(told.get("results")), seconds, load)


def results_of(told: object) -> tuple[Result, ...]:
    """Results as data. Raises an exception with what is wrong."""
    if not isinstance(told, list) or not all(isinstance(each, dict) for each in told):
        raise _Wrong("results is no list of objects")
    return tuple(_result(each) for each in told)


def _result(told: dict[str, Any]) -> Result:
    values = told.get("values")
    if not isinstance(values, list) or len(values) > _MAX_VALUES:
        raise _Wrong("values is no list, or too long")
    group = _text(told, "group") if "group" in told else ""
    return Result(_text(told, "name"), _text(told, "unit"), tuple(_finite(each, "values") for each in values), group)


def _text(told: dict[str, Any], name: str) -> str:
    return _printable(told.get(name), name)


def _printable(text: object, name: str) -> str:
    """No control character gets to a terminal."""
    if not isinstance(text, str) or len(text) > _MAX_TEXT or not text.isprintable():
        raise _Wrong(f"{name[:40]!r} is no plain text")
    return text


def _number(told: dict[str, Any], name: str) -> float:
    return _finite(told.get(name), name)


def _finite(value: object, name: str) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise _Wrong(f"{name[:40]!r} is no number")


def joined(runs: Iterable[Run]) -> dict[str, list[Result]]:
    """Results by benchmark; where several runs have the same, with the values of all of them."""
    found: dict[str, dict[tuple[str, str, str], tuple[float, ...]]] = {}
    for run in runs:
        for each in run.entries:
            rows = found.setdefault(each.benchmark, {})
            for result in each.results:
                key = result.group, result.name, result.unit
                rows[key] = rows.get(key, ()) + result.values
    return {
        name: [Result(side, unit, values, group) for (group, side, unit), values in rows.items()]
        for name, rows in found.items()
    }
