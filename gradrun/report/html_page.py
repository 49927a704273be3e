"""Results as one HTML page that needs nothing else: verdict, plots, tables, machine, warnings.

Knows HTML; whatever comes from files and users is text in it, and the page may load nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from gradrun.report import wording
from gradrun.report.escaping import escape_control_chars
from gradrun.report.plots import Plot, plots
from gradrun.report.side_by_side import Outputs, side_by_side
from gradrun.report.tables import Table, tables
from gradrun.results.result import AnyResult, CheckResult

_STYLE = Path(__file__).with_name("html_page.css")
_TONES = {
    "faster": "good",
    "yes": "good",
    "pass": "good",
    "slower": "bad",
    "fail": "bad",
    "cannot run": "bad",
    "error": "bad",
    "inconclusive": "unsure",
    "warning": "unsure",
}
_ERRORS = re.compile(r"differ .*|[\d,]+ errors?")
_UNIT = re.compile(r"(?<=\d) (?=[nµm]?s\b|[KMGT]?i?B\b)")
"""The blank before a unit, where no line should break."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def text(results: Sequence[Outputs]) -> str:
    """One page: of several results first a column each, then each of them whole.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    several = len(results) > 1
    parts = [_beside(results)] if several else []
    parts += [_article(name, result, f"{place}-") for place, (name, result) in enumerate(results)]
    names = dict.fromkeys(wording.model_name(result) for _, result in results)
    return _PAGE.format(
        title=_text(f"{', '.join(names)}: gradrun"),
        style=_STYLE.read_text(encoding="utf-8"),
        body="\n".join(parts),
    )


def _beside(results: Sequence[Outputs]) -> str:
    shown = "\n".join(map(_table, side_by_side(results)))
    return f'<div class="beside"><p class="over">gradrun</p><h1>Side by side</h1>\n{shown}</div>'


def _article(name: str, result: AnyResult, salt: str) -> str:
    about = ", ".join(filter(None, (wording.mode(result), wording.facts(result))))
    drawn = "\n".join(map(_figure, plots(result, salt)))
    told = [*map(_table, tables(result))]
    # What was asked for comes before what was measured.
    checked = isinstance(result, CheckResult) and bool(result.outcomes)
    first, then = (told, []) if checked else ([], told)
    tone = _tone(result.status) if isinstance(result, CheckResult) and checked else ""
    parts = [
        f'<p class="over">gradrun {_text(result.kind)} · {_text(name)}</p>',
        f"<h1>{_text(wording.model_name(result))}</h1>",
        f'<p class="facts">{_text(about)}</p>',
        f"<p{_class('verdict', tone)}>{_UNIT.sub('&nbsp;', _text(wording.verdict(result)))}</p>",
        *first,
        _list("Why", (f"<li>{_text(reason)}</li>" for reason in wording.reasons(result))),
        f'<div class="plots">\n{drawn}\n</div>' if drawn else "",
        *then,
        _list("Findings", (_finding(*found) for found in wording.findings(result))),
        _machine(result),
        _list("Warnings", (f"<li>{_text(warning)}</li>" for warning in wording.warnings(result))),
    ]
    return "<article>\n" + "\n".join(filter(None, parts)) + "\n</article>"


def _figure(plot: Plot) -> str:
    key = "".join(
        f'<li><i style="background: var(--series-{number})"></i><b>{_text(name)}</b> '
        f"{_text(said)}</li>"
        for number, name, said in plot.key
    )
    parts = (
        f"<h2>{_text(plot.title)}</h2>",
        plot.svg.replace("<svg", f'<svg role="img" aria-label="{_text(plot.title)}"', 1),
        f'<ul class="key">{key}</ul>' if key else "",
        f'<figcaption class="note">{_text(plot.note)}</figcaption>' if plot.note else "",
    )
    return f"<figure>{''.join(parts)}</figure>"


def _table(told: Table) -> str:
    figures = len(told.columns) - told.words
    heads = "".join(
        f"<th{_class('words' if i >= figures else '')}>{_text(head)}</th>"
        for i, head in enumerate(told.columns)
    )
    rows = "\n".join(
        f"<tr><th>{_text(name)}</th>"
        + "".join(_cell(cell, words=i >= figures) for i, cell in enumerate(cells))
        + "</tr>"
        for name, *cells in told.rows
    )
    note = f'<p class="note">{_text(told.note)}</p>' if told.note else ""
    prose = _class("prose" if told.words > 1 else "")
    head = f"<thead><tr><th>{_text(told.title)}</th>{heads}</tr></thead>"
    return (
        f'<section><div class="scrolls" tabindex="0"><table{prose}>\n{head}\n'
        f"<tbody>\n{rows}\n</tbody></table></div>{note}</section>"
    )


def _cell(cell: str, *, words: bool) -> str:
    return f"<td{_class('words' if words else '', _tone(cell))}>{_text(cell)}</td>"


def _tone(said: str) -> str:
    return _TONES.get(said, "bad" if _ERRORS.fullmatch(said) else "")


def _finding(severity: str, where: str, said: str) -> str:
    place = f'<span class="from">{_text(where)}</span>' if where else ""
    return f"<li><b{_class(_tone(severity))}>{_text(severity)}</b> {_text(said)}{place}</li>"


def _machine(result: AnyResult) -> str:
    rows = "\n".join(
        f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>"
        for name, value in wording.environment(result)
    )
    return f"<section><h2>Machine</h2><dl>\n{rows}\n</dl></section>"


def _list(title: str, items: Iterable[str]) -> str:
    told = "\n".join(items)
    return f'<section><h2>{title}</h2><ul class="list">\n{told}\n</ul></section>' if told else ""


def _class(*names: str) -> str:
    kept = " ".join(filter(None, names))
    return f' class="{kept}"' if kept else ""


def _text(said: str) -> str:
    return escape(escape_control_chars(said))
