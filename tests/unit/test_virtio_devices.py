# test_virtio_devices.py: rng, console and block, driven by Python; a raw file behind block; devices by description.
from __future__ import annotations

import errno
import os
import re
import struct
import threading
from pathlib import Path

import pytest
from virtio_driver import INDIRECT, USED, VERSION_1, Driver

from pyvmm._native import lib
from pyvmm.devices.virtio import block, specs
from pyvmm.devices.virtio.block import Block
from pyvmm.devices.virtio.console import QUEUE_SIZE, VirtioConsole
from pyvmm.devices.virtio.rawfile import RawFile
from pyvmm.devices.virtio.rng import PIECE, Rng
from pyvmm.errors import BadInput, FetchError, HostError, StateError
from pyvmm.layout import Gpa

HEADER, STATUS, DATA = USED, USED + 0x100, USED + 0x1000
FEATURES = VERSION_1 | INDIRECT | block.F_FLUSH | block.F_DISCARD | block.F_WRITE_ZEROES
SECTORS = 64


@pytest.fixture
def driver():
    made = []

    def make(model, features=VERSION_1, **options):
        made.append(Driver(model).start(features, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


# ---- rng ----


def test_random_bytes_differ(driver):
    found = driver(Rng())
    for at in (USED, USED + 64):
        found.rings[0].post(writable=[(at, 10), (at + 20, 22)])
        assert found.rings[0].answer()[1] == 32
    first, second = (found.memory.read(Gpa(at), 42) for at in (USED, USED + 64))
    assert first[:10] != second[:10]
    assert first[20:] != second[20:]
    assert first[10:20] == bytes(10)


def test_random_bytes_of_a_seed(driver):
    drawn = []
    for _ in range(2):
        found = driver(Rng(seed=7))
        for at in (USED, USED + 16):
            found.rings[0].post(writable=[(at, 16)])
            found.rings[0].answer()
        drawn.append(found.memory.read(Gpa(USED), 32))
    assert drawn[0] == drawn[1]
    assert drawn[0][:16] != drawn[0][16:]
    with pytest.raises(StateError, match="seed"):
        Rng().restore(Rng(seed=7).save())


def test_a_large_request_gets_a_piece(driver):
    found = driver(Rng())
    found.rings[0].post(writable=[(USED, 1 << 20)])
    assert found.rings[0].answer()[1] == PIECE


# ---- console ----


def test_console_both_ways(driver):
    got, listens = [], []
    console = VirtioConsole(got.append)
    console.on_listen = lambda: listens.append(1)
    found = driver(console)
    receive, transmit = found.rings
    assert console.feed(b"before") == 6
    receive.post(writable=[(USED, 4)])
    assert receive.answer() == (0, 4)
    found.memory.write(Gpa(DATA), b"hello, " * 2)
    transmit.post(readable=[(DATA, 3), (DATA + 3, 11)])
    transmit.answer()
    assert b"".join(got) == b"hello, hello, "
    receive.post(writable=[(USED + 4, 100)])
    assert receive.answer() == (1, 2)
    receive.post(writable=[(USED + 6, 100)])
    console.feed(b" after")
    assert receive.answer() == (2, 6)
    assert found.memory.read(Gpa(USED), 12) == b"before after"
    assert (console.waiting, listens) == (0, [1])


def test_console_input_is_bounded(driver):
    console = VirtioConsole(lambda data: None)
    assert console.feed(bytes(QUEUE_SIZE + 1)) == QUEUE_SIZE
    assert (console.feed(b"x"), console.room()) == (0, 0)


def test_console_output_goes_once_though_a_page_is_late(driver):
    got = []
    found = driver(VirtioConsole(got.append), go=False)
    size = 3 * (64 << 10)
    data = os.urandom(size)
    found.memory.write(Gpa(1 << 20), data)
    read, late = found.memory.read, [(1 << 20) + (128 << 10)]

    def reading(gpa, size):
        if gpa.value in late:
            late.remove(gpa.value)
            raise FetchError("late", 1, 5)
        return read(gpa, size)

    found.memory.read = reading
    found.rings[1].post(readable=[(1 << 20, size)])
    found.device.go()
    found.until(lambda: found.troubles)
    found.troubles.clear()
    state = found.device.save()
    other = VirtioConsole(got.append)
    other.restore(state.part("model"))
    assert other._sent == 128 << 10
    found.device.go()
    found.rings[1].answer()
    assert b"".join(got) == data


def test_console_state(driver):
    console, other = VirtioConsole(print), VirtioConsole(print)
    console.feed(b"typed")
    other.restore(console.save())
    assert other.save() == console.save()
    assert other.waiting == 5
    state = console.save()
    state.fields["input"] = bytes(QUEUE_SIZE + 1)
    with pytest.raises(StateError):
        other.restore(state)


# ---- block ----


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 2 * SECTORS)
    return path


def ask(found, kind, sector=0, readable=(), writable=(), indirect=False):
    """(status, bytes written) of one request."""
    found.memory.write(Gpa(HEADER), struct.pack("<IIQ", kind, 0, sector))
    found.memory.write(Gpa(STATUS), b"\xee")
    ring = found.rings[0]
    ring.post([(HEADER, 16), *readable], [*writable, (STATUS, 1)], indirect)
    written = ring.answer()[1]
    return found.memory.read(Gpa(STATUS), 1)[0], written


def ranges(found, kind, *given):
    raw = b"".join(struct.pack("<QII", *one) for one in given)
    found.memory.write(Gpa(DATA), raw)
    return ask(found, kind, readable=[(DATA, len(raw))] if raw else [])[0]


def test_block_configuration(driver, image):
    found = driver(Block(RawFile(str(image))))
    read = found.device.read
    assert (read(0x100, 4), read(0x104, 4)) == (SECTORS, 0)
    assert (read(0x108, 4), read(0x10C, 4), read(0x114, 4), read(0x122, 2)) == (256 << 10, 254, 512, 1)
    assert (read(0x124, 4), read(0x128, 4), read(0x130, 4), read(0x134, 4), read(0x138, 1)) == (65536, 16, 65536, 16, 1)
    assert read(0x13C, 4) == read(0xFFC, 4) == 0


def test_block_writes_and_reads(driver, image):
    found = driver(Block(RawFile(str(image))), FEATURES)
    data = os.urandom(1536)
    found.memory.write(Gpa(DATA), data)
    for indirect in (False, True):
        assert ask(found, block.OUT, 5, [(DATA, 1000), (DATA + 1000, 536)], (), indirect) == (0, 1)
        assert ask(found, block.IN, 5, (), [(DATA + 0x1000, 1), (DATA + 0x1001, 1535)], indirect) == (0, 1537)
        assert found.memory.read(Gpa(DATA + 0x1000), 1536) == data
    assert image.read_bytes()[5 * 512 : 8 * 512] == data
    assert found.device.model.counts == {
        "reads": 2, "writes": 2, "flushes": 0, "discards": 0, "zeroes": 0, "errors": 0,
    }  # fmt: skip


def test_header_and_status_may_lie_anywhere(driver, image):
    """Framing says nothing (2.7.4.1): header and data in one buffer, data and status too."""
    found = driver(Block(RawFile(str(image))), FEATURES)
    found.memory.write(Gpa(DATA), struct.pack("<IIQ", block.OUT, 0, 3) + b"w" * 512)
    ring = found.rings[0]
    ring.post([(DATA, 5), (DATA + 5, 523)], [(STATUS, 1)])
    ring.answer()
    assert image.read_bytes()[3 * 512 : 4 * 512] == b"w" * 512
    found.memory.write(Gpa(DATA), struct.pack("<IIQ", block.IN, 0, 3))
    ring.post([(DATA, 16)], [(DATA + 0x1000, 100), (DATA + 0x2000, 413)])
    assert ring.answer()[1] == 513
    assert found.memory.read(Gpa(DATA + 0x2000 + 411), 3) == b"w\0\0"


@pytest.mark.parametrize(
    ("kind", "sector", "size", "status"),
    [
        (block.IN, SECTORS, 512, 1),
        (block.IN, SECTORS - 1, 1024, 1),
        (block.IN, (1 << 64) - 1, 512, 1),
        (block.IN, 1 << 55, 512, 1),
        (block.IN, 0, 511, 1),
        (block.IN, SECTORS, 0, 0),
        (block.GET_ID, 0, 19, 1),
        (block.GET_ID, 0, 20, 0),
        (2, 0, 512, 2),
        (0xFFFF_FFFF, 0, 512, 2),
    ],
)
def test_block_requests_that_fail(driver, image, kind, sector, size, status):
    found = driver(Block(RawFile(str(image))), FEATURES)
    writable = [(DATA, size)] if size else []
    assert ask(found, kind, sector, (), writable)[0] == status
    assert found.device.model.counts["errors"] == (status != 0)
    assert ask(found, block.IN, 0, (), [(DATA, 512)])[0] == 0  # and it goes on


def test_a_request_that_would_take_too_long(driver, tmp_path):
    path = tmp_path / "large.img"
    path.touch()
    os.truncate(path, 128 << 20)
    found = driver(Block(RawFile(str(path))), FEATURES, size=64)
    buffers = [(1 << 20, 2 << 20)] * 32
    assert ask(found, block.IN, 0, (), buffers[:31]) == (0, (62 << 20) + 1)
    assert ask(found, block.IN, 0, (), buffers) == (1, 1)


def test_a_disk_has_a_name(driver, image):
    found = driver(Block(RawFile(str(image))), FEATURES)
    assert ask(found, block.GET_ID, 0, (), [(DATA, 20)]) == (0, 21)
    assert found.memory.read(Gpa(DATA), 20) == b"disk.img".ljust(20, b"\0")


@pytest.mark.parametrize("parts", [([(HEADER, 15)], [(STATUS, 1)]), ([(HEADER, 16)], []), ([], [(STATUS, 1)])])
def test_a_request_that_cannot_be_answered(driver, image, parts):
    found = driver(Block(RawFile(str(image))), FEATURES)
    found.rings[0].post(*parts)
    found.until(lambda: found.told)
    assert "header or status" in found.told[0]


def test_block_ranges(driver, image):
    found = driver(Block(RawFile(str(image))), FEATURES)
    before = image.read_bytes()
    for flags in (0, 1):
        assert ranges(found, block.WRITE_ZEROES, (2 + flags, 1, flags), (8 + flags, 2, 0), (9, 0, 0)) == 0
    zeros = {2, 3, 8, 9, 10}
    assert image.read_bytes() == b"".join(
        bytes(512) if at in zeros else before[at * 512 : at * 512 + 512] for at in range(SECTORS)
    )
    assert ranges(found, block.DISCARD, (20, 8, 0)) == 0
    assert os.path.getsize(image) == SECTORS * 512
    for kind in (block.WRITE_ZEROES, block.DISCARD):
        assert ranges(found, kind, (0, 1, 2)) == 2
        assert ranges(found, kind, (0, SECTORS + 1, 0)) == 1
        assert ranges(found, kind, ((1 << 64) - 1, 1, 0)) == 1
        assert ranges(found, kind, (30, 1, 0), (0, 1 << 31, 0)) == 1
        assert ranges(found, kind) == 1
        assert ranges(found, kind, *[(0, 1, 0)] * 17) == 1
    assert ranges(found, block.DISCARD, (0, 1, 1)) == 2
    assert image.read_bytes()[30 * 512 : 31 * 512] == before[30 * 512 : 31 * 512]  # nothing was done of that request


def test_block_without_holes_writes_zeros(driver, image, monkeypatch):
    monkeypatch.setattr("pyvmm.devices.virtio.rawfile.lib", _Lib(-errno.EOPNOTSUPP))
    found = driver(Block(RawFile(str(image))), FEATURES)
    assert ranges(found, block.WRITE_ZEROES, (2, 3, 0)) == 0
    assert image.read_bytes()[1024 : 5 * 512] == bytes(1536)
    assert ranges(found, block.DISCARD, (8, 3, 0)) == 0
    monkeypatch.setattr("pyvmm.devices.virtio.rawfile.lib", _Lib(-errno.EIO))
    assert ranges(found, block.WRITE_ZEROES, (2, 3, 0)) == 1


class _Lib:
    PV_FILE_HOLE, PV_FILE_ZEROS = lib.PV_FILE_HOLE, lib.PV_FILE_ZEROS

    def __init__(self, result):
        self.result = result

    def pv_clear_file(self, *_):
        return self.result


def test_what_was_not_agreed_on_is_not_done(driver, image):
    found = driver(Block(RawFile(str(image))), VERSION_1)
    assert ranges(found, block.DISCARD, (0, 1, 0)) == 2
    assert ranges(found, block.WRITE_ZEROES, (0, 1, 0)) == 2


@pytest.mark.parametrize(("features", "flushes"), [(FEATURES, [1]), (VERSION_1, [1, 1])])
def test_a_driver_that_cannot_flush_is_flushed_for(driver, image, monkeypatch, features, flushes):
    seen = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: seen.append(1))
    found = driver(Block(RawFile(str(image))), features)
    assert ask(found, block.OUT, 1, [(DATA, 512)])[0] == 0
    assert len(seen) == len(flushes) - 1
    assert ask(found, block.FLUSH)[0] == 0
    assert seen == flushes


