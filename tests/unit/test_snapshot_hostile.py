# test_snapshot_hostile.py: damaged, truncated and forged snapshot files: found out before a wrong byte is used, by our
# own errors in one line, and within bounds.
from __future__ import annotations

import os
import random
import resource
import struct
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_files import (
    AVAILABLE,
    PAGES,
    STATE,
    TABLE,
    WORD,
    Forge,
    pages_in,
    put,
    save,
    sealed,
    some_ram,
    xxh64,
)  # fmt: skip

from pyvmm.errors import SnapshotError
from pyvmm.layout import PAGE_SIZE
from pyvmm.memory import GuestMemory
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot import states as state_codec
from pyvmm.snapshot.format import CHUNK, HEADER_SIZE, ID_SIZE, MAX_MEMORY, SECTIONS, align, decode

FLIPS = 1000
CUTS = 200
BLOCK_KIND, PARENT_KIND = 1, 2


def everything(path):
    """What is in a file: read in each way that there is. Raises what opening and reading raise."""
    with Snapshot.open(str(path)) as snapshot:
        pages = [snapshot.read_page(page) for page in range(0, snapshot.pages, 7)]
        read = dict(entry for block in range(snapshot.blocks) for entry in snapshot.read_block(block))
        found = (snapshot.states, snapshot.large, snapshot.wset, pages, read)
        snapshot.check()
        return found


@pytest.fixture(params=AVAILABLE)
def saved(request, tmp_path):
    """(path, its bytes, what is in it) of a small file that has all sections."""
    path = tmp_path / "a"
    rng = random.Random(7)
    order = rng.sample(range(PAGES), 60)
    save(path, some_ram(7), order, request.param, large=[0], wset=order[:9])
    return path, path.read_bytes(), everything(path)


