# test_peer.py: post-copy between two VMs of one process: a guest goes on in one while its pages come from the other.
# Sessions, commits and processes are none of these tests'.
from __future__ import annotations

import errno
import socket
import threading

import pytest
from engine_help import both_ways, until, way  # noqa: F401 (a fixture)

from pyvmm import VM, host
from pyvmm.errors import BadInput, FetchError, HostError, MemoryAccessError, MigrationError, PeerGone
from pyvmm.layout import BLOCK_SIZE, MIB, PAGE_SIZE
from pyvmm.memory.pageset import PageSet
from pyvmm.memory.source import UNITS
from pyvmm.migration.connection import Connection
from pyvmm.migration.pages import PageChannel
from pyvmm.migration.peer import PeerHome, Served
from pyvmm.pytest_plugin import needs
from pyvmm.testing.balance import imbalances
from pyvmm.testing.verify_model import check_memory, ram_hash

pytestmark = needs("kvm", "uffd_guest")

BLOCK_PAGES = BLOCK_SIZE // PAGE_SIZE
SECONDS = 20


class Pair:
    """A guest that stands still in one VM, and that VM's copy, which has its pages still to come."""

    def __init__(self, source, target):
        self.source, self.target = source, target
        self.served = Served(source.memory)
        self.home = None
        self._channels, self._threads, self.errors = [], [], []

    def receive_here(self, unit="adaptive", away=None):
        looks = self.source.memory.engine.looks()
        large = bytearray(-(-len(looks) // 8))
        for block, look in enumerate(looks):
            large[block // 8] |= (look == "large") << block % 8
        self.home = PeerHome(self.target.memory, bytes(large), unit, away=away)
        self.target.restore_state(self.source.save_state())
        self.connect()
        return self.home

    def channels(self):
        ours, theirs = socket.socketpair()
        made = []
        for sock, machine, name in ((ours, self.source, "there"), (theirs, self.target, "here")):
            memory = machine.memory
            made.append(PageChannel(Connection(sock, name), memory._mapping(), memory.size // PAGE_SIZE, SECONDS))
        self._channels += made
        return made

    def thread(self, call):
        def run():
            try:
                call()
            except (MigrationError, MemoryAccessError) as error:
                self.errors.append(error)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def connect(self):
        """Requests go over a new connection."""
        ours, theirs = self.channels()
        self.thread(lambda: self.served.serve(ours))
        self.home.connect(theirs)
        self.urgent = theirs

    def send_all(self, channels=1):
        """The rest comes by itself."""
        for _ in range(channels):
            ours, theirs = self.channels()
            self.thread(lambda ours=ours: self.served.send_all(ours))
            self.thread(lambda theirs=theirs: self.receive(theirs))

    def receive(self, channel):
        while self.home.receive(channel, 1 << 12) is None:
            pass

    def close(self):
        for each in (self.source, self.target):
            each.close()
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive(), "a thread hangs"
        for channel in self._channels:
            channel.close()


@pytest.fixture
def pairs():
    made = []

    def make(guest, append="", seconds=0.15, **options):
        source = VM("32M", 2, **options)
        source.load(guest, append)
        source.run(timeout=seconds)
        made.append(Pair(source, VM("32M", 2, **options)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def pass_on(machine, passes=2):
    goal = machine.progress().passes + passes
    if not machine.started:
        machine.start()
    elif machine.paused:
        machine.resume()
    until(lambda: machine.progress().passes >= goal or machine.ended, "a pass")
    assert not machine.ended, machine.printed
    machine.pause()


def right(pair, **options):
    machine = pair.target
    until(lambda: not imbalances(machine.memory, 0), f"balance: {imbalances(machine.memory, 0)}")
    assert check_memory(machine.memory, machine.progress(), **options) == []


@pytest.mark.parametrize("unit", UNITS)
def test_a_guest_goes_on_while_its_pages_come(pairs, unit):
    comes_right(pairs, unit)


def test_a_guest_goes_on_without_move(pairs):
    with host.without("uffd_move"):
        comes_right(pairs, "adaptive")


def comes_right(pairs, unit):
    pair = pairs("verify", "order=random zeros=100")
    home = pair.receive_here(unit)
    pair.target.start()
    pair.send_all(2)
    pass_on(pair.target)
    until(lambda: home.left == 0, "all pages")
    home.settle()
    right(pair, order="random", zeros=100)
    counts = home.counts()
    assert counts.failed == 0
    assert counts.requests > 0
    assert counts.pages == pair.served.counts().pages
    assert counts.came == pair.served.counts().rest


@needs("large_mappings")
def test_large_pages_are_large_again(pairs):
    """By KVM's own count, after the guest has touched all; only touches bring anything at first."""
    pair = pairs("verify", pages="2m", seconds=0.5)
    expected = pair.source.mappings()["pages_2m"]
    assert expected >= 14
    home = pair.receive_here("page")
    pair.target.start()
    until(lambda: home.counts().requests > 300, "touches")
    pair.send_all()
    pass_on(pair.target)
    until(lambda: home.left == 0, "all pages")
    home.settle()
    pass_on(pair.target)
    assert pair.target.mappings()["pages_2m"] >= expected
    assert not pair.target.memory.pages().armed
    right(pair)


@pytest.mark.parametrize("pages", ["auto", "4k"])
def test_ram_is_the_same_and_what_was_never_touched_stays_so(pairs, pages):
    pair = pairs("touch", "size=6M passes=1", pages=pages)
    resident = pair.source.memory.pages()
    home = pair.receive_here()
    home_was = home.have().runs().pages
    pair.send_all()
    until(lambda: home.left == 0, "all pages")
    right_now = pair.target.memory.pages()
    assert home_was == 0
    assert right_now.untouched >= resident.untouched
    assert (right_now.away, right_now.armed) == (0, False)
    after = pair.source.memory.pages()
    assert after.untouched == resident.untouched  # to send zeros, none was made resident
    assert ram_hash(pair.target.memory) == ram_hash(pair.source.memory)


@both_ways
def test_hybrid(pairs, way):  # noqa: F811
    """A copy is here, and some of it is out of date."""
    pair = pairs("verify", "zeros=100")
    memory, copy = pair.source.memory, pair.target.memory
    stale = [page for page in range(memory.size // PAGE_SIZE) if page % 11 == 0 or 3000 < page < 3900]
    for first in range(0, memory.size, MIB):
        copy.write(copy.gpa_of(first // PAGE_SIZE), memory.read(memory.gpa_of(first // PAGE_SIZE), MIB))
    for page in stale:
        copy.write(copy.gpa_of(page), b"\xee" * PAGE_SIZE)
    large = pair.target.memory.pages().large
    home = pair.receive_here(away=PageSet(memory.size // PAGE_SIZE, [(page, 1) for page in stale]))
    pair.served.begin(home.have())
    assert home.left == len(stale)
    pass_on(pair.target, 1)
    pair.send_all(2)
    pass_on(pair.target)
    until(lambda: home.left == 0, "all pages")
    right(pair, zeros=100)
    assert pair.target.memory.pages().large >= large
    assert home.counts().pages + pair.served.counts().rest >= len(stale)


def test_a_break_and_what_comes_after_it(pairs):
    """The guest waits, and goes on; pages on their way are lost, and sent again."""
    pair = pairs("verify", "order=random")
    home = pair.receive_here("page")
    pair.target.start()
    until(lambda: home.counts().requests > 50, "touches")
    ours, theirs = pair.channels()
    theirs.end()
    with pytest.raises(PeerGone):  # what is sent now comes to nobody, and counts as sent
        pair.served.send_rest(ours, 4, 2)
    pair.urgent.end()  # whoever touches a page next sees it
    until(lambda: home.wait(1) == "apart", "the break")
    assert isinstance(home.problem(), PeerGone)
    requests = home.counts().requests
    pair.served.begin(home.have())
    pair.connect()
    until(lambda: home.counts().requests > requests + 50, "touches")
    pair.send_all(2)
    pass_on(pair.target)
    until(lambda: home.left == 0, "all pages")
    right(pair, order="random")


def test_the_source_is_dead(pairs):
    """Who touches a page that is lost gets a FetchError that says so; the rest is intact."""
    pair = pairs("verify")
    home = pair.receive_here("page")
    pair.target.start()
    until(lambda: home.counts().requests > 20, "touches")
    home.break_off()
    assert home.wait(SECONDS) == "apart"
    home.end(errno.EHOSTDOWN, "the source there was killed, and the pages that only it had are lost")
    with pytest.raises(FetchError, match=r"home 'peer': the source there was killed, and the pages"):
        pair.target.wait(timeout=SECONDS)
    assert pair.target.paused
    assert home.wait(0) == "ended"
    with pytest.raises(HostError, match="no page comes"):
        pair.connect()
    memory, page = pair.target.memory, next(iter(home.have().runs()))[0]
    assert memory.read(memory.gpa_of(page), 8) == pair.source.memory.read(memory.gpa_of(page), 8)


def test_closing_while_all_of_it_is_under_way(pairs):
    """Faults, requests, receivers: no call is left behind (the fixture joins them)."""
    pair = pairs("verify")
    home = pair.receive_here()
    pair.target.start()
    ours, theirs = pair.channels()
    pair.thread(lambda: pair.receive(theirs))  # nothing comes
    until(lambda: home.counts().requests > 3, "touches")
    pair.target.close()
    with pytest.raises(MemoryAccessError):
        home.receive(theirs, 1)
    with pytest.raises(MemoryAccessError):
        home.wait(0)
    pair.source.close()
    with pytest.raises(MemoryAccessError):
        pair.served.serve(ours)


def test_what_cannot_be(pairs):
    pair = pairs("hello", seconds=5)
    with pytest.raises(BadInput, match="unit='huge'"):
        PeerHome(pair.target.memory, unit="huge")
    with pytest.raises(BadInput, match="RAM has been touched"):
        PeerHome(pair.source.memory)