def test_a_flush_that_failed_is_never_said_to_be_well(driver, image, monkeypatch):
    def failing(fd):
        raise OSError(errno.EIO, "no")

    found = driver(Block(RawFile(str(image))), FEATURES)
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", failing)
    assert ask(found, block.FLUSH)[0] == 1
    monkeypatch.setattr(os, "fdatasync", sync)
    assert ask(found, block.FLUSH)[0] == 1
    with pytest.raises(HostError, match=r"disk\.img cannot be written out"):
        found.device.release()


def test_errors_of_the_file(driver, image, monkeypatch):
    found = driver(Block(RawFile(str(image))), FEATURES)

    def failing(fd, data, offset):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", failing)
    assert ask(found, block.OUT, 1, [(DATA, 512)])[0] == 1
    monkeypatch.undo()
    os.truncate(image, 1024)
    assert ask(found, block.IN, 1, (), [(DATA, 512)])[0] == 0
    assert ask(found, block.IN, 1, (), [(DATA, 1024)]) == (1, 1)
    assert found.device.model.counts["errors"] == 2


def test_a_disk_to_be_read_alone(driver, image):
    image.chmod(0o400)
    found = driver(Block(RawFile(str(image), read_only=True)), VERSION_1 | block.F_RO | block.F_FLUSH)
    assert not found.offered() & (block.F_DISCARD | block.F_WRITE_ZEROES)
    assert ask(found, block.OUT, 0, [(DATA, 512)])[0] == 1
    assert ask(found, block.FLUSH)[0] == 0
    assert ask(found, block.IN, 0, (), [(DATA, 512)])[0] == 0
    assert image.read_bytes() == bytes(range(256)) * 2 * SECTORS


