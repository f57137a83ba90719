# shape.py: what a VM is, so that another process can build one alike; and how two of them differ. Sizes in bytes.
"""`Shape`: the hello's, as a State, and `differences()`."""

from __future__ import annotations

from pyvmm.errors import ProtocolError, StateError
from pyvmm.layout import MIN_MEMORY, PAGE_SIZE, format_size, ram_regions
from pyvmm.migration.frames import MAX_PAGES, MAX_SHAPE
from pyvmm.record import Record
from pyvmm.snapshot.states import decode, encode
from pyvmm.state import State

KIND, VERSION = "shape", 1
BACKINGS = ("auto", "2m", "4k")
TSC_TOLERANCE = 250e-6
"""Part by which frequencies may differ, as KVM itself allows before it scales."""
_MAX_CPUS = 4096
_MAX_NAMES = 256
_MAX_NAME = 64


class Shape(Record):
    """memory: bytes of RAM; regions: (guest-physical address, bytes) of each piece of it, None: where pyvmm puts it;
    cpus; backing: pages as VM() takes it; hugetlb; states: kind and version of each kind of State; codecs: names;
    tsc_khz: of the guest; xsave_size: bytes of each vCPU's XSAVE area."""

    __slots__ = ("backing", "codecs", "cpus", "hugetlb", "memory", "regions", "states", "tsc_khz", "xsave_size")

    def __init__(
        self,
        memory: int,
        cpus: int,
        states: dict[str, int],
        tsc_khz: int,
        xsave_size: int,
        backing: str = "auto",
        hugetlb: bool = False,
        codecs: tuple[str, ...] = (),
        regions: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        if regions is None:
            regions = tuple((region.gpa.value, region.size) for region in ram_regions(memory))
        self.memory = memory
        self.regions = regions
        self.cpus = cpus
        self.backing = backing
        self.hugetlb = hugetlb
        self.states = states
        self.codecs = codecs
        self.tsc_khz = tsc_khz
        self.xsave_size = xsave_size

    __hash__ = None  # type: ignore[assignment]

    def encode(self) -> bytes:
        """As HELLO has it."""
        return encode(
            State(
                KIND,
                VERSION,
                {
                    "memory": self.memory,
                    "regions": [number for region in self.regions for number in region],
                    "cpus": self.cpus,
                    "backing": self.backing,
                    "hugetlb": self.hugetlb,
                    "states": dict(self.states),
                    "codecs": list(self.codecs),
                    "tsc_khz": self.tsc_khz,
                    "xsave_size": self.xsave_size,
                },
            )
        )


_FIELDS = {"memory", "regions", "cpus", "backing", "hugetlb", "states", "codecs", "tsc_khz", "xsave_size"}


def decode_shape(raw: bytes) -> Shape:
    """The shape in a HELLO. Raises ProtocolError for what no VM can be."""
    if len(raw) > MAX_SHAPE:
        raise ProtocolError(f"a shape of {len(raw)} bytes: {MAX_SHAPE} at most")
    try:
        state = decode(raw)
        if state.kind == KIND and state.version != VERSION:
            raise ProtocolError(f"a shape of version {state.version}, and this pyvmm knows version {VERSION}")
        fields = state.require(KIND, VERSION)
        if fields.keys() != _FIELDS:
            names = ", ".join(sorted(fields.keys() ^ _FIELDS))
            raise ProtocolError(f"the shape in HELLO: fields are added or missing: {names[:80]!r}")
        memory = state.integer("memory", MIN_MEMORY, MAX_PAGES * PAGE_SIZE)
        cpus = state.integer("cpus", 1, _MAX_CPUS)
        tsc_khz, xsave_size = state.integer("tsc_khz", 1, 1 << 32), state.integer("xsave_size", 1, 1 << 20)
    except StateError as error:
        raise ProtocolError(f"the shape in HELLO: {error}") from None
    if memory % PAGE_SIZE:
        raise ProtocolError(f"a shape with {memory} bytes of RAM: not whole pages")
    for name in ("memory", "cpus", "tsc_khz", "xsave_size"):
        if isinstance(fields[name], bool):
            raise ProtocolError(f"the shape in HELLO: {name} is no number")
    backing, hugetlb = fields["backing"], fields["hugetlb"]
    if not isinstance(backing, str) or backing not in BACKINGS or not isinstance(hugetlb, bool):
        raise ProtocolError("the shape in HELLO: there is no such page backing")
    return Shape(
        memory, cpus, _versions(fields["states"]), tsc_khz, xsave_size, backing, hugetlb, _names(fields["codecs"]),
        _regions(fields["regions"], memory),
    )  # fmt: skip


def _is_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= _MAX_NAME and name.isascii() and name.isprintable()


def _versions(value: object) -> dict[str, int]:
    if not isinstance(value, dict) or len(value) > _MAX_NAMES:
        raise ProtocolError("the shape in HELLO: states are not a table")
    for name, version in value.items():
        if not _is_name(name) or type(version) is not int or not 1 <= version < 1 << 32:
            raise ProtocolError("the shape in HELLO: a kind or version of states cannot be")
    return dict(value)


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > _MAX_NAMES or not all(_is_name(name) for name in value):
        raise ProtocolError("the shape in HELLO: codecs are not a list of names")
    return tuple(value)


def _regions(value: object, memory: int) -> tuple[tuple[int, int], ...]:
    """In ascending order, without overlap, and as much as the RAM together."""
    wrong = ProtocolError("the shape in HELLO: its regions are not its RAM")
    if not isinstance(value, list) or len(value) % 2 or not 2 <= len(value) <= 2 * _MAX_NAMES:
        raise wrong
    if not all(type(number) is int and 0 <= number < 1 << 52 and number % PAGE_SIZE == 0 for number in value):
        raise wrong
    pairs = tuple(zip(value[::2], value[1::2], strict=True))
    end = total = 0
    for start, size in pairs:
        if start < end or not size:
            raise wrong
        end, total = start + size, total + size
    if total != memory:
        raise wrong
    return pairs


def differences(theirs: Shape, ours: Shape, tsc_scaling: bool = False) -> list[str]:
    """One line for each thing in which the source's VM is not as the one that is here, or could be: none of both may be
    silently changed. tsc_scaling: the guest's TSC can be made to run at another frequency than the host's."""
    found = []

    def compare(what: str, there: object, here: object) -> None:
        if there != here:
            found.append(f"{what}: {there} there, {here} here")

    compare("RAM", format_size(theirs.memory), format_size(ours.memory))
    if theirs.memory == ours.memory:
        compare("RAM regions", _show_regions(theirs), _show_regions(ours))
    compare("vCPUs", theirs.cpus, ours.cpus)
    compare("page backing", theirs.backing, ours.backing)
    compare("hugetlb", theirs.hugetlb, ours.hugetlb)
    for kind in sorted(theirs.states.keys() | ours.states.keys()):
        there, here = (f"version {shape.states[kind]}" if kind in shape.states else "none" for shape in (theirs, ours))
        compare(f"states of {kind}", there, here)
    if not tsc_scaling and abs(theirs.tsc_khz - ours.tsc_khz) > ours.tsc_khz * TSC_TOLERANCE:
        compare("TSC kHz", theirs.tsc_khz, ours.tsc_khz)
    compare("bytes of XSAVE state", theirs.xsave_size, ours.xsave_size)
    return found


def refusal(found: list[str], limit: int = 1000) -> str:
    """One line of REFUSE for these differences; as many of them as fit."""
    text = "the VMs differ in " + "; ".join(found)
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def common(theirs: tuple[str, ...], ours: tuple[str, ...]) -> tuple[str, ...]:
    """What both have, in our order of preference."""
    return tuple(name for name in ours if name in theirs)


def _show_regions(shape: Shape) -> str:
    return "+".join(f"{format_size(size)}@{start:#x}" for start, size in shape.regions)
