# test_explain_disassembly.py: decoding and listings, in all modes, at the edges of what is mapped.
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_explain_builders import CODE, FakeSymbols, World

from pyvmm.explain.disassembly import Disassembler, listing
from pyvmm.explain.instruction import decode, starts

# 10000: mov rax, 0x7f0000000000; 1000a: mov qword ptr [rax], 1; 10011: ret
PROGRAM = bytes.fromhex("48b80000000000" + "7f0000" + "48c70001000000" + "c3")


def texts(lines):
    return [(line.address, line.text, line.current) for line in lines]


def test_neighbours_of_the_current_instruction():
    lines = World(PROGRAM).scene.code.around(CODE + 10, before=4, after=1)
    assert texts(lines) == [
        (CODE, "movabs  rax, 0x7f0000000000", False),
        (CODE + 10, "mov     qword ptr [rax], 1", True),
        (CODE + 17, "ret", False),
    ]
    assert listing(lines) == [
        "main:",
        "      10000  48 b8 00 00 00 00 00 7f 00 00  movabs  rax, 0x7f0000000000",
        "=>    1000a  48 c7 00 01 00 00 00           mov     qword ptr [rax], 1",
        "      10011  c3                             ret",
    ]


def test_no_more_neighbours_than_asked_for():
    world = World(b"\x90" * 40, rip=CODE + 20)
    assert [line.address - CODE for line in world.scene.code.around(CODE + 20, 2, 3)] == [18, 19, 20, 21, 22, 23]
    assert [line.address - CODE for line in world.scene.code.around(CODE + 20, 0, 0)] == [20]


def test_the_symbol_decides_where_instructions_begin():
    # From CODE on, the bytes are `mov eax, 0x90909090; nop`; read from CODE + 1 on they are nops.
    world = World(b"\xb8" + b"\x90" * 5)
    assert [line.address - CODE for line in world.scene.code.around(CODE + 5, after=0)] == [0, 5]
    code = Disassembler(64, world.scene.space, FakeSymbols(inner=CODE + 1))
    assert [line.address - CODE for line in code.around(CODE + 5, 9, 0)] == [1, 2, 3, 4, 5]


def test_the_code_before_a_label_belongs_to_the_symbol_before_it():
    world = World(PROGRAM)
    world.symbols = FakeSymbols(main=CODE, crash=CODE + 10)
    lines = world.scene.code.around(CODE + 10, after=0)
    assert [line.label for line in lines] == ["main", "crash"]


def test_without_symbols_decoding_arrives_exactly():
    world = World(PROGRAM)
    lines = Disassembler(64, world.scene.space).around(CODE + 10, after=0)
    assert [line.address for line in lines[-2:]] == [CODE, CODE + 10]
    assert lines[0].label == ""


def test_a_listing_that_begins_within_a_symbol_says_so():
    world = World(b"\x90" * 64)
    assert listing(world.scene.code.around(CODE + 9, 1, 0))[0] == "main+0x8:"


def test_undecodable_bytes():
    world = World(b"\x06\x90")
    assert texts(world.scene.code.around(CODE, 0, 1)) == [(CODE, ".byte   0x06", True), (CODE + 1, "nop", False)]


def test_names_of_targets_and_data():
    # call handler; jmp main; mov rax, [rip + 0x10]
    world = World(bytes.fromhex("e8fb0f0000" + "e9f6ffffff" + "488b0510000000"))
    lines = world.scene.code.around(CODE, 0, 2)
    assert [line.comment for line in lines] == ["handler", "main", f"{CODE + 17 + 16:#x}"]
    assert listing(lines)[1].endswith("call    0x11000  # handler")


def test_code_across_pages_that_lie_apart():
    world = World()
    world.write(0x10FFE, bytes.fromhex("48c7"))
    world.put(0x4000 + 8 * 0x11, 0x15000 | 7)
    world.write(0x15000, bytes.fromhex("0001000000"))
    assert str(world.scene.code.decode(0x10FFE)) == "mov qword ptr [rax], 1"


def test_an_unmapped_neighbourhood():
    world = World(rip=CODE)
    world.page(CODE - 0x1000, 0)
    world.page(CODE + 0x1000, 0)
    world.write(CODE, b"\x90" * 3)
    assert [line.address - CODE for line in world.scene.code.around(CODE + 2, 4, 0)] == [0, 1, 2]
    assert world.scene.code.around(CODE + 0x1000) == ()
    world.write(CODE + 0xFFF, b"\x90")
    assert world.scene.code.around(CODE + 0xFFF, 0, 5)[-1].address == CODE + 0xFFF


@pytest.mark.parametrize(
    ("hexadecimal", "is_call"), [("e800000000", True), ("ffd0", True), ("ff5008", True), ("9090", False), ("cc", False)]
)
def test_return_addresses_follow_calls(hexadecimal, is_call):
    raw = bytes.fromhex(hexadecimal)
    code = World(b"\x90" * 8 + raw).scene.code
    assert code.call_before(CODE + 8 + len(raw)) == (CODE + 8 if is_call else None)


@pytest.mark.parametrize(
    ("mode", "text"),
    [(16, "mov ax, word ptr [bx]"), (32, "mov eax, dword ptr [edi]"), (64, "mov eax, dword ptr [rdi]")],
)
def test_modes(mode, text):
    assert str(decode(b"\x8b\x07", 0, mode)) == text


def test_starts_must_fill_the_bytes():
    assert starts(bytes.fromhex("904889d8"), 0x100, 64) == [0x100, 0x101]
    assert starts(bytes.fromhex("9048"), 0x100, 64) == []


def test_a_symbol_with_a_plus_of_its_own():
    world = World(PROGRAM)
    world.symbols = FakeSymbols(**{"a+zz": CODE})
    assert world.scene.code.around(CODE + 10)[0].address == CODE


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=40), st.sampled_from([16, 32, 64]), st.integers(0, 39))
@example(b"\xf0" * 40, 64, 20)
def test_any_bytes(data, mode, at):
    world = World(data)
    code = Disassembler(mode, world.scene.space, world.symbols)
    lines = code.around(CODE + at)
    assert [line.current for line in lines].count(True) == 1
    for line, after in itertools.pairwise(lines):
        assert line.address + len(line.raw) == after.address
    assert listing(lines)
