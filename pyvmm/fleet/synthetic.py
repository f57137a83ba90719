# synthetic.py: what the VMs of a fleet use over time: made, or recorded. Bytes, ticks of one second.
"""`Series`: one VM's usage; `make()`, `three()`, `load()`."""

from __future__ import annotations

import json
from random import Random

from pyvmm.errors import BadInput
from pyvmm.fleet.demand import MOST, Classes, classes_of, default_shares
from pyvmm.fleet.entitle import MAX_SHARES
from pyvmm.layout import MIB
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_VMS = 4096
MAX_LINE = 64 << 10
MAX_LOOKS = 1 << 20

MIXES: dict[str, tuple[int, ...]] = {
    "free": (5, 10, 5, 5, 5, 70),
    "cache": (5, 10, 5, 5, 70, 5),
    "active": (5, 65, 15, 5, 5, 5),
    "idle": (5, 5, 5, 70, 10, 5),
}
"""Per cent of a guest's memory in each of CLASSES."""


class Series(Record):
    """A VM, what it was given by somebody (as `Demand` has it), and its classes at each tick, as they would be with all
    its memory."""

    __slots__ = ("balloon", "limit", "looks", "memory", "name", "reservation", "shares", "swap")

    def __init__(self, name: str, memory: int, looks: list[Classes], **given: Any) -> None:  # noqa: ANN401
        self.name = name
        self.memory = memory
        self.looks = looks
        self.shares: int = given.get("shares", default_shares(memory))
        self.reservation: int = given.get("reservation", 0)
        self.limit: int | None = given.get("limit")
        self.balloon: bool = given.get("balloon", True)
        self.swap: bool = given.get("swap", False)


def three(memory: int = 256 * MIB, ticks: int = 60) -> list[Series]:
    """Three unlike guests, each for ever the same: mostly free, mostly cache, mostly active. Each swaps by itself too,
    so that a balloon can have any of its pages."""
    return [
        Series(f"mostly-{kind}", memory, [_mix(memory, MIXES[kind])] * ticks, swap=True)
        for kind in ("free", "cache", "active")
    ]


def make(vms: int, ticks: int, seed: int = 1) -> list[Series]:
    """So many VMs of 64 to 512 MiB, each of one kind of MIXES at first, which turns into another now and then."""
    if not 1 <= vms <= MAX_VMS:
        raise BadInput(f"{vms} VMs: give 1 to {MAX_VMS}")
    random = Random(seed)
    found = []
    for number in range(vms):
        memory = MIB * random.choice((64, 128, 256, 512))
        kinds = sorted(MIXES)
        kind = random.choice(kinds)
        mix = [float(part) for part in MIXES[kind]]
        looks = []
        for _ in range(ticks):
            if random.random() < 0.02:
                kind = random.choice(kinds)
            mix = [part + (goal - part) / 4 for part, goal in zip(mix, MIXES[kind], strict=True)]
            looks.append(_mix(memory, mix))
        shares = default_shares(memory) * random.choice((1, 2, 2, 4)) // 2
        found.append(Series(f"vm{number}", memory, looks, shares=shares, swap=random.random() < 0.5))
    return found


def load(path: str) -> list[Series]:
    """A trace: lines of JSON as `pyvmm host up` writes them into its log, of which those with "event": "demand" count.
    Raises BadInput, naming the line."""
    found: dict[str, Series] = {}
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE):
                number += 1
                _take(found, line, f"{path}, line {number}")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    if not found:
        raise BadInput(f'{path}: no line of it has "event": "demand" and classes: a fleet whose guests tell none?')
    return list(found.values())


def _take(found: dict[str, Series], line: bytes, where: str) -> None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise BadInput(f"{where}: no JSON object")
    if fields.get("event") != "demand" or fields.get("classes") is None:
        return
    name, memory = fields.get("vm"), fields.get("memory")
    if not isinstance(name, str) or type(memory) is not int or not 0 < memory <= MOST:
        raise BadInput(f"{where}: a demand has vm, a name, and memory, bytes")
    classes = classes_of(fields["classes"], memory)
    if classes is None:
        raise BadInput(f"{where}: classes are six numbers of bytes")
    if name not in found:
        if len(found) == MAX_VMS:
            raise BadInput(f"{where}: more than {MAX_VMS} VMs")
        found[name] = Series(name, memory, [], **_given(fields, where))
    if len(found[name].looks) == MAX_LOOKS:
        raise BadInput(f"{where}: more than {MAX_LOOKS} looks at {name}")
    found[name].looks.append(classes)


def _given(fields: dict[str, object], where: str) -> dict[str, object]:
    given: dict[str, object] = {}
    for name, least, most in (("shares", 1, MAX_SHARES), ("reservation", 0, MOST), ("limit", 1, MOST)):
        value = fields.get(name)
        if value is None:
            continue
        if type(value) is not int or not least <= value <= most:
            raise BadInput(f"{where}: {name} is a whole number, {least} to {most}")
        given[name] = value
    for name in ("balloon", "swap"):
        if isinstance(fields.get(name), bool):
            given[name] = fields[name]
    return given


def _mix(memory: int, per_cent: tuple[int, ...] | list[float]) -> Classes:
    whole = sum(per_cent)
    parts = [int(memory * part / whole) for part in per_cent]
    parts[-1] += memory - sum(parts)
    return Classes(*parts)
