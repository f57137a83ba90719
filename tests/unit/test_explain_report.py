# test_explain_report.py: the whole report: its sections, its colours, and that nothing makes it raise.
import io
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_explain_builders import CODE, HANDLER, RING3, STACK, World, make_registers

from pyvmm.errors import MemoryAccessError
from pyvmm.explain import ExitFacts, explain
from pyvmm.explain.calls import call_chain
from pyvmm.explain.registers import bit_names, flags, table
from pyvmm.vcpu.registers import CONTROL, GENERAL, SEGMENTS

SHUTDOWN = ExitFacts("shutdown", 8)


def crash(**registers):
    """main calls handler, which writes to what rax points to."""
    world = World(bytes.fromhex("e8fb0f000090"), rip=HANDLER, rsp=STACK - 8, rax=0x4000_0000, **registers)
    world.write(HANDLER, bytes.fromhex("48c70001000000c3"))
    world.put(STACK - 8, CODE + 5)
    return world


def sections(explanation):
    return {section.title: section.lines for section in explanation.sections}


def test_sections():
    world = crash()
    explanation = explain(SHUTDOWN, world.registers, world.read, world.symbols, 3)
    found = sections(explanation)
    walk = "Page walk of 0x40000000, the address that faulted (4-level paging, cr3 0x1000)"
    assert list(found) == ["What happened", "vCPU 3", "Code", "Calls", walk, "Stack"]
    assert " ".join(found["What happened"]).startswith(explanation.sentence)
    at = found["Code"].index("handler:")
    assert found["Code"][at : at + 2] == [
        "handler:",
        "=>    11000  48 c7 00 01 00 00 00  mov     qword ptr [rax], 1",
    ]
    assert found["Calls"] == ["in          handler", "called from main"]
    assert found[walk] == [
        "PML4[0]    at 0x000001000  0000000000002007  P W U - - -- --",
        "PDPT[1]    at 0x000002008  0000000000000000  - - - - - -- --",
        "ends here: PDPT entry 1 is not present",
    ]
    assert found["Stack"][0] == "0x00000001fff8  0000000000010005  return to main+0x5"
    assert len(found["Stack"]) == 8


def test_text_is_titles_and_indented_lines():
    world = crash()
    text = explain(SHUTDOWN, world.registers, world.read, world.symbols, 0).text
    titles = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert [title.split()[0] for title in titles] == ["What", "vCPU", "Code", "Calls", "Page", "Stack"]
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_a_walk_that_arrives():
    world = World(bytes.fromhex("0f0b"))
    found = sections(explain(SHUTDOWN, world.registers, world.read, None, 0))
    lines = found["Page walk of 0x10000, rip (4-level paging, cr3 0x1000)"]
    assert lines[-1] == "physical 0x10000, in a page of 4K"


def test_no_paging():
    world = World(bytes.fromhex("0f0b"), cr0=0x11, cr4=0, efer=0, cs={"l": 0, "db": 1})
    found = sections(explain(SHUTDOWN, world.registers, world.read, None, 0))
    assert found["Page walk of 0x10000, rip (no paging, cr3 0x1000)"] == ["physical 0x10000: paging is off"]
    assert found["Stack"][0] == "0x000000020000  00000000"


def test_after_a_reset_only_registers_are_shown():
    world = World(rip=0xFFF0, cr0=0x6000_0010, cr4=0, efer=0, cs={"base": 0xFFFF_0000, "l": 0, "db": 0})
    assert list(sections(explain(SHUTDOWN, world.registers, world.read, None, 0))) == ["What happened", "vCPU 0"]


def test_missing_code_and_stack_are_said():
    world = World(rip=0x4000_0000, rsp=0x5000_0000)
    found = sections(explain(SHUTDOWN, world.registers, world.read, None, 0))
    assert found["Code"] == ["there is no code to be read at 0x40000000"]
    assert found["Stack"] == ["0x000050000000  cannot be read: PDPT entry 1 is not present"]
    assert "Calls" not in found


def test_render_prints_the_same_text_with_and_without_colours():
    world = crash()
    explanation = explain(SHUTDOWN, world.registers, world.read, world.symbols, 0)
    plain, coloured = io.StringIO(), io.StringIO()
    explanation.render(Console(file=plain, width=40))
    assert plain.getvalue() == explanation.text + "\n"
    explanation.render(Console(file=coloured, force_terminal=True, color_system="standard"))
    assert "\x1b[1;31m" in coloured.getvalue()  # the failing instruction
    assert coloured.getvalue() != plain.getvalue()


# ---- calls ----


def test_the_call_chain_follows_frames():
    world = crash(rbp=0x1F000)
    world.put(0x1F000, 0x1F100)
    world.put(0x1F008, CODE + 5)
    assert [world.scene.code.place(at) for at in call_chain(world.scene)] == ["handler", "main", "main"]
    world.put(0x1F100, 0x1F200)
    world.put(0x1F108, CODE + 6)  # follows no call
    assert len(call_chain(world.scene)) == 3


def test_a_ring_of_frames_ends():
    world = crash(rbp=0x1F000)
    world.put(0x1F000, 0x1F000)
    world.put(0x1F008, CODE + 5)
    assert len(call_chain(world.scene)) == 3


