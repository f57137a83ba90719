# test_engine_failures.py: pages that cannot be brought back or stored: nobody goes on with a wrong byte, nothing is
# lost, nothing hangs, and once the home works again, so does the guest.
from __future__ import annotations

import errno
import threading
import time
from contextlib import suppress

import pytest
from engine_help import BLOCK, Shelf, both_ways, judge, passes, shelve, until, way, working

from pyvmm import Gpa
from pyvmm.errors import FetchError, KernelError, MemoryAccessError
from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "uffd_guest")
__all__ = ["way"]


def raising(error):
    def fail(page):
        raise error

    return fail


# how a home fails -> (what its fetch does instead, the errno, words of the error)
FAILURES = {
    "disk": (raising(OSError(errno.EIO, "disk")), errno.EIO, "EIO, Input/output error"),
    "gone": (raising(OSError(errno.ENODEV, "gone")), errno.ENODEV, "ENODEV"),
    "exception": (raising(KeyError("no such page")), errno.EIO, "KeyError: 'no such page'"),
    "exit": (raising(SystemExit(3)), errno.EIO, "SystemExit: 3"),
    "errno that is none": (raising(OSError(-5, "odd")), errno.EIO, "EIO"),
    "errno that is text": (raising(OSError("odd", "odd")), errno.EIO, "EIO"),
    "short": (lambda page: b"short", errno.EIO, "ValueError: fetch(.*) gave 5 bytes for"),
    "nothing": (lambda page: b"", errno.EIO, "ValueError: fetch(.*) gave 0 bytes for"),
    "no bytes": (lambda page: 7, errno.EIO, "TypeError"),
}


@both_ways
@pytest.mark.parametrize("kind", FAILURES)
def test_a_guest_whose_page_cannot_come_is_paused_and_goes_on_when_it_can(vm, way, kind):
    machine = working(vm, append="order=random", cpus=2)
    shelf = Shelf()
    shelf.fail, number, words = FAILURES[kind]
    machine.pause()
    shelve(machine, shelf)
    machine.resume()
    for _ in range(2):  # it may try as often as it likes
        with pytest.raises(
            FetchError, match=f"\\Agfn 0x[0-9a-f]+ cannot be brought back from its home 'swap': .*{words}"
        ) as caught:
            machine.wait(20)
        assert caught.value.errno == number
        assert str(caught.value).startswith(f"gfn {caught.value.page:#x} ")
        assert "\n" not in str(caught.value)
        assert machine.paused
        machine.regs(0), machine.regs(1)
        with pytest.raises(FetchError, match="cannot be brought back"):  # the host is told as well
            machine.memory.read(machine.memory.gpa_of(caught.value.page), 1)
        assert machine.memory.pages().homes["swap"] == 15 * BLOCK
        assert machine.progress().status == "running"
        machine.resume()
    with pytest.raises(FetchError):
        machine.wait(20)
    shelf.fail = lambda page: None
    resume(machine)
    passes(machine)
    until(lambda: not shelf.pages)
    judge(machine)


def resume(machine):
    """Until nobody is held any more: a second vCPU may have failed just before the home was well."""
    machine.resume()
    end = time.monotonic() + 20
    while machine.memory.engine.stats().answers["failed"] and time.monotonic() < end:
        try:
            machine.wait(0.2)
            return
        except FetchError:
            machine.resume()


@both_ways
def test_a_home_that_fails_in_the_middle(vm, way):
    """Some pages of a block come, one does not: what came stays right, and the rest comes later."""
    machine = working(vm, pages="4k")
    shelf = Shelf()
    machine.pause()
    shelve(machine, shelf)
    bad = {5 * BLOCK + 100, 6 * BLOCK, 7 * BLOCK + 511}
    shelf.fail = lambda page: (
        raising(OSError(errno.EIO, "a bad sector"))(page) if bad & set(range(page, page + 16)) else None
    )
    for block in (5, 6, 7):
        with pytest.raises(FetchError, match="EIO"):
            machine.memory.engine.install(block * BLOCK, BLOCK)
    assert 0 < machine.memory.pages().homes["swap"] < 15 * BLOCK
    shelf.fail = lambda page: None
    machine.resume()
    passes(machine)
    judge(machine)


@both_ways
def test_merge_with_a_home_that_fails(vm, way):
    machine = working(vm)
    shelf = Shelf()
    machine.pause()
    shelve(machine, shelf, 4, 6)
    shelf.fail = raising(OSError(errno.EIO, "disk"))
    with pytest.raises(FetchError, match=r"home 'swap': EIO"):
        machine.memory.engine.merge(4)
    with pytest.raises(FetchError, match=r"home 'swap': EIO"):
        machine.memory.engine.merge(5)
    assert machine.memory.pages().homes["swap"] == 2 * BLOCK
    shelf.fail = lambda page: None
    machine.memory.engine.merge(4)
    machine.resume()
    passes(machine)
    judge(machine)


@both_ways
def test_a_slow_home_only_takes_time(vm, way):
    machine = working(vm, cpus=2)
    shelf = Shelf()
    shelf.fail = lambda page: time.sleep(0.02)
    machine.pause()
    shelve(machine, shelf)
    machine.resume()
    passes(machine)
    stats = machine.memory.engine.stats()
    assert max(each.longest for each in [*stats.vcpus, stats.workers]) >= 20_000_000
    judge(machine)


