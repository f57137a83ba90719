# test_trace_order.py: what all trackers share, with a tracker that is told what was "written": no KVM needed.
from __future__ import annotations

import gc

import pytest

from pyvmm.errors import BadInput, LifecycleError, MemoryAccessError
from pyvmm.layout import PAGE_SIZE, Gpa
from pyvmm.memory import GuestMemory
from pyvmm.memory.trace import TRACKERS, Runs, Target, Trace, make_trace


class Told(Trace):
    """Reports the pages in `written`; `fails` raises after so many of them, as a second memory slot may."""

    def __init__(self, target):
        super().__init__(target)
        self.written, self.fails, self.arm_fails, self.disarm_fails = [], None, False, False

    def _arm(self):
        if self.arm_fails:
            raise OSError("no arming")

    def _fetch(self, bits):
        for number in range(len(self.written)):
            if number == self.fails:
                self.fails, self.written = None, self.written[number:]
                raise OSError("the kernel fails")
            Runs([(self.written[number], 1)]).mark(bits)
        self.written = []

    def _disarm(self):
        if self.disarm_fails:
            raise OSError("no disarming")


@pytest.fixture
def memory():
    with_memory = GuestMemory(4 << 20, "4k")
    yield with_memory
    with_memory.close()


def target_of(memory, is_open=lambda: None):
    return Target(None, memory, [], None, is_open)


@pytest.fixture
def trace(memory):
    return Told(target_of(memory))


def pages(runs):
    return {page for first, count in runs for page in range(first, first + count)}


def test_what_was_written_is_reported_once(trace):
    with trace:
        trace.written = [1, 2, 700]
        assert list(trace.collect()) == [(1, 2), (700, 1)]
        assert list(trace.collect()) == []
    assert (trace.stats.collections, trace.stats.pages, trace.stats.host_pages) == (2, 3, 0)


def test_bits_taken_before_a_failure_are_in_the_next_collection(trace):
    with trace:
        trace.written, trace.fails = [1, 5, 9], 2
        with pytest.raises(OSError, match="the kernel fails"):
            trace.collect()
        assert trace.stats.collections == 0
        assert pages(trace.collect()) == {1, 5, 9}


def test_what_a_block_could_not_use_is_put_back(trace):
    def fail():
        with trace.collecting() as runs:
            assert pages(runs) == {3, 4}
            raise ZeroDivisionError

    with trace:
        trace.written = [3, 4]
        with pytest.raises(ZeroDivisionError):
            fail()
        trace.written = [8]
        with trace.collecting() as runs:
            assert pages(runs) == {3, 4, 8}
        assert not trace.collect()


def test_pages_put_back_must_be_ram(trace):
    with trace:
        trace.put_back(Runs([(1023, 1)]))
        with pytest.raises(BadInput, match="page 1024 is beyond the VM's RAM of 1024 pages"):
            trace.put_back(Runs([(0, 1025)]))
        assert pages(trace.collect()) == {1023}


def test_the_hosts_own_writes_are_reported(memory, trace):
    memory.write(Gpa(0), b"before the trace")
    with trace:
        memory.write(Gpa(PAGE_SIZE - 1), b"xy")
        memory[Gpa(0x5000) : Gpa(0x5001)] = b"z"
        memory.zero(Gpa(0x8000), 2 * PAGE_SIZE)
        memory.write(Gpa(0x20000), b"")
        memory.read(Gpa(0x30000), PAGE_SIZE)
        with pytest.raises(MemoryAccessError):
            memory.write(Gpa((4 << 20) - 1), b"xy")
        assert pages(trace.collect()) == {0, 1, 5, 8, 9}
        assert not trace.collect()
        assert trace.stats.host_pages == 5
    memory.write(Gpa(0), b"after it")
    assert memory.on_write is None


