# test_verify_model.py: the model of the guest `verify` against values that guest/verify.c computed, and against memory
# that a guest could have left, and could not.
from __future__ import annotations

import pytest

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, StateError
from pyvmm.layout import HOLE_END, Gpa, ram_regions
from pyvmm.machine import Progress
from pyvmm.memory import GuestMemory
from pyvmm.testing.stamps import mix_one, shuffled
from pyvmm.testing.verify_model import check_memory, expected_page, ram_hash, version

MASK = (1 << 64) - 1
REGION = 2 << 20
PAGES = 512


def words(page):
    return [int.from_bytes(page[i : i + 8], "little") for i in range(0, 4096, 8)]


@pytest.mark.parametrize(
    ("seed", "page", "version", "first", "last"),
    [
        (1, 0, 0, 0x71CAC37448049CE4, 0x4286BCB95DB24ACF),
        (1, 17, 3, 0x2BFB270DBCBCBC5C, 0xFCB72052D26A6A47),
        (MASK, 1309695, 1000000, 0x14DAEDDA1BEB6CEF, 0xE596E71F31991ADA),
    ],
)
def test_content_is_the_guests(seed, page, version, first, last):
    found = words(expected_page(seed, page, version))
    assert (len(found), found[0], found[-1]) == (512, first, last)


def test_versions_are_the_guests():
    assert [version(1, page, 20, 0) for page in range(8)] == [0] * 8
    assert [version(1, page, 20, 1) for page in range(8)] == [0, 0, 0, 0, 10, 0, 0, 0]
    assert [version(1, page, 20, 25) for page in range(8)] == [20, 17, 19, 20, 13, 16, 19, 18]
    assert [version(1, page, 20, 100) for page in range(8)] == [20] * 8


def test_zero_contents_are_the_guests():
    blank = [v for v in range(30) if expected_page(1, 5, v, zeros=300) == bytes(4096)]
    assert blank == [0, 1, 4, 8, 9, 13, 14, 15, 27, 28]
    assert expected_page(1, 5, 2, zeros=300) == expected_page(1, 5, 2)


def test_shuffles_are_the_guests():
    key = mix_one((mix_one(1) ^ MASK) + 3 & MASK)
    assert [list(shuffled(count, key)) for count in (1, 2, 7, 12)] == [
        [0],
        [1, 0],
        [5, 3, 1, 0, 4, 2, 6],
        [11, 4, 6, 9, 5, 7, 2, 1, 8, 10, 3, 0],
    ]


def progress(places, status=lib.PV_STATUS_RUNNING, pages=PAGES, seed=1, guest=b"verify"):
    """A progress page of which CPU i is at places[i] = (pass, index)."""
    raw = ffi.new("struct pv_progress *")
    raw.magic, raw.version, raw.cpus, raw.status = lib.PV_PROGRESS_MAGIC, lib.PV_PROGRESS_VERSION, len(places), status
    raw.guest, raw.seed, raw.region_gpa, raw.region_size = guest, seed, REGION, pages * 4096
    for work, (passes, index) in zip(raw.work, places, strict=False):
        setattr(work, "pass", passes)
        work.index = index
    return Progress(bytes(ffi.buffer(raw)))


def gpa(page):
    return Gpa(REGION + page * 4096)


def stamp(memory, places, order="seq", write=25, zeros=0):
    """Leaves in memory what a guest at these places must have left."""
    for cpu, (passes, index) in enumerate(places):
        owned = list(range(cpu, PAGES, len(places)))
        if order == "random":
            owned = [owned[i] for i in shuffled(len(owned), mix_one((mix_one(1) ^ MASK) + passes & MASK))]
        for place, page in enumerate(owned):
            last = passes if place < index else passes - 1
            if last >= 0:
                memory.write(gpa(page), expected_page(1, page, version(1, page, last, write), zeros))


@pytest.fixture
def memory():
    memory = GuestMemory(REGION + PAGES * 4096)
    yield memory
    memory.close()


@pytest.mark.parametrize("order", ["seq", "random"])
@pytest.mark.parametrize("places", [[(0, 0)], [(0, 100)], [(7, 13)], [(3, 5), (9, 255)], [(1, 0), (0, 3), (4, 9)]])
def test_memory_as_it_must_be(memory, places, order):
    stamp(memory, places, order, write=40, zeros=100)
    assert check_memory(memory, progress(places), write=40, zeros=100, order=order) == []


