# test_virtio_balloon.py: the balloon driven by Python: what goes and comes, hostile drivers, statistics, state.
from __future__ import annotations

import random
import struct
import threading
import zlib

import pytest
from virtio_driver import INDIRECT, VERSION_1, Driver

from pyvmm._native import ffi, lib
from pyvmm.devices.virtio import balloon, classes, specs
from pyvmm.devices.virtio.balloon import Balloon
from pyvmm.errors import BadInput, StateError
from pyvmm.layout import MIB, PAGE_SIZE, Gpa
from pyvmm.memory import GuestMemory
from pyvmm.memory.balloon import runs_of
from pyvmm.pytest_plugin import needs
from pyvmm.testing.balance import imbalances, populated

pytestmark = needs("uffd_guest")

FEATURES = VERSION_1 | INDIRECT | Balloon.features
BLOCK = 512
LIST, ROOM = 0x2_0000, 0x2_4000


@pytest.fixture
def made():
    made = []

    def make(features=FEATURES, memory=None, size=8 * MIB, **options):
        driver = Driver(Balloon(), memory or GuestMemory(size, "auto"))
        made.append(driver)
        driver.start(features, **options)
        driver.memory.zero(Gpa(LIST), ROOM - LIST)
        for page in range(2 * BLOCK, driver.memory.size // PAGE_SIZE):
            driver.memory.write(Gpa(page * PAGE_SIZE), page.to_bytes(8, "little"))
        return driver

    yield make
    for one in made:
        one.close()


def tell(driver, queue, frames, **options):
    """Posts these frames, and waits until the device is through with them."""
    data = struct.pack(f"<{len(frames)}I", *frames)
    driver.memory.write(Gpa(LIST), data)
    driver.rings[queue].post(readable=[(LIST, len(data))], **options)
    assert driver.rings[queue].answer()[1] == 0


def there(driver):
    return set(populated(driver.memory).nonzero()[0].tolist())


def balanced(driver):
    driver.until(lambda: not imbalances(driver.memory))  # the worker may still look at a ring
    assert driver.told == []
    assert driver.troubles == []


def word(driver, page):
    return int.from_bytes(driver.memory.read(Gpa(page * PAGE_SIZE), 8), "little")


# ---- what goes and comes ----


def test_pages_go_at_once_and_come_back_as_zeros(made):
    driver = made()
    frames = [1030, 1031, 1040, 1500]
    before = there(driver)
    tell(driver, balloon.Q_INFLATE, frames)
    assert before - there(driver) == set(frames)
    assert driver.device.model.away == len(frames) * PAGE_SIZE
    balanced(driver)
    assert word(driver, 1029) == 1029
    assert word(driver, 1031) == 0  # a touch brings zeros
    assert driver.device.model.away == (len(frames) - 1) * PAGE_SIZE
    assert not there(driver) & {1030, 1040, 1500}
    tell(driver, balloon.Q_DEFLATE, frames)
    assert driver.device.model.away == 0
    assert driver.memory.engine.count().away == 0
    assert not there(driver) & {1030, 1040, 1500}  # nobody has touched them
    balanced(driver)
    assert [word(driver, page) for page in frames] == [0] * 4
    assert word(driver, 1501) == 1501


@needs("thp")
def test_blocks_go_and_come_whole(made):
    driver = made()
    looks = driver.memory.engine.looks
    assert looks()[2:] == ["large", "large"]
    frames = list(range(2 * BLOCK, 3 * BLOCK))
    random.Random(1).shuffle(frames)
    tell(driver, balloon.Q_INFLATE, frames)
    assert looks()[2:] == ["balloon", "large"]
    assert driver.device.model.counts["blocks"] == 1
    tell(driver, balloon.Q_DEFLATE, frames)
    assert looks()[2] == "untouched"
    assert word(driver, 2 * BLOCK + 7) == 0
    driver.memory.write(Gpa(2 * BLOCK * PAGE_SIZE), b"x")
    assert looks()[2] == "large"
    balanced(driver)


@needs("thp", "uffd_move")
def test_a_part_of_a_large_page_is_given_back_too(made):
    """The kernel would keep all of a large page of which a part is dropped, unless it is broken first."""
    driver = made()
    before = len(there(driver))
    tell(driver, balloon.Q_INFLATE, list(range(2 * BLOCK, 3 * BLOCK, 2)))
    assert before - len(there(driver)) == BLOCK // 2
    flags = lib.PV_BLOCK_SMALL | lib.PV_BLOCK_BROKEN | lib.PV_BLOCK_BALLOONED
    assert int(driver.memory.engine.block_words[2]) & flags == flags
    tell(driver, balloon.Q_INFLATE, list(range(2 * BLOCK + 1, 3 * BLOCK, 2)))
    assert driver.memory.engine.looks()[2] == "balloon"
    assert not int(driver.memory.engine.block_words[2]) & flags
    tell(driver, balloon.Q_DEFLATE, list(range(2 * BLOCK, 3 * BLOCK)))
    driver.memory.write(Gpa(2 * BLOCK * PAGE_SIZE), b"x")
    assert driver.memory.engine.looks()[2] == "large"
    balanced(driver)


def test_what_was_given_stays_when_the_rest_of_its_block_comes(made):
    driver = made()
    engine = driver.memory.engine
    frames = list(range(2 * BLOCK, 2 * BLOCK + 300))
    tell(driver, balloon.Q_INFLATE, frames)
    engine.remove(2 * BLOCK, BLOCK)
    assert engine.homes()["aside"] == BLOCK - 300
    assert word(driver, 2 * BLOCK + 400) == 2 * BLOCK + 400
    assert engine.homes()["balloon"] == 300
    balanced(driver)


@pytest.mark.parametrize("part", [1, 77, BLOCK])
def test_pages_that_are_elsewhere_are_given_too(made, part):
    """Aside as a large page, in a home of somebody's, in none."""
    driver = made()
    engine = driver.memory.engine
    tell(driver, balloon.Q_INFLATE, [2000])  # so that the engine is there
    tell(driver, balloon.Q_DEFLATE, [2000])
    engine.remove(2 * BLOCK, BLOCK)
    tell(driver, balloon.Q_INFLATE, list(range(2 * BLOCK, 2 * BLOCK + part)))
    assert engine.homes()["balloon"] == part
    assert [word(driver, 2 * BLOCK + at) for at in range(part, BLOCK)] == list(range(2 * BLOCK + part, 3 * BLOCK))
    assert engine.homes()["balloon"] == part
    assert word(driver, 2 * BLOCK) == 0
    balanced(driver)


def test_a_home_is_told_that_it_need_not_keep_a_page(made):
    from pyvmm.memory.homes import Home

    class Shelf(Home):
        forgotten = []  # noqa: RUF012

        def store(self, page, data):
            return [page] * (len(data) // PAGE_SIZE)

        def fetch(self, page, locators):
            raise OSError(5, "not to be asked")

        def forget(self, page, locators):
            self.forgotten += range(page, page + len(locators))

    driver = made()
    engine = driver.memory.engine
    engine.set_home("swap", Shelf())
    engine.remove(2 * BLOCK, 3)
    engine.store(2 * BLOCK, 3, "swap")
    tell(driver, balloon.Q_INFLATE, [2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 2])
    assert Shelf.forgotten == [2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 2]
    assert word(driver, 2 * BLOCK + 1) == 0


def test_pages_that_the_host_uses_stay(made):
    driver = made()
    view = driver.memory.view(Gpa(1030 * PAGE_SIZE), PAGE_SIZE)
    tell(driver, balloon.Q_INFLATE, [1030, 1540])
    assert driver.device.model.counts["stayed"] == 1
    assert driver.device.model.away == PAGE_SIZE
    assert int.from_bytes(view[:8], "little") == 1030
    tell(driver, balloon.Q_DEFLATE, [1030, 1540])
    del view
    assert word(driver, 1030) == 1030
    balanced(driver)


def test_with_a_limit_what_comes_back_is_counted(made):
    driver = made()
    engine = driver.memory.engine
    assert engine.call(lib.pv_limit_begin) == 0

    def resident():
        return engine.call(lib.pv_limit_resident, equip=False)

    before = resident()
    assert before == len(there(driver))
    tell(driver, balloon.Q_INFLATE, list(range(2 * BLOCK, 3 * BLOCK + 100)))
    assert resident() == before - BLOCK - 100 == len(there(driver))
    tell(driver, balloon.Q_DEFLATE, list(range(2 * BLOCK, 3 * BLOCK + 100)))
    assert resident() == before - BLOCK - 100
    word(driver, 3 * BLOCK)
    assert resident() == len(there(driver))
    balanced(driver)


def test_free_pages_that_are_reported_cost_nothing(made):
    """At either of the two places that drivers have their queue at; what is not a whole page stays."""
    for queue in (balloon.Q_REPORTING, balloon.Q_REPORTING_TOO):
        driver = made()
        before = there(driver)
        start = 2 * BLOCK * PAGE_SIZE
        driver.rings[queue].post(writable=[(start, 4 * PAGE_SIZE), (start + 5 * PAGE_SIZE + 1, 2 * PAGE_SIZE)])
        driver.rings[queue].answer()
        assert before - there(driver) == {2 * BLOCK + at for at in (0, 1, 2, 3, 6)}
        assert driver.memory.engine.count().away == 0
        assert (word(driver, 2 * BLOCK), word(driver, 2 * BLOCK + 5)) == (0, 2 * BLOCK + 5)
        balanced(driver)


def test_reporting_comes_third_where_there_are_no_statistics(made):
    driver = made(VERSION_1 | balloon.F_REPORTING)
    driver.rings[2].post(writable=[(1600 * PAGE_SIZE, PAGE_SIZE)])
    driver.rings[2].answer()
    assert word(driver, 1600) == 0


def test_a_write_trace_hears_of_it(made):
    driver = made()
    told = []
    driver.memory.on_write = lambda first, count: told.append((first, count))
    try:
        tell(driver, balloon.Q_INFLATE, [1030, 1031])
    finally:
        driver.memory.on_write = None
    assert (1030, 2) in told


def test_a_coarse_trace_hears_of_it(made):
    driver = made()
    engine = driver.memory.engine
    assert engine.call(lib.pv_trace_start, 12, 0) == 0
    tell(driver, balloon.Q_INFLATE, [1030])
    bits = ffi.new("uint64_t[]", driver.memory.size // PAGE_SIZE // 64)
    assert engine.call(lib.pv_trace_collect, bits) >= 0
    assert bits[1030 // 64] >> 1030 % 64 & 1
    assert engine.call(lib.pv_trace_stop) == 0
    assert word(driver, 1030) == 0


# ---- hostile drivers ----


def test_frames_that_are_none_and_twice_the_same(made):
    driver = made()
    tell(driver, balloon.Q_INFLATE, [1030, 1030, 0xFFFF_FFFF, 2048, 1 << 31, 1030, 0xD0000, 1031])
    tell(driver, balloon.Q_INFLATE, [1030, 1031])
    tell(driver, balloon.Q_DEFLATE, [1031, 1999, 0xFFFF_FFFF, 1031])
    counts = driver.device.model.counts
    assert (counts["inflated"], counts["deflated"], counts["strange"]) == (2, 1, 5)
    assert driver.device.model.away == PAGE_SIZE
    assert word(driver, 1999) == 1999
    balanced(driver)


@pytest.mark.parametrize("size", [0, 1, 3, 5, 4097])
def test_lists_of_odd_sizes(made, size):
    driver = made()
    driver.memory.write(Gpa(LIST), struct.pack("<1025I", *[1030] * 1025))
    driver.rings[0].post(readable=[(LIST, size)] if size else [(LIST, 0)])
    driver.rings[0].answer()
    assert driver.device.model.away == (PAGE_SIZE if size >= 4 else 0)
    balanced(driver)


def test_a_list_that_is_too_long_for_one_go(made):
    driver = made()
    driver.memory.write(Gpa(3 * MIB), struct.pack("<40000I", *[1600 + at % 50 for at in range(40000)]))
    driver.rings[0].post(readable=[(3 * MIB, 100_000), (3 * MIB + 100_000, 60_000)])
    driver.rings[0].answer()
    assert driver.device.model.away == 50 * PAGE_SIZE
    balanced(driver)


def test_its_own_rings_and_lists_may_be_given_away(made):
    """What is read then is zeros: nothing that harms anybody but this guest."""
    driver = made()
    frames = [driver.rings[0].base // PAGE_SIZE + at for at in range(3)] + [LIST // PAGE_SIZE]
    driver.memory.write(Gpa(LIST), struct.pack(f"<{len(frames)}I", *frames))
    driver.rings[0].post(readable=[(LIST, 4 * len(frames))])
    driver.until(lambda: driver.device.model.counts["inflated"] == len(frames))
    assert driver.troubles == []


def test_buffers_that_are_writable_have_no_frames(made):
    driver = made()
    driver.memory.write(Gpa(LIST), struct.pack("<I", 1030))
    driver.rings[0].post(writable=[(LIST, 4)])
    driver.rings[0].answer()
    assert driver.device.model.away == 0


# ---- configuration ----


def test_target_and_actual(made):
    driver = made()
    model = driver.device.model
    model.target = 5 * MIB + 100
    assert model.target == 5 * MIB
    assert driver.get(0x100) == 5 * MIB // PAGE_SIZE
    assert driver.acknowledge() & 2
    driver.set(0x104, 77)
    driver.set(0x100, 99)  # not the driver's
    driver.device.write(0x104, 5, 2)
    assert (driver.get(0x104), model.actual) == (77, 77 * PAGE_SIZE)
    driver.set(0x104, 0xFFFF_FFFF)
    assert model.actual == driver.memory.size
    for wrong in (-1, driver.memory.size + 1):
        with pytest.raises(BadInput, match="the VM has 8M"):
            model.target = wrong
    assert driver.device.read(0x108, 8) == driver.device.read(0xFFC, 4) == 0


def test_no_second_balloon_and_none_with_hugetlb():
    with pytest.raises(BadInput, match="takes no options"):
        specs.make("balloon:1", print)
    assert specs.make("balloon", print).name == "balloon"

    class Huge:
        hugetlb = True

    with pytest.raises(BadInput, match="hugetlb"):
        Balloon().attach(Huge())


# ---- statistics ----


def statistics(driver, entries):
    data = b"".join(struct.pack("<HQ", *entry) for entry in entries)
    driver.memory.write(Gpa(LIST), data)
    driver.rings[balloon.Q_STATS].post(readable=[(LIST, len(data))])


def test_statistics_are_asked_for_and_come(made):
    driver = made()
    model = driver.device.model
    statistics(driver, [(classes.FREE, MIB), (classes.TOTAL, 8 * MIB)])
    driver.until(lambda: model.stats() == {classes.FREE: MIB, classes.TOTAL: 8 * MIB})
    assert driver.rings[balloon.Q_STATS].given == 0  # it is kept until newer ones are wanted
    assert model.stats(fresh=0.01) == {classes.FREE: MIB, classes.TOTAL: 8 * MIB}
    found = []
    asks = threading.Thread(target=lambda: found.append(model.classes(fresh=10)))
    asks.start()
    driver.rings[balloon.Q_STATS].answer()
    statistics(driver, [(0xF000 + place, (place + 1) * 100) for place in range(6)] + [(classes.REFAULTS_TAG, 9)])
    asks.join(10)
    assert found == [{name: (place + 1) * 100 for place, name in enumerate(classes.CLASSES)}]
    assert model.refaults() == 9


def test_statistics_of_a_driver_that_was_reset_are_gone(made):
    driver = made()
    statistics(driver, [(classes.FREE, MIB)])
    driver.until(driver.device.model.stats)
    driver.set(0x070, 0)
    assert driver.device.model.stats() == {}
    assert set(driver.device.model.classes().values()) == {None}


def test_statistics_that_are_nonsense(made):
    driver = made()
    driver.memory.write(Gpa(LIST), struct.pack("<HQ", 4, 5) * 200)
    driver.rings[balloon.Q_STATS].post(readable=[(LIST, 2001)])
    driver.until(lambda: driver.device.model.stats() == {4: 5})
    balanced(driver)


# ---- classes of pages ----


def test_pages_are_classified(made):
    driver = made()
    model, ring = driver.device.model, driver.rings[balloon.Q_CLASSES]
    assert model.classify([1, 2], timeout=0.01) is None  # nobody is there yet
    ring.post(writable=[(ROOM, 2000)])
    found = []
    asks = threading.Thread(target=lambda: found.append(model.classify([7, 2000, 9], 10)))
    asks.start()
    _, size = ring.answer()
    raw = driver.memory.read(Gpa(ROOM), size)
    number, count, *frames = struct.unpack("<5I", raw)
    assert (count, frames) == (3, [7, 2000, 9])
    driver.memory.write(Gpa(LIST), struct.pack("<II3B", number + 1, 3, 1, 1, 1))
    ring.post(readable=[(LIST, 11)], writable=[(ROOM, 2000)])  # another question's answer
    asks.join(0.05)
    assert found == []
    model.classify([1], timeout=0.01)  # one at a time: the question before is given up
    asks.join(10)
    assert found == [None]


def test_an_answer_comes_with_the_next_room(made):
    driver = made()
    model, ring = driver.device.model, driver.rings[balloon.Q_CLASSES]
    stop = threading.Event()

    def answers():
        ring.post(writable=[(ROOM, 2000)])
        while not stop.is_set():
            if ring.given == ring.seen:
                continue
            number, count = struct.unpack("<II", driver.memory.read(Gpa(ROOM), 8))
            frames = struct.unpack(f"<{count}I", driver.memory.read(Gpa(ROOM + 8), 4 * count))
            ring.answer()
            given = bytes(frame % 8 for frame in frames)
            driver.memory.write(Gpa(LIST), struct.pack("<II", number, count) + given)
            ring.post(readable=[(LIST, 8 + count)], writable=[(ROOM, 2000)])

    guest = threading.Thread(target=answers)
    guest.start()
    try:
        assert model.classify([0, 9, 6, 5], 10) == [0, 1, classes.UNKNOWN, 5]
        assert model.classify(list(range(256)), 10) == [n % 8 if n % 8 < 6 else 255 for n in range(256)]
        found = model.sample(2000, seed=1, timeout=10)
        assert all(abs(size - MIB) < 0.25 * MIB for size in found.values())
    finally:
        stop.set()
        guest.join()
    for wrong in ([], [1] * 257):
        with pytest.raises(BadInput, match="1 to 256"):
            model.classify(wrong)


def test_a_question_that_has_no_room_is_not_asked(made):
    driver = made()
    ring = driver.rings[balloon.Q_CLASSES]
    ring.post(writable=[(ROOM, 11)])
    assert driver.device.model.classify([1], timeout=0.05) is None
    assert ring.answer()[1] == 0


# ---- state ----


def test_state_goes_to_another_memory(made):
    driver = made(go=True)
    driver.device.model.target = 4 * MIB
    driver.set(0x104, 600)
    tell(driver, balloon.Q_INFLATE, [*range(2 * BLOCK, 3 * BLOCK), 1600])
    driver.device.hold()
    state = driver.device.save()
    other = Driver(Balloon(), GuestMemory(8 * MIB))
    try:
        other.device.restore(state)
        assert other.device.save() == state
        model = other.device.model
        assert (model.target, model.actual) == (4 * MIB, 600 * PAGE_SIZE)
        other.memory.write(Gpa(1700 * PAGE_SIZE), b"x")
        other.device.go()
        assert model.away == 513 * PAGE_SIZE
        assert other.device.read(0x060, 4) & 2  # the target is told anew
        other.device.hold()
        assert other.device.save().part("model") == state.part("model")
        assert imbalances(other.memory) == []
    finally:
        other.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"pages": b"x"},
        {"pages": zlib.compress(bytes(255))},
        {"pages": zlib.compress(bytes(257))},
        {"pages": zlib.compress(bytes(1 << 22))},
        {"pages": zlib.compress(bytes(256)) + b"x"},
        {"pages": zlib.compress(bytes(256))[:-1]},
        {"target": 2049},
        {"actual": 1 << 32},
        {"pages": 5},
    ],
)
def test_states_that_cannot_be(made, fields):
    driver = made()
    state = driver.device.model.save()
    state.fields |= fields
    with pytest.raises(StateError):
        driver.device.model.restore(state)


def test_a_state_of_pages_that_are_not_there():
    memory = GuestMemory(2 * MIB + 12 * PAGE_SIZE)
    model = Balloon()
    model.attach(memory)
    state = model.save()
    state.fields["pages"] = zlib.compress(bytes(65) + b"\x10")
    with pytest.raises(StateError):
        model.restore(state)
    memory.close()


# ---- classes ----


def test_standard_tags_are_mapped_with_care():
    of = classes.classes_of
    nothing = dict.fromkeys(classes.CLASSES)
    assert of({}, 100) == nothing
    assert of({classes.TOTAL: 80}, 100) == nothing
    assert of({classes.FREE: 30}, 100) == nothing | {"free": 30, "active anonymous": 70}
    assert of({classes.FREE: 30, classes.TOTAL: 80, classes.CACHES: 20}, 100) == nothing | {
        "free": 30, "active anonymous": 30, "active buffer": 20, "inactive buffer": 0,
    }  # fmt: skip
    told = {classes.FREE: 30, classes.TOTAL: 80, classes.CACHES: 20, classes.AVAILABLE: 44}
    assert of(told, 100) == nothing | {
        "free": 30, "active anonymous": 30, "active buffer": 13, "inactive buffer": 7,
    }  # fmt: skip
    assert of(told | {classes.AVAILABLE: 10}, 100)["inactive buffer"] == 0


@pytest.mark.parametrize("seed", range(50))
def test_no_guest_has_more_than_its_memory(seed):
    rng = random.Random(seed)
    tags = [*range(16), *range(0xF000, 0xF006)] if seed % 2 else list(range(16))
    told = {tag: rng.choice((0, 1, rng.randrange(200), (1 << 64) - 1)) for tag in rng.sample(tags, rng.randrange(16))}
    found = classes.classes_of(told, 100)
    assert set(found) == set(classes.CLASSES)
    known = [value for value in found.values() if value is not None]
    assert all(0 <= value <= 100 for value in known)
    assert sum(known) <= 100


def test_a_guest_that_claims_more_than_there_is_has_less_to_be_taken():
    told = {classes.CLASS_TAG: 80, classes.CLASS_TAG + 5: 80}
    found = classes.classes_of(told, 100)
    assert (found["unreclaimable"], found["free"], found["active buffer"]) == (80, 20, None)


def test_runs_of_frames():
    memory = GuestMemory(4 * MIB)
    assert runs_of(memory, []) == ([], 0)
    assert runs_of(memory, [5, 3, 4, 3, 1023, 1024, 9]) == ([(3, 3), (9, 1), (1023, 1)], 1)
    memory.close()
    large = GuestMemory(3200 * MIB)
    high = (4 << 30) // PAGE_SIZE
    low = large.regions[0].size // PAGE_SIZE
    assert runs_of(large, [high + 1, low - 1, high, low]) == ([(low - 1, 3)], 1)
    large.close()
