# test_ring.py: dirty rings while vCPUs are kicked all the time: no signal keeps KVM from protecting a page anew.
from __future__ import annotations

from engine_help import working
from test_trace import differing, pages_of, ram

from pyvmm.layout import PAGE_SIZE
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "dirty_ring")

KICKS = 60


def test_no_write_is_missed_where_vcpus_are_kicked_all_the_time(vm):
    """The ring is so small that vCPUs empty it again and again, where a kick's signal meets them. Linux 6.16 and later
    stops KVM_RESET_DIRTY_RINGS then, and leaves pages unprotected."""
    machine = working(vm, memory="16M", append="order=random", cpus=2, pages="4k", dirty_ring=1024)
    with machine.trace("ring") as trace:
        for _ in range(5):
            for _ in range(KICKS):
                machine.life.hold_back(0.0005)
            trace.collect()
            before = ram(machine)
            count = machine.progress().count
            while machine.progress().count < count + 2000:
                machine.life.hold_back(0.0005)
            machine.pause()
            reported, changed = pages_of(trace.collect()), differing(before, ram(machine))
            assert changed
            assert changed <= reported
            machine.resume()


def test_rings_that_are_blind_report_everything_until_the_next_trace(vm):
    machine = working(vm, memory="16M", pages="4k", dirty_ring=1024)
    machine.pause()
    trace = machine.trace("ring")
    with trace:
        trace.collect()
        assert trace.collect().pages < 16
        trace._rings.native.blind = 1
        for _ in range(2):
            assert trace.collect().pages == machine.memory.size // PAGE_SIZE
    with trace:
        trace.collect()
        assert trace.collect().pages < 16