def test_a_deep_chain_is_cut():
    world = crash(rbp=0x1F000)
    for frame in range(0x1F000, 0x1F800, 16):
        world.put(frame, frame + 16)
        world.put(frame + 8, CODE + 5)
    assert len(call_chain(world.scene)) == 16


# ---- registers ----


def test_table():
    lines = table(make_registers(rax=0x1234, rflags=0x3246, **RING3), "main+0x4", "4-level paging")
    text = "\n".join(lines)
    assert lines[0] == "64-bit code in ring 3, 4-level paging"
    assert "rax 0000000000001234  rbx " in text
    assert "rip     0000000000010000  main+0x4" in text
    assert "rflags  0000000000003246  PF ZF IF IOPL=3" in text
    assert "cr0     0000000080010011  PE ET WP PG" in text
    assert "efer    0000000000000d00  LME LMA NXE" in text
    assert "cs              0x0023  base 0x0, limit 0xffffffff, 64-bit code, DPL 3" in text
    assert "ds es fs gs     0x0010  base 0x0, limit 0xffffffff, data, DPL 0" in text
    assert "gdt                     base 0x7000, limit 0x3f" in text


def test_changed_registers_are_marked():
    lines = "\n".join(table(make_registers(rax=1, cr3=5), "", "", previous=make_registers()))
    assert "rax*" in lines
    assert "cr3*" in lines
    assert "rbx*" not in lines


def test_a_segment_that_is_not_loaded():
    assert any("ldt" in line and "not loaded" in line for line in table(make_registers(ldt={"selector": 0}), "", ""))
    assert any("ds" in line and "not loaded" in line for line in table(make_registers(ds={"present": 0}), "", ""))


@pytest.mark.parametrize(("value", "shown"), [(0, ""), (2, ""), (0x3000, "IOPL=3"), (0x1001, "CF IOPL=1")])
def test_flags(value, shown):
    assert flags(value) == shown


def test_bits_without_a_name_are_numbered():
    assert bit_names(1 << 40 | 1, {0: "PE"}) == "PE bit40"


# ---- facts ----


def test_facts_from_kvm_run():
    run = SimpleNamespace(
        exit_reason=17,
        internal=SimpleNamespace(suberror=1, ndata=1000, data=list(range(16))),
        fail_entry=SimpleNamespace(hardware_entry_failure_reason=0x8000_0021),
    )
    assert ExitFacts.from_run("internal_error", run) == ExitFacts("internal_error", 17, 1, tuple(range(16)))
    assert ExitFacts.from_run("fail_entry", run) == ExitFacts("fail_entry", 17, hardware_reason=0x8000_0021)
    assert ExitFacts.from_run("shutdown", run) == ExitFacts("shutdown", 17)


# ---- hostile guests ----

WORD = st.integers(0, 2**64 - 1) | st.sampled_from([0, 0x1000, CODE, STACK, 1 << 47, 2**64 - 1, 0xFFFF_FFFF])
MODES = [
    {},
    RING3,
    {"cs": {"l": 0}},
    {"cr0": 0x10, "cr4": 0, "efer": 0, "cs": {"l": 0}, "ss": {"db": 0}},
    {"cr0": 0x11, "cr4": 0, "efer": 0, "cs": {"l": 0, "db": 1}},
    {"cr0": 0x8000_0011, "cr4": 0x20, "efer": 0, "cs": {"l": 0, "db": 1}},
]
KINDS = st.sampled_from(["shutdown", "internal_error", "fail_entry", "unhandled"])


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    KINDS,
    st.integers(0, 40),
    st.lists(WORD, max_size=16),
    st.sampled_from(MODES),
    st.dictionaries(st.sampled_from((*GENERAL, *CONTROL)), WORD, max_size=6),
    st.dictionaries(st.sampled_from(SEGMENTS), WORD, max_size=3),
    st.tuples(WORD, st.integers(0, 0xFFFF)),
    st.binary(min_size=1, max_size=20),
    st.binary(min_size=8, max_size=64),
)
def test_nothing_makes_it_raise(kind, number, data, mode, values, bases, idt, code, rubbish):
    world = World(code, **{**mode, "idt": idt, "gdt": idt})
    world.write(0x5000, (rubbish * 512)[: 0x1000 * 8])  # over IDT, GDT and TSS
    for name, value in values.items():
        if name not in mode:
            setattr(world.registers, name, value)
    for name, base in bases.items():
        getattr(world.registers, name).base = base
    facts = ExitFacts(kind, number, number % 6, tuple(data), number)
    explanation = explain(facts, world.registers, world.read, world.symbols, 0)
    assert explanation.sentence.endswith(".")
    assert "\n" not in explanation.sentence
    assert explanation.sentence in " ".join(explanation.sections[0].lines)


def test_a_guest_without_any_memory():
    def read(gpa, size):
        raise MemoryAccessError("gone")

    explanation = explain(SHUTDOWN, make_registers(), read, None, 0)
    assert "the PML4 itself lies outside RAM, at 0x1000" in explanation.sentence
