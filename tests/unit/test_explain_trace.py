# test_explain_trace.py: lines of a trace, and returns to ring 3 seen in advance.
import pytest
from test_explain_builders import CODE, RING3, STACK, World, make_registers

from pyvmm.explain import TraceFormatter, leaves_ring0


def test_lines():
    world = World(bytes.fromhex("4889d8" + "4801d8" + "90"), rbx=0x10)
    formatter = TraceFormatter(world.read, world.symbols)
    before = make_registers(rbx=0x10)
    middle = make_registers(rbx=0x10, rax=0x10, rip=CODE + 3, rflags=0x102)
    after = make_registers(rbx=0x10, rax=0x20, rip=CODE + 6, rflags=0x10106)
    assert formatter.line(before, middle).split() == ["0", "r0", "main", "mov", "rax,", "rbx", "rax=0x10"]
    assert formatter.line(middle, after).split() == ["1", "r0", "main+0x3", "add", "rax,", "rbx", "rax=0x20", "[PF]"]
    assert formatter.line(after, after).split() == ["2", "r0", "main+0x6", "nop"]


def test_columns_line_up():
    world = World(b"\x90\xf4")
    formatter = TraceFormatter(world.read, world.symbols)
    lines = [formatter.line(make_registers(rip=rip), make_registers(rax=1)) for rip in (CODE, CODE + 1)]
    assert lines[0].index("rax=0x1") == lines[1].index("rax=0x1")


def test_changes_of_tables_control_registers_and_segments():
    world = World()
    formatter = TraceFormatter(world.read, None)
    after = make_registers(cr3=0x5000, ds={"selector": 0x18}, idt=(0x6000, 0xFFF), rflags=2)
    line = formatter.line(make_registers(rflags=0x43), after)
    assert line.endswith("[-] cr3=0x5000 idt_base=0x6000 idt_limit=0xfff ds=0x18")


def test_code_that_cannot_be_read():
    world = World()
    registers = make_registers(rip=0x4000_0000)
    assert TraceFormatter(world.read).line(registers, registers).split() == ["0", "r0", "0x40000000", "?"]


@pytest.mark.parametrize(
    ("hexadecimal", "at", "selector", "leaves"),
    [
        ("48cf", 8, 0x2B, True),  # iretq
        ("48cf", 8, 0x08, False),
        ("48cf", 4, 0x2B, False),  # the upper half of the return address is no selector
        ("cf", 4, 0x2B, True),  # iretd
        ("66cf", 2, 0x2B, True),
        ("48cb", 8, 0x2B, True),  # retfq
        ("cb", 4, 0x2B, True),  # retf
        ("cb", 4, 0x08, False),
        ("480f07", 0, 0, True),  # sysretq
        ("0f35", 0, 0, True),  # sysexit
        ("c3", 8, 0x2B, False),
        ("90", 8, 0x2B, False),
    ],
)
def test_leaves_ring0(hexadecimal, at, selector, leaves):
    world = World(bytes.fromhex(hexadecimal))
    world.put(STACK + at, selector)
    assert leaves_ring0(world.registers, world.read) is leaves


def test_leaves_ring0_is_false_in_ring_3_and_without_code_or_stack():
    world = World(bytes.fromhex("48cf"), **RING3)
    world.put(STACK + 8, 0x2B)
    assert not leaves_ring0(world.registers, world.read)
    assert not leaves_ring0(make_registers(rip=0x4000_0000), world.read)
    assert not leaves_ring0(make_registers(rsp=0x4000_0000), world.read)