def test_another_place_is_noticed(memory):
    stamp(memory, [(7, 13)], write=100)
    assert [wrong.page for wrong in check_memory(memory, progress([(7, 15)]), write=100)] == [13, 14]
    assert [wrong.page for wrong in check_memory(memory, progress([(7, 10)]), write=100)] == [11, 12]


def test_a_wrong_byte_is_found_and_told(memory):
    places = [(4, 0)]
    stamp(memory, places)
    right = memory.read(gpa(17) + 77, 1)[0]
    memory.write(gpa(17) + 77, bytes([right ^ 8]))
    memory.write(gpa(300) + 2048, bytes(2048))
    memory.write(gpa(301), expected_page(1, 44, 2))
    flipped, zeroed, misplaced = check_memory(memory, progress(places))
    assert (flipped.page, flipped.gpa, flipped.offset) == (17, gpa(17), 77)
    assert (flipped.expected, flipped.found, flipped.version) == (right, right ^ 8, version(1, 17, 3))
    assert "1 of 512 words" in flipped.text
    assert (zeroed.page, zeroed.offset) == (300, 2048)
    assert "looks like zeros" in zeroed.text
    assert "looks like version 2 of page 44" in misplaced.text


def test_only_the_page_in_flight_may_be_torn(memory):
    places = [(3, 20)]
    stamp(memory, places, write=100)
    torn = expected_page(1, 20, 3)[:1024] + expected_page(1, 20, 2)[1024:]
    memory.write(gpa(20), torn)
    assert check_memory(memory, progress(places), write=100) == []
    assert [wrong.page for wrong in check_memory(memory, progress(places, lib.PV_STATUS_DONE), write=100)] == [20]
    memory.write(gpa(20), torn[:1020] + torn[1016:1020] + torn[1024:])  # half a word of each
    assert [wrong.page for wrong in check_memory(memory, progress(places), write=100)] == [20]
    memory.write(gpa(20), expected_page(1, 20, 1))
    assert [wrong.page for wrong in check_memory(memory, progress(places), write=100)] == [20]


def test_a_page_in_flight_that_is_only_read_must_be_right(memory):
    page = next(page for page in range(PAGES) if version(1, page, 3) != 3)
    stamp(memory, [(3, page)])
    memory.write(gpa(page), expected_page(1, page, 3))
    assert [wrong.page for wrong in check_memory(memory, progress([(3, page)]))] == [page]


class Sparse:
    """RAM that is computed when it is read."""

    def __init__(self, size, content):
        self.regions = ram_regions(size)
        self.content = content

    def read(self, at, size):
        assert any(region.gpa <= at and at + size <= region.end for region in self.regions)
        return b"".join(self.content(at.value + i) for i in range(0, size, 4096))


def test_pages_go_on_behind_the_hole(monkeypatch):
    monkeypatch.setattr("pyvmm.layout.HOLE_START", 6 << 20)  # 4 MiB, of which the guest's page tables take 2 MiB
    low = 512

    def content(at):
        return expected_page(1, (at - REGION) // 4096 if at < HOLE_END else low + (at - HOLE_END) // 4096, 0)

    memory = Sparse(7 << 20, content)
    assert check_memory(memory, progress([(1, 0)], pages=low + 256)) == []
    with pytest.raises(StateError, match="769 pages, of which 768 exist"):
        check_memory(memory, progress([(1, 0)], pages=low + 257))


def test_what_cannot_be_checked_is_refused(memory):
    with pytest.raises(StateError, match="not the guest verify"):
        check_memory(memory, progress([(1, 0)], guest=b"touch"))
    with pytest.raises(StateError, match="not the guest verify"):
        check_memory(memory, progress([(0, 0)], lib.PV_STATUS_BOOTING))
    with pytest.raises(StateError, match="is at page 512 of 512"):
        check_memory(memory, progress([(1, 512)]))
    with pytest.raises(BadInput, match="write=101"):
        check_memory(memory, progress([(1, 0)]), write=101)


def test_ram_hash_sees_every_byte_and_the_layout(memory):
    blank = ram_hash(memory)
    memory.write(Gpa(memory.size - 1), b"\1")
    assert ram_hash(memory) != blank
    memory.write(Gpa(memory.size - 1), b"\0")
    assert ram_hash(memory) == blank
    other = GuestMemory(memory.size + 4096)
    assert ram_hash(other) != blank
    other.close()