@both_ways
@pytest.mark.parametrize("room", [0, 3 * BLOCK, 3 * BLOCK + 7])
def test_a_home_that_is_full_loses_nothing(vm, way, room):
    machine = working(vm, pages="4k")
    shelf = Shelf()
    shelf.room = room
    engine = machine.memory.engine
    engine.set_home("swap", shelf)
    machine.pause()
    for page in range(BLOCK + 50, 16 * BLOCK, 100):  # runs of pages in between
        assert engine.remove(page, 30) == 30
    with pytest.raises(KernelError, match=r"store in swap.*ENOSPC"):
        engine.store(0, 16 * BLOCK, "swap")
    homes = engine.count().homes
    assert homes["swap"] == len(shelf.pages) == room // 30 * 30
    assert homes["swap"] + homes["aside"] == machine.memory.pages().away == 2310
    machine.resume()
    passes(machine)
    judge(machine)


# What of the guest is away when it is ended: its data only, which KVM waits for interruptibly; or all of it, with the
# page tables and the code of ring 0, which KVM's emulator reads where no signal reaches it.
@both_ways
@pytest.mark.parametrize("first", [1, 0])
@pytest.mark.parametrize("end", ["stop", "close", "stop at once", "pause and stop", "resume and stop"])
def test_a_guest_that_waits_for_ever_can_be_ended(vm, way, first, end):
    machine = working(vm, cpus=2, append="order=random")
    shelf = Shelf()
    machine.pause()
    shelve(machine, shelf, first)
    shelf.fail = raising(OSError(errno.EIO, "disk"))
    machine.resume()
    if end != "stop at once":
        with pytest.raises(FetchError):
            machine.wait(20)
    begin = time.monotonic()
    if end == "resume and stop":
        machine.resume()
    if end == "close":
        machine.close()
    else:
        machine.stop(3)
        assert (machine.wait(0).reason, machine.wait(0).status) == ("stopped", 3)
    assert time.monotonic() - begin < 10
    assert machine.ended
    machine.close()


def test_close_lets_go_of_threads_that_wait_for_a_page(vm):
    """A thread that touches guest memory by itself, through no view, waits in the kernel."""
    from pyvmm._native import ffi, lib

    machine = vm(memory="16M")
    shelf = Shelf()
    machine.memory.write(Gpa(6 * MIB), b"x" * 2 * MIB)
    shelve(machine, shelf)
    shelf.fail = raising(OSError(errno.EIO, "disk"))
    address = ffi.cast("uint8_t *", machine.memory.hva(Gpa(6 * MIB)).value)
    keep = machine.memory._mapping()
    thread = threading.Thread(target=lib.pv_peek, args=(address,))
    thread.start()
    until(lambda: machine.memory.engine.stats().answers["failed"])
    assert thread.is_alive()
    machine.close()
    thread.join(10)
    assert not thread.is_alive()
    del keep


def test_a_home_without_places_takes_nothing(vm):
    from pyvmm.memory.homes import Home

    machine = vm(memory="16M")
    engine = machine.memory.engine
    machine.memory.write(Gpa(4 * MIB), b"kept" * PAGE_SIZE)
    engine.set_home("peer", Home())
    engine.remove(2 * BLOCK, BLOCK)
    with pytest.raises(KernelError, match="EROFS"):
        engine.store(2 * BLOCK, BLOCK, "peer")
    assert machine.memory.read(Gpa(4 * MIB), 4 * PAGE_SIZE) == b"kept" * PAGE_SIZE
    engine.assign(4 * BLOCK, 4, "file")  # which nobody serves
    with pytest.raises(FetchError, match="home 'file': ENXIO"):
        machine.memory.read(Gpa(8 * MIB), 1)
    with pytest.raises(MemoryAccessError):
        machine.memory.read(Gpa(16 * MIB), 1)


@both_ways
@pytest.mark.parametrize("found", [[], [1, 2], [-1] * 30, [1 << 52] * 30, ["a"] * 30, None])
def test_a_home_that_gives_wrong_locators_loses_nothing(vm, way, found):
    machine = vm(memory="16M", pages="4k")
    shelf = Shelf()
    shelf.store = lambda page, data: found
    engine = machine.memory.engine
    engine.set_home("swap", shelf)
    machine.memory.write(Gpa(4 * MIB), b"kept" * 30 * 1024)
    assert engine.remove(2 * BLOCK, 30) == 30
    with pytest.raises(KernelError, match="EIO"):
        engine.store(2 * BLOCK, 30, "swap")
    assert engine.count().homes["aside"] == 30
    assert machine.memory.read(Gpa(4 * MIB), 30 * PAGE_SIZE) == b"kept" * 30 * 1024


def test_a_pause_that_meets_a_page_which_cannot_come_says_so(vm):
    """Where KVM itself reads it, as a page table with shadow paging, no signal ends the wait; the vCPU does not park:
    whoever pauses is told of the page, and soon."""
    machine, shelf = working(vm, append="order=random"), Shelf()
    asked, answer = threading.Event(), threading.Event()

    def fail(page):
        asked.set()
        assert answer.wait(20)
        raise OSError(errno.EIO, "disk")

    machine.pause()
    before = machine.progress().count
    shelf.fail = fail
    shelve(machine, shelf, 0)
    machine.resume()
    assert asked.wait(20)
    timer = threading.Timer(0.2, answer.set)  # most likely during the pause; before it or after is right as well
    timer.start()
    with suppress(FetchError):  # KVM lets a vCPU park on some hosts
        machine.pause()
    timer.join()
    with pytest.raises(FetchError, match="EIO"):
        machine.wait(20)
    shelf.fail = lambda page: None
    machine.resume()
    until(lambda: machine.progress().count > before + 1000)
    judge(machine)
