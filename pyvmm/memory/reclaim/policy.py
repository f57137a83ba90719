# policy.py: who chooses what leaves memory: the interface of victim policies, and how one is found. docs/reclaim.md
# tells how to write one. Units: small pages of 4 KiB, by number; blocks of 2 MiB, which are 512 of them.
"""`Policy`, the base; `View`, what it sees; `Block` and `Share`, victims beside pages; `find()`, by name or file;
`find_class()`, for other kinds of policy."""

from __future__ import annotations

import os
from random import Random

from pyvmm.errors import BadInput
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import TypeAlias, TypeVar

    Kind = TypeVar("Kind")
    Victim: TypeAlias = "int | Block | Share"

BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
"""Small pages in a block: page p lies in block p // BLOCK_PAGES."""


class Block(Record):
    """A victim: all pages of a block that are in memory. A block that is large goes whole, and comes back large."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Share(Record):
    """A victim: pages of a block whose content is elsewhere too; a large block is broken for that (technique T5)."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class View:
    """What a policy may look at, and must not change. pages, blocks: of the VM; limit: pages it may have in memory.

    resident[page]: 1 for pages in memory. present[block]: how many of its pages are. large[block]: 1 for a block that
    is one large page. used: pages in memory, of all. now: us since the trace began. random: the policy's own; whoever
    uses no other gives the same victims for the same trace and seed.
    """

    __slots__ = ("blocks", "large", "limit", "now", "pages", "present", "random", "resident", "used")

    def __init__(self, pages: int, limit: int, seed: int = 0) -> None:
        self.pages = pages
        self.blocks = -(-pages // BLOCK_PAGES)
        self.limit = limit
        self.resident = bytearray(pages)
        self.present = [0] * self.blocks
        self.large = bytearray(self.blocks)
        self.used = 0
        self.now = 0
        self.random = Random(seed)


class Policy:
    """Chooses victims. Every method but victims() may be left out; what is left out costs nothing.

    A VMM knows of faults alone by itself, and so may touched(); the simulator tells it of each touch, unless it is
    asked to be as blind. sampled() and scanned() come of what a VMM looks for.
    """

    def __init__(self, view: View) -> None:
        self.view = view

    def came(self, page: int) -> None:
        """A page is in memory now, by a fault, or with the rest of its block."""

    def left(self, page: int) -> None:
        """A page has left memory, by this policy's choice."""

    def touched(self, page: int, write: bool) -> None:
        """The guest read or wrote a page, which is in memory; after came(), where it had to come."""

    def sampled(self, block: int, touched: int) -> None:
        """A block was watched for a window of time: bit i of `touched` is set where its small page i was touched
        (technique T8). How many: touched.bit_count()."""

    def scanned(self, block: int, duplicates: int) -> None:
        """A block's small pages were hashed: bit i of `duplicates` is set where the content of its page i is kept
        elsewhere too (technique T5), and page i can be given up for that."""

    def victims(self, wanted: int) -> Iterable[Victim]:
        """What is to leave memory, the first first: page numbers, Block(n) and Share(n), all of what is in memory now.

        Whoever asks takes as many as it needs for `wanted` pages and asks for no more; a generator sees what has left
        meanwhile. Too few are an error.
        """
        raise NotImplementedError


def find(name: str) -> type[Policy]:
    """The class of a policy: one that pyvmm brings, or `file.py:Class`, which is run. Raises BadInput."""
    from pyvmm.memory.reclaim.policies import POLICIES

    return find_class(name, POLICIES, Policy, "victims")


def absolute(name: str) -> str:
    """The name of a policy that means the same in a process with another working directory."""
    path, colon, class_name = name.rpartition(":")
    return os.path.abspath(path) + colon + class_name if path else name


def find_class(name: str, known: Mapping[str, type[Kind]], base: type[Kind], method: str) -> type[Kind]:
    """The class that `known` has, or that of `file.py:Class`: one made from `base`, which has the method that `base`
    leaves to it. Raises BadInput."""
    if name in known:
        return known[name]
    path, colon, class_name = name.rpartition(":")
    if not colon or not path or not class_name:
        choices = ", ".join(known)
        raise BadInput(f"no policy {name!r}: choose one of {choices}, or write one and give it as file.py:Class")
    found = _run(path).get(class_name)
    if not isinstance(found, type) or not issubclass(found, base):
        raise BadInput(f"{path}: {class_name} is no class made from {base.__module__}.{base.__qualname__}")
    if getattr(found, method) is getattr(base, method):
        raise BadInput(f"{path}: {class_name} has no method {method}()")
    return found


def _run(path: str) -> dict[str, object]:
    """The names in a file of somebody's own. Not put into sys.modules: two files may have one name."""
    try:
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        words = error.msg if isinstance(error, SyntaxError) else error
        raise BadInput(f"{path}{where}: no Python: {words}") from None
    names: dict[str, object] = {"__name__": "policy", "__file__": path}
    try:
        exec(code, names)  # noqa: S102 (the user's own file, which they asked for)
    except Exception as error:
        raise BadInput(f"{path}: {broken(error, path)}") from None
    return names


def broken(error: BaseException, path: str = "") -> str:
    """One line for an exception that a policy raised: what, and the last line of `path` that it came by."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if not path or trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    words = " ".join(str(error).split())
    return f"line {line}: {type(error).__name__}{': ' if words else ''}{words}"
