# test_snapshot_file.py: what is saved is what is read: any order, block size, codec, chain of parents; and wrong calls.
from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_files import AVAILABLE, BLOCK, PAGES, STATE, page_of, pages_in, save, some_ram

from pyvmm.errors import BadInput, LifecycleError, SnapshotError, StateError
from pyvmm.layout import GIB, PAGE_SIZE, Gpa
from pyvmm.memory import GuestMemory
from pyvmm.memory.trace import Runs
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.format import MAX_DEPTH
from pyvmm.snapshot.writer import Writer
from pyvmm.state import State

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = [16 << 10, 32 << 10, 64 << 10, 256 << 10, 2 << 20]


def loaded(path):
    """RAM after an eager load."""
    with Snapshot.open(str(path)) as snapshot:
        memory = GuestMemory(snapshot.memory_size, "4k")
        snapshot.load_into(memory)
        return memory.read(Gpa(0), memory.size)


@few
@given(st.data(), st.integers(0, 1 << 30), st.sampled_from(SIZES), st.sampled_from(AVAILABLE))
def test_what_is_saved_is_read(tmp_path, data, seed, block_size, codec):
    ram = some_ram(seed)
    order = data.draw(st.permutations(range(PAGES)))
    large, wset = data.draw(st.sets(st.integers(0, 1))), data.draw(st.lists(st.integers(0, PAGES - 1), unique=True))
    path = tmp_path / "a"
    save(path, ram, order, codec, block_size, large=large, wset=wset)
    assert pages_in(path) == ram == loaded(path)
    with Snapshot.open(str(path)) as snapshot:
        snapshot.check()
        assert (snapshot.states, set(snapshot.large), list(snapshot.wset)) == (STATE, large, wset)
        zeros = [page for page in range(PAGES) if not any(page_of(ram, page))]
        assert [page for page in range(PAGES) if snapshot.page_home(page).kind == "zero"] == zeros
        read = [entry for block in range(snapshot.blocks) for entry in snapshot.read_block(block)]
        # As they were given, and every block but the last is full.
        assert read == [(page, page_of(ram, page)) for page in order if page not in set(zeros)]
        assert snapshot.blocks == -(-len(read) * PAGE_SIZE // block_size)
        info = snapshot.info()
        assert (info.zero, info.stored, info.inherited) == (len(zeros), PAGES - len(zeros), 0)
        assert info.raw_bytes == len(read) * PAGE_SIZE >= info.stored_bytes
        assert info.raw_blocks == snapshot.blocks or codec != "raw"


@few
@given(st.data(), st.lists(st.tuples(st.sampled_from(AVAILABLE), st.sampled_from(SIZES)), min_size=2, max_size=5))
def test_a_chain_of_parents(tmp_path, data, generations):
    ram, parent = some_ram(0), None
    for number, (codec, block_size) in enumerate(generations):
        path = tmp_path / f"{number}"
        pages = data.draw(st.lists(st.integers(0, PAGES - 1), unique=True, max_size=40)) if number else range(PAGES)
        fresh = some_ram(data.draw(st.integers(0, 99)))
        for page in pages:
            ram[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = page_of(fresh, page)
        save(path, ram, pages, codec, block_size, parent)
        if parent is not None:
            parent.close()
        parent = Snapshot.open(str(path))
        parent.check()
        assert parent.depth == number
        assert pages_in(path) == ram == loaded(path)
        inherited = [page for page in range(PAGES) if parent.page_home(page).kind == "parent"]
        assert not number or set(inherited) == set(range(PAGES)) - set(pages)
    parent.close()


def test_pages_come_in_runs_and_blocks_end_where_asked(tmp_path):
    ram = some_ram(1)
    path = str(tmp_path / "a")
    runs = Runs([(0, 10), (20, 3), (500, 15)])
    with Writer(path, len(ram), BLOCK) as writer:
        chosen = b"".join(page_of(ram, page) for first, count in runs for page in range(first, first + count))
        writer.add_pages(runs, chosen)
        writer.end_block()
        writer.end_block()  # an empty one is none
        writer.add_pages([(100, 1)], memoryview(b"\1" * PAGE_SIZE))
        writer.finish(STATE)
    with Snapshot.open(path) as snapshot:
        snapshot.check()
        assert snapshot.read_block(snapshot.blocks - 1) == [(100, b"\1" * PAGE_SIZE)]
        assert snapshot.read_page(501) == page_of(ram, 501)
        assert snapshot.read_page(300) == bytes(PAGE_SIZE)  # not given: zeros


def test_ram_behind_the_hole(tmp_path):
    path = str(tmp_path / "a")
    size = 3 * GIB + 64 * PAGE_SIZE
    first = 3 * GIB // PAGE_SIZE
    with Writer(path, size) as writer:
        writer.add_pages([(first - 2, 4)], b"".join(bytes([n]) * PAGE_SIZE for n in (1, 2, 3, 4)))
        writer.finish(STATE, large=[0, 1535, 1536])
    with Snapshot.open(path) as snapshot:
        snapshot.check()
        assert snapshot.large == (0, 1535, 1536)
        memory = GuestMemory(size)
        told = []
        snapshot.load_into(memory, lambda *progress: told.append(progress))
        assert told[-1] == (65536, 65536)
        assert memory.read(Gpa(3 * GIB - PAGE_SIZE), 1) == b"\2"
        assert memory.read(Gpa(4 * GIB), PAGE_SIZE + 1) == b"\3" * PAGE_SIZE + b"\4"


def test_a_file_is_only_its_owners(tmp_path):
    save(tmp_path / "a", some_ram(0))
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["a"]


# ---- calls that cannot be ----


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"memory_size": 1 << 20}, "memory of 1048576 bytes"),
        ({"memory_size": (2 << 20) + 1}, "memory of 2097153 bytes"),
        ({"memory_size": 1 << 41}, "2M to 1024G"),
        ({"block_size": 8192}, "storage blocks of 8K"),
        ({"block_size": 48 << 10}, "storage blocks of 48K"),
        ({"block_size": 4 << 20}, "storage blocks of 4M"),
        ({"codec": "zip"}, "no codec 'zip': choose one of raw, lz4, zstd"),
    ],
)
def test_shapes_that_cannot_be(tmp_path, arguments, named):
    with pytest.raises(BadInput, match=named):
        Writer(str(tmp_path / "a"), **{"memory_size": 4 << 20, **arguments})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("runs", "size", "named"),
    [
        ([(0, 1), (0, 1)], 2, "page 0 is given twice"),
        ([(3, 2), (4, 1)], 3, "page 4 is given twice"),
        ([(PAGES, 1)], 1, f"page {PAGES} is beyond"),
        ([(PAGES - 1, 2)], 2, f"page {PAGES} is beyond"),
        ([(1 << 62, 1)], 1, "is beyond"),
        ([(-1, 1)], 1, "a run of 1 pages from page -1"),
        ([(0, -1)], 0, "a run of -1 pages"),
        ([(0, 2)], 1, "a run of 2 pages from page 0, and 4096 bytes for it"),
        ([(0, 1)], 2, "4096 bytes more"),
    ],
)
def test_pages_that_cannot_be(tmp_path, runs, size, named):
    with Writer(str(tmp_path / "a"), PAGES * PAGE_SIZE) as writer:
        with pytest.raises(BadInput, match=named):
            writer.add_pages(runs, b"x" * size * PAGE_SIZE)
        with pytest.raises(LifecycleError, match="by an error"):
            writer.finish(STATE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"large": [2]}, BadInput, "block 2 is beyond"),
        ({"large": [-1]}, BadInput, "block -1 is beyond"),
        ({"wset": [1, 1]}, BadInput, "twice"),
        ({"wset": [PAGES]}, BadInput, "beyond"),
        ({"wset": [-1]}, BadInput, "beyond"),
        ({"states": State("k", 1, {"f": None})}, StateError, "NoneType"),
    ],
)
def test_ends_that_cannot_be(tmp_path, arguments, error, named):
    ram = some_ram(0)
    with Writer(str(tmp_path / "a"), len(ram)) as writer:
        with pytest.raises(error, match=named):
            writer.finish(**{"states": STATE, **arguments})
        writer.finish(STATE)  # nothing had been written
    with Snapshot.open(str(tmp_path / "a")) as snapshot:
        snapshot.check()


