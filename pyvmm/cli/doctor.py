# doctor.py: `pyvmm doctor`: what this host can do, shown to a person or, with --json, to a program.
"""The view of `pyvmm.host`: a report that fits 80 columns, one JSON object, or a summary of a few lines."""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from itertools import groupby

from pyvmm import host
from pyvmm.host import Feature, Finding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

    from pyvmm.cli.parse import Arguments

EXIT_NO_GUESTS = 1
"""No guest can run on this host."""
_SCHEMA = 1
_TITLE_WIDTH = 23


def run(args: Arguments) -> int:
    """Prints the report; with --json one object, with --summary a few lines. Returns 0 if guests can run, else 1."""
    findings, facts = host.findings(), host.facts()
    if args.json:
        print(json.dumps(as_json(findings, facts), indent=2))
    elif args.summary:
        print(summary_line())
    else:
        from pyvmm.cli.output import Output

        show(Output(), findings, facts)
    return 0 if _can_run(findings) else EXIT_NO_GUESTS


def _can_run(findings: Iterable[Finding]) -> bool:
    return any(finding.feature == Feature.KVM and finding.ok for finding in findings)


def as_json(findings: Sequence[Finding], facts: Mapping[str, object]) -> dict[str, object]:
    """The report as plain data. `cost` and `remedy` are null for what works; units are in the names of numbers."""
    return {
        "schema": _SCHEMA,
        "ok": _can_run(findings),
        "seconds": round(sum(finding.seconds for finding in findings), 6),
        "host": dict(facts),
        "findings": {str(finding.feature): _fields(finding) for finding in findings},
    }


def _fields(finding: Finding) -> dict[str, object]:
    return {
        "group": finding.group,
        "title": finding.title,
        "ok": finding.ok,
        "value": finding.value,
        "numbers": finding.numbers,
        "only_slower": finding.only_slower,
        "needs": finding.needs,
        "cost": None if finding.ok else finding.cost,
        "remedy": None if finding.ok else finding.remedy,
        "seconds": round(finding.seconds, 6),
    }


def show(console: Console, findings: Sequence[Finding], facts: Mapping[str, object]) -> None:
    """Prints the report for people; below what is missing or slow, what that costs and what would help."""
    marks = ("✓", "✗") if console.encoding.startswith("utf") else ("+", "x")
    for group, members in groupby(findings, key=lambda finding: finding.group):
        console.print(group, style="bold")
        for finding in members:
            _show_finding(console, finding, marks)
        console.print()
    console.print("host", style="bold")
    for title, value in host_lines(facts):
        _row(console, " ", title, value)
    console.print()
    console.print(_verdict(findings), markup=False)


def _show_finding(console: Console, finding: Finding, marks: tuple[str, str]) -> None:
    good, bad = marks
    if finding.ok:
        return _row(console, good, finding.title, finding.value, "green")
    if finding.needs is not None:
        return _row(console, "-", finding.title, finding.value, "dim")
    mark, style = ("~", "yellow") if finding.only_slower else (bad, "red")
    _row(console, mark, finding.title, finding.value, style)
    _wrapped(console, "  cost: ", finding.cost)
    return _wrapped(console, "  help: ", finding.remedy)


def _row(console: Console, mark: str, title: str, value: str, style: str = "") -> None:
    _wrapped(console, f" {mark} {title:<{_TITLE_WIDTH}} ", value, style)


def _wrapped(console: Console, lead: str, text: str, style: str = "") -> None:
    """`text` behind `lead`, and indented as far on the lines that follow. Commands are not broken at hyphens."""
    from rich.text import Text

    indent = " " * len(lead)
    lines = textwrap.fill(text, console.width, initial_indent=lead, subsequent_indent=indent, break_on_hyphens=False)
    shown = Text(lines)
    shown.stylize(style, 0, lead.find(" ", 1) + 1)
    console.print(shown, soft_wrap=True)


def host_lines(facts: Mapping[str, object]) -> list[tuple[str, str]]:
    """What of the facts people read, in words; a fact that the host does not tell is shown as "?"."""
    known = defaultdict(lambda: "?", {name: value for name, value in facts.items() if value is not None})
    lines = [
        ("kernel", "{kernel}"),
        ("CPU", "{cpu}, {cores} cores, {address_bits} physical address bits"),
        ("memory", f"{_gib(facts.get('memory_bytes'))}, {_gib(facts.get('memory_available_bytes'))} available"),
        ("vCPUs of a VM", "up to {max_vcpus}, recommended {recommended_vcpus}"),
        ("THP", "enabled={thp_enabled} defrag={thp_defrag} shmem_enabled={thp_shmem_enabled}"),
        ("reserved huge pages", "{hugetlb_2m_free} of {hugetlb_2m_total} free (2 MiB)"),
        ("KSM", "run={ksm_run}"),
        ("userfaultfd", "vm.unprivileged_userfaultfd={unprivileged_userfaultfd}"),
    ]
    return [(title, text.format_map(known)) for title, text in lines]


def _gib(size: object) -> str:
    return f"{size / (1 << 30):.1f} GiB" if isinstance(size, int) else "?"


def _verdict(findings: Sequence[Finding]) -> str:
    can = "Guests can run." if _can_run(findings) else "No guest can run."
    tried = [finding for finding in findings if finding.needs is None]
    slower = sum(not finding.ok and finding.only_slower for finding in tried)
    missing = sum(not finding.ok and not finding.only_slower for finding in tried)
    return f"{can} Of {len(tried)} features tried, {missing} missing, {slower} slower."


def summary_line() -> str:
    """A few lines for the start of a demonstration: the host, the speed of guests, what is missing."""
    findings, facts = {finding.feature: finding for finding in host.findings()}, host.facts()
    lines = dict(host_lines(facts))
    names = (Feature.RING3_NATIVE, Feature.RING0_NATIVE, Feature.FAST_EXITS)
    speeds = [f"{findings[name].title}: {findings[name].value}" for name in names]
    absent = [str(name) for name, finding in findings.items() if not finding.ok]
    paragraphs = (
        f"host:    {lines['CPU']}, {lines['memory']}",
        f"guests:  {'; '.join(speeds) if _can_run(findings.values()) else findings[Feature.KVM].value}",
        f"without: {', '.join(absent) or 'nothing'} ('pyvmm doctor' says more)",
    )
    return "\n".join(textwrap.fill(text, 80, subsequent_indent=" " * 9) for text in paragraphs)
