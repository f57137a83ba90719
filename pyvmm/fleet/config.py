# config.py: fleet.toml: a host's budget, its states and policy, and its VMs. Every mistake is one line with the key.
"""`load()`, `Fleet`, `Guest`. Sizes in bytes, times in seconds."""

from __future__ import annotations

import os
import tomllib

from pyvmm.errors import BadInput
from pyvmm.fleet.demand import MOST, default_shares
from pyvmm.fleet.entitle import MAX_SHARES
from pyvmm.fleet.policy import find
from pyvmm.fleet.states import STATES, TABLE, State, check_table
from pyvmm.layout import format_size, parse_size
from pyvmm.memory.reclaim.reclaimer import LEAST
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_VMS = 1024
MAX_FILE = 1 << 20
MAX_NAME = 32
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")

HOST_KEYS = ("budget", "policy", "interval", "states")
VM_KEYS = (
    "name", "guest", "memory", "cpus", "append", "shares", "reservation", "limit", "balloon", "swap", "options",
)  # fmt: skip
STATE_KEYS = ("below", "above", "means")
_OURS = (
    "--mem", "--cpus", "--append", "--balloon", "--control", "--limit", "--live", "--snapshot", "--trace", "--hugetlb",
)  # fmt: skip
"""Options of `pyvmm run` that are set by the fleet, or make no sense in one."""


class Guest(Record):
    """One VM of a fleet, as somebody wants it. balloon: it is given one; swap: the guest has a swap device
    of its own; options: more of `pyvmm run`, words."""

    __slots__ = (
        "append", "balloon", "cpus", "guest", "limit", "memory", "name", "options", "reservation", "shares", "swap",
    )  # fmt: skip

    def __init__(self, name: str, guest: str, memory: int) -> None:
        self.name = name
        self.guest = guest
        self.memory = memory
        self.cpus = 1
        self.append = ""
        self.shares = default_shares(memory)
        self.reservation = LEAST
        self.limit = memory
        self.balloon = False
        self.swap = False
        self.options: list[str] = []


class Fleet(Record):
    """What a file says. interval: between two decisions."""

    __slots__ = ("budget", "guests", "interval", "policy", "states")

    def __init__(self, budget: int, guests: list[Guest]) -> None:
        self.budget = budget
        self.guests = guests
        self.policy = "class-based"
        self.interval = 1.0
        self.states: tuple[State, ...] = TABLE


def load(path: str) -> Fleet:
    """Raises BadInput, with the file's name and the key."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE + 1)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    if len(text) > MAX_FILE:
        raise BadInput(f"{path}: more than {MAX_FILE} bytes")
    try:
        found = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: {' '.join(str(error).split())}") from None
    try:
        return fleet_of(found, os.path.dirname(os.path.abspath(path)))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def fleet_of(found: dict[str, Any], folder: str = ".") -> Fleet:
    """The fleet of a file's tables; files that it names are below `folder`. Raises BadInput, with the key."""
    _known(found, ("host", "vm"), "the file")
    host = found.get("host")
    if not isinstance(host, dict):
        raise BadInput("[host]: missing; it has the budget")
    _known(host, HOST_KEYS, "[host]")
    vms = found.get("vm")
    if not isinstance(vms, list) or not vms:
        raise BadInput("[[vm]]: missing; there is one for each VM")
    if len(vms) > MAX_VMS:
        raise BadInput(f"[[vm]]: {len(vms)} of them; {MAX_VMS} are the most")
    fleet = Fleet(_size(host, "budget", "[host]", None, LEAST), [])
    if "policy" in host:
        fleet.policy = _policy(_text(host, "policy", "[host]"), folder)
    if "interval" in host:
        fleet.interval = _number(host, "interval", "[host]", 0.05, 3600)
    if "states" in host:
        fleet.states = _states(host["states"])
    for number, table in enumerate(vms, 1):
        guest = _guest(table, number, folder)
        if any(guest.name == other.name for other in fleet.guests):
            raise BadInput(f"[[vm]] {number}: name: {guest.name!r} is another one's already")
        fleet.guests.append(guest)
    return fleet


def check_name(name: str, key: str) -> str:
    """A name that a file can have too. Raises BadInput."""
    if not name or len(name) > MAX_NAME or name.startswith((".", "-")) or not set(name) <= _LETTERS:
        raise BadInput(f"{key}: {name[:64]!r}: give 1 to {MAX_NAME} letters, digits, '-', '_', '.', a letter first")
    return name


