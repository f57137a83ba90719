# test_virtio_mmio.py: registers, negotiation, reset and state of the virtio-mmio transport (virtio 1.2, 4.2), by rng.
from __future__ import annotations

import threading

import pytest
from virtio_driver import EVENT, INDIRECT, USED, VERSION_1, Driver

from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.rng import Rng
from pyvmm.errors import FetchError, StateError
from pyvmm.layout import Gpa


@pytest.fixture
def driver():
    made = []

    def make(model=None, **options):
        made.append(Driver(model or Rng(seed=1), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_identity(driver):
    found = driver()
    assert [found.get(at) for at in (0, 4, 8)] == [0x74726976, 2, 4]
    assert found.offered() == VERSION_1 | INDIRECT | EVENT
    found.set(mmio.R_DEVICE_FEATURES_SEL, 2)
    assert found.get(mmio.R_DEVICE_FEATURES) == 0
    assert found.get(mmio.R_QUEUE_MAX) == 256
    found.select(1)
    assert found.get(mmio.R_QUEUE_MAX) == 0
    assert found.get(0xB0) == found.get(0xB4) == 0xFFFF_FFFF  # no shared memory


def test_registers_are_whole_words(driver):
    found = driver()
    assert found.device.read(0, 1) == found.device.read(2, 2) == found.device.read(0, 8) == 0
    found.device.write(mmio.R_STATUS, 1, 1)
    found.device.write(mmio.R_STATUS + 1, 1, 4)
    assert found.status == 0
    for register in range(0, 0x100, 4):  # what is not there reads as something, and takes anything
        if register not in (mmio.R_STATUS,):
            found.set(register, 0xFFFF_FFFF)
            found.get(register)


@pytest.mark.parametrize(
    ("features", "taken"),
    [
        (VERSION_1, True),
        (VERSION_1 | INDIRECT | EVENT, True),
        (0, False),
        (INDIRECT, False),
        (VERSION_1 | 1 << 40, False),
    ],
)
def test_features_are_agreed_on_or_not(driver, features, taken):
    found = driver()
    found.set(mmio.R_STATUS, 3)
    assert found.accept(features) is taken
    if taken:  # nothing changes any more
        found.set(mmio.R_DRIVER_FEATURES_SEL, 1)
        found.set(mmio.R_DRIVER_FEATURES, 0xFF)
        found.set(mmio.R_STATUS, found.status | mmio.DRIVER_OK)
        assert found.status == 0xF
        found.set(mmio.R_STATUS, 1)  # bits go by a reset alone
        assert found.status == 0xF


def test_a_driver_cannot_say_that_the_device_is_broken(driver):
    found = driver()
    found.set(mmio.R_STATUS, 0xFF & ~mmio.FEATURES_OK)
    assert found.status == 0x87


def test_no_queue_before_features(driver):
    found = driver()
    found.set(mmio.R_QUEUE_READY, 1)
    assert found.status == mmio.NEEDS_RESET
    assert found.get(mmio.R_QUEUE_READY) == 0
    assert not found.line.level  # no driver runs that could be told
    assert len(found.told) == 1


@pytest.mark.parametrize(
    ("size", "addresses"),
    [
        (0, (0x4000, 0x5000, 0x6000)),
        (3, (0x4000, 0x5000, 0x6000)),
        (512, (0x4000, 0x5000, 0x6000)),
        (0xFFFF_FFFF, (0x4000, 0x5000, 0x6000)),
        (8, (0x4008, 0x5000, 0x6000)),
        (8, (0x4000, 0x5001, 0x6000)),
        (8, (0x4000, 0x5000, 0x6002)),
        (8, ((4 << 20) - 64, 0x5000, 0x6000)),
        (8, (0x4000, (1 << 64) - 2, 0x6000)),
        (8, (0x4000, 0x5000, 0xD000_0000)),
    ],
)
def test_a_queue_that_cannot_be_is_refused(driver, size, addresses):
    found = driver()
    found.set(mmio.R_STATUS, 3)
    found.accept(VERSION_1)
    found.set(mmio.R_QUEUE_SIZE, size)
    for register, address in zip((0x80, 0x90, 0xA0), addresses, strict=True):
        found.set(register, address & 0xFFFF_FFFF)
        found.set(register + 4, address >> 32)
    found.set(mmio.R_QUEUE_READY, 1)
    assert found.get(mmio.R_QUEUE_READY) == 0
    assert found.status & mmio.NEEDS_RESET


def test_a_ready_queue_stays_where_it_is(driver):
    found = driver().start(go=False)
    found.set(0x80, 0x9000)
    found.set(mmio.R_QUEUE_SIZE, 16)
    saved = found.device.save().parts("queues")[0]
    assert (saved.integer("descriptors"), saved.integer("size")) == (0x4000, 8)
    found.set(mmio.R_QUEUE_READY, 0)
    assert found.get(mmio.R_QUEUE_READY) == 0
    found.set(mmio.R_QUEUE_SIZE, 16)
    assert found.device.save().parts("queues")[0].integer("size") == 16


def test_interrupts_are_raised_and_acknowledged(driver):
    found = driver().start()
    (ring,) = found.rings
    for rises in (1, 2, 3):
        ring.post(writable=[(USED, 16)])
        assert ring.answer()[1] == 16
        found.until(lambda: found.line.level)
        assert found.line.rises == rises
        found.set(mmio.R_INTERRUPT_ACK, 2)
        assert found.line.level
        assert found.acknowledge() == mmio.USED_BUFFER
        assert not found.line.level


def test_no_interrupt_where_none_is_wanted(driver):
    found = driver().start()
    (ring,) = found.rings
    found.memory.write(Gpa(ring.avail), b"\1\0")
    for _ in range(3):
        ring.post(writable=[(USED, 16)])
        ring.answer()
    found.device.hold()
    assert found.line.rises == 0


def test_event_index(driver):
    """The driver asks for an interrupt with the third answer; the device, when idle, to hear of the next request."""
    found = driver().start(VERSION_1 | EVENT, go=False)
    (ring,) = found.rings
    found.memory.write(Gpa(ring.avail), b"\1\0")  # says nothing with this feature
    found.memory.write(Gpa(ring.avail + 4 + 2 * 8), b"\2\0")
    found.device.go()
    for count in (1, 2, 3, 4):
        ring.post(writable=[(USED, 16)])
        ring.answer()
        found.until(lambda: found.memory.read(Gpa(ring.used + 4 + 8 * 8), 2) == bytes((count, 0)))  # noqa: B023
        found.device.hold()
        assert found.line.rises == (count >= 3)
        found.device.go()


def test_a_configuration_that_changes(driver):
    found = driver().start()
    found.device.config_changed()
    assert found.get(mmio.R_GENERATION) == 1
    assert found.acknowledge() == mmio.CONFIG_CHANGE


def test_nothing_is_served_before_driver_ok_or_after_an_error(driver):
    found = driver()
    found.set(mmio.R_STATUS, 3)
    found.accept(VERSION_1)
    from virtio_driver import Ring

    ring = Ring(found, 0, 0x4000, 8)
    found.device.go()
    ring.post(writable=[(USED, 16)])
    found.device.hold()
    assert not found.device._step()
    assert ring.given == 0
    found.device.go()
    found.set(mmio.R_STATUS, 0xF)
    ring.answer()
    ring.offer(99)
    found.until(lambda: found.status & mmio.NEEDS_RESET)
    assert found.acknowledge() & mmio.CONFIG_CHANGE
    found.memory.write(Gpa(ring.avail + 4 + 2), b"\0\0")  # repaired, and too late
    ring.post(writable=[(USED, 16)])
    found.device.hold()
    assert not found.device._step()
    assert ring.given == 1
    assert found.told == ["virtio-rng@0 stands until its driver resets it: descriptor 99 is available in a queue of 8"]
    found.start()  # and all is well
    found.rings[0].post(writable=[(USED, 16)])
    found.rings[0].answer()
    assert found.device.broken == ""


def test_a_reset_waits_for_the_request_at_hand(driver):
    entered, on = threading.Event(), threading.Event()

    class Slow(Rng):
        def serve(self, index, queue, features):
            chain = queue.take()
            if chain is None:
                return None
            entered.set()
            assert on.wait(10)
            return queue.give(chain.head, 0)

    found = driver(Slow()).start()
    found.rings[0].post(writable=[(USED, 16)])
    assert entered.wait(10)
    thread = threading.Thread(target=found.set, args=(mmio.R_STATUS, 0))
    thread.start()
    assert found.status == 0xF  # as long as that writes to its memory
    on.set()
    thread.join(10)
    assert found.status == 0
    given = found.rings[0].given
    assert given == 1
    found.set(mmio.R_QUEUE_NOTIFY, 0)
    found.device.hold()
    assert not found.device._step()
    assert found.rings[0].given == given


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | INDIRECT | EVENT])
def test_a_device_goes_on_elsewhere(driver, features):
    """Requests that were posted and not answered are answered there, and the interrupt line is where it was."""
    found = driver().start(features)
    (ring,) = found.rings
    ring.post(writable=[(USED, 16)])
    first = ring.answer()
    found.until(lambda: found.line.level)
    found.device.hold()
    ring.post(writable=[(USED + 16, 16)])
    ring.post(writable=[(USED + 32, 16)], indirect=bool(features & INDIRECT))
    state = found.device.save()
    other = driver(memory=found.memory)
    other.rings, ring.driver = found.rings, other
    other.device.restore(state)
    assert other.line.level
    assert other.get(mmio.R_INTERRUPT_STATUS) == 1
    assert other.device.save() == state
    other.device.go()
    assert [ring.answer() for _ in range(2)] == [(first[0] + 1, 16), (first[0] + 2, 16)]
    model = Rng(seed=1)
    expected = []
    for block in range(3):
        model._blocks = block
        expected.append(model._from_seed(16))
    assert found.memory.read(Gpa(USED), 48) == b"".join(expected)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"offered": 5}, "features"),
        ({"accepted": 1 << 50}, "features"),
        ({"config": b"x"}, "size or geometry"),
        ({"status": 0x100}, "status"),
        ({"interrupt": 4}, "interrupt"),
        ({"queues": []}, "queues"),
        ({"queue_sel": -1}, "queue_sel"),
        ({"model": 1}, "model"),
    ],
)
def test_a_state_that_does_not_fit(driver, change, text):
    found = driver().start(go=False)
    state = found.device.save()
    state.fields.update(change)
    other = driver()
    with pytest.raises(StateError, match=text):
        other.device.restore(state)
    assert other.status == 0


