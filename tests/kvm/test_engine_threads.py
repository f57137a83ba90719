# test_engine_threads.py: the memory engine in a process that does much at once: host threads, signals, children, and a
# VM that is closed under them. A hang is ended by the tests' watchdog, with all threads' stacks.
from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time

import pytest
from engine_help import BLOCK, Shelf, Workers, both_ways, judge, passes, way, working

from pyvmm import Gpa
from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, MemoryAccessError, check
from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm", "uffd_guest")
__all__ = ["way"]

HAMMERING = 2.0
"""Seconds. A longer run: PYVMM_HAMMER=20 pytest ..."""


def seconds():
    return float(os.environ.get("PYVMM_HAMMER", HAMMERING))


@both_ways
def test_host_threads_and_operations_at_once(vm, way):
    """Threads read, write and view memory of their own, which others take away; the guest looks after the rest."""
    machine = working(vm, "48M", "size=32M order=random", cpus=2, pages="auto")
    ram, engine = machine.memory, machine.memory.engine
    engine.set_home("swap", Shelf())
    blocks = range(24)

    def owner(number):
        """Of one page in every four of the last 14 MiB: nobody else writes there."""
        rng = random.Random(number)
        pages = range(17 * BLOCK + number, 24 * BLOCK, 4)
        known = {}

        def work():
            page = rng.choice(pages)
            gpa = ram.gpa_of(page)
            if rng.random() < 0.4:
                known[page] = rng.randbytes(8) * (PAGE_SIZE // 8)
                ram.write(gpa, known[page])
            elif rng.random() < 0.5:
                assert ram.read(gpa, PAGE_SIZE) == known.get(page, bytes(PAGE_SIZE))
            else:
                with ram.view(gpa, PAGE_SIZE) as view:
                    assert engine.remove(page, 1) == 0
                    assert view == known.get(page, bytes(PAGE_SIZE))

        return work

    def mover(number):
        rng = random.Random(100 + number)

        def work():
            block, kind = rng.choice(blocks), rng.randrange(6)
            try:
                if kind < 2:
                    engine.remove(block * BLOCK, BLOCK, what=rng.choice(["aside", "zero"]))
                elif kind == 2:
                    engine.remove(block * BLOCK + rng.randrange(400), 1 + rng.randrange(100))
                elif kind == 3:
                    engine.store(block * BLOCK, BLOCK, "swap")
                else:
                    rng.choice([engine.split, engine.merge, engine.break_])(block)
            except HostError as error:
                if "in use" not in str(error):
                    raise

        return work

    with Workers(*map(owner, range(4)), *map(mover, range(3))) as workers:
        end = time.monotonic() + seconds()
        while time.monotonic() < end and workers.well():
            assert machine.wait(0.05).reason == "timeout"
    passes(machine)
    judge(machine)


@both_ways
def test_blocks_copied_out_while_a_trace_by_gib_runs(vm, way):
    """The first write anywhere lifts the trace of all RAM: not that of the block which is just being copied."""
    machine = working(vm, "32M", "write=100", cpus=2, pages="auto")
    engine = machine.memory.engine
    assert engine.call(lib.pv_trace_start, 30, 0) == 0
    bits = ffi.new("uint64_t[]", machine.memory.size // PAGE_SIZE // 64)
    end = time.monotonic() + seconds()
    with Workers(lambda: check(engine.call(lib.pv_trace_collect, bits), "collect")) as workers:
        for block in itertools.cycle(range(1, 16)):
            engine.split(block)
            engine.merge(block)
            engine.remove(block * BLOCK, BLOCK)
            if time.monotonic() > end or not workers.well() or machine.ended:
                break
    assert engine.call(lib.pv_trace_stop) == 0
    passes(machine)
    judge(machine)


@both_ways
def test_storms_of_signals(vm, way):
    """Neither the calls that they interrupt nor the threads that serve faults make anything of them."""
    machine = working(vm, cpus=2)
    engine = machine.memory.engine
    counts = itertools.count()
    before = [(number, signal.signal(number, lambda *_: next(counts))) for number in (signal.SIGALRM, signal.SIGUSR1)]
    end = time.monotonic() + seconds()
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        with Workers(lambda: os.kill(os.getpid(), signal.SIGUSR1)):
            for block in itertools.cycle(range(1, 16)):
                engine.remove(block * BLOCK, BLOCK)
                engine.remove((17 - block) % 15 * BLOCK + 10, 100)
                engine.install(block * BLOCK, BLOCK)
                if block % 5 == 0:
                    engine.merge(block)
                if time.monotonic() > end:
                    break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before:
            signal.signal(number, handler)
    assert next(counts) > 200
    passes(machine)
    judge(machine)


def until_closed(call, heard):
    def work():
        while not heard:
            try:
                call()
            except MemoryAccessError as error:
                heard.append(str(error))
            except HostError as error:
                if "in use" not in str(error):
                    raise

    return work


@both_ways
@pytest.mark.parametrize("turn", range(5))
def test_close_with_threads_in_calls(vm, way, turn):
    """Each either gets its answer or hears that the VM is closed; none is left behind, none meets freed memory."""
    machine = working(vm, "16M", cpus=2)
    ram, engine = machine.memory, machine.memory.engine
    calls = {
        "remove": lambda: engine.remove(BLOCK, 4 * BLOCK),
        "install": lambda: engine.install(BLOCK, 4 * BLOCK),
        "read": lambda: ram.read(Gpa(2 * MIB), 6 * MIB),
        "view": lambda: ram.view(Gpa(4 * MIB), MIB),
        "merge": lambda: engine.merge(3),
        "count": engine.count,
    }
    heard = {name: [] for name in calls}
    threads = [threading.Thread(target=until_closed(call, heard[name])) for name, call in calls.items()]
    for thread in threads:
        thread.start()
    time.sleep(0.02 * turn)  # at another moment each turn
    machine.close()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert heard == {name: ["the VM is closed: its memory is gone"] for name in calls}


def test_many_threads_make_one_engine(vm):
    for _ in range(20):
        machine = vm(memory="4M")
        engines = []
        barrier = threading.Barrier(8)

        def first(machine=machine, engines=engines, barrier=barrier):
            barrier.wait()
            machine.memory.engine.remove(BLOCK, 10)
            engines.append(machine.memory.engine)

        threads = [threading.Thread(target=first) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len({id(engine) for engine in engines}) == 1
        machine.close()
