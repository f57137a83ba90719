# report.py: everything that is known about a vCPU that could not go on, for people: one sentence, and a long text.
"""`explain()` turns a stopped vCPU into an `Explanation`."""

from __future__ import annotations

import re
import textwrap

from pyvmm.explain.access import stack_pointer, word_size
from pyvmm.explain.calls import call_chain
from pyvmm.explain.cause import is_reset, notes, sentence
from pyvmm.explain.disassembly import listing
from pyvmm.explain.fault import find_fault
from pyvmm.explain.pagewalk import FLAGS
from pyvmm.explain.registers import table
from pyvmm.explain.scene import Scene
from pyvmm.layout import format_size
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rich.console import Console

    from pyvmm.explain.facts import ExitFacts
    from pyvmm.explain.pagewalk import Read, Walk
    from pyvmm.image.symbols import Symbols
    from pyvmm.vcpu import Registers

_WIDTH = 92
_STACK_WORDS = 8
_STYLES = (
    (r"(?m)^\S.*$", "bold"),  # titles: what is not indented
    (r"(?m)^ +=> .*$", "bold red"),
    (r"(?m)^  [^ :]+:$", "cyan"),
    (r"(?m)(?:ends here|cannot be read|there is no code).*$", "red"),
    (r"# .*$", "cyan"),
    (r"\b0{4,}(?=[0-9a-f])", "dim"),
    (r"(?<=\w)\*", "yellow"),
)


class Section(Record):
    """A part of the report: a title, and lines without their indentation."""

    __slots__ = ("lines", "title")

    def __init__(self, title: str, lines: list[str]) -> None:
        self.title = title
        self.lines = lines


class Explanation(Record):
    """`sentence`: what happened and most likely why, one line. `text`: the whole report, without colours."""

    __slots__ = ("sections", "sentence")

    def __init__(self, sentence: str, sections: tuple[Section, ...]) -> None:
        self.sentence = sentence
        self.sections = sections

    @property
    def text(self) -> str:
        """Plain text: titles at the margin, the rest indented by two."""
        return "\n\n".join(
            "\n".join([section.title, *(f"  {line}".rstrip() for line in section.lines)]) for section in self.sections
        )

    def render(self, console: Console) -> None:
        """Prints the same text with a little colour, where the console has colours. Lines are not wrapped."""
        from rich.text import Text

        text = Text(self.text)
        for pattern, style in _STYLES:
            text.highlight_regex(re.compile(pattern, re.MULTILINE), style)
        console.print(text, soft_wrap=True)


def explain(facts: ExitFacts, registers: Registers, read: Read, symbols: Symbols | None, vcpu: int) -> Explanation:
    """Explains why a stopped vCPU could not go on. Raises nothing, whatever the guest left behind.

    `read`: guest-physical memory; raises a PyvmmError where there is no RAM. `vcpu`: its number, for the report.
    """
    scene = Scene(registers, read, symbols)
    said = sentence(facts, scene)
    paragraphs = [said, *notes(facts, scene)]
    sections = [
        Section("What happened", [line for text in paragraphs for line in _wrap(text)]),
        Section(f"vCPU {vcpu}", table(registers, scene.code.symbol(registers.pc) or "", scene.space.name)),
    ]
    if not is_reset(scene):
        sections += [_code(scene), *_calls(scene), _walk(scene, facts), _stack(scene)]
    return Explanation(said, tuple(sections))


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _code(scene: Scene) -> Section:
    pc = scene.registers.pc
    lines = listing(scene.code.around(pc))
    return Section("Code", lines or [f"there is no code to be read at {pc:#x}"])


def _calls(scene: Scene) -> list[Section]:
    chain = call_chain(scene)
    if len(chain) < 2:
        return []
    lines = [f"{'in' if at == chain[0] else 'called from':<12}{scene.code.place(at)}" for at in chain]
    return [Section("Calls", lines)]


def _walk(scene: Scene, facts: ExitFacts) -> Section:
    """The way to the address that faulted, or else to rip."""
    fault = find_fault(scene) if facts.kind == "shutdown" else None
    address = fault.address if fault is not None and fault.address is not None else scene.registers.pc
    walk = scene.space.walk(address)
    what = "rip" if address == scene.registers.pc else "the address that faulted"
    title = f"Page walk of {walk.linear:#x}, {what} ({scene.space.name}, cr3 {scene.registers.cr3:#x})"
    return Section(title, walk_lines(walk))


def walk_lines(walk: Walk) -> list[str]:
    """A page walk, one line a step: table and index, where the entry lies, its value, its flags (- for those that are
    0), and how it ended."""
    lines = []
    for step in walk.steps:
        shown = " ".join(name if name in step.flags else "-" * len(name) for name in FLAGS)
        where = f"{step.level}[{step.index}]"
        lines.append(f"{where:<10} at {step.at.value:#011x}  {step.value:016x}  {shown}")
    if walk.gpa is None:
        lines.append(f"ends here: {walk.reason}")
    elif walk.page_size:
        lines.append(f"physical {walk.gpa.value:#x}, in a page of {format_size(walk.page_size)}")
    else:
        lines.append(f"physical {walk.gpa.value:#x}: paging is off")
    return lines


def _stack(scene: Scene) -> Section:
    """The words on top of the stack; those that point into code are named, and return addresses told apart."""
    registers, size = scene.registers, word_size(scene.registers)
    lines = []
    for i in range(_STACK_WORDS):
        at = stack_pointer(registers) + i * size
        word = scene.space.number(at, size)
        if word is None:
            refusal = scene.space.walk(at).reason or "there is no RAM"
            lines.append(f"{at:#014x}  cannot be read: {refusal}")
            break
        symbol = scene.code.symbol(word)
        returns = symbol is not None and scene.code.call_before(word) is not None
        lines.append(f"{at:#014x}  {word:0{2 * size}x}  {'return to ' if returns else ''}{symbol or ''}".rstrip())
    return Section("Stack", lines)
