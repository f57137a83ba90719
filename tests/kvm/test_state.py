# test_state.py: a guest goes on in another VM; a state that does not fit is refused by name.
from __future__ import annotations

import copy
import random
import time
from contextlib import suppress

import pytest

from pyvmm import VM, GuestCrash, StateError
from pyvmm.layout import MIB
from pyvmm.pytest_plugin import needs
from pyvmm.state import State
from pyvmm.testing.verify_model import check_memory, ram_hash

pytestmark = needs("kvm")

CHUNK = 4 * MIB
DEADLINE = 30

# guest, command line, vCPUs, what it prints at the end
GUESTS = [
    ("timer", "ticks=400", 1, "SUCCESS: "),
    ("timer", "ticks=400 mode=oneshot", 4, "SUCCESS: "),
    ("timer", "ticks=400 mode=deadline", 1, "SUCCESS: "),
    ("smp", "count=40M", 1, "SUCCESS: 1 CPU, 41943040 adds\n"),
    ("smp", "count=8M", 4, "SUCCESS: 4 CPUs, 33554432 adds\n"),
]


def copy_ram(source, target):
    for region in source.memory.regions:
        for at in range(0, region.size, CHUNK):
            size = min(CHUNK, region.size - at)
            target.memory.view(region.gpa + at, size)[:] = source.memory.view(region.gpa + at, size)


def moved(vm, source, **options):
    """A new VM that is what the paused `source` is."""
    target = vm(memory=source.memory.size, cpus=len(source.vcpus), **options)
    copy_ram(source, target)
    target.restore_state(source.save_state())
    return target


def start(vm, guest, append="", **options):
    machine = vm(**options)
    machine.load(guest, append)
    machine.start()
    return machine


@pytest.mark.parametrize(("guest", "append", "cpus", "printed"), GUESTS)
def test_a_guest_goes_on_elsewhere(vm, guest, append, cpus, printed):
    """From VM to VM at random moments, booting included, until it has ended by itself."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # shown where the test fails
    moments = random.Random(seed)
    machine = start(vm, guest, append, memory="8M", cpus=cpus)
    text, moves = "", 0
    while machine.wait(moments.uniform(0, 0.06)).reason == "timeout":
        machine.pause()
        if machine.ended:
            break
        before = [machine.regs(cpu) for cpu in range(cpus)]
        target = moved(vm, machine)
        assert [target.regs(cpu) for cpu in range(cpus)] == before
        assert target.progress() == machine.progress()
        text += machine.printed
        machine.close()
        machine, moves = target, moves + 1
        machine.start()
        assert moves < 500
    assert moves > 1
    assert machine.wait(DEADLINE).ok, text + machine.printed
    assert printed in text + machine.printed


@pytest.mark.parametrize("cpus", [1, 4])
def test_memory_is_right_after_each_move(vm, cpus):
    """By the guest's own check, which goes on, and by the model of what it has written so far."""
    options = {"write": 40, "zeros": 50, "order": "random"}
    append = " ".join(f"{name}={value}" for name, value in options.items())
    machine = start(vm, "verify", append, memory="12M", cpus=cpus)
    for _ in range(8):
        passes = machine.progress().passes
        while machine.progress().passes == passes:
            assert not machine.ended
        machine.pause()
        target = moved(vm, machine)
        assert ram_hash(target.memory) == ram_hash(machine.memory)
        machine.close()
        machine = target
        assert not check_memory(machine.memory, machine.progress(), **options)
        machine.start()
    assert machine.progress().status == "running"


def test_a_state_may_be_restored_twice(vm):
    """One guest becomes two, which do not disturb each other."""
    machine = start(vm, "timer", "ticks=100", memory="4M")
    while machine.progress().count < 10:
        assert not machine.ended
    machine.pause()
    both = [moved(vm, machine) for _ in range(2)]
    machine.resume()
    for one in (*both, machine):
        assert one.run(timeout=DEADLINE).ok
        assert "SUCCESS: 100 ticks" in one.printed


def test_what_was_typed_and_not_read_goes_along(vm):
    machine = start(vm, "echo", "until=end")
    machine.type("one\r")
    assert machine.expect("one\r\n")
    machine.pause()
    machine.type("two\r")
    target = moved(vm, machine)
    assert target.serial.listening
    target.start()
    assert target.expect("two\r\n")
    target.type("end\r")
    assert target.wait(DEADLINE).ok
    assert target.printed == "two\r\nend\r\n"


def test_the_state_of_a_vm_that_never_ran(vm):
    machine = vm(memory="4M", cpus=2)
    machine.load("smp", "count=1000")
    assert moved(vm, machine).run(timeout=DEADLINE).ok
    assert machine.run(timeout=DEADLINE).ok


def test_saving_changes_nothing(vm):
    machine = start(vm, "smp", "count=0", cpus=2)
    machine.pause()
    first, second = machine.save_state(), machine.save_state()
    for state in (first, second):
        del state.fields["clock"]  # goes on
        for vcpu in state.parts("vcpus"):
            del vcpu.fields["msrs"]  # the TSC among them
    assert first == second