def test_requests_in_flight_go_on_elsewhere(driver, image):
    """One that was begun when its memory went away, and others behind it: all are done after restore(), in order."""
    found = driver(Block(RawFile(str(image))), FEATURES, go=False)
    ring = found.rings[0]
    found.memory.write(Gpa(STATUS), b"\xee\xee\xee")
    for at in range(3):
        found.memory.write(Gpa(HEADER + 16 * at), struct.pack("<IIQ", block.OUT, 0, at))
        found.memory.write(Gpa(DATA + 512 * at), bytes((65 + at,)) * 512)
    ring.post([(HEADER, 16), (DATA, 512)], [(STATUS, 1)])
    ring.post([(HEADER + 16, 16), (DATA + 512, 512)], [(STATUS + 1, 1)], True)
    read = found.memory.read

    def away(gpa, size):
        if gpa.value == DATA + 512:
            raise FetchError("gone", 1, 5)
        return read(gpa, size)

    found.memory.read = away
    found.device.go()
    found.until(lambda: found.troubles)
    found.device.hold()
    found.memory.read = read
    assert found.memory.read(Gpa(STATUS), 2) == b"\0\xee"
    state = found.device.save()
    found.device.release()
    found.device.close(lambda: None)

    other = Driver(Block(RawFile(str(image))), memory=found.memory)
    try:
        other.rings, ring.driver = found.rings, other
        other.device.restore(state)
        other.device.go()
        assert [ring.answer()[0] for _ in range(2)] == [0, 3]
        assert image.read_bytes()[:1024] == b"A" * 512 + b"B" * 512
    finally:
        other.device.close(lambda: None)