def _guest(table: object, number: int, folder: str) -> Guest:
    where = f"[[vm]] {number}"
    if not isinstance(table, dict):
        raise BadInput(f"{where}: no table")
    name = check_name(_text(table, "name", where), f"{where}: name")
    where = f"[[vm]] {name}"
    _known(table, VM_KEYS, where)
    image = _text(table, "guest", where)
    guest = Guest(name, image if "/" not in image else os.path.join(folder, image), _size(table, "memory", where))
    if guest.memory < LEAST:
        raise BadInput(f"{where}: memory: a VM of a fleet has at least {format_size(LEAST)}")
    guest.cpus = _whole(table, "cpus", where, 1, 1, 64)
    guest.append = _text(table, "append", where, "")
    guest.shares = _whole(table, "shares", where, guest.shares, 1, MAX_SHARES)
    guest.limit = _size(table, "limit", where, guest.memory, LEAST)
    guest.reservation = _size(table, "reservation", where, min(LEAST, guest.memory), 0)
    if guest.limit > guest.memory:
        raise BadInput(f"{where}: limit: {format_size(guest.limit)} is more than its memory")
    if guest.reservation > guest.limit:
        raise BadInput(f"{where}: reservation: {format_size(guest.reservation)} is more than it may ever have")
    guest.reservation = max(LEAST, guest.reservation)
    guest.balloon = _flag(table, "balloon", where, False)
    guest.swap = _flag(table, "swap", where, False)
    guest.options = _words(table.get("options", []), f"{where}: options")
    for word in guest.options:
        if word.split("=")[0] in _OURS:
            raise BadInput(f"{where}: options: {word} is not for a fleet's VM: see the other keys")
    return guest


def _states(found: object) -> tuple[State, ...]:
    """The default table, with what is said of some states."""
    if not isinstance(found, dict):
        raise BadInput("[host.states]: no table")
    _known(found, STATES, "[host.states]")
    table = []
    for state in TABLE:
        said = found.get(state.name, {})
        where = f"[host.states.{state.name}]"
        if not isinstance(said, dict):
            raise BadInput(f"{where}: no table")
        _known(said, STATE_KEYS, where)
        if state is TABLE[0] and ("below" in said or "above" in said):
            raise BadInput(f"{where}: below, above: it is where no other state is")
        below, above = state.below, state.above
        if "below" in said:
            below = _number(said, "below", where, -100, 100) / 100
            above = below + (state.above - state.below)
        if "above" in said:
            above = _number(said, "above", where, -100, 100) / 100
        means = _words(said.get("means", list(state.means)), f"{where}: means")
        table.append(State(state.name, below, above, means))
    try:
        return check_table(table)
    except BadInput as error:
        raise BadInput(f"[host.states]: {error}") from None


def _policy(name: str, folder: str) -> str:
    path, colon, class_name = name.rpartition(":")
    found = f"{os.path.join(folder, path)}:{class_name}" if colon else name
    try:
        find(found)
    except BadInput as error:
        raise BadInput(f"[host]: policy: {error}") from None
    return found


# ---- one value ----


def _known(table: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            raise BadInput(f"{where}: no key {key[:64]!r}: it may have {', '.join(keys)}")


def _text(table: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = table.get(key, default)
    if value is None:
        raise BadInput(f"{where}: {key}: missing")
    if not isinstance(value, str) or "\0" in value or (not value and default is None):
        raise BadInput(f"{where}: {key}: give a text")
    return value


def _size(table: dict[str, Any], key: str, where: str, default: int | None = None, least: int = 1) -> int:
    value = table.get(key, default)
    if value is None:
        raise BadInput(f"{where}: {key}: missing")
    if type(value) not in (int, str):
        raise BadInput(f"{where}: {key}: give a size, such as 256M")
    try:
        size = parse_size(value)
    except BadInput as error:
        raise BadInput(f"{where}: {key}: {error}") from None
    if not least <= size <= MOST:
        raise BadInput(f"{where}: {key}: give {format_size(least)} to {format_size(MOST)}")
    return size


def _whole(table: dict[str, Any], key: str, where: str, default: int, least: int, most: int) -> int:
    value = table.get(key, default)
    if type(value) is not int or not least <= value <= most:
        raise BadInput(f"{where}: {key}: give a whole number, {least} to {most}")
    return value


def _number(table: dict[str, Any], key: str, where: str, least: float, most: float) -> float:
    value = table[key]
    if type(value) not in (int, float) or not least <= value <= most:
        raise BadInput(f"{where}: {key}: give a number, {least:g} to {most:g}")
    return float(value)


def _flag(table: dict[str, Any], key: str, where: str, default: bool) -> bool:
    value = table.get(key, default)
    if not isinstance(value, bool):
        raise BadInput(f"{where}: {key}: give true or false")
    return value


def _words(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(word, str) and "\0" not in word for word in value):
        raise BadInput(f'{where}: give a list of texts, such as ["--pages", "4k"]')
    return value
