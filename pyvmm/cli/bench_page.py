# bench_page.py: results as a page of HTML that needs nothing beside it, with the plots in it, and the plots as files.
"""`Report`."""

from __future__ import annotations

import base64
import os
from html import escape

from pyvmm.bench import MANY, Result, grouped
from pyvmm.bench.catalogue import BENCHMARKS
from pyvmm.bench.results import Run, joined
from pyvmm.bench.targets import MET, MISSED, Verdict, verdicts
from pyvmm.cli.bench_plots import COLOURS, NAMES, draw
from pyvmm.cli.bench_tables import cells, ratio
from pyvmm.cli.doctor import host_lines
from pyvmm.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PAGE = "report.html"
_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 1150px; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 3rem; border-top: 1px solid #d0d7de; padding-top: 1rem }
h2 small { font-weight: normal; color: #59636e } h3 { font-size: 1rem; margin: 1.5rem 0 .3rem }
table { border-collapse: collapse; font-size: 13.5px } td, th { padding: .15rem .7rem; text-align: left;
  border-bottom: 1px solid #eaeef2 } th { color: #59636e; font-weight: 600 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
img { max-width: 100%; display: block; margin: 1rem 0 } summary { cursor: pointer; color: #0969da }
.met { color: #1a7f37 } .missed { color: #b35900; font-weight: 600 } .none { color: #59636e }
.failed { background: #fff1e5; padding: .5rem .8rem; border-left: 4px solid #b35900 }
.key span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
"""


class Report:
    """A folder with a page and plots. Raises BadInput where it cannot be made."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{folder}: {error.strerror}") from None

    def write(self, runs: Sequence[Run]) -> None:
        """Of several runs with the values of all together. Raises BadInput where some are quick and others are not."""
        if len({run.quick for run in runs}) != 1:
            raise BadInput("report: some of these runs are --quick and others are not: they do not measure the same")
        quick, found = runs[0].quick, joined(runs)
        judged = {name: verdicts(name, rows, quick) for name, rows in found.items()}
        parts = [_heads(runs), _targets(judged), _contents(found)]
        for name, rows in found.items():
            parts.append(self._benchmark(name, rows, judged[name], runs))
        path = os.path.join(self._folder, PAGE)
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(_page("\n".join(parts)))
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}") from None

    def _benchmark(self, name: str, rows: list[Result], judged: Sequence[Verdict], runs: Sequence[Run]) -> str:
        row = BENCHMARKS.get(name)
        numbers = f" <small>{escape(row.numbers)}</small>" if row and row.numbers else ""
        parts = [f'<h2 id="{escape(name)}">{escape(name)}{numbers}</h2>']
        parts += [f"<p>{escape(row.text[0].upper() + row.text[1:])}.</p>"] if row else []
        entries = [entry for run in runs for entry in run.entries if entry.benchmark == name]
        parts += [f'<p class="failed">Not measured: {escape(entry.reason)}</p>' for entry in entries if entry.reason]
        if not rows:
            return "\n".join(parts)
        took = ", ".join(f"{entry.seconds:,.0f} s at load {entry.load:g}" for entry in entries if not entry.reason)
        parts.append(f'<p class="none">It took {took}.</p>')
        if judged:
            parts.append(_verdicts(judged))
        for file in draw(self._folder, _file_of(name), rows, runs[0].quick):
            parts.append(_picture(os.path.join(self._folder, file), f"{name}: medians and ranges"))
        tables = "\n".join(_table(group, members) for group, members in grouped(rows).items())
        parts.append(f"<details><summary>All figures</summary>{tables}</details>")
        return "\n".join(parts)


def _file_of(name: str) -> str:
    """A benchmark that we have; any other name may be from anywhere, and shall not lead out of the folder."""
    if name in BENCHMARKS:
        return name
    if not name.isidentifier() or not name.isascii():
        raise BadInput(f"report: {name[:40]!r} is no name of a benchmark")
    return name


def _page(body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>pyvmm bench</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>pyvmm bench</h1>\n{body}\n</body></html>\n"
    )


def _heads(runs: Sequence[Run]) -> str:
    return "\n".join(_head(run) for run in runs)


def _head(run: Run) -> str:
    head = run.head
    lines = [
        ("measured", f"{head['date']}, by {head['command']}{' (small and short)' if run.quick else ''}"),
        ("pyvmm", f"{head['version']}, {head.get('commit') or 'not of a checkout'}"),
        ("load", f"{head['load']:g} when it began"),
        *host_lines(head["host"]),
    ]
    missing = ", ".join(name for name, there in head["features"].items() if not there)
    lines.append(("without", missing or "nothing: this host has all features"))
    return _rows([(escape(title), escape(str(value))) for title, value in lines])


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{title}</th><td>{value}</td></tr>" for title, value in rows) + "</table>"


def _targets(judged: dict[str, list[Verdict]]) -> str:
    found = sorted(
        ((verdict, name) for name, each in judged.items() for verdict in each),
        key=lambda pair: int(pair[0].target.measure[1:]),
    )
    if not found:
        return ""
    counts = [sum(verdict.said == word for verdict, _ in found) for word in (MET, MISSED)]
    title = f"<h3>Targets: {counts[0]} met, {counts[1]} missed, {len(found) - sum(counts)} not judged</h3>"
    rows = "".join(
        _verdict(verdict, f'<td><a href="#{escape(name)}">{escape(name)}</a></td>') for verdict, name in found
    )
    return f"{title}<table>{_VERDICT_HEADS.format('<th>benchmark</th>')}{rows}</table>"


_VERDICT_HEADS = (
    '<tr><th></th>{}<th>of</th><th>what</th><th class="n">wanted</th><th class="n">median (range)</th><th></th></tr>'
)


def _verdicts(judged: Sequence[Verdict]) -> str:
    return f"<table>{_VERDICT_HEADS.format('')}{''.join(_verdict(verdict, '') for verdict in judged)}</table>"


def _verdict(verdict: Verdict, benchmark: str) -> str:
    style = {MET: "met", MISSED: "missed"}.get(verdict.said, "none")
    return (
        f"<tr><td>{escape(verdict.target.measure)}</td>{benchmark}<td>{escape(verdict.group)}</td>"
        f'<td>{escape(verdict.what)}</td><td class="n">{escape(verdict.bound)}</td>'
        f'<td class="n">{escape(verdict.figure())}</td><td class="{style}">{escape(verdict.said)}</td></tr>'
    )


def _contents(found: dict[str, list[Result]]) -> str:
    links = ", ".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in found)
    key = "".join(f'<span style="background:{COLOURS[kind]}"></span>{escape(text)}' for kind, text in NAMES.items())
    return (
        f"<h3>Benchmarks</h3><p>{links}</p>\n<p class='key'>Bars and dots are medians, lines reach from the least to "
        f"the greatest value (of {MANY} values and more, to the 90th percentile):{key}.</p>"
    )


def _picture(path: str, text: str) -> str:
    with open(path, "rb") as file:
        data = base64.b64encode(file.read()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _table(group: str, rows: Sequence[Result]) -> str:
    many = any(len(row.values) >= MANY for row in rows)
    rows = sorted(rows, key=lambda row: not row.values)
    heads = ["median", "min", *(["p90"] if many else []), "max", f"/ {rows[0].name}"]
    lines = ["<tr><th></th>" + "".join(f'<th class="n">{escape(head)}</th>' for head in heads) + "</tr>"]
    for row in rows:
        figures = [*cells(row, many), ratio(row, rows[0]) if row.values else ""]
        tds = "".join(f'<td class="n">{escape(text)}</td>' for text in figures)
        lines.append(f"<tr><td>{escape(row.name)}</td>{tds}</tr>")
    return f"<h3>{escape(group)}</h3><table>{''.join(lines)}</table>"