# ---- the file ----


def test_files_that_are_no_disk(tmp_path, image):
    (tmp_path / "odd").write_bytes(bytes(513))
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, why in [
        ("odd", "513 bytes are not whole sectors"),
        ("empty", "0 bytes are not whole sectors"),
        ("pipe", "neither a file nor a block device"),
        ("none", "No such file"),
        ("", "Is a directory"),
    ]:
        with pytest.raises(BadInput, match=why) as caught:
            RawFile(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput):
        RawFile("a\0b")


def test_no_two_write_to_one_disk(image):
    path = str(image)
    disks = [RawFile(path), RawFile(path), RawFile(path, True), RawFile(path, True)]
    first, second, reader, other_reader = disks
    first.activate()
    first.activate()  # it has it
    for disk in (second, reader):
        with pytest.raises(BadInput, match="in use"):
            disk.activate()
    first.release()
    reader.activate()
    other_reader.activate()
    with pytest.raises(BadInput, match="in use"):
        second.activate()
    reader.close()
    other_reader.release()
    second.activate()
    for disk in disks:
        disk.close()
        disk.close()


# ---- by description ----


def test_devices_by_description(image):
    made = [specs.make(text, print) for text in ("rng", "rng:seed=5", "console", f"block:{image}", f"block:{image},ro")]
    assert [model.id for model in made] == [4, 4, 3, 2, 2]
    assert [bool(model.features & block.F_RO) for model in made[3:]] == [False, True]
    for model in made:
        model.close()


@pytest.mark.parametrize(
    "text", ["", "tape", "rng:seed=", "rng:seed=x", "rng:5", "console:x", "block", "block:", "block:,ro"]
)
def test_descriptions_of_no_device(text):
    with pytest.raises(BadInput):
        specs.make(text, print)


def test_interrupts_are_those_of_the_guests_header():
    text = (Path(__file__).parents[2] / "guest" / "abi.h").read_text()
    macro = re.search(r"#define PV_VIRTIO_IRQ\(n\) (.*?) /\*", text)[1]
    low, first, second = re.fullmatch(r"\(\(n\) < (\d) \? (\d) \+ \(n\) : (\d) \+ \(n\)\)", macro).groups()
    for n in range(lib.PV_VIRTIO_SLOTS):
        assert specs.irq_of(n) == (int(first) if n < int(low) else int(second)) + n


def test_no_thread_before_it_is_needed(image):
    before = threading.active_count()
    found = Driver(Rng())
    assert threading.active_count() == before
    found.start()
    assert threading.active_count() == before + 1
    found.close()
    assert threading.active_count() == before