def test_a_view_counts_as_written_while_it_is_held(memory, trace):
    early = memory.view(Gpa(0x3000), PAGE_SIZE)
    with trace:
        view = memory.view(Gpa(0x10FFF), 2)
        part = view[:1]
        assert pages(trace.collect()) == pages(trace.collect()) == {3, 0x10, 0x11}
        view.release()
        del view
        assert pages(trace.collect()) == {3, 0x10, 0x11}  # a slice of it is still there
        part[0] = 1
        part.release()
        early.release()
        del part, early
        gc.collect()
        assert pages(trace.collect()) == {3, 0x10, 0x11}  # the last writes through them
        assert not trace.collect()


def test_a_view_that_ends_before_the_trace_is_forgotten(memory, trace):
    memory.view(Gpa(0x3000), PAGE_SIZE).release()
    gc.collect()
    with trace:
        assert not trace.collect()


def test_the_order_of_calls(memory, trace):
    with pytest.raises(LifecycleError, match="not started: start"):
        trace.collect()
    trace.stop()
    trace.start()
    assert trace.running
    with pytest.raises(LifecycleError, match="the trace was started already: stop"):
        trace.start()
    assert trace.running
    trace.stop()
    trace.stop()
    with pytest.raises(LifecycleError, match="not started"):
        trace.collect()


def test_a_second_start_is_a_new_trace(memory, trace):
    trace.start()
    trace.put_back(Runs([(7, 1)]))
    memory.write(Gpa(0x9000), b"x")
    trace.stop()
    with trace:
        assert not trace.collect()


def test_one_trace_at_a_time(memory):
    target = target_of(memory)
    one, other = Told(target), Told(target)
    with one:
        with pytest.raises(LifecycleError, match="another trace of this VM is started already"):
            other.start()
        other.stop()
        assert one.running
        memory.write(Gpa(0), b"x")
        assert pages(one.collect()) == {0}
    with other:
        assert not other.collect()


def test_a_start_that_fails_leaves_nothing(memory):
    target = target_of(memory)
    trace = Told(target)
    trace.arm_fails = True
    with pytest.raises(OSError, match="no arming"):
        trace.start()
    assert (trace.running, memory.on_write) == (False, None)
    with Told(target):
        pass


def test_a_stop_that_fails_is_a_stop(memory, trace):
    trace.start()
    trace.disarm_fails = True
    with pytest.raises(OSError, match="no disarming"):
        trace.stop()
    assert (trace.running, memory.on_write) == (False, None)


def test_a_closed_vm_is_named(memory):
    closed = []

    def require_open():
        if closed:
            raise LifecycleError("the VM is closed")

    target = target_of(memory, require_open)
    trace = Told(target)
    trace.start()
    closed.append(True)
    target.close()
    for call in (trace.collect, trace.start):
        with pytest.raises(LifecycleError, match="the VM is closed"):
            call()
    trace.stop()


def test_host_writes_beyond_ram_are_a_mistake(trace):
    for first, count in ((1024, 1), (-1, 1), (0, 1025)):
        with pytest.raises(IndexError):
            trace.host_wrote(first, count)


def test_unknown_trackers_and_options(memory):
    with pytest.raises(BadInput, match=f"no tracker 'magic': choose one of {', '.join(TRACKERS)}"):
        make_trace("magic", target_of(memory), {})
    with pytest.raises(BadInput, match="tracker bitmap has no option 'chunk'; it has none"):
        make_trace("bitmap", target_of(memory), {"chunk": "1M"})
    with pytest.raises(BadInput, match="tracker manual has no option 'size'; it has chunk"):
        make_trace("manual", target_of(memory), {"size": "1M"})


@pytest.mark.parametrize("chunk", [0, -1, "100K", "1", 4096])
def test_bad_chunks(memory, chunk):
    with pytest.raises(BadInput, match="give a multiple of 256K"):
        make_trace("manual", target_of(memory), {"chunk": chunk})


def test_the_table_is_of_the_hosts_features():
    from pyvmm.host import Feature

    assert {feature for row in TRACKERS.values() for feature in row.features} <= {str(name) for name in Feature}