def test_each_changed_byte_is_found(saved):
    path, raw, right = saved
    rng = random.Random(raw)
    # Half of them anywhere, half where no page's bytes are: in header, maps and checksums.
    tail = decode(raw[:HEADER_SIZE], len(raw), "").sections["states"].offset
    places = [rng.randrange(len(raw)) for _ in range(FLIPS // 2)]
    places += [rng.choice((rng.randrange(330), rng.randrange(tail, len(raw)))) for _ in range(FLIPS // 2)]
    for at in places:
        changed = bytearray(raw)
        changed[at] ^= rng.choice((1 << rng.randrange(8), rng.randrange(1, 256)))
        path.write_bytes(changed)
        with pytest.raises(SnapshotError) as error:
            assert everything(path) == right, f"other content by byte {at}"
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


def test_what_is_damaged_later_does_not_hide_what_is_right(saved):
    """The check is lazy: pages whose bytes and maps are right are read all the same."""
    path, raw, right = saved
    with Snapshot.open(str(path)) as snapshot:
        victim = snapshot.read_block(0)[0][0]
    changed = bytearray(raw)
    changed[HEADER_SIZE + 100] ^= 1
    path.write_bytes(changed)
    with Snapshot.open(str(path)) as snapshot:
        assert snapshot.states == right[0]
        for block in range(1, snapshot.blocks):
            assert all(right[4][page] == data for page, data in snapshot.read_block(block))
        for read in (lambda: snapshot.read_block(0), lambda: snapshot.read_page(victim), snapshot.check):
            with pytest.raises(SnapshotError, match="the checksum of storage block 0 is wrong"):
                read()
        with pytest.raises(SnapshotError, match="storage block 0"):
            snapshot.load_into(GuestMemory(snapshot.memory_size, "4k"))


def test_each_truncation_is_refused(saved):
    path, raw, _ = saved
    rng = random.Random(raw)
    for size in [0, 1, 7, 8, 11, 12, 4095, 4096, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(CUTS))]:
        path.write_bytes(raw[:size])
        with pytest.raises(SnapshotError, match="truncated" if size > 12 else "truncated|not a snapshot") as error:
            Snapshot.open(str(path))
        assert "\n" not in str(error.value)
    path.write_bytes(raw + b"\0")
    with pytest.raises(SnapshotError, match="something is appended"):
        Snapshot.open(str(path))


def test_a_file_that_shrinks_while_it_is_open(saved):
    path, _, _ = saved
    with Snapshot.open(str(path)) as snapshot:
        os.truncate(path, HEADER_SIZE)
        for read in (lambda: snapshot.page_home(0), lambda: snapshot.read_block(0), lambda: snapshot.large):
            with pytest.raises(SnapshotError, match="truncated"):
                read()


def test_what_was_verified_does_not_change_any_more(saved):
    path, _, right = saved
    with Snapshot.open(str(path)) as snapshot:
        homes = [snapshot.page_home(page) for page in range(PAGES)]
        with open(path, "r+b") as file:
            file.seek(snapshot.header.sections["index"].offset)
            file.write(bytes(8 * PAGES))
        assert [snapshot.page_home(page) for page in range(PAGES)] == homes
        assert snapshot.states == right[0]


def test_no_file_is_no_snapshot(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, named in ((tmp_path, "not a file"), (tmp_path / "fifo", "not a file"), (tmp_path / "none", "No such")):
        with pytest.raises(SnapshotError, match=named):
            Snapshot.open(str(path))


# ---- forged: with all checksums right ----


@pytest.fixture
def forge(tmp_path):
    """(path, Forge) of a small raw file."""
    path = tmp_path / "forged"
    save(path, some_ram(3), range(40), wset=[3, 1])
    made = Forge(path.read_bytes())
    assert made.raw() == path.read_bytes()  # nothing forged yet
    assert [name for name in SECTIONS if not made.sections[name]] == []
    return path, made


HEADERS = {
    "header size": (12, "<I", 8192),
    "producer": (16, "<4s", b"a\x1b[m"),
    "producer that is no text": (16, "<1s", b"\xff"),
    "no id": (48, "<16s", bytes(ID_SIZE)),
    "a parent, and no depth": (64, "<16s", b"p" * 16),
    "RAM of another size": (88, "<Q", 2 << 20),
    "RAM of odd size": (88, "<Q", PAGES * PAGE_SIZE + 1),
    "RAM without end": (88, "<Q", 1 << 63),
    "pages": (96, "<Q", PAGES + 1),
    "blocks": (104, "<Q", 1 << 60),
    "fewer blocks": (104, "<Q", 1),
    "pages in blocks": (112, "<Q", 1 << 61),
    "block size 0": (120, "<I", 0),
    "block size": (120, "<I", 12288),
    "block size beyond all": (120, "<I", 1 << 31),
    "codec": (124, "<I", 3),
    "depth without parent": (128, "<I", 1),
    "depth": (128, "<I", 33),
    "path size": (132, "<I", 4000),
    "path without parent": (132, "<I", 5),
    "kind of a section": (TABLE, "<Q", 7),
    "offset of a section": (TABLE + 8, "<Q", 4096),
    "offset beyond the file": (TABLE + 8, "<Q", (1 << 64) - 8),
    "length of a section": (TABLE + 16, "<Q", 1 << 62),
    "length of the index": (TABLE + 32 + 16, "<Q", 8),
    "RAM beyond all": (88, "<QQ", (2 * MAX_MEMORY, 2 * MAX_MEMORY // PAGE_SIZE)),
    "length of the working set": (TABLE + 5 * 32 + 16, "<Q", 1 << 63),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_forged_header_is_refused(forge, name):
    path, made = forge
    at, kind, value = HEADERS[name]
    raw = made.raw()
    struct.pack_into(kind, raw, at, *(value if isinstance(value, tuple) else (value,)))
    path.write_bytes(sealed(raw))
    with pytest.raises(SnapshotError, match="its header contradicts itself"):
        Snapshot.open(str(path))


def test_another_version_is_refused_by_name(forge):
    path, made = forge
    put(made, 8, "<I", 2)
    path.write_bytes(made.raw())
    with pytest.raises(SnapshotError, match=r"format version 2, and this pyvmm reads version 1"):
        Snapshot.open(str(path))


def word(block, slot, kind=BLOCK_KIND):
    return block << 21 | slot << 12 | kind


def swallow(made):
    """Block 0 takes the pages of block 1 into slots that no block has, and all maps agree."""
    for slot in range(4, 8):
        made.word("index", made.word("back", slot), word(0, slot))
    made.row(0, slots=8, length=8 * PAGE_SIZE, checksum=xxh64(bytes(made.blocks[: 8 * PAGE_SIZE])))


def wrap(made):
    """A page number that finds its word in INDEX by an overflow of 64 bits."""
    made.word("back", 0, made.word("back", 0) + (1 << 61))


FORGERIES = {
    "a block of twice the size": swallow,
    "a slot of a page that wraps": wrap,
    "a page in no block": lambda made: made.word("index", 0, word(1 << 40, 0)),
    "a page in no slot": lambda made: made.word("index", 0, word(0, 4)),
    "a page in another's slot": lambda made: made.word("index", 0, made.word("index", made.word("back", 1))),
    "a page in two places": lambda made: made.word("index", 400, made.word("index", made.word("back", 0))),
    "a page that no place names": lambda made: made.word("index", made.word("back", 0), 0),
    "a page of no parent": lambda made: made.word("index", 0, PARENT_KIND),
    "a page of unknown kind": lambda made: made.word("index", 0, 3),
    "a zero page with a place": lambda made: made.word("index", 0, word(1, 1, 0)),
    "a page with flags": lambda made: made.word("index", 0, made.word("index", 0) | 16),
    "a slot of a page beyond RAM": lambda made: made.word("back", 0, PAGES),
    "a slot of a page far beyond RAM": lambda made: made.word("back", 0, -1),
    "a slot of another's page": lambda made: made.word("back", 0, made.word("back", 1)),
    "a block in the header": lambda made: made.row(0, offset=0),
    "a block at an odd place": lambda made: made.row(0, offset=4097),
    "a block beyond the file": lambda made: made.row(0, offset=(1 << 64) - 8),
    "a block in the maps": lambda made: made.row(0, offset=HEADER_SIZE + len(made.blocks) - 8),
    "a block upon another": lambda made: made.row(0, **{k: made.row(1)[k] for k in ("offset", "checksum")}),
    "a block of no bytes": lambda made: made.row(0, length=0),
    "a block of many bytes": lambda made: made.row(0, length=(1 << 32) - 1),
    "a block of another length": lambda made: made.row(0, length=4096),
    "a block of no pages": lambda made: made.row(0, slots=0),
    "a block of many pages": lambda made: made.row(0, slots=65535),
    "a block with more pages": lambda made: made.row(0, slots=5, length=5 * 4096),
    "a block with less pages": lambda made: made.row(0, slots=3, length=3 * 4096),
    "a block of unknown codec": lambda made: made.row(0, codec=9),
    "a block of another codec": lambda made: made.row(0, codec=1),
    "a block with others' pages": lambda made: made.row(0, first=1),
    "a block with pages beyond all": lambda made: made.row(0, first=(1 << 64) - 2),
    "bytes behind the blocks": lambda made: made.blocks.extend(bytes(8)),
    "slots of no block": lambda made: (
        made.sections["back"].extend(bytes(8)),
        put(made, 112, "<Q", made.header.backs + 1),
    ),
    "large pages beyond RAM": lambda made: made.word("large", 0, 1 << 40),
    "a working set beyond RAM": lambda made: made.word("wset", 0, PAGES),
    "a working set with a page twice": lambda made: made.word("wset", 0, made.word("wset", 1)),
    "states that are none": lambda made: made.sections.update(states=bytearray(b"Tx")),
}


ODD_WORDS = {
    "a page in no block", "a page in no slot", "a page of no parent", "a page of unknown kind",
    "a zero page with a place", "a page with flags",
}  # fmt: skip
BY_ITSELF = {"a block upon another", "a block with less pages"}
"""As far as one block shows, this is right: another's bytes with their checksum; or a checksum is wrong."""


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_maps_are_found(forge, name):
    path, made = forge
    FORGERIES[name](made)
    path.write_bytes(made.raw())
    with Snapshot.open(str(path)) as snapshot:  # lazily: this much is right
        with pytest.raises(SnapshotError, match="damaged") as error:
            snapshot.check()
        assert "\n" not in str(error.value)
        if name.startswith(("a block", "a slot")) and name not in BY_ITSELF:  # seen before a byte of it is read
            with pytest.raises(SnapshotError, match="storage block 0 contradicts its other maps"):
                snapshot.read_block(0)
        if name in ODD_WORDS:
            with pytest.raises(SnapshotError, match="the index of page 0 contradicts its other maps"):
                snapshot.page_home(0)
        in_pages = name.startswith(("a page", "a slot", "a block"))
        if in_pages and name not in BY_ITSELF and name != "a page that no place names":
            with pytest.raises(SnapshotError):
                snapshot.load_into(GuestMemory(snapshot.memory_size, "4k"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_forgeries_raise_only_our_errors(forge, data):
    path, start = forge
    made = Forge(bytes(start.raw()))
    for _ in range(data.draw(st.integers(1, 3))):
        target = data.draw(st.sampled_from(["head", *SECTIONS]))
        area = made.head if target == "head" else made.sections[target]
        if not area:
            continue
        at = data.draw(st.integers(12, 330) if target == "head" else st.integers(0, len(area) - 1))
        if data.draw(st.booleans()):
            area[at] = data.draw(st.integers(0, 255))
        else:
            WORD.pack_into(area.ljust(at + 8, b"\0"), at, 0)  # no change if at the end
            area[at : at + 8] = data.draw(st.sampled_from([bytes(8), b"\xff" * 8, WORD.pack(1 << 63)]))[
                : len(area) - at
            ]
    path.write_bytes(made.raw())
    try:
        found = everything(path)
        with Snapshot.open(str(path)) as snapshot:
            snapshot.load_into(GuestMemory(snapshot.memory_size, "4k"))
            snapshot.info()
    except SnapshotError:
        return
    assert len(found[3]) == -(-PAGES // 7)  # other content with right checksums: nothing can tell


# ---- parents ----


def test_forged_chains_end(tmp_path):
    """A file that is its own ancestor, two that are each other's, and names of parents that are no names."""
    save(tmp_path / "a", some_ram(0))
    with Snapshot.open(str(tmp_path / "a")) as parent:
        save(tmp_path / "b", some_ram(1), [3], parent=parent)
    made = Forge((tmp_path / "b").read_bytes())
    own = bytes(made.head[48:64])
    put(made, 64, "<16s", own)
    put(made, 512, "<1s", b"b")
    (tmp_path / "b").write_bytes(made.raw())
    with pytest.raises(SnapshotError, match="contradicts itself"):
        Snapshot.open(str(tmp_path / "b"))

    ids = {name: name.encode() * ID_SIZE for name in "cd"}
    for name, other in (("c", "d"), ("d", "c")):
        put(made, 48, "<16s", ids[name])
        put(made, 64, "<16s", ids[other])
        put(made, 512, "<1s", other.encode())
        (tmp_path / name).write_bytes(made.raw())
    with pytest.raises(SnapshotError, match="another snapshot than the parent"):
        Snapshot.open(str(tmp_path / "c"))


@pytest.mark.parametrize("name", ["..", "/", "x/", "/dev/zero", "\x1b[31mred", "\udcff", "a" * 1024])
def test_names_of_parents_that_are_no_names(tmp_path, name):
    save(tmp_path / "a", some_ram(0))
    with Snapshot.open(str(tmp_path / "a")) as parent:
        save(tmp_path / "b", some_ram(1), [3], parent=parent)
    made = Forge((tmp_path / "b").read_bytes())
    path = os.fsencode(name)
    put(made, 132, "<I", len(path))
    made.head[512 : 512 + len(path)] = path
    (tmp_path / "b").write_bytes(made.raw())
    with pytest.raises(SnapshotError, match="its parent is missing") as error:
        Snapshot.open(str(tmp_path / "b"))
    assert str(error.value).isprintable()


def test_a_path_with_a_zero_byte_is_refused(tmp_path):
    save(tmp_path / "a", some_ram(0))
    with Snapshot.open(str(tmp_path / "a")) as parent:
        save(tmp_path / "b", some_ram(1), [3], parent=parent)
    made = Forge((tmp_path / "b").read_bytes())
    put(made, 512, "<1s", b"\0")
    (tmp_path / "b").write_bytes(made.raw())
    with pytest.raises(SnapshotError, match="contradicts itself"):
        Snapshot.open(str(tmp_path / "b"))


def test_a_forged_size_takes_no_memory(tmp_path):
    """A header that claims 1 TiB, in a sparse file as long as that needs: refused, without memory for its index."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "a"
    save(path, some_ram(0), [])
    made = Forge(path.read_bytes())
    raw_states = state_codec.encode(STATE)
    pages = MAX_MEMORY // PAGE_SIZE
    put(made, 88, "<QQ", MAX_MEMORY, pages)
    at = HEADER_SIZE
    lengths = {"states": len(raw_states), "index": pages * 8, "blocks": 0, "back": 0, "large": pages // 4096, "wset": 0}
    for number, name in enumerate(SECTIONS):
        struct.pack_into("<QQQQ", made.head, TABLE + 32 * number, number + 1, at, lengths[name], 0)
        at += align(lengths[name]) + 8 * -(-lengths[name] // CHUNK)
    put(made, 80, "<Q", at)
    path.write_bytes(sealed(made.head))
    os.truncate(path, at)
    with pytest.raises(SnapshotError, match="the checksums of section states are wrong"):
        Snapshot.open(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_pages_of_a_sound_file_are_right(forge):
    path, made = forge
    path.write_bytes(made.raw())
    ram = some_ram(3)
    assert pages_in(path)[: 40 * PAGE_SIZE] == ram[: 40 * PAGE_SIZE]


def test_a_block_does_not_grow_into_the_next(tmp_path):
    """512 slots are the most: a slot more would have the word of the next block's first."""
    path = tmp_path / "a"
    save(path, b"x" * PAGES * PAGE_SIZE, block_size=2 << 20)
    made = Forge(path.read_bytes())
    made.row(0, slots=PAGES, length=PAGES * PAGE_SIZE, checksum=xxh64(bytes(made.blocks)))
    path.write_bytes(made.raw())
    with Snapshot.open(str(path)) as snapshot:
        for read in (lambda: snapshot.read_block(0), lambda: snapshot.load_into(GuestMemory(snapshot.memory_size))):
            with pytest.raises(SnapshotError, match="storage block 0 contradicts"):
                read()


def test_many_threads_read_one_file(saved):
    path, _, right = saved
    found, errors = [], []

    def read(snapshot, seed):
        try:
            pages = random.Random(seed).sample(sorted(right[4]), len(right[4]))
            found.append(all(snapshot.read_page(page) == right[4][page] for page in pages))
        except Exception as error:
            errors.append(error)

    with Snapshot.open(str(path)) as snapshot:
        threads = [threading.Thread(target=read, args=(snapshot, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert found == [True] * 8