def test_a_writer_ends_once(tmp_path):
    writer = Writer(str(tmp_path / "a"), PAGES * PAGE_SIZE)
    writer.finish(STATE)
    writer.abandon()
    with pytest.raises(LifecycleError, match="has ended"):
        writer.add_pages([(0, 1)], bytes(PAGE_SIZE))
    with Snapshot.open(str(tmp_path / "a")) as snapshot:
        assert snapshot.blocks == 0
        snapshot.check()


def test_reading_what_is_not_there(tmp_path):
    save(tmp_path / "a", some_ram(0))
    with Snapshot.open(str(tmp_path / "a")) as snapshot:
        for call in (snapshot.read_page, snapshot.page_home, snapshot.read_block):
            for number in (-1, 1 << 60):
                with pytest.raises(BadInput, match=str(number)):
                    call(number)
        with pytest.raises(BadInput, match="is of a VM with 2060K"):
            snapshot.load_into(GuestMemory(4 << 20))
        memory = GuestMemory(PAGES * PAGE_SIZE)
        memory.write(Gpa(0), b"x")
        with pytest.raises(BadInput, match="fresh memory"):
            snapshot.load_into(memory)
    with pytest.raises(BadInput, match="is closed"):
        snapshot.read_page(0)


# ---- parents ----


