# classes.py: what a guest uses its memory for, by class (technique T2), by what its balloon driver says. Unit: bytes.
"""`CLASSES`; `parse()`: statistics; `classes_of()`: from those to classes; `extrapolated()`: from a sample of pages."""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CLASSES = (
    "unreclaimable", "active anonymous", "active buffer", "inactive anonymous", "inactive buffer", "free",
)  # fmt: skip
"""A page that the guest has given up is of none of them."""
UNKNOWN = 0xFF
"""For a page of which the guest cannot say."""

# Tags of the statistics queue (virtio 1.2, 5.5.6.3); ours are far from those.
MAJOR_FAULTS, FREE, TOTAL, AVAILABLE, CACHES = 2, 4, 5, 6, 7
CLASS_TAG = 0xF000
"""+ place in CLASSES: bytes of that class."""
REFAULTS_TAG = 0xF010
"""Pages that the guest has read again after it had given them up, since it began."""
MAX_ENTRIES = 64
_ENTRY = struct.Struct("<HQ")
ENTRY_SIZE = _ENTRY.size


def parse(data: bytes) -> dict[int, int]:
    """Tag -> value: of the first MAX_ENTRIES, the last one of each tag counts. What is no whole entry is none."""
    whole = min(len(data) // ENTRY_SIZE, MAX_ENTRIES) * ENTRY_SIZE
    return dict(_ENTRY.iter_unpack(data[:whole]))


def classes_of(stats: Mapping[int, int], memory: int) -> dict[str, int | None]:
    """Bytes by class, None where that is not known; together never more than `memory`, whatever the guest says."""
    if any(CLASS_TAG <= tag < CLASS_TAG + len(CLASSES) for tag in stats):
        told = {name: stats.get(CLASS_TAG + place) for place, name in enumerate(CLASSES)}
    else:
        told = _conservative(stats, memory)
    left = memory
    for name in CLASSES:  # what cannot be had comes first: a guest that lies has less to be taken
        value = told[name]
        if value is not None:
            told[name] = value = min(value, left)
            left -= value
    return told


def _conservative(stats: Mapping[int, int], memory: int) -> dict[str, int | None]:
    """Of a driver that has the standard tags alone. "Available" is what could be had without swapping, active cache
    too: a half of what of that is cache counts as inactive. Nothing tells anonymous memory that is not used, and none
    of it counts as that; what the kernel itself has is with the active anonymous memory."""
    total = min(stats.get(TOTAL, memory), memory)
    free, caches, available = (stats.get(tag) for tag in (FREE, CACHES, AVAILABLE))
    found: dict[str, int | None] = dict.fromkeys(CLASSES)
    if free is None:
        return found
    found["free"] = free = min(free, total)
    cache = min(caches or 0, total - free)
    if caches is not None:
        inactive = 0 if available is None else min(max(available - free, 0), cache) // 2
        found["inactive buffer"] = inactive
        found["active buffer"] = cache - inactive
    found["active anonymous"] = total - free - cache
    return found


def refaults_of(stats: Mapping[int, int]) -> int | None:
    """Pages read again: what the driver says of that, or its major faults, or None."""
    return stats.get(REFAULTS_TAG, stats.get(MAJOR_FAULTS))


def extrapolated(found: Iterable[int], memory: int) -> dict[str, int]:
    """Bytes by class of all memory, by the classes of pages that were drawn at random."""
    pages = list(found)
    return {name: memory * pages.count(place) // max(len(pages), 1) for place, name in enumerate(CLASSES)}