@pytest.mark.parametrize("field", [{"descriptors": 1 << 40}, {"size": 0}, {"taken": 1 << 16}, {"driver": 1}])
def test_a_state_with_a_queue_that_cannot_be(driver, field):
    state = driver().start(go=False).device.save()
    state.parts("queues")[0].fields.update(field)
    with pytest.raises(StateError, match="virtqueue"):
        driver().device.restore(state)


def test_a_page_that_does_not_come(driver):
    """The device stands, its machine hears why, and after go() the same request is served once more."""
    found = driver().start(go=False)
    (ring,) = found.rings
    write, fails = found.memory.write, [USED, ring.used + 4, ring.used + 2]

    def failing(gpa, data):
        if gpa.value in fails:
            fails.remove(gpa.value)
            raise FetchError("gone", 1, 5)
        write(gpa, data)

    found.memory.write = failing
    ring.post(writable=[(USED, 16)], notify=False)
    for count in (1, 2, 3):
        found.device.go()
        found.until(lambda: len(found.troubles) == count)  # noqa: B023
        assert ring.given == 0
    found.troubles.clear()
    found.device.go()
    assert ring.answer() == (0, 16)
    assert found.memory.read(Gpa(USED), 16) == Rng(seed=1)._from_seed(16)


def test_a_fault_of_ours_is_told_and_ends_the_thread(driver):
    found = driver().start()
    found.device.model.serve = lambda *_: 1 / 0
    found.set(mmio.R_QUEUE_NOTIFY, 0)
    found.until(lambda: found.troubles)
    assert isinstance(found.troubles[0], ZeroDivisionError)
    found.device.hold()