@pytest.fixture
def family(tmp_path):
    """Paths of a snapshot and of its child."""
    old, new = tmp_path / "old", tmp_path / "new"
    save(old, some_ram(1))
    with Snapshot.open(str(old)) as parent:
        save(new, some_ram(2), [3], parent=parent)
    return old, new


def refused(path, *named):
    with pytest.raises(SnapshotError) as error:
        Snapshot.open(str(path))
    message = str(error.value)
    assert message.count("\n") == 0
    assert all(part in message for part in (os.path.basename(path), *named)), message


def test_a_missing_parent_is_named(family):
    old, new = family
    old.unlink()
    refused(new, "its parent is missing", repr(str(old)))
    with Snapshot.open(str(new), parents=False) as alone:
        assert alone.page_home(3).kind != "parent"
        with pytest.raises(SnapshotError, match="without its parent 'old'"):
            alone.read_page(4)
        with pytest.raises(SnapshotError, match="without its parent"):
            alone.load_into(GuestMemory(alone.memory_size))
        with pytest.raises(SnapshotError, match="without its parent"):
            alone.check()


def test_another_file_in_the_parents_place_is_refused(family):
    old, new = family
    save(old, some_ram(1))
    refused(new, "is another snapshot than the parent")
    old.write_bytes(b"x" * 9999)
    refused(new, "its parent cannot be used", "old: not a snapshot")


def test_a_family_moves_together(family, tmp_path):
    ram = pages_in(family[1])
    (tmp_path / "elsewhere").mkdir()
    for path in family:
        path.rename(tmp_path / "elsewhere" / path.name)
    assert pages_in(tmp_path / "elsewhere" / "new") == ram


def test_a_parent_elsewhere_is_found_where_it_was(family, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with Snapshot.open(str(family[0])) as parent:
        save(tmp_path / "elsewhere" / "b", some_ram(2), [3], parent=parent)
    assert pages_in(tmp_path / "elsewhere" / "b") == pages_in(family[1])
    os.symlink(tmp_path / "elsewhere" / "b", tmp_path / "link")
    assert pages_in(tmp_path / "link") == pages_in(family[1])


def test_an_ancestor_is_not_replaced(family):
    before = family[0].read_bytes()
    with Snapshot.open(str(family[1])) as parent:
        for path in family:
            with pytest.raises(BadInput, match="is an ancestor of what is to replace it"):
                Writer(str(path), parent.memory_size, parent=parent)
        with pytest.raises(BadInput, match="cannot be the parent"):
            Writer(str(family[0]), 4 << 20, parent=parent)
    assert family[0].read_bytes() == before


def test_chains_end(tmp_path):
    ram, parent = some_ram(0), None
    for number in range(MAX_DEPTH + 1):
        save(tmp_path / f"{number}", ram, [number], parent=parent)
        parent = Snapshot.open(str(tmp_path / f"{number}"))
    assert parent.depth == MAX_DEPTH
    assert parent.read_page(0) == page_of(ram, 0)
    with pytest.raises(BadInput, match="has 32 ancestors"):
        Writer(str(tmp_path / "last"), len(ram), parent=parent)
    parent.check()
    parent.close()
