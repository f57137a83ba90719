# test_lazy.py: how much of a snapshot comes with a touch, what comes ahead of touches, and the order of touches.
from __future__ import annotations

import os
import random
import threading

import pytest
from engine_help import until

from pyvmm import VM, BadInput, Snapshot
from pyvmm._native import ffi, lib
from pyvmm.errors import FetchError
from pyvmm.layout import BLOCK_SIZE, MIB, PAGE_SIZE
from pyvmm.memory.source import UNITS
from pyvmm.pytest_plugin import needs
from pyvmm.snapshot.lazy import FileHome
from pyvmm.snapshot.writer import Writer
from pyvmm.testing.verify_model import check_memory, ram_hash

pytestmark = needs("kvm", "uffd_guest")

BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
STORE_PAGES = 16


@pytest.fixture
def restored():
    made = []

    def make(path, **options):
        made.append(VM.restore(str(path), lazy=True, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def pass_on(vm, passes=1):
    """Runs until the guest has completed so many passes more."""
    until = vm.progress().passes + passes
    while vm.progress().passes < until:
        vm.run(timeout=0.02)


def in_another_order(path, source, seed):
    """Saves a paused VM with its pages in any order, so that a storage block has pages of many blocks of 2 MiB."""
    rng = random.Random(seed)
    pages = list(range(source.memory.size // PAGE_SIZE))
    rng.shuffle(pages)
    looks = source.memory.engine.looks()
    with Writer(str(path), source.memory.size) as writer:
        for page in pages:
            writer.add_pages([(page, 1)], source.memory.read(source.memory.gpa_of(page), PAGE_SIZE))
        writer.finish(source.save_state(), [block for block, look in enumerate(looks) if look == "large"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Snapshots of a verifying guest, by address and in any order, and the hash of its RAM."""
    folder = tmp_path_factory.mktemp("lazy")
    with VM("32M", 2) as source:
        source.load("verify", "order=random zeros=100")
        source.run(timeout=0.4)
        source.snapshot(str(folder / "address"))
        in_another_order(folder / "shuffled", source, 1)
        return {"folder": folder, "hash": ram_hash(source.memory)}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """Snapshot of a guest that begins to read 1 page in 2 MiB, or rather would: see `reader`."""
    folder = tmp_path_factory.mktemp("sparse")
    with VM("64M", pages="2m") as source:
        source.load("touch", "size=60M passes=1")
        source.run(timeout=20)
        source.snapshot(str(folder / "filled"))
    return folder / "filled"


@pytest.mark.parametrize("order", ["address", "shuffled"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pages", ["auto", "4k"])
def test_units_bring_the_right_pages(files, restored, unit, order, pages):
    vm = restored(files["folder"] / order, unit=unit, fill=False, pages=pages)
    pass_on(vm)
    assert check_memory(vm.memory, vm.progress(), order="random", zeros=100) == []


@pytest.mark.parametrize("order", ["address", "shuffled"])
@pytest.mark.parametrize("ahead", [{"fill": True}, {"fill": True, "fill_rate": 200e6}, {"fill": False}])
def test_ram_is_the_same_however_it_comes(files, restored, order, ahead):
    vm = restored(files["folder"] / order, generation=False, **ahead)
    vm.restored.wait()
    assert ram_hash(vm.memory) == files["hash"]
    assert vm.memory.pages().away == 0
    assert not vm.memory.pages().armed


@needs("large_mappings")
def test_adaptive_units(sparse, restored):
    """By KVM's statistics: what is touched once stays small, what is touched twice is a large page."""
    vm = restored(sparse, fill=False, pages="2m")
    page = vm.memory.size // PAGE_SIZE - 2 * BLOCK_PAGES  # of the last blocks, which the guest does not use
    engine, first = vm.memory.engine, page // BLOCK_PAGES
    away = vm.memory.pages().away
    touch(vm, page)
    assert away - vm.memory.pages().away in (1, STORE_PAGES)  # zeros are each for themselves
    touch(vm, page + 256)
    assert engine.looks()[first] == "large"


def touch(vm, page):
    """Touches a page as a guest does, through the mapping; if it is away, waits until the fault is dealt with: who
    touches is woken before."""
    engine = vm.memory.engine
    faults = engine.stats().faults + bool(int(engine.page_words[page]) & 15)
    lib.pv_touch(vm.memory._mapping() + page * PAGE_SIZE, 1, PAGE_SIZE)
    while engine.stats().faults < faults:
        os.sched_yield()


def stored_pages(path, count, step):
    """Pages in storage blocks, of `count` different blocks of 2 MiB."""
    with Snapshot.open(str(path)) as snapshot:
        homes = [(page, snapshot.page_home(page)) for page in range(BLOCK_PAGES + step, snapshot.pages, BLOCK_PAGES)]
        return [page for page, home in homes if home.kind == "block" and home.slot + 1 < STORE_PAGES][:count]


@needs("large_mappings")
def test_a_touch_brings_its_storage_block_and_a_second_one_the_rest(sparse, restored):
    vm = restored(sparse, fill=False, pages="2m")
    for page in stored_pages(sparse, 5, 100):
        block, before = page // BLOCK_PAGES, vm.memory.pages().homes["file"]
        touch(vm, page)
        assert before - vm.memory.pages().homes["file"] == STORE_PAGES
        touch(vm, page + 1)  # has come with it
        assert before - vm.memory.pages().homes["file"] == STORE_PAGES
        assert vm.memory.engine.looks()[block] == "file"
        touch(vm, page + 100)
        assert before - vm.memory.pages().homes["file"] == BLOCK_PAGES
        assert vm.memory.engine.looks()[block] == "large"
    assert vm.memory.engine.stats().answers["unit"] == 5


@pytest.mark.parametrize(("unit", "pages"), [("page", 1), ("block", STORE_PAGES), ("large", BLOCK_PAGES)])
def test_units_by_choice(sparse, restored, unit, pages):
    vm = restored(sparse, fill=False, unit=unit)
    for page in stored_pages(sparse, 3, 200):
        for touched in (page, page + 64):
            if unit == "large" and touched != page:
                continue
            before = vm.memory.pages().homes["file"]
            touch(vm, touched)
            assert before - vm.memory.pages().homes["file"] == pages


def test_a_unit_of_many_blocks_comes_as_a_whole(files, restored):
    path = files["folder"] / "shuffled"
    vm = restored(path, fill=False)
    with Snapshot.open(str(path)) as snapshot:
        unit = next(pages for block in range(3, 40) if len(pages := snapshot.read_block(block)) == STORE_PAGES)
    pages = [page for page, _ in unit]
    assert len({page // BLOCK_PAGES for page in pages}) > 5
    words = vm.memory.engine.page_words
    came = {page for page in pages if words[page] & 15 == 0}  # with the pages of the first instruction
    touch(vm, next(page for page in pages if page not in came))
    assert all(words[page] & 15 == 0 for page in pages)
    for page, data in unit:
        assert vm.memory.read(vm.memory.gpa_of(page), PAGE_SIZE) == data


@needs("large_mappings")
@pytest.mark.parametrize("order", ["address", "shuffled"])
def test_large_pages_are_large_again_after_parts_of_them_came(files, restored, order):
    path = files["folder"] / order
    vm = restored(path, fill=False, unit="block")
    pass_on(vm)
    vm.pause()
    vm.restored.run_ahead()
    vm.restored.wait()
    with Snapshot.open(str(path)) as snapshot:
        expected = set(snapshot.large)
    assert len(expected) >= 14
    looks = vm.memory.engine.looks()
    came_whole = {block for block in expected if looks[block] == "large"}
    assert ram_hash(vm.memory)
    assert check_memory(vm.memory, vm.progress(), order="random", zeros=100) == []
    if order == "address":  # with unit="block" a guest that touches all of a block has it in small pages
        assert came_whole <= expected
    vm.resume()
    pass_on(vm)


@needs("large_mappings")
def test_all_large_pages_of_the_source(files, restored):
    """KVM's own count, after the guest has touched all."""
    with VM.restore(str(files["folder"] / "address")) as eager:
        pass_on(eager, 2)
        expected = eager.mappings()["pages_2m"]
    assert expected >= 14
    for options in ({"fill": False}, {"fill": True}, {"fill": False, "unit": "large"}):
        vm = restored(files["folder"] / "address", **options)
        pass_on(vm, 2)
        assert vm.mappings()["pages_2m"] >= expected


def test_a_block_that_was_small_and_holds_little_stays_small(vm, restored, tmp_path):
    source = vm(memory="16M", pages="4k")
    source.memory.write(source.memory.gpa_of(3 * BLOCK_PAGES), b"few" * 1000)
    source.memory.write(source.memory.gpa_of(5 * BLOCK_PAGES), b"many" * (256 * 1024))
    source.load("hello")
    source.snapshot(str(tmp_path / "s"))
    for pages, small in (("auto", True), ("2m", False)):
        target = restored(tmp_path / "s", fill=False, pages=pages)
        engine = target.memory.engine
        words = engine.block_words  # fills in what each block is to be
        assert words is not None
        assert engine.is_for_large(3) is not small
        assert engine.is_for_large(5)


def test_large_pages_survive_two_generations(vm, restored, tmp_path):
    source = vm(memory="32M", pages="2m")
    source.load("touch", "size=16M passes=1")
    source.run(timeout=20)
    source.snapshot(str(tmp_path / "0"))
    second = restored(tmp_path / "0", fill=False, pages="2m")
    page = stored_pages(tmp_path / "0", 1, 30)[0]
    touch(second, page)  # one block comes in part
    second.snapshot(str(tmp_path / "1"))
    with Snapshot.open(str(tmp_path / "0")) as first, Snapshot.open(str(tmp_path / "1")) as last:
        assert len(first.large) >= 8
        assert last.large == first.large


# ---- the order of touches, and what comes ahead ----


def test_recorded_and_prefetched(vm, restored, tmp_path):
    source = vm(memory="64M", pages="2m")
    source.load("touch", "size=48M stride=256K pattern=sequential read=1 seed=3")
    source.run(timeout=0.2)
    # what the guest reads is not zeros
    with source.memory.view(source.memory.gpa_of(BLOCK_PAGES), 56 * MIB) as view:
        view[: 48 * MIB] = random.Random(5).randbytes(MIB) * 48
    source.snapshot(str(tmp_path / "s"))
    slots = [BLOCK_PAGES + i * 64 for i in range(192)]

    recorder = restored(tmp_path / "s", record=True)
    pass_on(recorder, 2)
    recorder.pause()
    order = recorder.restored.working_set()
    touched = [page for page in order if page in set(slots)]
    assert set(touched) == set(slots)
    start = touched[0]
    assert touched == sorted(touched, key=lambda page: (page < start, page)), "not in the order of the guest's passes"
    assert len(order) < 2 * len(slots)  # what the guest does not touch has not come

    target = restored(tmp_path / "s", fill=False)
    target.restored.prefetch(order)
    came = target.restored.reads
    before = target.memory.pages().homes["file"]
    pass_on(target, 2)
    assert target.memory.pages().homes["file"] == before, "something was touched that had not come"
    assert target.restored.reads == came
    recorder.close()
    assert recorder.restored.working_set() == order


@needs("large_mappings")
def test_much_of_a_block_prefetched_comes_as_a_large_page(sparse, restored):
    vm = restored(sparse, fill=False, pages="2m")
    few, many = stored_pages(sparse, 2, 0)
    vm.restored.prefetch([*range(few, few + 20), *range(many, many + 200)])
    looks = vm.memory.engine.looks()
    assert looks[many // BLOCK_PAGES] == "large"
    assert looks[few // BLOCK_PAGES] == "file"
    with Snapshot.open(str(sparse)) as snapshot:
        for page in (few, few + 19, many, many + 500):
            assert vm.memory.read(vm.memory.gpa_of(page), PAGE_SIZE) == snapshot.read_page(page)


def test_what_is_recorded_needs_room_only_once(files, restored):
    """Pages that go away and come back are touched anew, but first touched once."""
    vm = restored(files["folder"] / "address", record=True)
    pass_on(vm)
    vm.memory.engine.remove(BLOCK_PAGES * 4, BLOCK_PAGES)
    pass_on(vm)
    vm.pause()
    order = vm.restored.working_set()
    assert len(set(order)) == len(order)
    assert {page // BLOCK_PAGES for page in order} >= set(range(1, 14))


def test_closing_while_it_fills(files):
    for rate in (None, 1e6):
        vm = VM.restore(str(files["folder"] / "address"), lazy=True, fill_rate=rate)
        vm.start()
        vm.close()
        vm.restored.wait()


# ---- what fails ----


def test_a_damaged_index(sparse, restored, tmp_path):
    """What it says of other pages than those asked for is not looked at; mended, it gives these too."""
    path = tmp_path / "s"
    path.write_bytes(sparse.read_bytes())
    page, far = 20 * BLOCK_PAGES, 10 * BLOCK_PAGES  # a chunk of the index is of 8192 pages
    with Snapshot.open(str(path)) as snapshot:
        expected = {number: snapshot.read_page(number) for number in (page, far)}
        at = snapshot.header.sections["index"].offset + (page + 9) * 8 + 5
    flip(path, at)
    vm = restored(path, fill=False)
    gpa = vm.memory.gpa_of(page)
    for _ in range(2):
        with pytest.raises(FetchError, match=r"gfn 0x[0-9a-f]+ cannot .* 'file': .*damaged: "):
            vm.memory.read(gpa, PAGE_SIZE)
    assert vm.memory.read(vm.memory.gpa_of(far), PAGE_SIZE) == expected[far]
    flip(path, at)
    assert vm.memory.read(gpa, PAGE_SIZE) == expected[page]


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_a_unit_that_was_read_stays_while_pages_are_fetched(files):
    """Who installs it locks other blocks, for which a live save may fetch their pages first: with this very thread."""
    with VM("32M") as vm, Snapshot.open(str(files["folder"] / "shuffled")) as snapshot:
        home = FileHome(Snapshot.open(snapshot.path), vm.memory)
        vm.memory.keep(home.close)
        words = vm.memory.engine.page_words
        stored = [page for page in range(BLOCK_PAGES, 8 * BLOCK_PAGES) if words[page] & 15 == lib.PV_HOME_FILE]
        unit, bytes_, word = ffi.new("struct pv_unit *"), ffi.new("uint8_t **"), ffi.new("uint64_t *")
        room = ffi.new("uint8_t[]", PAGE_SIZE)
        native = home.struct.self
        assert lib.pv_file_gather(native, stored[0], int(words[stored[0]]), unit) == 0
        assert lib.pv_file_read(native, unit, bytes_) == 0
        for page in stored[1:40]:
            word[0] = int(words[page])
            assert lib.pv_file_fetch(native, page, 1, word, room) == 0
            assert bytes(ffi.buffer(room)) == snapshot.read_page(page)
        for slot in range(unit.count):
            found = ffi.buffer(bytes_[0] + slot * PAGE_SIZE, PAGE_SIZE)
            assert found[:] == snapshot.read_page(unit.pages[slot])


@pytest.mark.parametrize("order", ["address", "shuffled"])
def test_nothing_of_a_damaged_storage_block_comes(files, restored, tmp_path, order):
    """Not what was touched, and not what is kept with it, in this block or in others."""
    path = tmp_path / "s"
    path.write_bytes((files["folder"] / order).read_bytes())
    with Snapshot.open(str(path)) as snapshot:
        number = next(i for i in range(20, 90) if len({page // BLOCK_PAGES for page, _ in snapshot.read_block(i)}) > 1)
        unit = dict(snapshot.read_block(number))
    at = path.read_bytes().find(unit[min(unit)]) + 17
    flip(path, at)
    vm = restored(path, fill=False)
    words = vm.memory.engine.page_words
    away = [page for page in unit if words[page] & 15]
    assert len(away) > 8
    told = threading.Event()
    vm.memory.engine.on_failure = lambda error: told.set()
    thread = threading.Thread(target=touch, args=(vm, away[-1]))
    thread.start()
    assert told.wait(20)
    until(lambda: vm.memory.engine.stats().answers["failed"] == 1)  # it is told before it is counted
    assert all(words[page] & 15 for page in away)
    flip(path, at)
    vm.memory.engine.retry()
    thread.join()
    for page, data in unit.items():
        assert vm.memory.read(vm.memory.gpa_of(page), PAGE_SIZE) == data


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"unit": "byte"}, "unit='byte': choose one of adaptive, page, block, large"),
        ({"prefetch": True}, "has no working set: restore it once with record"),
        ({"populate": True}, "has no working set"),
        ({"record": True, "prefetch": True}, "record goes without prefetch"),
        ({"fill_rate": 0}, "fill_rate=0: give bytes a second above 0"),
    ],
)
def test_options_that_cannot_be(files, options, line):
    threads = threading.active_count()
    with pytest.raises(BadInput, match=line):
        VM.restore(str(files["folder"] / "address"), lazy=True, **options)
    assert threading.active_count() <= threads


def test_lazy_options_without_lazy(files):
    with pytest.raises(BadInput, match="restore with lazy"):
        VM.restore(str(files["folder"] / "address"), record=True)
