# stats.py: KVM's binary statistics (KVM_GET_STATS_FD), of a VM or a vCPU. Units are KVM's, mostly counts.
"""Reads a statistics descriptor (Documentation/virt/kvm/api.rst, 4.133)."""

from __future__ import annotations

import os
import struct

_HEADER = struct.Struct("<6I")  # flags, name_size, num_desc, id_offset, desc_offset, data_offset
_DESC = struct.Struct("<IhHII")  # flags, exponent, size (values), offset, bucket_size; then the name
_layouts: dict[int, tuple[int, int, dict[str, tuple[int, int]]]] = {}  # by num_desc: VM or vCPU, of this kernel


def read_stats(fd: int) -> dict[str, int]:
    """Each statistic of one value by its name; histograms are left out."""
    head = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    count = head[2]
    if count not in _layouts:
        _layouts[count] = _read_layout(fd, *head[1:])
    start, size, places = _layouts[count]
    data = os.pread(fd, size, start)
    return {name: int.from_bytes(data[at : at + 8], "little") for name, (at, _) in places.items()}


def _read_layout(
    fd: int, name_size: int, count: int, _id: int, desc_offset: int, data_offset: int
) -> tuple[int, int, dict[str, tuple[int, int]]]:
    step = _DESC.size + name_size
    table = os.pread(fd, step * count, desc_offset)
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for at in range(0, step * count, step):
        _, _, values, offset, _ = _DESC.unpack_from(table, at)
        name = table[at + _DESC.size : at + step].split(b"\0", 1)[0].decode()
        end = max(end, offset + 8 * values)
        if values == 1:
            places[name] = (offset, values)
    return data_offset, end, places
