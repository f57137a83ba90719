# test_asleep.py: how long a vCPU slept, by the kernel: its stalls, also where workers of KVM's fetch pages for it.
from __future__ import annotations

import time

from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm")


def asleep(machine):
    return [stall.asleep / 1e9 for stall in machine.memory.engine.stats().vcpus]


def test_a_guest_that_works_does_not_sleep_and_pausing_it_does_not_count(vm):
    machine = vm(memory="16M", pages="4k")
    machine.load("verify")
    machine.run(timeout=0.3)
    before = asleep(machine)[0]
    time.sleep(0.3)  # paused: what is to be not counted
    assert asleep(machine)[0] == before < 0.1
    machine.resume()
    time.sleep(0.2)
    machine.pause()
    assert asleep(machine)[0] - before < 0.1


def test_halting_is_sleep_and_stays_known_after_the_end(vm):
    """The guest echo halts until something is typed."""
    machine = vm(memory="4M")
    machine.load("echo", "until=end")
    machine.start()
    time.sleep(0.5)  # in which it sleeps
    assert 0.2 < asleep(machine)[0] < 0.6
    machine.type("end\r")
    assert machine.wait(10).ok
    assert asleep(machine)[0] > 0.2
    assert asleep(machine) == asleep(machine)


@needs("uffd_guest")
def test_waiting_for_pages_is_sleep(vm):
    machine = vm(memory="64M", pages="4k", cpus=2)
    machine.load("verify")
    machine.run(timeout=1)
    before = asleep(machine)
    machine.memory.engine.remove(1024, 4096)
    machine.resume()
    while machine.memory.pages().away:
        time.sleep(0.001)
    machine.pause()
    stats = machine.memory.engine.stats()
    slept = sum(asleep(machine)) - sum(before)
    assert stats.faults > 2000
    # The engine's count lacks the kernel's part, but counts twice where faults of both vCPUs wait in one batch.
    assert slept > 0.3 * stats.nanoseconds / 1e9