def test_kvmclock_goes_on_from_where_it_was(vm):
    machine = start(vm, "smp", "count=0")
    machine.pause()
    state = machine.save_state()
    target = vm()
    target.restore_state(state)
    begin = time.monotonic_ns()
    later = target.save_state().integer("clock")
    assert 0 <= later - state.integer("clock") < time.monotonic_ns() - begin + 1_000_000_000


# ---- states that do not fit ----


@pytest.fixture(scope="module")
def good():
    """A saved state, to be copied before it is damaged."""
    with VM(memory="4M", cpus=2) as machine:
        machine.load("smp", "count=0")
        machine.start()
        machine.pause()
        return machine.save_state()


def paths(state, at=()):
    """The way to each field of a state, nested ones too."""
    for name, value in state.fields.items():
        yield (*at, name)
        nested = value if isinstance(value, list) else [value]
        for number, part in enumerate(nested):
            if isinstance(part, State):
                yield from paths(part, (*at, name, number) if isinstance(value, list) else (*at, name))


def holder(state, path):
    """The State that has the last field of `path`."""
    for name in path[:-1]:
        state = state[name] if isinstance(state, list) else state.fields[name]
    return state


ANY_LENGTH = [("devices", "serial", "queue"), ("devices", "serial", "looped")]
"""Bytes that may be as few as they are."""

DAMAGES = {
    "missing": lambda fields, name: fields.pop(name),
    "none": lambda fields, name: fields.update({name: None}),
    "text": lambda fields, name: fields.update({name: "0"}),
    "negative": lambda fields, name: fields.update({name: -1}),
    "huge": lambda fields, name: fields.update({name: 1 << 64}),
    "short": lambda fields, name: fields.update({name: b"\xff" * 3}),
    "long": lambda fields, name: fields.update({name: bytes(1 << 21)}),
    "list": lambda fields, name: fields.update({name: [1, b"", "x"]}),
    "table": lambda fields, name: fields.update({name: {"x": -1}}),
    "state": lambda fields, name: fields.update({name: State("other", 1, {})}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_field_damaged_is_refused(vm, good, damage):
    machine = vm(memory="4M", cpus=2)
    machine.load("hello")
    everything = list(paths(good))
    assert len(everything) > 30
    accepted, sentences = [], []
    for path in everything:
        state = copy.deepcopy(good)
        DAMAGES[damage](holder(state, path).fields, path[-1])
        if state == good:
            continue
        try:
            machine.restore_state(state)
        except StateError as error:
            sentences.append(str(error))
        else:
            accepted.append(path)
    assert accepted == (ANY_LENGTH if damage == "short" else [])
    assert not [sentence for sentence in sentences if "\n" in sentence]


OTHERS = {
    "another kind": (lambda s: setattr(s, "kind", "serial"), "cannot restore a 'serial' state"),
    "a later version": (lambda s: setattr(s, "version", 2), "version 2"),
    "a vCPU's kind": (lambda s: setattr(s.parts("vcpus")[1], "kind", "vm"), "cannot restore a 'vm' state"),
    "more memory": (lambda s: s.fields.update(memory_size=8 << 20), "8388608 bytes of memory"),
    "fewer vCPUs": (lambda s: s.parts("vcpus") and s.fields["vcpus"].pop(), "1 vCPUs, this one has 2"),
    "vCPUs swapped": (lambda s: s.fields["vcpus"].reverse(), "the state of vCPU 1 cannot go into vCPU 0"),
    "an MSR that is none": (lambda s: s.parts("vcpus")[0].fields["msrs"].update({"0xdeadbeef": 1}), "0xdeadbeef"),
    "an MSR out of range": (lambda s: s.parts("vcpus")[0].fields["msrs"].update({"0x10": 1 << 64}), "0x10"),
    "an MSR without a number": (lambda s: s.parts("vcpus")[0].fields["msrs"].update({"TSC": 1}), "TSC"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_state_is_refused_by_name(vm, good, name):
    change, words = OTHERS[name]
    state = copy.deepcopy(good)
    change(state)
    with pytest.raises(StateError, match=words):
        vm(memory="4M", cpus=2).restore_state(state)


@pytest.mark.parametrize("name", ["sregs", "regs", "xcrs", "xsave", "lapic", "debugregs", "events", "pit", "irqchips"])
@pytest.mark.parametrize("byte", [0xFF, 0xA5])
def test_rubbish_of_the_right_size_never_harms_us(vm, good, name, byte):
    """The kernel refuses it, or the guest goes wrong; our process and the error are sane either way."""
    state = copy.deepcopy(good)
    fields = state.fields if name in state.fields else state.parts("vcpus")[0].fields
    old = fields[name]
    fields[name] = [bytes([byte]) * len(old[0])] * 3 if isinstance(old, list) else bytes([byte]) * len(old)
    machine = vm(memory="4M", cpus=2)
    try:
        machine.restore_state(state)
    except StateError:
        return
    with suppress(GuestCrash):
        machine.run(timeout=0.05)
